//! Handles the exits of vCPUs: one look-up, one device, one effect.

use std::sync::Arc;

use gantry_devices::bus::Effect;
use gantry_devices::pci::PciSegment;

use super::Event;
use crate::kvm::ExitHandler;
use crate::machine::{AddressSpace, Machine};
use crate::process::event_loop::Mailbox;
use crate::vcpus::{FaultSink, VcpuBarrier, VcpuFault};

/// Answers the exits of all vCPUs.
pub struct ExitDispatcher {
    space: Arc<AddressSpace>,
    pci: Arc<PciSegment>,
    barrier: Arc<VcpuBarrier>,
    mailbox: Arc<Mailbox<Event>>,
}

impl ExitDispatcher {
    /// Answers accesses from the machine's address space, and posts events that concern the whole VM to `mailbox`.
    pub fn new(
        machine: &Machine,
        barrier: &Arc<VcpuBarrier>,
        mailbox: &Arc<Mailbox<Event>>,
    ) -> Self {
        Self {
            space: Arc::clone(&machine.space),
            pci: Arc::clone(&machine.pci),
            barrier: Arc::clone(barrier),
            mailbox: Arc::clone(mailbox),
        }
    }

    fn apply(&self, effect: Option<Effect>) {
        match effect {
            None | Some(Effect::None) => {}
            Some(Effect::Remap(port)) => self.pci.remap(port, &*self.space),
            Some(Effect::PowerOff) => self.halt(Event::PowerOff),
            Some(Effect::Reset) => self.halt(Event::Reset),
            Some(Effect::Panic(panic)) => self.mailbox.post(Event::Panic(panic)),
            Some(Effect::Eject(port)) => self.mailbox.post(Event::Eject(port)),
        }
    }

    /// The guest asked to stop: no vCPU runs on until the control thread has handled that.
    fn halt(&self, event: Event) {
        self.barrier.halt();
        self.mailbox.post(event);
    }
}

impl ExitHandler for ExitDispatcher {
    fn port_in(&self, port: u16, data: &mut [u8]) {
        self.space.ports().read(port.into(), data);
    }

    fn port_out(&self, port: u16, data: &[u8]) {
        self.apply(self.space.ports().write(port.into(), data));
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.space.mmio().read(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.apply(self.space.mmio().write(address, data));
    }
}

impl FaultSink for ExitDispatcher {
    fn fault(&self, vcpu: u8, fault: VcpuFault) {
        self.mailbox.post(Event::Fault(vcpu, fault));
    }
}
