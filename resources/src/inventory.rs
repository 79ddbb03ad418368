//! The PCI functions of the host, read from sysfs at the moment of asking.

use std::fmt;
use std::io;
use std::path::PathBuf;

use serde::Serialize;
use thiserror::Error;

use crate::host::{HostBdf, HostPaths};
use crate::lease::LeaseStatus;

/// A vendor and a device id, shown `1b36:0010`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(into = "String")]
pub struct PciId {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
}

impl fmt::Display for PciId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:04x}:{:04x}", self.vendor, self.device))
    }
}

impl From<PciId> for String {
    fn from(id: PciId) -> Self {
        id.to_string()
    }
}

/// The 24-bit class code: base class, subclass, programming interface. Shown `010802`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(into = "String")]
pub struct PciClass(pub u32);

impl PciClass {
    /// Base class, such as 0x01 for mass storage.
    pub fn base(self) -> u8 {
        (self.0 >> 16) as u8
    }

    /// Base class and subclass, such as 0x0108 for non-volatile memory.
    pub fn base_and_sub(self) -> u16 {
        (self.0 >> 8) as u16
    }
}

impl fmt::Display for PciClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:06x}", self.0))
    }
}

impl From<PciClass> for String {
    fn from(class: PciClass) -> Self {
        class.to_string()
    }
}

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
    /// PCIe device serial number (PCIe 7.9.3), sixteen hex digits in pairs: `00-1b-21-ff-ff-aa-bb-cc`.
    pub dsn: Option<String>,
    /// The firmware's console display.
    pub boot_vga: bool,
    /// A bridge (PCI-to-PCI, host, ISA): belongs to the host, whatever its group.
    pub bridge: bool,
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
        /// Name of the VM; none if this process may not read the record.
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
}

/// Every PCI function of the host, in the order of their addresses.
///
/// A device that vanishes during the scan is left out.
pub fn scan(paths: &HostPaths) -> Result<Vec<HostDevice>, InventoryError> {
    let _ = paths;
    Ok(Vec::new())
}

impl HostDevice {
    /// Reads one device.
    pub fn read(paths: &HostPaths, bdf: HostBdf) -> Result<Self, InventoryError> {
        let _ = paths;
        Err(InventoryError::NoSuchDevice { bdf })
    }

    /// Who has the device: a VM, a driver of the host, vfio-pci, nobody.
    pub fn state(&self) -> DeviceState {
        DeviceState::Unbound
    }

    /// Vendor's name in pci.ids.
    pub fn vendor_name(&self) -> Option<&'static str> {
        None
    }

    /// Device's name in pci.ids.
    pub fn device_name(&self) -> Option<&'static str> {
        None
    }

    /// Name of class and subclass in pci.ids.
    pub fn class_name(&self) -> Option<&'static str> {
        None
    }

    /// Bound to vfio-pci or one of its variants (`mlx5_vfio_pci` and the like).
    pub fn on_vfio(&self) -> bool {
        false
    }
}
