//! Devices that are leased to this VM, before they are opened.

use std::any::Any;
use std::sync::Arc;

use gantry_devices::pci::MsiRouter;
use gantry_resources::allocation::Lease;
use gantry_resources::base::{DeviceName, Uuid};
use gantry_resources::inventory::Allow;
use gantry_resources::opener::HeldLease;
use gantry_vfio::host::{Attachment, Group, VfioDevice};

use super::device::AttachedDevice;
use super::error::DeviceError;
use super::events::DeviceNotify;

/// A lease, kept by this process or by its opener. Dropping it gives the device back.
pub trait DeviceLease: Send {
    /// Puts the device into quarantine for this reason when the lease ends.
    fn quarantine(&self, reason: &str);
}

impl DeviceLease for Lease {
    fn quarantine(&self, reason: &str) {
        self.set_aside(reason);
    }
}

impl DeviceLease for HeldLease {
    fn quarantine(&self, reason: &str) {
        self.set_aside(reason);
    }
}

/// What tells which functions belong to one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FunctionId {
    /// What the function is called on the host.
    pub name: DeviceName,
    /// Whether it is a virtual function: a device of its own, though cards give them addresses that look
    /// like those of one device's functions.
    pub virtual_function: bool,
}

/// What a device is called, and what was said of it when it was asked for.
#[derive(Debug, Clone)]
pub struct DeviceLabel {
    /// What the VM calls it.
    pub id: String,
    /// The group or alias that it was asked for by; the group that it is in, if it was asked for by its address.
    pub group: Option<String>,
    /// What it may lack.
    pub allow: Allow,
}

/// What a VM keeps of a device from its lease to its end.
pub struct LeasedDevice {
    /// What it is.
    pub function: FunctionId,
    /// What it is called.
    pub label: DeviceLabel,
    // With the last device, RAM is unmapped. Dropped before others may lease the device.
    pub(super) _space: Arc<dyn Any + Send + Sync>,
    pub(super) lease: Box<dyn DeviceLease>,
}

/// A device that is leased and not open yet. Its IOMMU group is in the VM's address space.
pub struct UnopenedDevice {
    // Dropped in this order: the group leaves the address space before others may lease the device.
    pub(super) iommu_group: Arc<Group>,
    /// The token that it must be opened with.
    pub(super) token: Option<Uuid>,
    pub(super) leased: LeasedDevice,
}

impl UnopenedDevice {
    /// Opens the device and makes a function of the guest of it.
    ///
    /// # Errors
    /// VFIO refused, or the device has no MSI-X and must have it.
    pub fn open(
        self,
        router: Arc<dyn MsiRouter>,
        notify: DeviceNotify,
    ) -> Result<AttachedDevice, DeviceError> {
        let name = self.leased.function.name.to_string();
        let token = self.token.map(|token| token.to_string());
        let io = VfioDevice::open(Attachment::Group(self.iommu_group), &name, token.as_deref())?;
        AttachedDevice::new(self.leased, io, router, notify)
    }
}
