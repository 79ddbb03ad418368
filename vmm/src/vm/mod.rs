//! One VM from its configuration to its end.

mod build;
mod commands;
mod context;
mod event;
mod exits;
mod hotplug_setup;
mod payload;

use std::fmt;
use std::fs::File;
use std::sync::{Arc, Weak};
use std::time::Instant;

use crate::command::{Answer, Command, Reply};
use crate::config::{SerialMode, VmConfig};
use crate::cpu::{self, Snapshot};
use crate::error::Error;
use crate::host::placement::VmPlacement;
use crate::hotplug::HostDevices;
use crate::info::{VmEvent, VmState};
use crate::kvm::{IrqchipState, KvmVm};
use crate::layout::Layout;
use crate::machine::{Keyboard, Machine, SerialOutput, release_program_pages};
use crate::passthrough::Prefault;
use crate::process::error::cannot;
use crate::process::event_loop::EventLoop;
use crate::process::sandbox::Role;
use crate::status::VmStatus;
use crate::vcpus::{VcpuBarrier, VcpuFault, Vcpus};
use gantry_devices::panic::Panic;
use gantry_devices::{info_limited, warn_limited};

pub use context::VmContext;
pub use event::Event;
pub use payload::OpenPayload;

/// Why a VM runs no more.
pub enum End {
    /// By itself, by a signal, or from its console.
    Over(Outcome),
    /// A client asked for it. It is answered once the VM has released everything.
    Requested(Command, Reply),
}

/// How the process, or its VM, ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered itself off.
    PowerOff,
    /// The user ended it from its console.
    Stopped,
    /// A client ended it.
    Client,
    /// A signal ended it.
    Signal(i32),
    /// The guest cannot go on, and why.
    GuestFault(String),
    /// A device reported an error after which the VM must not run, and its name.
    DeviceFault(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Stopped => f.write_str("it was ended from its console"),
            Self::Client => f.write_str("a client ended it"),
            Self::Signal(number) => write!(f, "signal {number} ended it"),
            Self::GuestFault(what) => write!(f, "the guest died: {what}"),
            Self::DeviceFault(id) => write!(
                f,
                "the device {id} reported an error that cannot be corrected, and its entry says \"on_error\": \"stop\""
            ),
        }
    }
}

/// A VM that is built. Dropping it stops its vCPUs and returns the host's devices.
pub struct Vm {
    // Dropped in this order: vCPUs, then devices, then the machine, KVM last.
    vcpus: Vcpus,
    devices: HostDevices,
    _prefault: Option<Prefault>,
    machine: Machine,
    snapshots: Vec<Snapshot>,
    irqchip: IrqchipState,
    layout: Layout,
    payload: OpenPayload,
    /// `/proc/interrupts`, if it can be read.
    interrupts: Option<File>,
    barrier: Arc<VcpuBarrier>,
    config: Arc<VmConfig>,
    placement: VmPlacement,
    state: VmState,
    context: VmContext,
    kvm: KvmVm,
}

impl Vm {
    /// Runs the guest until something ends it. `started` is answered when the vCPUs start.
    pub fn run(&mut self, started: &mut Option<Reply>) -> Result<End, Error> {
        let mut control = self.context.event_loop()?;
        control.add(Box::new(self.devices.listener()));
        self.open_console(&mut control)?;
        let confined = self.context.sandbox.confinement(Role::Control).enter();
        confined.map_err(cannot("enter the sandbox"))?;
        self.barrier.open();
        release_program_pages();
        self.context.status.publish(Some(VmStatus {
            config: Arc::clone(&self.config),
            placement: self.placement.clone(),
            state: self.state,
            started: Some(Instant::now()),
            ended: None,
            devices: self.devices.statuses(),
            slots: Some(self.machine.slots.clone()),
            serial: self
                .machine
                .serial
                .as_ref()
                .map_or_else(Weak::new, Arc::downgrade),
        }));
        self.tell(VmEvent::State(self.state));
        if let Some(started) = started.take() {
            started(Ok(Answer::Done));
        }
        loop {
            let event = control.next(self.devices.deadline());
            match event.map_err(cannot("wait for events"))? {
                None => self.devices.tick(Instant::now()),
                Some(Event::Eject(port)) => self.devices.ejected(port),
                Some(Event::Device(key, event)) => {
                    if let Some(id) = self.devices.handle(key, event) {
                        return Ok(End::Over(Outcome::DeviceFault(id)));
                    }
                }
                Some(Event::AttachDone) => self.devices.arrive(&self.machine.windows),
                Some(Event::Panic(panic)) => self.panicked(panic),
                Some(Event::Reset) => self.reboot()?,
                Some(Event::PowerOff) => return Ok(End::Over(Outcome::PowerOff)),
                Some(Event::Quit) => return Ok(End::Over(Outcome::Stopped)),
                Some(Event::Signal(number)) => return Ok(End::Over(Outcome::Signal(number))),
                Some(Event::Fault(vcpu, fault)) => {
                    let what = describe(vcpu, &fault);
                    return Ok(End::Over(Outcome::GuestFault(what)));
                }
                Some(Event::Command(command, reply)) => {
                    if let Some(end) = self.obey(command, reply)? {
                        return Ok(end);
                    }
                }
            }
        }
    }

    fn panicked(&self, panic: Panic) {
        warn_limited!("the guest's kernel has panicked: its console has its last words");
        let crash_kernel = panic == Panic::CrashKernel;
        self.tell(VmEvent::GuestPanic { crash_kernel });
    }

    /// Changes the state of the VM, publishes it, and sends the event.
    fn set_state(&mut self, state: VmState) {
        self.state = state;
        self.context.status.set_state(state);
        self.tell(VmEvent::State(state));
    }

    fn tell(&self, event: VmEvent) {
        (self.context.events)(event);
    }

    fn open_console(&self, control: &mut EventLoop<Event>) -> Result<(), Error> {
        let Some(serial) = &self.machine.serial else {
            return Ok(());
        };
        control.add(Box::new(SerialOutput(Arc::clone(serial))));
        if self.config.serial == SerialMode::Tty {
            let mailbox = Arc::clone(&self.context.mailbox);
            let on_quit = move || mailbox.post(Event::Quit);
            let keyboard = Keyboard::new(Arc::clone(serial), on_quit);
            control.add(Box::new(keyboard.map_err(cannot("make the terminal raw"))?));
        }
        Ok(())
    }

    /// Resets the machine and boots the guest again. RAM, vCPUs, mappings and open devices stay.
    fn reboot(&mut self) -> Result<(), Error> {
        info_limited!("the guest reboots");
        // Devices first: a device that still runs would raise interrupts in the restored machine and write to
        // the memory of the guest that boots. So would a device that is leaving.
        self.vcpus.pause()?;
        let forgotten = self.context.mailbox.extract(Event::is_of_guest);
        let ejected = forgotten.iter().filter_map(|event| match event {
            Event::Eject(port) => Some(*port),
            _ => None,
        });
        let ejected: Vec<_> = ejected.collect();
        self.barrier.rearm();
        self.devices.reset(&ejected);
        self.devices.reset_functions()?;
        self.devices.wait_for_leaving();
        self.machine.reset(&self.layout)?;
        let snapshots = self.snapshots.iter();
        let mut snapshots = snapshots.cycle();
        self.vcpus.visit(|_, vcpu| match snapshots.next() {
            Some(snapshot) => snapshot.restore(vcpu),
            None => Ok(()),
        })?;
        self.kvm.restore_irqchip(&self.irqchip)?;
        let entry = self
            .payload
            .load(&self.machine, &self.layout, self.config.vcpus)?;
        let memory = self.machine.ram.memory();
        let mut first = true;
        self.vcpus.visit(|_, vcpu| {
            if std::mem::take(&mut first) {
                cpu::boot_state(vcpu, &entry, memory)
            } else {
                Ok(())
            }
        })?;
        self.tell(VmEvent::Reboot);
        if self.state == VmState::Running {
            self.barrier.open();
        }
        Ok(())
    }
}

fn describe(vcpu: u8, fault: &VcpuFault) -> String {
    match fault {
        VcpuFault::TripleFault => format!(
            "vCPU {vcpu} of the guest had a triple fault\n\
             a kernel that dies so at once was often built for another machine, or given too little \
             memory; boot it with `console=ttyS0 earlyprintk=ttyS0` to see its last words"
        ),
        VcpuFault::Broken(what) => format!("vCPU {vcpu} cannot go on: {what}"),
    }
}
