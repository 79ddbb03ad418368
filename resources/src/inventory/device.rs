//! A PCI function of the host: its facts from sysfs, and its holder.

use std::fmt;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::bdf::HostBdf;
use crate::facts::ids::{PciClass, PciId};
use crate::facts::interrupts::Interrupts;
use crate::facts::nvme::Nvme;
use crate::facts::vgpu::VendorVgpu;
use crate::holding::record::{LeaseKind, LeaseStatus};

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

/// One PCI function of the host as it was read.
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
    /// Revision id; none if the device was read only for a choice.
    pub revision: Option<u8>,
    /// Name of the bound driver.
    pub driver: Option<String>,
    /// The host driver that it was detached from, until it is bound to one again.
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
    /// The description of an NVMe controller and its disks, remembered like the serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme: Option<Nvme>,
    /// PCIe device serial number (PCIe 7.9.3), eight pairs of hex digits: `00-1b-21-ff-ff-aa-bb-cc`.
    /// Only root can read it.
    pub dsn: Option<String>,
    /// The interrupts that it has, if they are known: only root can read them.
    pub interrupts: Option<Interrupts>,
    /// The methods by which the kernel can reset it (`reset_method`): "flr", "bus", ...; empty if there are
    /// none.
    pub reset_methods: Vec<String>,
    /// Why it must not be reset, if it must not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub must_not_reset: Option<String>,
    /// Whether its bus is a root bus, which is never reset as a whole.
    #[serde(skip)]
    pub on_root_bus: bool,
    /// The first function of its card, if that is another one.
    #[serde(skip)]
    pub lead: Option<Arc<HostDevice>>,
    /// The firmware's console display.
    pub boot_vga: bool,
    /// Types of mediated devices that it can make (`mdev_supported_types`).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mdev_types: Vec<String>,
    /// The vendor's virtual GPU, if it is a virtual function that is or can be one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vgpu: Option<VendorVgpu>,
    /// The VFIO node, for a device in an IOMMU group that is bound to vfio-pci.
    pub node: Option<NodeAccess>,
    /// Its lease.
    pub lease: LeaseStatus,
    /// Why it is in quarantine, if it is.
    pub quarantine: Option<String>,
}

/// The state of a device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum DeviceState {
    /// Bound to a host driver.
    Attached,
    /// Bound to vfio-pci, and free.
    Detached,
    /// Leased by a VM.
    Assigned {
        /// Name of the VM; none if the record cannot be read.
        vm: Option<String>,
    },
    /// Bound to no driver.
    Unbound,
    /// In quarantine.
    Quarantined {
        /// Why.
        reason: String,
    },
}

impl HostDevice {
    /// The state of the device.
    ///
    /// While a command moves it between drivers, its present driver decides.
    pub fn state(&self) -> DeviceState {
        match &self.lease {
            LeaseStatus::Held(record) if record.kind == LeaseKind::Vm => DeviceState::Assigned {
                vm: Some(record.name.clone()),
            },
            LeaseStatus::Unrecorded | LeaseStatus::Unreadable { .. } => {
                DeviceState::Assigned { vm: None }
            }
            _ if self.quarantine_reason().is_some() => DeviceState::Quarantined {
                reason: self.quarantine_reason().unwrap_or_default().to_owned(),
            },
            _ if self.on_vfio() => DeviceState::Detached,
            _ if self.driver.is_some() => DeviceState::Attached,
            _ => DeviceState::Unbound,
        }
    }

    /// Why it or its card is in quarantine.
    pub(crate) fn quarantine_reason(&self) -> Option<&str> {
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

    /// Whether it can be one of several functions of a card: virtual functions are cards of their own.
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
    pub(crate) fn first_function(&self) -> &Self {
        self.lead.as_deref().unwrap_or(self)
    }

    /// Whether VFIO lets other devices of its IOMMU group be assigned: the kernel requires that no host driver
    /// does DMA from the group (Documentation/driver-api/vfio.rst, "Groups").
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

/// The kind of a function in SR-IOV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeviceType {
    /// A function without SR-IOV.
    #[serde(rename = "type-PCI")]
    Pci,
    /// A physical function: it has the SR-IOV capability, whether or not that is used.
    #[serde(rename = "type-PF")]
    Pf,
    /// A virtual function.
    #[serde(rename = "type-VF")]
    Vf,
}

impl DeviceType {
    /// The kind of a device.
    pub fn of(device: &HostDevice) -> Self {
        match (device.physfn, device.sriov) {
            (Some(_), _) => Self::Vf,
            (None, Some(sriov)) if sriov.total > 0 => Self::Pf,
            (None, _) => Self::Pci,
        }
    }
}

impl fmt::Display for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pci => "type-PCI",
            Self::Pf => "type-PF",
            Self::Vf => "type-VF",
        })
    }
}
