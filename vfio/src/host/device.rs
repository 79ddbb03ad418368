//! A host device: the trait through which its function reaches it, and the kernel's VFIO device.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use gantry_devices::mapping::HostMapping;
use vfio_bindings::bindings::vfio as abi;
use vmm_sys_util::eventfd::EventFd;

use super::attachment::Attachment;
use super::info::{IrqInfo, MmapArea, RegionInfo, parse_region};
use super::ioctl::{self, BusFunction};
use crate::{Error, Result};

/// A region of a PCI device, by its VFIO index.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Region(u32);

impl Region {
    /// The configuration space.
    pub const CONFIG: Self = Self(abi::VFIO_PCI_CONFIG_REGION_INDEX);
    /// The expansion ROM.
    pub const ROM: Self = Self(abi::VFIO_PCI_ROM_REGION_INDEX);
    /// How many regions a PCI device has at most: six BARs, ROM, configuration space, VGA.
    pub const COUNT: usize = abi::VFIO_PCI_NUM_REGIONS as usize;

    /// The BAR `index`, 0 to 5.
    pub const fn bar(index: u8) -> Option<Self> {
        if index < 6 {
            Some(Self(index as u32))
        } else {
            None
        }
    }

    /// Its index in a list of all regions.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The register of the BAR that it is; more than 5 if it is no BAR.
    pub const fn bar_number(self) -> u8 {
        self.0 as u8
    }

    /// All of them, in the order of their indexes.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..abi::VFIO_PCI_NUM_REGIONS).map(Self)
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bar @ 0..6 => write!(f, "BAR{bar}"),
            abi::VFIO_PCI_ROM_REGION_INDEX => f.write_str("expansion ROM"),
            abi::VFIO_PCI_CONFIG_REGION_INDEX => f.write_str("configuration space"),
            _ => f.write_str("VGA"),
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A kind of interrupt of a PCI device, with its VFIO index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Irq {
    /// The line of the interrupt pin.
    Intx = abi::VFIO_PCI_INTX_IRQ_INDEX,
    /// Message-signalled interrupts.
    Msi = abi::VFIO_PCI_MSI_IRQ_INDEX,
    /// Message-signalled interrupts with a table.
    Msix = abi::VFIO_PCI_MSIX_IRQ_INDEX,
    /// The device reported an uncorrectable error.
    Error = abi::VFIO_PCI_ERR_IRQ_INDEX,
    /// The host asks for the device back.
    Request = abi::VFIO_PCI_REQ_IRQ_INDEX,
}

impl Irq {
    const ALL: [Self; 5] = [
        Self::Intx,
        Self::Msi,
        Self::Msix,
        Self::Error,
        Self::Request,
    ];
}

impl fmt::Display for Irq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Irq::Intx => "INTx",
            Irq::Msi => "MSI",
            Irq::Msix => "MSI-X",
            Irq::Error => "error",
            Irq::Request => "request",
        })
    }
}

/// A device, as its passed-through function uses it.
///
/// Several vCPUs call at once. Errors name the device, the place and the errno; only the function turns them
/// into all ones for the guest.
pub trait DeviceIo: Send + Sync {
    /// The device's address on the host, for messages.
    fn name(&self) -> &str;

    /// Information on a region; of size 0 if the device has no such region.
    fn region(&self, region: Region) -> &RegionInfo;

    /// Information on an interrupt index; no interrupts if the device has no such index.
    fn irq(&self, irq: Irq) -> IrqInfo;

    /// Fills `data` from `offset` of a region, in accesses as wide as alignment allows.
    ///
    /// # Errors
    /// The range is not inside the region, or the device cannot be reached.
    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<()>;

    /// Writes `data` at `offset` of a region, in accesses as wide as alignment allows.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<()>;

    /// Maps a part of a region that lies in one of its [`RegionInfo::areas`].
    ///
    /// # Errors
    /// The kernel refuses the part.
    fn map(&self, region: Region, part: MmapArea) -> Result<Arc<HostMapping>>;

    /// Connects the interrupts from `start` on to `triggers`; `None` disconnects one. The first call for an
    /// index enables it in the device.
    ///
    /// # Errors
    /// The host has no interrupt vectors left, or the kernel refuses.
    fn set_irqs(&self, irq: Irq, start: u32, triggers: &[Option<&EventFd>]) -> Result<()>;

    /// Unmasks the interrupt of an index, which each interrupt masks, whenever `resample` is written.
    ///
    /// # Errors
    /// The interrupt is not connected, or the kernel refuses.
    fn unmask_by(&self, irq: Irq, resample: &EventFd) -> Result<()>;

    /// Disconnects all interrupts of an index and disables it in the device.
    ///
    /// # Errors
    /// The kernel refuses.
    fn disable_irqs(&self, irq: Irq) -> Result<()>;

    /// Resets the device and no other.
    ///
    /// # Errors
    /// The device has no reset of its own, or the reset failed.
    fn reset(&self) -> Result<()>;

    /// The host addresses of the functions that are reset with the device's bus, its own among them; none if the
    /// device has a reset of its own, or its bus cannot be reset.
    fn on_bus(&self) -> &[String];

    /// Resets all functions of the device's bus. None may be in use.
    ///
    /// # Errors
    /// The bus cannot be reset, another user has functions on it, or the reset failed.
    fn reset_bus(&self) -> Result<()>;
}

/// A device of the kernel's VFIO, open.
#[derive(Debug)]
pub struct VfioDevice {
    name: String,
    // Declared before the attachment, so that the device is closed first.
    file: File,
    regions: Vec<(RegionInfo, u64)>,
    irqs: Vec<IrqInfo>,
    resettable: bool,
    bus: Vec<BusFunction>,
    on_bus: Vec<String>,
    attachment: Attachment,
}

/// The largest useful alignment of a mapped BAR: the largest page of the kernel.
const MAX_ALIGN: u64 = 1 << 30;

impl VfioDevice {
    /// Opens the device at the host address `name` (`0000:01:00.0`) through its `attachment`.
    ///
    /// Through a group, the kernel resets it on the way, where it has a function-level reset: about 100 ms, during
    /// which other threads can open devices of other groups. The device behind a cdev is open already.
    ///
    /// # Errors
    /// The attachment has no such device, the device is not bound to vfio-pci or is no PCI device, or the
    /// kernel refuses.
    pub fn open(attachment: Attachment, name: &str) -> Result<Self> {
        let failed = |place: String| {
            move |source| Error::Device {
                device: name.to_owned(),
                place,
                source,
            }
        };
        let fd = attachment.device(name)?;
        let info = ioctl::device_info(fd.as_fd()).map_err(failed("VFIO_DEVICE_GET_INFO".into()))?;
        if info.flags & abi::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(Error::Unusable {
                device: name.to_owned(),
                why: "it is not a PCI device".into(),
            });
        }
        let mut regions = Vec::with_capacity(Region::COUNT);
        for region in Region::all() {
            let bytes = or_absent(ioctl::region_info(fd.as_fd(), region.0))
                .map_err(failed(format!("VFIO_DEVICE_GET_REGION_INFO of {region}")))?;
            regions.push(parse_region(&bytes));
        }
        let mut irqs = Vec::with_capacity(Irq::ALL.len());
        for irq in Irq::ALL {
            let info = or_absent(ioctl::irq_info(fd.as_fd(), irq))
                .map_err(failed(format!("VFIO_DEVICE_GET_IRQ_INFO of {irq}")))?;
            irqs.push(info.into());
        }
        let resettable = info.flags & abi::VFIO_DEVICE_FLAGS_RESET != 0;
        let bus = match resettable {
            true => Vec::new(),
            false => no_bus_reset(ioctl::hot_reset_info(fd.as_fd()))
                .map_err(failed("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO".into()))?,
        };
        Ok(Self {
            name: name.to_owned(),
            file: fd.into(),
            regions,
            irqs,
            resettable,
            on_bus: bus.iter().map(BusFunction::to_string).collect(),
            bus,
            attachment,
        })
    }

    /// Makes it a device that nothing can reset, alone or with its bus. The kernel still resets it when it is
    /// closed, if it can.
    pub fn forbid_resets(&mut self) {
        self.resettable = false;
        self.bus.clear();
        self.on_bus.clear();
    }

    fn error(&self, place: String, source: io::Error) -> Error {
        Error::Device {
            device: self.name.clone(),
            place,
            source,
        }
    }

    /// The offset in the device's file of `len` bytes at `offset` of a region.
    fn locate(&self, region: Region, offset: u64, len: usize) -> io::Result<u64> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let (info, start) = self.regions.get(region.index()).ok_or_else(invalid)?;
        let end = offset.checked_add(len as u64).ok_or_else(invalid)?;
        if end > info.size {
            return Err(invalid());
        }
        start.checked_add(offset).ok_or_else(invalid)
    }
}

impl DeviceIo for VfioDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn region(&self, region: Region) -> &RegionInfo {
        static ABSENT: RegionInfo = RegionInfo {
            size: 0,
            areas: Vec::new(),
        };
        self.regions
            .get(region.index())
            .map_or(&ABSENT, |(info, _)| info)
    }

    fn irq(&self, irq: Irq) -> IrqInfo {
        self.irqs.get(irq as usize).copied().unwrap_or_default()
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<()> {
        let len = data.len();
        self.locate(region, offset, len)
            .and_then(|at| self.file.read_exact_at(data, at))
            .map_err(|source| {
                self.error(
                    format!("reading {len} bytes at {offset:#x} of {region}"),
                    source,
                )
            })
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<()> {
        let len = data.len();
        self.locate(region, offset, len)
            .and_then(|at| self.file.write_all_at(data, at))
            .map_err(|source| {
                self.error(
                    format!("writing {len} bytes at {offset:#x} of {region}"),
                    source,
                )
            })
    }

    fn map(&self, region: Region, part: MmapArea) -> Result<Arc<HostMapping>> {
        let len = usize::try_from(part.len).unwrap_or(usize::MAX);
        // The BAR's own, as far as that helps: its parts lie in it as those of the BAR do in the guest.
        let size = self.region(region).size.checked_next_power_of_two();
        let align = size.unwrap_or(MAX_ALIGN).clamp(4096, MAX_ALIGN);
        let skew = (part.offset % align) as usize;
        self.locate(region, part.offset, len)
            .and_then(|at| HostMapping::file(self.file.as_fd(), at, len, align as usize, skew))
            .map(Arc::new)
            .map_err(|source| {
                let MmapArea { offset, len } = part;
                self.error(
                    format!("mmap of {len:#x} bytes at {offset:#x} of {region}"),
                    source,
                )
            })
    }

    fn set_irqs(&self, irq: Irq, start: u32, triggers: &[Option<&EventFd>]) -> Result<()> {
        ioctl::set_irqs(self.file.as_fd(), irq, start, triggers).map_err(|source| {
            let end = start as usize + triggers.len();
            self.error(
                format!("VFIO_DEVICE_SET_IRQS of {irq} {start}..{end}"),
                source,
            )
        })
    }

    fn unmask_by(&self, irq: Irq, resample: &EventFd) -> Result<()> {
        ioctl::unmask_by(self.file.as_fd(), irq, resample).map_err(|source| {
            let place = format!("VFIO_DEVICE_SET_IRQS of {irq}, to unmask it");
            self.error(place, source)
        })
    }

    fn disable_irqs(&self, irq: Irq) -> Result<()> {
        ioctl::disable_irqs(self.file.as_fd(), irq).map_err(|source| {
            self.error(
                format!("VFIO_DEVICE_SET_IRQS of {irq}, disabling it"),
                source,
            )
        })
    }

    fn reset(&self) -> Result<()> {
        if !self.resettable {
            let source = io::Error::from(io::ErrorKind::Unsupported);
            return Err(self.error("VFIO_DEVICE_RESET".into(), source));
        }
        ioctl::device_reset(self.file.as_fd())
            .map_err(|source| self.error("VFIO_DEVICE_RESET".into(), source))
    }

    fn on_bus(&self) -> &[String] {
        &self.on_bus
    }

    fn reset_bus(&self) -> Result<()> {
        if self.bus.is_empty() {
            let source = io::Error::from(io::ErrorKind::Unsupported);
            return Err(self.error("VFIO_DEVICE_PCI_HOT_RESET".into(), source));
        }
        let device = (self.name.as_str(), self.file.as_fd());
        self.attachment.reset_bus(device, &self.bus)
    }
}

/// The kernel answers ENODEV if a bus cannot be reset, EPERM if a function on it is in no IOMMU group, and ENOTTY
/// if the device is a mediated one, which is on no bus.
fn no_bus_reset(asked: io::Result<Vec<BusFunction>>) -> io::Result<Vec<BusFunction>> {
    match asked {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENODEV | libc::EPERM | libc::ENOTTY)
            ) =>
        {
            Ok(Vec::new())
        }
        asked => asked,
    }
}

/// The kernel answers EINVAL if a device has no such region or interrupt.
fn or_absent<T: Default>(asked: io::Result<T>) -> io::Result<T> {
    match asked {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(T::default()),
        asked => asked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_called_by_their_names() {
        assert_eq!(Region::bar(5).unwrap().to_string(), "BAR5");
        assert_eq!(Region::bar(6), None);
        assert_eq!(Region::CONFIG.to_string(), "configuration space");
        assert_eq!(Region::all().nth(6).unwrap().to_string(), "expansion ROM");
    }

    #[test]
    fn functions_on_a_bus_have_the_addresses_of_the_host() {
        let function = BusFunction {
            owner: 3,
            segment: 1,
            bus: 0xb,
            devfn: 0x09,
        };
        assert_eq!(function.to_string(), "0001:0b:01.1");
        for (errno, known) in [
            (libc::ENODEV, true),
            (libc::EPERM, true),
            (libc::ENOTTY, true),
            (libc::EIO, false),
        ] {
            let asked = no_bus_reset(Err(io::Error::from_raw_os_error(errno)));
            assert_eq!(asked.is_ok(), known, "{errno}");
        }
    }

    #[test]
    fn what_the_kernel_does_not_know_is_absent_and_other_refusals_are_errors() {
        let absent = or_absent::<u32>(Err(io::Error::from_raw_os_error(libc::EINVAL)));
        assert_eq!(absent.unwrap(), 0);
        or_absent::<u32>(Err(io::Error::from_raw_os_error(libc::EIO))).unwrap_err();
    }
}
