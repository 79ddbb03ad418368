//! What clients learn of a VM: its state, its devices, their counters, and events.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use gantry_devices::pci::GuestBdf;
use gantry_resources::base::{DeviceName, Numbers};
use gantry_resources::inventory::Allow;
use gantry_resources::pools::{OnError, RomSource};

use crate::config::{DiskConfig, NetConfig, RngConfig, VmConfig, VsockConfig};

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmState {
    /// It is defined, and was not booted yet.
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
    /// The host's CPUs that its vCPUs run on, but for vCPUs with an affinity of their own; any if empty.
    pub cpus: Numbers,
    /// What it is doing.
    pub state: VmState,
    /// How long ago its vCPUs started, if it runs.
    pub uptime: Option<Duration>,
    /// Why it has ended, in words for people, if it has.
    pub ended: Option<String>,
    /// Devices that it has in slots.
    pub devices: Vec<DeviceInfo>,
    /// Slots that devices can be plugged into while it runs.
    pub slots: usize,
    /// How many of those are empty.
    pub free_slots: usize,
}

/// How far a device has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    /// It is in its slot, and the guest has been notified.
    Announced,
    /// The guest has switched it on.
    Enabled,
    /// The guest was asked to release it.
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

/// A device that a VM has in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What it is called.
    pub id: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Where the guest finds it.
    pub guest: GuestBdf,
    /// How far it has come.
    pub state: DeviceState,
    /// The ids of the other functions in its slot, which are detached together with it.
    pub together_with: Vec<String>,
}

/// What a device in a slot is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceKind {
    /// A device of the host.
    Passed(PassedDevice),
    /// A disk.
    Disk(DiskConfig),
    /// The disk of cloud-init.
    CloudInit,
    /// A network.
    Net(NetConfig),
    /// Sockets between guest and host.
    Vsock(VsockConfig),
    /// Random numbers of the host.
    Rng(RngConfig),
}

impl DeviceKind {
    /// The device of the host, if it is one.
    pub fn passed(&self) -> Option<&PassedDevice> {
        match self {
            Self::Passed(device) => Some(device),
            _ => None,
        }
    }

    /// The disk, if it is one.
    pub fn disk(&self) -> Option<&DiskConfig> {
        match self {
            Self::Disk(disk) => Some(disk),
            _ => None,
        }
    }
}

/// A device of the host, and the terms of its request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedDevice {
    /// What it is called on the host: its address, if it is a PCI function.
    pub name: DeviceName,
    /// The group or alias of its request; its own group if it was requested by address.
    pub group: Option<String>,
    /// What it may lack.
    pub allow: Allow,
    /// What happens when it reports an error.
    pub on_error: OnError,
    /// Where its expansion ROM comes from.
    pub rom: RomSource,
}

/// What a device did since it was attached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceCounters {
    /// What it is called.
    pub id: String,
    /// Where it is on the host, as text; empty for one that is not a device of the host.
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
    /// What a virtio device did, by name.
    pub requests: Vec<(&'static str, u64)>,
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
        /// Why it took long and how to avoid that, if it can be avoided.
        hint: Option<&'static str>,
    },
    /// A device is plugged in, and the guest has been told.
    Attached(DeviceInfo),
    /// Devices could not be attached. None of them is held.
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
    /// The guest was asked to release a device.
    DetachAsked {
        /// What it is called.
        id: String,
    },
    /// A device was removed from the guest and returned to the host.
    Detached {
        /// What it was called.
        id: String,
        /// Whether the guest had not released it.
        forced: bool,
    },
    /// The host wants a device back. The guest is asked to release it.
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
    /// The guest's kernel has panicked. The guest decides what follows.
    GuestPanic {
        /// Whether the guest's crash kernel takes over.
        crash_kernel: bool,
    },
    /// The guest cannot go on.
    GuestFault {
        /// Why.
        error: String,
    },
    /// The VM has ended and released everything.
    Ended {
        /// Why, in words for people.
        reason: String,
    },
    /// The process ends: no event follows.
    Exit {
        /// Its exit status.
        status: u8,
    },
}

/// Receives events, on threads of the VMM. Must not wait.
pub type EventSink = Arc<dyn Fn(VmEvent) + Send + Sync>;

/// Receives what the guest writes to its serial port, on threads of the VMM. Must not wait.
pub type ConsoleSink = Arc<dyn Fn(&[u8]) + Send + Sync>;
