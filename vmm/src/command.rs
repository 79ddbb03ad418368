//! The commands of clients and their answers: the interface to the code that serves clients.

use std::fmt;
use std::time::Duration;

use gantry_devices::pci::BarName;
pub use gantry_devices::pci::GuestBdf;
use gantry_devices::pci::firmware::{Misfit, WindowKind};
pub use gantry_devices::virtio::block::ResizeError;
use gantry_resources::pools::DeviceRequest;

use crate::config::{DiskConfig, VmConfig};
use crate::error::Error;
pub use crate::info::{
    ConsoleSink, DeviceCounters, DeviceInfo, DeviceKind, DeviceState, EventSink, PassedDevice,
    VmEvent, VmInfo, VmState,
};
pub use crate::passthrough::SentDevice;

/// Why a client's definition of a VM is invalid.
pub type InvalidConfig = Box<dyn std::error::Error + Send + Sync>;

/// Makes a VM's configuration of a client's definition. It reads files of the host, which the thread that
/// serves clients may not: the thread that builds VMs calls it, and only if there is no VM.
pub struct DeferredConfig(pub Box<dyn FnOnce() -> Result<VmConfig, CommandError> + Send>);

impl fmt::Debug for DeferredConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeferredConfig")
    }
}

/// Something a client wants done.
#[derive(Debug)]
pub enum Command {
    /// Remember what the VM is to be.
    Create(DeferredConfig),
    /// Build the VM and run it. Answered once its vCPUs run.
    Boot,
    /// End the VM if it runs, and forget its definition.
    Delete,
    /// End the VM at once. Answered once it has released everything.
    Shutdown,
    /// Reset the VM at once, and boot it again.
    Reboot,
    /// Stop the vCPUs.
    Pause,
    /// Let the vCPUs run on.
    Resume,
    /// Press the power button: the guest decides what it does.
    PowerButton,
    /// Send every vCPU a non-maskable interrupt.
    Nmi,
    /// Say what its devices did so far.
    Counters,
    /// Attach devices of the host. Answered once the guest has been notified.
    Attach(Attach),
    /// Ask the guest to release a device, or ask again. Answered once the guest was asked;
    /// [`VmEvent::Detached`] follows when the device is gone.
    Detach(Detach),
    /// Make a disk larger. Answered once its guest was told.
    ResizeDisk {
        /// What it is called.
        id: String,
        /// Its new size in bytes.
        bytes: u64,
    },
    /// End the VM if it runs, and the process.
    Quit,
}

/// Devices to be plugged in while the guest runs.
#[derive(Debug)]
pub enum Attach {
    /// A number of devices of a group or alias, or one device by its address.
    Devices(DeviceRequest),
    /// The devices that the host's service plan of that name has at that moment.
    Plan {
        /// The plan.
        name: String,
        /// The id of the first device; further devices get `-1`, `-2`, ... behind it.
        id: Option<String>,
    },
    /// A device that the client has opened.
    Sent(SentDevice),
    /// A disk.
    Disk {
        /// What it is to be called; any name that is free if absent.
        id: Option<String>,
        /// What it is. Its own id is not looked at.
        disk: DiskConfig,
    },
}

impl Attach {
    /// The id of the first device; its address on the host if absent.
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::Devices(DeviceRequest { id, .. })
            | Self::Plan { id, .. }
            | Self::Disk { id, .. } => id.as_deref(),
            Self::Sent(SentDevice { request, .. }) => request.id(),
        }
    }
}

impl fmt::Display for Attach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Devices(request) => request.from.fmt(f),
            Self::Plan { name, .. } => write!(f, "plan \"{name}\""),
            Self::Sent(_) => f.write_str("the device that came as a descriptor"),
            Self::Disk { disk, .. } => disk.path.display().fmt(f),
        }
    }
}

/// A device to be unplugged while the guest runs. The functions of one device go together.
#[derive(Debug, Clone)]
pub struct Detach {
    /// What the device is called.
    pub id: String,
    /// Take it away after this time even if the guest has not released it; zero takes it away at once.
    pub force_after: Option<Duration>,
}

/// What became of a command.
#[derive(Debug)]
pub enum Answer {
    /// It was done.
    Done,
    /// The devices that were plugged in.
    Attached(Vec<DeviceInfo>),
    /// What its devices did, in the order in which they were attached.
    Counters(Vec<DeviceCounters>),
}

/// Receives the result of a command. Called once, on a thread of the VMM. Must not wait.
pub type Reply = Box<dyn FnOnce(Result<Answer, CommandError>) + Send>;

/// Why a command was not obeyed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// There is no VM.
    #[error("there is no VM yet: create one first")]
    NotCreated,
    /// There is a VM.
    #[error("there is a VM already: delete it first")]
    AlreadyCreated,
    /// What is to be created is no VM.
    #[error(transparent)]
    Invalid(InvalidConfig),
    /// The VM does not run.
    #[error("the VM is not running: boot it first")]
    NotBooted,
    /// The VM runs.
    #[error("the VM is running already")]
    AlreadyRunning,
    /// The VM is not to be paused again.
    #[error("the VM is paused already")]
    AlreadyPaused,
    /// The VM is not paused.
    #[error("the VM is not paused")]
    NotPaused,
    /// Its serial port leads nowhere.
    #[error(
        "this VM has no console: its file says \"serial\": {{\"mode\": \"Null\"}} or \"Off\", where \"Tty\" or \
         \"File\" would give it one"
    )]
    NoConsole,
    /// The VM was built without slots.
    #[error(
        "this VM has no slots for devices: start it with \"hotplug\": {{\"slots\": 32}} in its file"
    )]
    NoSlots,
    /// All slots are in use, or were emptied by force and the guest has not read that.
    #[error(
        "all {slots} slots of the VM are taken, or were emptied by force and its guest has not read \
         that: detach a device first, or try again"
    )]
    NoFreeSlot {
        /// How many there are.
        slots: usize,
    },
    /// The device has larger BARs than the windows of any empty slot.
    #[error(
        "no empty slot of the VM can hold {device}: its {} ({:#x} bytes) needs {:#x} bytes of {} \
         addresses there; {}",
        BarName(misfit.largest.index), misfit.largest.size, misfit.size, misfit.kind, wider(misfit.kind)
    )]
    SlotsTooSmall {
        /// The device.
        device: String,
        /// Which window is too small.
        misfit: Misfit,
    },
    /// Another device is called so.
    #[error("the VM has a device \"{0}\" already: choose another id")]
    DuplicateId(String),
    /// There is no such device.
    #[error("the VM has no device \"{id}\"{}", known(.others))]
    NoSuchDevice {
        /// What was asked for.
        id: String,
        /// What there is.
        others: Vec<String>,
    },
    /// A disk has not the size that was asked for.
    #[error("the disk {id} stays as it is: {problem}")]
    Resize {
        /// What it is called.
        id: String,
        /// Why.
        problem: ResizeError,
    },
    /// The process is about to end.
    #[error("the VM is ending")]
    Ending,
    /// Too many commands wait for the thread that owns the VM.
    #[error("too many requests wait for the VM: try again")]
    Busy,
    /// It was tried and failed.
    #[error(transparent)]
    Failed(#[from] Error),
}

fn wider(kind: WindowKind) -> &'static str {
    match kind {
        WindowKind::Io => {
            "start the VM with the device, or detach one that is in a slot with I/O ports"
        }
        WindowKind::Mem64 => "start the VM with a larger `hotplug.window` in its file",
        WindowKind::Mem32 => {
            "start the VM with fewer `hotplug.slots` in its file: each is larger then"
        }
    }
}

fn known(others: &[String]) -> String {
    match others {
        [] => ": it has none".to_owned(),
        others => format!(": it has {}", others.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use gantry_devices::pci::BarKind;
    use gantry_devices::pci::firmware::BarRequest;

    use super::*;

    #[test]
    fn a_slot_without_io_ports_is_told_with_the_device_and_its_bar() {
        let largest = BarRequest {
            function: 0,
            index: 2,
            kind: BarKind::Io,
            size: 0x20,
        };
        let refused = CommandError::SlotsTooSmall {
            device: "0000:03:00.0".to_owned(),
            misfit: Misfit {
                kind: WindowKind::Io,
                size: 0x1000,
                largest,
            },
        };
        assert_eq!(
            refused.to_string(),
            "no empty slot of the VM can hold 0000:03:00.0: its BAR 2 (0x20 bytes) needs 0x1000 bytes of \
             I/O port addresses there; start the VM with the device, or detach one that is in a slot with \
             I/O ports"
        );
    }
}
