//! The PCI functions of the host, read from sysfs at the moment of asking.

mod attributes;
mod nvme;
mod source;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::facts::ids::{PciClass, PciId};
use crate::facts::interrupts::Interrupts;
use crate::holding::lease::{LeaseError, LeaseKind, LeaseStatus};
use crate::making::vgpu::VendorVgpu;
pub use nvme::{Namespace, Nvme};
use source::Source;
pub(crate) use source::id_at;

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
    /// The interrupts that it has, if they are known: only root can read them.
    pub interrupts: Option<Interrupts>,
    /// How the kernel can reset it (`reset_method`): "flr", "bus", ...; empty if in no way.
    pub reset_methods: Vec<String>,
    /// Whether its bus is a root bus, which is never reset as a whole.
    #[serde(skip)]
    pub on_root_bus: bool,
    /// The first function of its card, if it is another function of that card.
    #[serde(skip)]
    pub lead: Option<Arc<HostDevice>>,
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
        let device = source.read(bdf, &[])?;
        let mut device = device.ok_or(InventoryError::NoSuchDevice { bdf })?;
        device.lead = source.read_lead(&device)?.map(Arc::new);
        Ok(device)
    }

    /// Who has the device: a VM, a driver of the host, vfio-pci, nobody.
    ///
    /// While a command moves it between drivers, the driver it has at that moment decides.
    pub fn state(&self) -> DeviceState {
        match &self.lease {
            LeaseStatus::Held(record) if record.kind == LeaseKind::Vm => DeviceState::Assigned {
                vm: Some(record.name.clone()),
            },
            LeaseStatus::Unrecorded | LeaseStatus::Unreadable { .. } => {
                DeviceState::Assigned { vm: None }
            }
            _ if self.kept_out().is_some() => DeviceState::Quarantined {
                reason: self.kept_out().unwrap_or_default().to_owned(),
            },
            _ if self.on_vfio() => DeviceState::Detached,
            _ if self.driver.is_some() => DeviceState::Attached,
            _ => DeviceState::Unbound,
        }
    }

    /// Why it, or its card, is in quarantine.
    pub(crate) fn kept_out(&self) -> Option<&str> {
        let card = self.first_function().quarantine.as_deref();
        self.quarantine.as_deref().or(card)
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

    /// Whether it can be one of several functions of a card: virtual functions are devices of their own.
    pub(crate) fn may_share_card(&self) -> bool {
        self.physfn.is_none() && !self.is_bridge()
    }

    /// Whether two functions are of one card: they have one slot and one IOMMU group.
    pub(crate) fn shares_card(&self, other: &Self) -> bool {
        self.may_share_card()
            && other.may_share_card()
            && self.bdf.is_in_slot_of(other.bdf)
            && self.iommu_group == other.iommu_group
    }

    /// The first function of its card, which may be itself.
    pub fn first_function(&self) -> &Self {
        self.lead.as_deref().unwrap_or(self)
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

#[cfg(test)]
mod tests;
