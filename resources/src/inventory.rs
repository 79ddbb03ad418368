//! The PCI functions of the host, read from sysfs at the moment of asking.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, eaccess};
use serde::Serialize;
use thiserror::Error;

use crate::former::Former;
use crate::host::{HostBdf, HostPaths};
use crate::ids::{PciClass, PciId};
use crate::lease::{LeaseError, LeaseKind, LeaseStatus, holder};
use crate::{dsn, sysfs};

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
    /// Revision id.
    pub revision: u8,
    /// Name of the bound driver.
    pub driver: Option<String>,
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
    /// PCIe device serial number (PCIe 7.9.3), eight pairs of hex digits: `00-1b-21-ff-ff-aa-bb-cc`.
    /// Only root can read it.
    pub dsn: Option<String>,
    /// The firmware's console display.
    pub boot_vga: bool,
    /// The VFIO node, for a device in an IOMMU group that is bound to vfio-pci.
    pub node: Option<NodeAccess>,
    /// Who has leased the device.
    pub lease: LeaseStatus,
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
    /// for one that is being reset.
    Full,
    /// Everything but the serial numbers: what the kernel has in memory.
    WithoutSerials,
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
    let dir = paths.sysfs.join("bus/pci/devices");
    let unreadable = |source| InventoryError::Sysfs {
        path: dir.clone(),
        source,
    };
    let mut addresses = Vec::new();
    for entry in std::fs::read_dir(&dir).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        if let Some(bdf) = name.to_str().and_then(|name| name.parse::<HostBdf>().ok()) {
            addresses.push(bdf);
        }
    }
    addresses.sort();
    let devices = addresses
        .into_iter()
        .filter_map(|bdf| read(paths, bdf, detail).transpose());
    devices.collect()
}

impl HostDevice {
    /// Reads one device.
    pub fn read(paths: &HostPaths, bdf: HostBdf) -> Result<Self, InventoryError> {
        read(paths, bdf, Detail::Full)?.ok_or(InventoryError::NoSuchDevice { bdf })
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

/// Reads a device; none if it is not there, or no longer.
fn read(
    paths: &HostPaths,
    bdf: HostBdf,
    detail: Detail,
) -> Result<Option<HostDevice>, InventoryError> {
    let dir = paths.pci_device(bdf);
    let facts = Facts { dir: &dir };
    match facts.read(bdf).map_err(|source| InventoryError::Sysfs {
        path: dir.clone(),
        source,
    })? {
        None => Ok(None),
        Some(mut device) => {
            device.lease = holder(paths, bdf)?;
            device.node = device
                .iommu_group
                .filter(|_| device.on_vfio())
                .map(|group| node_access(paths, group));
            if detail == Detail::Full {
                device.dsn = dsn::read(&dir.join("config"));
                device.serial = facts
                    .nvme_serial()
                    .or_else(|| Former::load(paths, &device).and_then(|former| former.serial));
            }
            Ok(Some(device))
        }
    }
}

fn node_access(paths: &HostPaths, group: u32) -> NodeAccess {
    let node = paths.vfio_group(group);
    match eaccess(&node, AccessFlags::R_OK | AccessFlags::W_OK) {
        Ok(()) => NodeAccess::Ready,
        Err(Errno::ENOENT | Errno::ENOTDIR) => NodeAccess::Missing,
        Err(_) => NodeAccess::Denied,
    }
}

/// The attributes of one device's directory.
struct Facts<'a> {
    dir: &'a Path,
}

impl Facts<'_> {
    fn hex(&self, name: &str) -> io::Result<Option<u32>> {
        sysfs::hex(&self.dir.join(name))
    }

    fn link(&self, name: &str) -> io::Result<Option<String>> {
        sysfs::link_name(&self.dir.join(name))
    }

    /// What sysfs says, without serial numbers, VFIO node and lease.
    fn read(&self, bdf: HostBdf) -> io::Result<Option<HostDevice>> {
        let (Some(vendor), Some(device), Some(class)) =
            (self.hex("vendor")?, self.hex("device")?, self.hex("class")?)
        else {
            return Ok(None);
        };
        let found = HostDevice {
            bdf,
            id: PciId {
                vendor: vendor as u16,
                device: device as u16,
            },
            subsystem: self.subsystem()?,
            class: PciClass::new(class),
            revision: self.hex("revision")?.unwrap_or(0) as u8,
            driver: self.link("driver")?,
            driver_override: self.driver_override()?,
            iommu_group: self.link("iommu_group")?.and_then(|name| name.parse().ok()),
            numa_node: sysfs::decimal(&self.dir.join("numa_node"))?,
            sriov: self.sriov()?,
            physfn: self.link("physfn")?.and_then(|name| name.parse().ok()),
            serial: None,
            dsn: None,
            boot_vga: sysfs::text(&self.dir.join("boot_vga"))?.as_deref() == Some("1"),
            node: None,
            lease: LeaseStatus::Free,
        };
        // Attributes that vanished on the way would have been taken for "none".
        Ok(self.dir.join("vendor").exists().then_some(found))
    }

    fn subsystem(&self) -> io::Result<Option<PciId>> {
        let ids = self
            .hex("subsystem_vendor")?
            .zip(self.hex("subsystem_device")?);
        let id = ids.map(|(vendor, device)| PciId {
            vendor: vendor as u16,
            device: device as u16,
        });
        Ok(id.filter(|id| id.vendor != 0 || id.device != 0))
    }

    fn driver_override(&self) -> io::Result<Option<String>> {
        let name = sysfs::text(&self.dir.join("driver_override"))?;
        Ok(name.filter(|name| !name.is_empty() && name != "(null)"))
    }

    fn sriov(&self) -> io::Result<Option<Sriov>> {
        let Some(total) = sysfs::decimal(&self.dir.join("sriov_totalvfs"))? else {
            return Ok(None);
        };
        let active = sysfs::decimal(&self.dir.join("sriov_numvfs"))?.unwrap_or(0);
        Ok(Some(Sriov { total, active }))
    }

    /// What the host's nvme driver knows; a device that is not NVMe has no such directory.
    fn nvme_serial(&self) -> Option<String> {
        let dir = self.dir.join("nvme");
        let controllers = sysfs::entries(&dir).ok()?;
        let serial = controllers
            .iter()
            .find_map(|name| sysfs::text(&dir.join(name).join("serial")).ok()?);
        serial.filter(|serial| !serial.is_empty())
    }
}
