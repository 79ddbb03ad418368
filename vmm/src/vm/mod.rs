//! One VM from its configuration to its end.

mod alarms;
mod attach;
mod build;
mod closing;
mod commands;
mod counted;
mod domain;
mod exits;
mod host_devices;
mod hotplug;
mod machine;
mod payload;
mod populate;
mod trial;

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use crate::command::{Answer, Command, Reply, VmEvent, VmState};
use crate::config::{SerialMode, VmConfig};
use crate::console::{Keyboard, SerialOutput};
use crate::control::{ControlLoop, Event, SignalWatch};
use crate::cpu::{self, Snapshot};
use crate::error::Error;
use crate::kvm::{IrqchipState, KvmVm};
use crate::layout::Layout;
use crate::memory;
use crate::placement::VmPlacement;
use crate::status::VmStatus;
use crate::threads::Role;
use crate::vcpus::{VcpuBarrier, VcpuFault, Vcpus};
use crate::vmm::{Outcome, VmContext};
use gantry_devices::panic::Panic;
use gantry_devices::{info_limited, warn_limited};
use hotplug::Devices;
use machine::Machine;
use payload::OpenPayload;
use populate::Populating;

pub use alarms::{Alarm, AlarmKey};
pub use attach::Prepared;
pub use closing::Leaving;
pub use payload::FileError;
pub use trial::check;

/// Why a VM runs no more.
pub enum End {
    /// By itself, by a signal, or from its console.
    Over(Outcome),
    /// A client asked for it, and is answered once everything has been given back.
    Requested(Command, Reply),
}

/// A VM that stands. Dropping it stops its vCPUs and gives the host's devices back.
pub struct Vm {
    // Dropped in this order: first what runs, then what is reached, last what it is reached through.
    vcpus: Vcpus,
    devices: Devices,
    _populating: Option<Populating>,
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
    /// Runs the guest until something ends it; `started` is answered when it begins.
    pub fn run(&mut self, started: &mut Option<Reply>) -> Result<End, Error> {
        let (mailbox, signals) = (&self.context.mailbox, &self.context.signals);
        let mut control =
            ControlLoop::new(Arc::clone(mailbox)).map_err(Error::host("make the control loop"))?;
        signals.check()?;
        control.add(Box::new(SignalWatch {
            signals: Arc::clone(signals),
            mailbox: Arc::clone(mailbox),
        }));
        control.add(Box::new(self.devices.ears(mailbox)));
        self.open_console(&mut control)?;
        let confined = self.context.sandbox.confinement(Role::Control).enter();
        confined.map_err(Error::host("enter the sandbox"))?;
        self.barrier.open();
        memory::release_program_pages();
        self.context.status.publish(Some(VmStatus {
            config: Arc::clone(&self.config),
            placement: self.placement.clone(),
            state: self.state,
            ended: None,
            devices: self.devices.statuses(),
            slots: Some(self.machine.slots()),
        }));
        self.tell(VmEvent::State(self.state));
        if let Some(started) = started.take() {
            started(Ok(Answer::Done));
        }
        loop {
            let event = control.next(self.devices.deadline());
            match event.map_err(Error::host("wait for events"))? {
                None => self.devices.tick(Instant::now(), &self.machine),
                Some(Event::Eject(port)) => self.devices.ejected(port, &self.machine),
                Some(Event::Enabled(bdf)) => self.devices.enabled(bdf),
                Some(Event::Panic(panic)) => self.panicked(panic),
                Some(Event::Alarm(key, alarm)) => self.devices.alarmed(key, alarm, &self.machine),
                Some(Event::Prepared(prepared)) => self.devices.arrive(*prepared, &self.machine),
                Some(Event::Reset) => self.reboot()?,
                Some(Event::PowerOff) => return Ok(End::Over(Outcome::PowerOff)),
                Some(Event::Quit) => return Ok(End::Over(Outcome::Stopped)),
                Some(Event::Signal(number)) => return Ok(End::Over(Outcome::Signal(number))),
                Some(Event::VcpuFault(vcpu, fault)) => {
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

    /// Shows the state that the VM has from now on, and tells of it.
    fn enter(&mut self, state: VmState) {
        self.state = state;
        self.context.status.set_state(state);
        self.tell(VmEvent::State(state));
    }

    fn tell(&self, event: VmEvent) {
        (self.context.events)(event);
    }

    fn open_console(&self, control: &mut ControlLoop) -> Result<(), Error> {
        let Some(serial) = &self.machine.serial else {
            return Ok(());
        };
        control.add(Box::new(SerialOutput(Arc::clone(serial))));
        if self.config.serial == SerialMode::Tty {
            let keyboard = Keyboard::new(Arc::clone(serial), Arc::clone(&self.context.mailbox));
            control.add(Box::new(
                keyboard.map_err(Error::host("make the terminal raw"))?,
            ));
        }
        Ok(())
    }

    /// Brings the machine back to its first state and boots again. RAM, vCPUs, mappings and open
    /// devices stay.
    fn reboot(&mut self) -> Result<(), Error> {
        info_limited!("the guest reboots");
        // Devices first: one that still runs would raise interrupts in what is restored next, and write to
        // the memory of the guest that boots. That goes for those that leave, too, closed or not.
        self.vcpus.pause()?;
        let emptied = self.context.mailbox.forget_guest();
        self.barrier.rearm();
        self.devices.reset(&emptied, &self.machine);
        for port in self.machine.reset_devices(&self.context.sandbox)? {
            self.devices.lose(port, &self.machine);
        }
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
