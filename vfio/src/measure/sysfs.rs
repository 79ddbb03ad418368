//! A device of a guest whose kernel has no VFIO without an IOMMU: its BARs are mapped through sysfs. It has no
//! interrupts.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gantry_devices::mapping::HostMapping;
use vmm_sys_util::eventfd::EventFd;

use crate::host::{DeviceIo, Irq, IrqInfo, MmapArea, Region, RegionInfo};
use crate::{Error, Result};

/// A PCI device without a driver.
#[derive(Debug)]
pub struct SysfsDevice {
    name: String,
    folder: PathBuf,
    config: File,
    /// The BARs, then what is absent.
    regions: Vec<RegionInfo>,
}

impl SysfsDevice {
    /// Opens the device at the address `name` in the directory `sys`.
    ///
    /// # Errors
    /// There is no such device, or it is not permitted.
    pub fn open(sys: &Path, name: &str) -> Result<Self> {
        let folder = sys.join("bus/pci/devices").join(name);
        let path = folder.join("resource");
        let resources = fs::read_to_string(&path).map_err(|source| Error::Open { path, source })?;
        Ok(Self {
            name: name.to_owned(),
            config: open(folder.join("config"))?,
            regions: resources.lines().take(6).map(region).collect(),
            folder,
        })
    }

    fn failed(&self, place: impl Into<String>, source: impl Into<io::Error>) -> Error {
        Error::Device {
            device: self.name.clone(),
            place: place.into(),
            source: source.into(),
        }
    }

    fn config_only(&self, region: Region) -> Result<()> {
        match region == Region::CONFIG {
            true => Ok(()),
            false => Err(self.failed(format!("access to {region}"), io::ErrorKind::Unsupported)),
        }
    }

    fn no_interrupts(&self, irq: Irq) -> Error {
        self.failed(format!("connecting {irq}"), io::ErrorKind::Unsupported)
    }
}

/// A line of `resource`: first address, last address, flags.
fn region(line: &str) -> RegionInfo {
    const MEMORY: u64 = 0x200;
    let mut numbers = line.split_whitespace().map(|word| {
        let digits = word.trim_start_matches("0x");
        u64::from_str_radix(digits, 16).unwrap_or_default()
    });
    let mut next = || numbers.next().unwrap_or_default();
    let (start, end, flags) = (next(), next(), next());
    let size = match flags & MEMORY {
        0 => 0,
        _ => end.wrapping_sub(start).wrapping_add(1),
    };
    let whole = MmapArea {
        offset: 0,
        len: size,
    };
    // Less than a page is not mapped.
    let areas = if size >= 4096 {
        vec![whole]
    } else {
        Vec::new()
    };
    RegionInfo { size, areas }
}

fn open(path: PathBuf) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(&path);
    opened.map_err(|source| Error::Open { path, source })
}

impl DeviceIo for SysfsDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn region(&self, region: Region) -> &RegionInfo {
        static ABSENT: RegionInfo = RegionInfo {
            size: 0,
            areas: Vec::new(),
        };
        self.regions.get(region.index()).unwrap_or(&ABSENT)
    }

    fn irq(&self, _: Irq) -> IrqInfo {
        IrqInfo::default()
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<()> {
        self.config_only(region)?;
        self.config
            .read_exact_at(data, offset)
            .map_err(|source| self.failed(format!("reading at {offset:#x} of {region}"), source))
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<()> {
        self.config_only(region)?;
        self.config
            .write_all_at(data, offset)
            .map_err(|source| self.failed(format!("writing at {offset:#x} of {region}"), source))
    }

    fn map(&self, region: Region, part: MmapArea) -> Result<Arc<HostMapping>> {
        let file = open(self.folder.join(format!("resource{}", region.index())))?;
        let len = usize::try_from(part.len).unwrap_or(usize::MAX);
        HostMapping::file(file.as_fd(), part.offset, len, 4096, 0)
            .map(Arc::new)
            .map_err(|source| self.failed(format!("mmap of {region}"), source))
    }

    fn set_irqs(&self, irq: Irq, _: u32, _: &[Option<&EventFd>]) -> Result<()> {
        Err(self.no_interrupts(irq))
    }

    fn unmask_by(&self, irq: Irq, _: &EventFd) -> Result<()> {
        Err(self.no_interrupts(irq))
    }

    fn disable_irqs(&self, irq: Irq) -> Result<()> {
        Err(self.no_interrupts(irq))
    }

    fn reset(&self) -> Result<()> {
        let path = self.folder.join("reset");
        fs::write(path, "1").map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => self.failed("its reset", io::ErrorKind::Unsupported),
            _ => self.failed("its reset", source),
        })
    }

    fn on_bus(&self) -> &[String] {
        &[]
    }

    fn reset_bus(&self) -> Result<()> {
        Err(self.failed("a reset of its bus", io::ErrorKind::Unsupported))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_memory_and_mapped_whole() {
        let bar = region("0x00000000fe800000 0x00000000fe803fff 0x0000000000140204");
        assert_eq!((bar.size, bar.areas.len()), (0x4000, 1));
        let ports = region("0x000000000000c000 0x000000000000c01f 0x0000000000040101");
        assert_eq!((ports.size, ports.areas.len()), (0, 0));
        let small = region("0x00000000fe800000 0x00000000fe8000ff 0x0000000000040200");
        assert_eq!((small.size, small.areas.len()), (0x100, 0));
        let absent = region("0x0000000000000000 0x0000000000000000 0x0000000000000000");
        assert_eq!(absent, RegionInfo::default());
    }
}
