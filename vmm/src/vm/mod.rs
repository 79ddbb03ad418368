//! One VM from its configuration to its end.

mod board;
mod build;
mod dispatch;
mod host_devices;
mod payload;

use std::io::{self, IsTerminal};
use std::sync::Arc;

use gantry_devices::info_limited;
use gantry_resources::HostPaths;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::{SerialMode, VcpuCount, VmConfig};
use crate::console::{Keyboard, RawTerminal, SerialOutput};
use crate::control::{ControlLoop, Event, Mailbox, SignalWatch, Signals};
use crate::cpu::{self, Snapshot};
use crate::error::Error;
use crate::kvm::{IrqchipState, Machine};
use crate::layout::Layout;
use crate::sandbox::{self, Sandbox, SeccompMode};
use crate::threads::Role;
use crate::vcpus::{Fault, Gate, Vcpus};
use board::Board;
use gantry_vfio::host::DmaMapping;
use host_devices::AttachedDevice;
use payload::OpenPayload;

pub use payload::FileError;

/// What the user decides about a run beside the VM itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// What becomes of system calls that a filter does not name.
    pub seccomp: SeccompMode,
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered itself off.
    PowerOff,
    /// The user ended it from its console.
    Stopped,
    /// A signal ended it.
    Signal(i32),
    /// The guest cannot go on, and why.
    GuestFault(String),
}

/// Builds a VM, runs it until it ends, and gives everything back. To be called on the process's
/// first thread, which is confined for the rest of its life.
///
/// # Errors
/// The VM could not be built, or the host failed it later. Everything has been given back.
pub fn run(config: &VmConfig, host: &HostPaths, options: Options) -> Result<Outcome, Error> {
    // Dropped after the VM: a second signal must not keep it from giving everything back.
    let signals = Arc::new(Signals::block().map_err(Error::host("block signals"))?);
    raise_file_limit();
    sandbox::install_traps().map_err(Error::host("install signal handlers"))?;
    let sandbox = Arc::new(Sandbox::new(options.seccomp).map_err(Error::host("compile filters"))?);
    let mailbox = Mailbox::new().map_err(Error::host("make an eventfd"))?;
    let ended =
        Vm::build(config, host, &sandbox, &mailbox, &signals).and_then(|mut vm| vm.run(&signals));
    match ended {
        Err(Error::Interrupted(signal)) => Ok(Outcome::Signal(signal)),
        ended => ended,
    }
}

/// Each interrupt vector costs a descriptor, and the usual soft limit of 1024 is there for programs
/// that call select(2).
fn raise_file_limit() {
    let limit = getrlimit(Resource::RLIMIT_NOFILE);
    let raised = limit.and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit on open files stays as it is");
    }
}

/// A VM that stands. Dropping it stops its vCPUs and gives the host's devices back.
struct Vm {
    // Dropped in this order: first what runs, then what is reached, last what it is reached through.
    vcpus: Vcpus,
    devices: Vec<AttachedDevice>,
    _dma: Vec<DmaMapping>,
    board: Board,
    snapshots: Vec<Snapshot>,
    irqchip: IrqchipState,
    layout: Layout,
    payload: OpenPayload,
    vcpu_count: VcpuCount,
    serial: SerialMode,
    gate: Arc<Gate>,
    mailbox: Arc<Mailbox>,
    sandbox: Arc<Sandbox>,
    machine: Machine,
}

impl Vm {
    /// Runs the guest until something ends it.
    fn run(&mut self, signals: &Arc<Signals>) -> Result<Outcome, Error> {
        let mut control = ControlLoop::new(Arc::clone(&self.mailbox))
            .map_err(Error::host("make the control loop"))?;
        signals.check()?;
        control.add(Box::new(SignalWatch {
            signals: Arc::clone(signals),
            mailbox: Arc::clone(&self.mailbox),
        }));
        let _terminal = self.open_console(&mut control)?;
        let confined = self.sandbox.filter(Role::Control).enter();
        confined.map_err(Error::host("enter the sandbox"))?;
        self.gate.open();
        loop {
            match control.next().map_err(Error::host("wait for events"))? {
                Event::Reset => self.reboot()?,
                Event::PowerOff => return Ok(Outcome::PowerOff),
                Event::Quit => return Ok(Outcome::Stopped),
                Event::Signal(number) => return Ok(Outcome::Signal(number)),
                Event::Fault(vcpu, fault) => {
                    return Ok(Outcome::GuestFault(describe(vcpu, &fault)));
                }
            }
        }
    }

    fn open_console(&self, control: &mut ControlLoop) -> Result<Option<RawTerminal>, Error> {
        let Some(serial) = &self.board.serial else {
            return Ok(None);
        };
        control.add(Box::new(SerialOutput(Arc::clone(serial))));
        if self.serial != SerialMode::Tty {
            return Ok(None);
        }
        let commands = io::stdin().is_terminal();
        let keyboard = Keyboard::new(Arc::clone(serial), Arc::clone(&self.mailbox), commands);
        control.add(Box::new(keyboard));
        RawTerminal::enter().map_err(Error::host("make the terminal raw"))
    }

    /// Brings the machine back to its first state and boots again. RAM, vCPUs, mappings and open
    /// devices stay.
    fn reboot(&mut self) -> Result<(), Error> {
        info_limited!("the guest reboots");
        // Devices first: one that still runs would raise interrupts in what is restored next.
        self.vcpus.pause();
        self.board.reset(&self.layout, &self.sandbox)?;
        let snapshots = self.snapshots.iter();
        let mut snapshots = snapshots.cycle();
        self.vcpus.visit(|_, vcpu| match snapshots.next() {
            Some(snapshot) => snapshot.restore(vcpu),
            None => Ok(()),
        })?;
        self.machine.restore_irqchip(&self.irqchip)?;
        let entry = self
            .payload
            .load(&self.board, &self.layout, self.vcpu_count)?;
        let memory = self.board.ram.memory();
        let mut first = true;
        self.vcpus.visit(|_, vcpu| {
            if std::mem::take(&mut first) {
                cpu::boot_state(vcpu, &entry, memory)
            } else {
                Ok(())
            }
        })?;
        self.mailbox.forget_guest();
        self.gate.open();
        Ok(())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.vcpus.stop();
        host_devices::close(std::mem::take(&mut self.devices), &self.sandbox);
    }
}

fn describe(vcpu: u8, fault: &Fault) -> String {
    match fault {
        Fault::TripleFault => format!(
            "vCPU {vcpu} of the guest had a triple fault\n\
             a kernel that dies so at once was often built for another machine, or given too little \
             memory; boot it with `console=ttyS0 earlyprintk=ttyS0` to see its last words"
        ),
        Fault::Broken(what) => format!("vCPU {vcpu} cannot go on: {what}"),
    }
}
