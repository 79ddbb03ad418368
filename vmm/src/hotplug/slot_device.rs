//! What a slot holds: a device of the host, or a virtio device.

use std::sync::Arc;

use gantry_devices::pci::firmware::BarRequest;
use gantry_devices::pci::{PciSegment, PortIndex, SegmentError};

use crate::info::{DeviceCounters, DeviceKind, PassedDevice};
use crate::passthrough::{AttachedDevice, DeviceKey, FunctionId};
use crate::virtio::VirtioDevice;

/// A device that is in a slot, or on its way into one or out of it.
pub enum SlotDevice {
    /// A device of the host.
    Passed(AttachedDevice),
    /// A virtio device.
    Virtio(VirtioDevice),
}

impl SlotDevice {
    /// What the VM calls it.
    pub fn id(&self) -> &str {
        match self {
            Self::Passed(device) => &device.label().id,
            Self::Virtio(device) => device.id(),
        }
    }

    /// What messages call it.
    pub fn name(&self) -> String {
        match self {
            Self::Passed(device) => device.name().to_string(),
            Self::Virtio(device) => device.id().to_owned(),
        }
    }

    /// What it is.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Passed(device) => {
                let label = device.label();
                DeviceKind::Passed(PassedDevice {
                    name: device.name(),
                    group: label.group.clone(),
                    allow: label.allow,
                    on_error: label.on_error,
                    rom: label.rom.clone(),
                })
            }
            Self::Virtio(device) => device.kind().clone(),
        }
    }

    /// Its number, which its events carry.
    pub fn key(&self) -> DeviceKey {
        match self {
            Self::Passed(device) => device.key(),
            Self::Virtio(device) => device.key(),
        }
    }

    /// The device of the host that it is, if it is one.
    pub fn passed(&self) -> Option<&AttachedDevice> {
        match self {
            Self::Passed(device) => Some(device),
            Self::Virtio(_) => None,
        }
    }

    /// The virtio device that it is, if it is one.
    pub fn virtio(&self) -> Option<&VirtioDevice> {
        match self {
            Self::Passed(_) => None,
            Self::Virtio(device) => Some(device),
        }
    }

    /// What tells which functions share its slot; `None` if none does.
    pub fn function(&self) -> Option<FunctionId> {
        self.passed().map(AttachedDevice::function)
    }

    /// Puts it behind a root port, as function number `function`, which is 0 for one that shares its slot with none.
    ///
    /// # Errors
    /// There is no such port, or it is taken.
    pub fn plug(
        &mut self,
        pci: &Arc<PciSegment>,
        port: PortIndex,
        function: u8,
    ) -> Result<(), SegmentError> {
        match self {
            Self::Passed(device) => device.plug(pci, port, function),
            Self::Virtio(device) => device.plug(pci, port),
        }
    }

    /// Takes it out of its slot: no vCPU finds it in configuration space any more. Does not wait.
    pub fn unplug(&mut self) {
        match self {
            Self::Passed(device) => device.unplug(),
            Self::Virtio(device) => device.unplug(),
        }
    }

    /// Takes it away from the guest: guest RAM, interrupts, BARs. Waits for it.
    pub fn retire(&self) {
        match self {
            Self::Passed(device) => device.retire(),
            Self::Virtio(device) => device.retire(),
        }
    }

    /// The BARs that it needs addresses for as function number `function`. Its decoding is off afterwards: the guest
    /// must not have it yet.
    pub fn bars(&self, function: u8) -> Vec<BarRequest> {
        match self {
            Self::Passed(device) => device.bars(function),
            Self::Virtio(device) => device.bars(),
        }
    }

    /// Why it goes into quarantine after this VM, if it does.
    pub fn quarantine_reason(&self) -> Option<String> {
        self.passed()?.quarantine_reason()
    }

    /// Puts it into quarantine after this VM, if it is a device of the host.
    pub fn quarantine(&self, why: &str) {
        if let Some(device) = self.passed() {
            device.quarantine(why);
        }
    }

    /// Fills in what it did so far.
    pub fn count(&self, into: &mut DeviceCounters) {
        match self {
            Self::Passed(device) => {
                into.bdf = device.name().to_string();
                device.counters().read(into);
            }
            Self::Virtio(device) => into.requests = device.counters(),
        }
    }
}
