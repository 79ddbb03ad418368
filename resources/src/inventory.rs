//! The PCI functions of the host, read from sysfs at the moment of asking.

mod attributes;
mod nvme;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};
use serde::Serialize;
use thiserror::Error;

use crate::former::Former;
use crate::host::{HostBdf, HostPaths};
use crate::ids::{PciClass, PciId};
use crate::lease::{LeaseError, LeaseKind, LeaseStatus, holder};
use crate::quarantine::{self, Until};
use crate::vgpu::{NVIDIA, VendorVgpu};
use crate::{dsn, sysfs};
use attributes::{Attributes, Identity};
pub use nvme::{Namespace, Nvme};

/// Virtual functions of a physical function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sriov {
    /// How many the hardware can have.
    pub total: u16,
    /// How many exist now.
    pub active: u16,
}

/// Whether the VFIO node of a device can be opened by this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeAccess {
    /// It is there and may be opened for reading and writing.
    Ready,
    /// It does not exist.
    Missing,
    /// It exists; this process lacks the permission.
    Denied,
}

/// One PCI function of the host as it was at the moment of reading.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostDevice {
    /// Address.
    pub bdf: HostBdf,
    /// Vendor and device id.
    pub id: PciId,
    /// Subsystem vendor and device id; none where sysfs shows zeroes.
    pub subsystem: Option<PciId>,
    /// Class code.
    pub class: PciClass,
    /// Revision id; none in a look that is only to choose a device.
    pub revision: Option<u8>,
    /// Name of the bound driver.
    pub driver: Option<String>,
    /// The driver of the host's that it was taken from, until one has it again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub former_driver: Option<String>,
    /// The only driver that may bind, where one is set.
    pub driver_override: Option<String>,
    /// IOMMU group; none if the host's IOMMU is off.
    pub iommu_group: Option<u32>,
    /// NUMA node, where the host has several.
    pub numa_node: Option<u32>,
    /// Virtual functions, if the device is a physical function.
    pub sriov: Option<Sriov>,
    /// The physical function, if the device is a virtual one.
    pub physfn: Option<HostBdf>,
    /// Serial number of an NVMe controller, remembered while the device is detached.
    pub serial: Option<String>,
    /// What an NVMe controller says of itself and its disks, remembered like its serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme: Option<Nvme>,
    /// PCIe device serial number (PCIe 7.9.3), eight pairs of hex digits: `00-1b-21-ff-ff-aa-bb-cc`.
    /// Only root can read it.
    pub dsn: Option<String>,
    /// The firmware's console display.
    pub boot_vga: bool,
    /// Types of mediated devices that it can make (`mdev_supported_types`).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mdev_types: Vec<String>,
    /// The vendor's virtual GPU that it is or could be, if it is a virtual function that can be one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vgpu: Option<VendorVgpu>,
    /// The VFIO node, for a device in an IOMMU group that is bound to vfio-pci.
    pub node: Option<NodeAccess>,
    /// Who has leased the device.
    pub lease: LeaseStatus,
    /// Why it is in quarantine, if it is.
    pub quarantine: Option<String>,
}

/// What a device is to the host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum DeviceState {
    /// A driver of the host has it.
    Attached,
    /// It is with vfio-pci and free.
    Detached,
    /// A VM has leased it.
    Assigned {
        /// Name of the VM; none if the record is not to be had.
        vm: Option<String>,
    },
    /// No driver has it.
    Unbound,
    /// No VM gets it for now.
    Quarantined {
        /// Why.
        reason: String,
    },
}

/// The inventory could not be read.
#[derive(Debug, Error)]
pub enum InventoryError {
    /// A path of sysfs that must be there cannot be read.
    #[error("cannot read {path}: is sysfs mounted there?")]
    Sysfs {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A device does not exist.
    #[error("there is no PCI device {bdf} on this host: `gantry device list` shows what there is")]
    NoSuchDevice {
        /// Its address.
        bdf: HostBdf,
    },
    /// It cannot be told who holds a device.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

/// How much of a device is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detail {
    /// All of it. Reading a serial number touches the hardware: it wakes a sleeping device and waits
    /// for one that is being reset. Reading an override waits for whoever moves the device.
    Full,
    /// What a choice of devices looks at: all but serial numbers, overrides and revisions.
    ForChoice,
}

/// Every PCI function of the host, in the order of their addresses.
///
/// A device that vanishes during the scan is left out.
pub fn scan(paths: &HostPaths) -> Result<Vec<HostDevice>, InventoryError> {
    scan_with(paths, Detail::Full)
}

pub(crate) fn scan_with(
    paths: &HostPaths,
    detail: Detail,
) -> Result<Vec<HostDevice>, InventoryError> {
    let source = Source::open(paths, detail)?;
    let listing = std::fs::read_dir(&source.dir).map_err(source.unreadable())?;
    let mut addresses = Vec::new();
    for entry in listing {
        let name = entry.map_err(source.unreadable())?.file_name();
        if let Some(bdf) = name.to_str().and_then(|name| name.parse::<HostBdf>().ok()) {
            addresses.push(bdf);
        }
    }
    addresses.retain(|bdf| paths.shows(*bdf));
    addresses.sort();
    let mut devices = Vec::with_capacity(addresses.len());
    for bdf in addresses {
        let device = source.read(bdf, &devices)?;
        devices.extend(device);
    }
    Ok(devices)
}

impl HostDevice {
    /// Reads one device.
    pub fn read(paths: &HostPaths, bdf: HostBdf) -> Result<Self, InventoryError> {
        let source = Source::open(paths, Detail::Full)?;
        source
            .read(bdf, &[])?
            .ok_or(InventoryError::NoSuchDevice { bdf })
    }

    /// Who has the device: a VM, a driver of the host, vfio-pci, nobody.
    ///
    /// While a command moves it between drivers, the driver it has at that moment decides.
    pub fn state(&self) -> DeviceState {
        match &self.lease {
            LeaseStatus::Held(record) if record.kind == LeaseKind::Vm => DeviceState::Assigned {
                vm: Some(record.name.clone()),
            },
            LeaseStatus::Unrecorded => DeviceState::Assigned { vm: None },
            _ if self.quarantine.is_some() => DeviceState::Quarantined {
                reason: self.quarantine.clone().unwrap_or_default(),
            },
            _ if self.on_vfio() => DeviceState::Detached,
            _ if self.driver.is_some() => DeviceState::Attached,
            _ => DeviceState::Unbound,
        }
    }

    /// Vendor's name in pci.ids.
    pub fn vendor_name(&self) -> Option<&'static str> {
        self.id.vendor_name()
    }

    /// Device's name in pci.ids.
    pub fn device_name(&self) -> Option<&'static str> {
        self.id.device_name()
    }

    /// Name of class and subclass in pci.ids.
    pub fn class_name(&self) -> Option<&'static str> {
        self.class.name()
    }

    /// Bound to vfio-pci or one of its variants (`mlx5_vfio_pci` and the like).
    pub fn on_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio_driver)
    }

    /// An NVMe controller.
    pub fn is_nvme(&self) -> bool {
        (self.class.base(), self.class.sub()) == (0x01, 0x08)
    }

    /// A bridge that belongs to the host: never in a group, never detached, never assigned.
    pub fn is_bridge(&self) -> bool {
        self.class.is_bridge()
    }

    /// Whether VFIO lets other devices of this one's IOMMU group be assigned: the kernel asks that no
    /// driver of the host does DMA from the group (Documentation/driver-api/vfio.rst, "Groups").
    pub(crate) fn leaves_group_viable(&self) -> bool {
        match self.driver.as_deref() {
            None | Some("pci-stub") => true,
            Some(driver) => self.class.is_bus_bridge() || is_vfio_driver(driver),
        }
    }
}

/// Whether a driver of this name is vfio-pci or a variant driver built on it.
pub(crate) fn is_vfio_driver(name: &str) -> bool {
    let name = name.replace('_', "-");
    name == "vfio-pci" || name.ends_with("-vfio-pci")
}

/// The base class of displays; the kernel says of no other device whether the firmware started it.
const DISPLAY: u8 = 0x03;

/// Where devices are read from.
struct Source<'a> {
    paths: &'a HostPaths,
    detail: Detail,
    /// The directory of all devices.
    dir: PathBuf,
    devices: File,
    leases: Listed,
    quarantine: Vec<Listed>,
    former: Listed,
    /// Whether any device can make mediated ones.
    mdev: bool,
}

/// Names of the files of a directory, so that a device without one is not looked for; none where they
/// cannot be listed: then each is.
struct Listed(Option<BTreeSet<String>>);

impl Listed {
    fn of(dir: &Path) -> Self {
        let names = sysfs::entries(dir).ok();
        Self(names.map(|names| names.into_iter().collect()))
    }

    fn may_have(&self, name: impl FnOnce() -> String) -> bool {
        match &self.0 {
            Some(names) => !names.is_empty() && names.contains(&name()),
            None => true,
        }
    }
}

impl<'a> Source<'a> {
    fn open(paths: &'a HostPaths, detail: Detail) -> Result<Self, InventoryError> {
        let dir = paths.sysfs.join("bus/pci/devices");
        let devices = File::open(&dir).map_err(|source| InventoryError::Sysfs {
            path: dir.clone(),
            source,
        })?;
        Ok(Self {
            paths,
            detail,
            dir,
            devices,
            leases: Listed::of(&paths.run.join("leases")),
            quarantine: quarantine::homes(paths)
                .iter()
                .map(|home| Listed::of(home.dir()))
                .collect(),
            former: Listed::of(&paths.run.join("former")),
            mdev: paths.sysfs.join("class/mdev_bus").exists(),
        })
    }

    fn unreadable(&self) -> impl FnOnce(io::Error) -> InventoryError + use<> {
        let path = self.dir.clone();
        |source| InventoryError::Sysfs { path, source }
    }

    /// Reads a device; none if it is not there, or no longer. `before` are those of lower addresses, as
    /// far as they have been read.
    fn read(
        &self,
        bdf: HostBdf,
        before: &[HostDevice],
    ) -> Result<Option<HostDevice>, InventoryError> {
        let paths = self.paths;
        let unreadable = |source| InventoryError::Sysfs {
            path: paths.pci_device(bdf),
            source,
        };
        let attributes = Attributes::open(&self.devices, bdf).map_err(unreadable)?;
        let Some(attributes) = attributes.filter(|_| paths.shows(bdf)) else {
            return Ok(None);
        };
        let Some(mut device) = facts(&attributes, bdf, before, self.mdev).map_err(unreadable)?
        else {
            return Ok(None);
        };
        let leased = self.leases.may_have(|| format!("{bdf}.lock"));
        if leased {
            device.lease = holder(paths, bdf)?;
        }
        let mut hung = false;
        let aside = |one: &Listed| one.may_have(|| format!("{bdf}.json"));
        if leased || self.quarantine.iter().any(aside) {
            let found = quarantine::find(paths, bdf, &device.id.to_string());
            hung = found
                .as_ref()
                .is_some_and(|found| found.until == Until::Boot);
            device.quarantine = found.map(|found| found.reason);
        }
        if device.physfn.is_some() && device.id.vendor == NVIDIA {
            device.vgpu = VendorVgpu::read(&paths.pci_device(bdf));
        }
        device.node = device
            .iommu_group
            .filter(|_| device.on_vfio())
            .map(|group| node_access(paths, group));
        if self.detail == Detail::Full {
            if !hung && !moves_elsewhere(&device) {
                let name = attributes.text("driver_override").map_err(unreadable)?;
                device.driver_override = name.filter(|name| !name.is_empty() && name != "(null)");
            }
            device.revision = match sibling(before, device.physfn) {
                Some(like) => like.revision,
                None => attributes.hex_byte("revision").map_err(unreadable)?,
            };
            self.read_serials(&mut device);
        }
        if self.former.may_have(|| bdf.to_string()) {
            device.former_driver = Former::driver_of(paths, &device);
        }
        Ok(Some(device))
    }

    fn read_serials(&self, device: &mut HostDevice) {
        let dir = self.paths.pci_device(device.bdf);
        // A virtual function has its physical one's number, or none.
        if device.physfn.is_none() {
            device.dsn = dsn::read(&dir.join("config"));
        }
        if device.is_nvme() {
            (device.serial, device.nvme) = nvme::read(&dir);
        }
        if device.serial.is_none() && self.former.may_have(|| device.bdf.to_string()) {
            let former = Former::load(self.paths, device);
            let known = former.map(|former| (former.serial, former.nvme));
            (device.serial, device.nvme) = known.unwrap_or_default();
        }
    }
}

/// Whether somebody else is moving a device between drivers. That holds the device's lock in the kernel,
/// for which whoever asks for the override waits, if need be for ever.
fn moves_elsewhere(device: &HostDevice) -> bool {
    match device.lease.record() {
        // A VM's helper moves devices for it.
        Some(record) if [std::process::id(), parent_id()].contains(&record.pid) => false,
        Some(record) => record.kind == LeaseKind::Task || !device.on_vfio(),
        None => false,
    }
}

fn node_access(paths: &HostPaths, group: u32) -> NodeAccess {
    let node = paths.vfio_group(group);
    match access(&node, AccessFlags::R_OK | AccessFlags::W_OK) {
        Ok(()) => NodeAccess::Ready,
        Err(Errno::ENOENT | Errno::ENOTDIR) => NodeAccess::Missing,
        Err(_) => NodeAccess::Denied,
    }
}

/// What sysfs says of a device at no cost, without serial numbers, VFIO node and lease; none if it is gone.
fn facts(
    attributes: &Attributes,
    bdf: HostBdf,
    before: &[HostDevice],
    mdev: bool,
) -> io::Result<Option<HostDevice>> {
    let physfn = attributes
        .link("physfn")?
        .and_then(|name| name.parse().ok());
    let mut device = HostDevice {
        bdf,
        id: PciId {
            vendor: 0,
            device: 0,
        },
        subsystem: None,
        class: PciClass::new(0),
        revision: None,
        driver: attributes.link("driver")?,
        former_driver: None,
        driver_override: None,
        iommu_group: attributes
            .link("iommu_group")?
            .and_then(|name| name.parse().ok()),
        // A virtual function is where its physical one is.
        numa_node: match physfn.and_then(|pf| found(before, pf)) {
            Some(card) => card.numa_node,
            None => attributes.decimal("numa_node")?,
        },
        sriov: match physfn {
            Some(_) => None,
            None => sriov(attributes)?,
        },
        physfn,
        serial: None,
        nvme: None,
        dsn: None,
        boot_vga: false,
        mdev_types: Vec::new(),
        vgpu: None,
        node: None,
        lease: LeaseStatus::Free,
        quarantine: None,
    };
    // Last, as a device always has it: attributes of one that vanished on the way would have been taken
    // for "none".
    let told = match sibling(before, physfn) {
        // It is still there.
        Some(like) => attributes.link("physfn")?.map(|_| like.into()),
        None => attributes.identity()?,
    };
    let Some(Identity {
        id,
        subsystem,
        class,
    }) = told
    else {
        return Ok(None);
    };
    (device.id, device.subsystem, device.class) = (id, subsystem, class);
    if class.base() == DISPLAY {
        device.boot_vga = attributes.text("boot_vga")?.as_deref() == Some("1");
    }
    if mdev {
        device.mdev_types = attributes.entries("mdev_supported_types")?;
    }
    Ok(Some(device))
}

/// The virtual function before, of the same physical one. The kernel asks the first what it is, and takes
/// the others for the same (pci_setup_device).
fn sibling(before: &[HostDevice], physfn: Option<HostBdf>) -> Option<&HostDevice> {
    let last = before.last().filter(|_| physfn.is_some());
    last.filter(|one| one.physfn == physfn)
}

fn found(sorted: &[HostDevice], bdf: HostBdf) -> Option<&HostDevice> {
    let index = sorted.binary_search_by_key(&bdf, |device| device.bdf);
    sorted.get(index.ok()?)
}

fn sriov(attributes: &Attributes) -> io::Result<Option<Sriov>> {
    let Some(total) = attributes.decimal("sriov_totalvfs")? else {
        return Ok(None);
    };
    let active = attributes.decimal("sriov_numvfs")?.unwrap_or(0);
    Ok(Some(Sriov { total, active }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost, bdf};
    use std::fs;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_device_is_read_with_everything_sysfs_says() {
        let host = FakeHost::new(&[
            Fake::nvme("0000:01:00.0", 12)
                .driver("nvme")
                .with("numa_node", "1")
                .with("nvme/nvme0/serial", "gantry-0001     "),
            Fake::nvme("0000:02:00.0", 13)
                .class(0x03_00_00)
                .with("sriov_totalvfs", "7")
                .with("sriov_numvfs", "2")
                .with("boot_vga", "1"),
        ]);
        let nvme = host.read("0000:01:00.0");
        assert_eq!(nvme.id.to_string(), "1b36:0010");
        assert_eq!(nvme.subsystem.unwrap().to_string(), "1af4:1100");
        assert_eq!(nvme.class.to_string(), "010802");
        assert_eq!(
            (nvme.revision, nvme.numa_node, nvme.iommu_group),
            (Some(2), Some(1), Some(12))
        );
        assert_eq!(nvme.serial.as_deref(), Some("gantry-0001"));
        assert_eq!(
            (nvme.driver.as_deref(), nvme.driver_override.as_deref()),
            (Some("nvme"), None)
        );
        assert_eq!((nvme.state(), nvme.node), (DeviceState::Attached, None));
        let nic = host.read("0000:02:00.0");
        assert_eq!(
            nic.sriov,
            Some(Sriov {
                total: 7,
                active: 2
            })
        );
        assert_eq!((nic.numa_node, nic.boot_vga), (None, true));
        assert_eq!(
            (nic.state(), nic.node),
            (DeviceState::Detached, Some(NodeAccess::Ready))
        );
    }

    #[test]
    fn a_virtual_function_knows_its_physical_one() {
        let host = FakeHost::new(&[Fake::nvme("0000:01:00.0", 1), Fake::nvme("0000:01:10.0", 2)]);
        std::os::unix::fs::symlink(
            "../0000:01:00.0",
            host.dir(bdf("0000:01:10.0")).join("physfn"),
        )
        .unwrap();
        assert_eq!(host.read("0000:01:10.0").physfn, Some(bdf("0000:01:00.0")));
    }

    #[test]
    fn a_host_without_iommu_and_a_device_without_driver_are_read() {
        let host = FakeHost::new(&[Fake::nvme("0000:01:00.0", 1).no_group().unbound()]);
        let device = host.read("0000:01:00.0");
        assert_eq!(
            (device.iommu_group, device.state()),
            (None, DeviceState::Unbound)
        );
        fs::create_dir_all(host.paths.dev.join("vfio")).unwrap();
        host.bind(device.bdf, Some("vfio-pci"));
        assert_eq!(host.read("0000:01:00.0").node, None);
    }

    #[test]
    fn the_vfio_node_may_be_missing() {
        let host = FakeHost::new(&[Fake::nvme("0000:01:00.0", 12)]);
        fs::remove_file(host.paths.vfio_group(12)).unwrap();
        assert_eq!(host.read("0000:01:00.0").node, Some(NodeAccess::Missing));
    }

    #[test]
    fn devices_come_in_the_order_of_their_addresses() {
        let addresses = [
            "10000:00:00.0",
            "0000:02:00.1",
            "0000:02:00.0",
            "0000:01:00.0",
            "0001:00:00.0",
        ];
        let devices: Vec<Fake> = addresses
            .iter()
            .map(|address| Fake::nvme(address, 1))
            .collect();
        let host = FakeHost::new(&devices);
        let found: Vec<String> = host
            .scan()
            .iter()
            .map(|device| device.bdf.to_string())
            .collect();
        assert_eq!(
            found,
            [
                "0000:01:00.0",
                "0000:02:00.0",
                "0000:02:00.1",
                "0001:00:00.0",
                "10000:00:00.0"
            ]
        );
    }

    #[test]
    fn a_device_that_comes_and_goes_never_fails_a_scan() {
        let host = FakeHost::new(&[Fake::nvme("0000:01:00.0", 1)]);
        let flicker = Fake::nvme("0000:02:00.0", 2).with("nvme/nvme0/serial", "x");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..200 {
                    host.add(&flicker);
                    host.remove(flicker.bdf);
                }
                done.store(true, Ordering::Relaxed);
            });
            while !done.load(Ordering::Relaxed) {
                let seen = scan(&host.paths).unwrap();
                assert!(seen.iter().any(|device| device.bdf == bdf("0000:01:00.0")));
            }
        });
        let error = HostDevice::read(&host.paths, flicker.bdf).unwrap_err();
        assert!(
            error.to_string().contains("no PCI device 0000:02:00.0"),
            "{error}"
        );
    }

    #[test]
    fn a_host_without_sysfs_is_said_to_have_none() {
        let paths = HostPaths::under(Path::new("/nonexistent"));
        let error = scan(&paths).unwrap_err().to_string();
        assert!(
            error.contains("/nonexistent/sys/bus/pci/devices"),
            "{error}"
        );
    }

    #[test]
    fn variant_drivers_of_vfio_are_known() {
        for (name, vfio) in [
            ("vfio-pci", true),
            ("mlx5_vfio_pci", true),
            ("nvgrace-gpu-vfio-pci", true),
            ("pci-stub", false),
            ("nvme", false),
            ("notvfio-pci", false),
        ] {
            assert_eq!(is_vfio_driver(name), vfio, "{name}");
        }
    }

    #[test]
    fn json_shows_ids_as_people_write_them() {
        let host = FakeHost::new(&[Fake::nvme("0000:01:00.0", 12)]);
        let json = serde_json::to_value(host.read("0000:01:00.0")).unwrap();
        assert_eq!(
            (&json["bdf"], &json["id"]),
            (&"0000:01:00.0".into(), &"1b36:0010".into())
        );
        assert_eq!(
            (&json["class"], &json["lease"]),
            (&"010802".into(), &"free".into())
        );
    }
}
