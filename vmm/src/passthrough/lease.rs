//! Devices that are leased to this VM, before they are opened.

use std::any::Any;
use std::sync::Arc;

use gantry_resources::allocation::Lease;
use gantry_resources::base::DeviceName;
use gantry_resources::inventory::Allow;
use gantry_resources::opener::HeldLease;
use gantry_resources::pools::{OnError, RomSource};

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

/// The name of a device, and the terms of its request.
#[derive(Debug, Clone)]
pub struct DeviceLabel {
    /// What the VM calls it.
    pub id: String,
    /// The group or alias of its request; its own group if it was requested by address.
    pub group: Option<String>,
    /// What it may lack.
    pub allow: Allow,
    /// What happens when it reports an error.
    pub on_error: OnError,
    /// Where its expansion ROM comes from.
    pub rom: RomSource,
}

impl FunctionId {
    /// Whether it is the first function of its device.
    pub fn is_first(&self) -> bool {
        match self.name {
            DeviceName::Pci(bdf) => bdf.function() == 0 || self.virtual_function,
            DeviceName::Mdev(_) => true,
        }
    }
}

/// What a VM keeps of a device from its lease to its end.
pub struct LeasedDevice {
    /// What it is.
    pub function: FunctionId,
    /// What it is called.
    pub label: DeviceLabel,
    // The address space: the last device unmaps RAM. Dropped before the lease.
    pub(super) _space: Arc<dyn Any + Send + Sync>,
    pub(super) lease: Box<dyn DeviceLease>,
}
