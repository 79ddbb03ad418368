//! The lines of the stream of events.

use gantry_vmm::command;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Device, VmState};

/// One line of the stream of events.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct EventLine {
    /// When, in seconds since 1970.
    pub time: f64,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The VM has this state now; also the first line of every stream, without a state where no VM is
    /// created.
    State {
        /// The state.
        state: Option<VmState>,
    },
    /// A step of an attach is done.
    AttachStep {
        /// The device.
        id: String,
        /// The step.
        step: String,
        /// How long it took.
        seconds: f64,
        /// Why it took its time and how to avoid that, if that can be avoided.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
    /// A device is in its slot, and the guest was told.
    Attached {
        /// The device.
        device: Device,
    },
    /// Devices could not be attached, and nothing of them is held.
    AttachFailed {
        /// What they were to be called.
        id: String,
        /// Why.
        error: String,
    },
    /// The guest has enabled the memory or I/O ports of a device.
    Enabled {
        /// The device.
        id: String,
    },
    /// The guest was asked to let a device go.
    DetachAsked {
        /// The device.
        id: String,
    },
    /// A device is gone from the guest and given back.
    Detached {
        /// The device.
        id: String,
        /// Whether it was taken without the guest's consent.
        forced: bool,
    },
    /// The host wants a device back, as when its driver is unbound: it is detached.
    Wanted {
        /// The device.
        id: String,
    },
    /// A device has an error.
    DeviceError {
        /// The device.
        id: String,
        /// What is wrong.
        error: String,
    },
    /// The guest was reset and boots again.
    Reboot,
    /// The guest's kernel has panicked. What follows is the guest's to decide: it waits, or is reset.
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
    /// gantry ends: the last line of every stream. A stream that ends without it broke off, as when gantry
    /// is killed.
    Exit {
        /// The exit status, as `gantry run --help` explains it.
        status: u8,
    },
    /// The reader was too slow: so many events are missing here.
    Missed {
        /// How many.
        events: u64,
    },
}

impl From<&command::VmEvent> for Event {
    fn from(event: &command::VmEvent) -> Self {
        use command::VmEvent as E;
        match event.clone() {
            E::State(state) => Self::State {
                state: Some(state.into()),
            },
            E::AttachStep {
                id,
                step,
                took,
                hint,
            } => Self::AttachStep {
                id,
                step: step.to_owned(),
                seconds: took.as_secs_f64(),
                hint: hint.map(str::to_owned),
            },
            E::Attached(device) => Self::Attached {
                device: Device::from(&device),
            },
            E::Enabled { id } => Self::Enabled { id },
            E::AttachFailed { id, error } => Self::AttachFailed { id, error },
            E::DetachAsked { id } => Self::DetachAsked { id },
            E::Detached { id, forced } => Self::Detached { id, forced },
            E::ReleaseRequested { id } => Self::Wanted { id },
            E::DeviceError { id, error } => Self::DeviceError { id, error },
            E::Reboot => Self::Reboot,
            E::GuestPanic { crash_kernel } => Self::GuestPanic { crash_kernel },
            E::GuestFault { error } => Self::GuestFault { error },
            E::Ended { reason } => Self::Ended { reason },
            E::Exit { status } => Self::Exit { status },
        }
    }
}
