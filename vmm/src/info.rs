//! What a VM tells of itself: what it is, what its devices did, and what happens to it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use gantry_devices::pci::GuestBdf;
use gantry_resources::base::{DeviceName, Numbers};
use gantry_resources::inventory::Allow;

use crate::config::VmConfig;

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmState {
    /// It is described, and has not been booted yet.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are stopped.
    Paused,
    /// It has ended. It can be booted again.
    Shutdown,
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Shutdown => "shut down",
        })
    }
}

/// A VM as it is at a moment.
#[derive(Debug, Clone)]
pub struct VmInfo {
    /// What it was made from.
    pub config: Arc<VmConfig>,
    /// The NUMA nodes of the host that its RAM comes from; the kernel's choice if there is none.
    pub nodes: Numbers,
    /// The host's processors that its vCPUs run on, but for those with some of their own; any if there is
    /// none.
    pub cpus: Numbers,
    /// What it is doing.
    pub state: VmState,
    /// Why it has ended, in words for people, if it has.
    pub ended: Option<String>,
    /// Devices of the host that it has.
    pub devices: Vec<DeviceInfo>,
    /// Slots that devices can be plugged into while it runs.
    pub slots: usize,
    /// How many of those are empty.
    pub free_slots: usize,
}

/// How far a device has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    /// It is there, and the guest has been told.
    Announced,
    /// The guest has switched it on.
    Enabled,
    /// The guest has been asked to let go of it.
    Detaching,
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Announced => "announced",
            Self::Enabled => "enabled",
            Self::Detaching => "detaching",
        })
    }
}

/// A device of the host that a VM has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What it is called.
    pub id: String,
    /// What it is called on the host: its address, if it is a PCI function.
    pub name: DeviceName,
    /// Where the guest finds it.
    pub guest: GuestBdf,
    /// The group or alias of its request; its own group if it was requested by address.
    pub group: Option<String>,
    /// What it may lack, as was said when it was asked for.
    pub allow: Allow,
    /// How far it has come.
    pub state: DeviceState,
    /// What the other functions in its slot are called: they go when it goes.
    pub together_with: Vec<String>,
}

/// What a device did since it was attached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceCounters {
    /// What it is called.
    pub id: String,
    /// Where it is on the host, as text.
    pub bdf: String,
    /// Interrupts by MSI-X or MSI vector, as the host's kernel counted them.
    pub interrupts: BTreeMap<u16, u64>,
    /// Reads of the guest that did not reach the device directly, by region.
    pub trapped_reads: BTreeMap<String, u64>,
    /// Writes of the guest that did not reach the device directly, by region.
    pub trapped_writes: BTreeMap<String, u64>,
    /// Bytes of its BARs that the guest reaches directly.
    pub bytes_mapped: u64,
    /// How long each step of attaching it took.
    pub attach: Vec<(&'static str, Duration)>,
    /// Times that it was reset.
    pub resets: u64,
    /// Accesses, resets and interrupt settings that failed, and errors that the device itself reported.
    pub errors: u64,
}

/// Something that happened to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEvent {
    /// The VM changed its state.
    State(VmState),
    /// The guest was reset, by itself or by a client, and boots again.
    Reboot,
    /// A step of attaching a device is done.
    AttachStep {
        /// What the device is called.
        id: String,
        /// Which step.
        step: &'static str,
        /// How long it took.
        took: Duration,
        /// Why it took its time and how to avoid that, if that can be avoided.
        hint: Option<&'static str>,
    },
    /// A device is plugged in, and the guest has been told.
    Attached(DeviceInfo),
    /// Devices could not be attached, and nothing of them is held.
    AttachFailed {
        /// What they were to be called.
        id: String,
        /// Why.
        error: String,
    },
    /// The guest has enabled the memory or I/O ports of a device.
    Enabled {
        /// What it is called.
        id: String,
    },
    /// The guest was asked to let go of a device.
    DetachAsked {
        /// What it is called.
        id: String,
    },
    /// A device is gone from the guest and given back to the host.
    Detached {
        /// What it was called.
        id: String,
        /// Whether it was taken without the guest's consent.
        forced: bool,
    },
    /// The host wants a device back: the guest is asked to let go of it.
    ReleaseRequested {
        /// What it is called.
        id: String,
    },
    /// A device failed.
    DeviceError {
        /// What it is called.
        id: String,
        /// How.
        error: String,
    },
    /// The guest's kernel has panicked. What follows is the guest's to decide.
    GuestPanic {
        /// Whether a kernel that the guest keeps for that takes over.
        crash_kernel: bool,
    },
    /// The guest cannot go on.
    GuestFault {
        /// Why.
        error: String,
    },
    /// The VM has ended, and all that it had has been given back.
    Ended {
        /// Why, in words for people.
        reason: String,
    },
    /// The process ends: nothing is told after this.
    Exit {
        /// Its exit status.
        status: u8,
    },
}

/// Who hears of events: called on threads of the VMM that must not wait.
pub type EventSink = Arc<dyn Fn(VmEvent) + Send + Sync>;
