//! What the server asks of a VM, and what it hears.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use gantry_resources::{HostBdf, Request};
use gantry_vmm::VmConfig;

/// Makes the VM's configuration. It reads files of the host, so the thread that owns the VM calls it.
pub type MakeConfig = Box<dyn FnOnce() -> Result<VmConfig, String> + Send>;

/// What a client wants.
pub enum Command {
    Create(MakeConfig),
    Boot,
    Delete,
    Shutdown,
    Reboot,
    Pause,
    Resume,
    PowerButton,
    Nmi,
    Info,
    Counters,
    Attach(Attach),
    Detach(Detach),
    Quit,
}

/// A device to attach.
#[derive(Debug, Clone)]
pub struct Attach {
    pub id: Option<String>,
    pub request: Request,
}

/// A device to detach.
#[derive(Debug, Clone)]
pub struct Detach {
    pub id: String,
    pub force_after: Option<Duration>,
}

/// What came of a command.
#[derive(Debug, Clone)]
pub enum Answer {
    Done,
    Attached(Vec<DeviceInfo>),
    Info(VmInfo),
    Counters(Vec<DeviceCounters>),
}

/// State of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmState {
    Created,
    Running,
    Paused,
    Shutdown,
}

/// State of a device in its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    Announced,
    Enabled,
    Detaching,
}

/// A device that the VM has.
#[derive(Debug, Clone)]
pub struct DeviceInfo {
    pub id: String,
    pub bdf: HostBdf,
    pub guest: String,
    pub group: Option<String>,
    pub state: DeviceState,
}

/// A VM.
#[derive(Debug, Clone)]
pub struct VmInfo {
    pub config: Arc<VmConfig>,
    pub state: VmState,
    pub devices: Vec<DeviceInfo>,
    pub slots: usize,
    pub free_slots: usize,
}

/// What a device did.
#[derive(Debug, Clone)]
pub struct DeviceCounters {
    pub id: String,
    pub bdf: HostBdf,
    pub group: Option<String>,
    pub interrupts: BTreeMap<u16, u64>,
    pub trapped_reads: BTreeMap<String, u64>,
    pub trapped_writes: BTreeMap<String, u64>,
    pub mapped_bytes: u64,
    pub attach_steps: Vec<(&'static str, Duration)>,
    pub resets: u64,
    pub errors: u64,
}

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("the VM is not created: use vm.create")]
    NotCreated,
    #[error("the VM is created already: use vm.delete first")]
    AlreadyCreated,
    #[error("the VM is not booted: use vm.boot")]
    NotBooted,
    #[error("the VM runs already")]
    AlreadyRunning,
    #[error("the VM is not paused")]
    NotPaused,
    #[error("the configuration is wrong: {0}")]
    Invalid(String),
    #[error("there is no device \"{0}\"")]
    NoSuchDevice(String),
    #[error("there is a device \"{0}\" already")]
    IdInUse(String),
    #[error("all slots for devices are taken")]
    NoFreeSlot,
    #[error("{0}")]
    Failed(String),
}

/// What happened.
#[derive(Debug, Clone)]
pub enum VmEvent {
    State(VmState),
    AttachStep {
        id: String,
        step: &'static str,
        took: Duration,
    },
    Attached(DeviceInfo),
    Enabled {
        id: String,
    },
    DetachStep {
        id: String,
        step: &'static str,
        took: Duration,
    },
    Detached {
        id: String,
    },
    DeviceError {
        id: String,
        what: String,
    },
    GuestPanic,
}
