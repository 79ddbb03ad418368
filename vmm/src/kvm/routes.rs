//! Interrupt routes: the kernel delivers message-signalled interrupts, without an exit to user space.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gantry_devices::pci::{IntxLine, MsiMessage, MsiRoute, MsiRouter};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Inputs of the kernel's IO-APIC: GSIs 0 to 23 of every VM.
const IOAPIC_PINS: u32 = 24;

/// KVM's limit on routes (`KVM_CAP_IRQ_ROUTING`), those of the IO-APIC included.
const MAX_ROUTES: u32 = 4096;

/// The interrupt routes of one virtual machine: sole owner of its routing table and its GSIs.
#[derive(Clone)]
pub struct GsiRoutes(Arc<Shared>);

struct Shared {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

/// GSIs handed out.
#[derive(Default)]
struct Table {
    /// The message that each delivers, once it has one.
    messages: BTreeMap<u32, Option<MsiMessage>>,
    /// The GSIs whose messages are not published yet, with the published message of each.
    prepared: BTreeMap<u32, Option<MsiMessage>>,
}

impl GsiRoutes {
    /// The IO-APIC's pins and nothing else, which is what a new VM routes.
    ///
    /// # Errors
    /// The kernel refused the table.
    pub fn new(vm: Arc<VmFd>) -> io::Result<Self> {
        let shared = Shared {
            vm,
            table: Mutex::default(),
        };
        shared.publish(&shared.lock())?;
        Ok(Self(Arc::new(shared)))
    }

    /// Raises the IO-APIC's pin `gsi` whenever `trigger` is written to.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn wire_pin(&self, gsi: u32, trigger: &EventFd) -> io::Result<()> {
        self.0
            .vm
            .register_irqfd(trigger, gsi)
            .map_err(io::Error::from)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the kernel the whole table; it takes no parts.
    fn publish(&self, table: &Table) -> io::Result<()> {
        let routing = KvmIrqRouting::from_entries(&table.entries()).map_err(io::Error::other)?;
        self.vm.set_gsi_routing(&routing).map_err(io::Error::from)
    }

    /// Gives the table to the kernel if it has changed.
    fn publish_prepared(&self) -> io::Result<()> {
        let mut table = self.lock();
        table.publish_with(|table| self.publish(table))
    }
}

impl Table {
    fn take(&mut self) -> io::Result<u32> {
        let free = (IOAPIC_PINS..MAX_ROUTES).find(|gsi| !self.messages.contains_key(gsi));
        let gsi = free.ok_or_else(|| io::Error::other("all 4096 interrupt routes are in use"))?;
        self.messages.insert(gsi, None);
        Ok(gsi)
    }

    fn give_back(&mut self, gsi: u32) {
        self.messages.remove(&gsi);
        self.prepared.remove(&gsi);
    }

    /// Records the message of a GSI. A message that is published already does not change the table: guests
    /// unmask more often than they move an interrupt, and the kernel waits at each new table until nobody uses
    /// the old one.
    fn prepare(&mut self, gsi: u32, message: MsiMessage) {
        let before = self.messages.insert(gsi, Some(message)).flatten();
        if before != Some(message) {
            self.prepared.entry(gsi).or_insert(before);
        }
    }

    /// Calls `publish` if the table has changed. A message that the kernel refuses is removed, or it would be
    /// in every later table.
    fn publish_with(&mut self, publish: impl FnOnce(&Self) -> io::Result<()>) -> io::Result<()> {
        if self.prepared.is_empty() {
            return Ok(());
        }
        let published = publish(self);
        let prepared = std::mem::take(&mut self.prepared);
        if published.is_err() {
            self.messages.extend(prepared);
        }
        published
    }

    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let pins = (0..IOAPIC_PINS).map(pin_entry);
        let messages = self
            .messages
            .iter()
            .filter_map(|(&gsi, message)| Some((gsi, (*message)?)));
        pins.chain(messages.map(|(gsi, message)| message_entry(gsi, message)))
            .collect()
    }
}

fn pin_entry(gsi: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    entry.u.irqchip.pin = gsi;
    entry
}

fn message_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

impl MsiRouter for GsiRoutes {
    fn route(&self) -> io::Result<Box<dyn MsiRoute>> {
        let trigger = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let gsi = self.0.lock().take()?;
        let live = Mutex::new(false);
        Ok(Box::new(GsiRoute {
            routes: Arc::clone(&self.0),
            gsi,
            trigger,
            live,
        }))
    }

    fn publish(&self) -> io::Result<()> {
        self.0.publish_prepared()
    }

    fn line(&self, gsi: u32) -> io::Result<Box<dyn IntxLine>> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let (trigger, resample) = (event()?, event()?);
        let vm = Arc::clone(&self.0.vm);
        vm.register_irqfd_with_resample(&trigger, &resample, gsi)?;
        Ok(Box::new(GsiLine {
            vm,
            gsi,
            trigger,
            resample,
        }))
    }
}

/// A source of a pin of the I/O APIC: KVM asserts the pin when `trigger` is written, and at the guest's end of
/// interrupt releases it and writes `resample`.
struct GsiLine {
    vm: Arc<VmFd>,
    gsi: u32,
    trigger: EventFd,
    resample: EventFd,
}

impl IntxLine for GsiLine {
    fn trigger(&self) -> &EventFd {
        &self.trigger
    }

    fn resample(&self) -> &EventFd {
        &self.resample
    }
}

impl Drop for GsiLine {
    fn drop(&mut self) {
        if let Err(error) = self.vm.unregister_irqfd(&self.trigger, self.gsi) {
            tracing::error!(gsi = self.gsi, %error, "irqfd stays assigned");
        }
    }
}

/// One GSI and the eventfd that raises it.
struct GsiRoute {
    routes: Arc<Shared>,
    gsi: u32,
    trigger: EventFd,
    // Whether the irqfd is assigned. Taken before the table's lock.
    live: Mutex<bool>,
}

impl GsiRoute {
    fn stop(&self, live: &mut bool) -> io::Result<()> {
        if std::mem::take(live) {
            self.routes.vm.unregister_irqfd(&self.trigger, self.gsi)?;
        }
        Ok(())
    }
}

impl MsiRoute for GsiRoute {
    fn prepare(&self, message: MsiMessage) {
        self.routes.lock().prepare(self.gsi, message);
    }

    /// To start delivery, the route is set before the irqfd; to stop it, the irqfd is removed before the route:
    /// the kernel must never see an irqfd without a route. If the eventfd was written to in between, the kernel
    /// notices when the irqfd is assigned.
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(message) = message else {
            return self.stop(&mut live);
        };
        self.prepare(message);
        if let Err(error) = self.routes.publish_prepared() {
            self.stop(&mut live)?;
            return Err(error);
        }
        if !*live {
            self.routes.vm.register_irqfd(&self.trigger, self.gsi)?;
            *live = true;
        }
        Ok(())
    }

    /// Takes the eventfd's count and gives it back: while no irqfd is assigned nobody else reads it,
    /// and what the device adds meanwhile only adds up.
    fn pending(&self) -> bool {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if *live {
            return false;
        }
        self.trigger
            .read()
            .is_ok_and(|count| self.trigger.write(count).is_ok())
    }

    fn trigger(&self) -> &EventFd {
        &self.trigger
    }
}

impl Drop for GsiRoute {
    fn drop(&mut self) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = self.stop(&mut live) {
            tracing::error!(gsi = self.gsi, %error, "irqfd stays assigned");
        }
        // The next table drops the kernel's entry: no irqfd uses it any more.
        self.routes.lock().give_back(self.gsi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gsis_are_handed_out_above_the_pins_and_reused() {
        let mut table = Table::default();
        assert_eq!(table.take().unwrap(), 24);
        assert_eq!(table.take().unwrap(), 25);
        table.give_back(24);
        assert_eq!(table.take().unwrap(), 24);
    }

    #[test]
    fn the_table_ends_at_the_kernels_limit() {
        let mut table = Table::default();
        for _ in IOAPIC_PINS..MAX_ROUTES {
            table.take().unwrap();
        }
        assert!(table.take().is_err());
    }

    fn message(data: u32) -> MsiMessage {
        MsiMessage {
            address: 0x1_fee0_0000,
            data,
        }
    }

    #[test]
    fn many_messages_are_published_at_once_and_known_ones_not_again() {
        let mut table = Table::default();
        let gsis = [(); 2048].map(|()| table.take().unwrap());
        gsis.iter()
            .for_each(|gsi| table.prepare(*gsi, message(*gsi)));
        let mut calls = 0;
        for _ in 0..2 {
            table
                .publish_with(|table| {
                    calls += 1;
                    assert_eq!(table.entries().len(), 24 + gsis.len());
                    Ok(())
                })
                .unwrap();
            gsis.iter()
                .for_each(|gsi| table.prepare(*gsi, message(*gsi)));
        }
        assert_eq!(calls, 1);
    }

    #[test]
    fn what_the_kernel_refuses_is_in_no_later_table() {
        let mut table = Table::default();
        let [old, new] = [(); 2].map(|()| table.take().unwrap());
        table.prepare(old, message(1));
        table.publish_with(|_| Ok(())).unwrap();
        table.prepare(old, message(2));
        table.prepare(new, message(3));
        table
            .publish_with(|_| Err(io::ErrorKind::InvalidInput.into()))
            .unwrap_err();
        assert_eq!(table.messages[&old], Some(message(1)));
        assert_eq!(table.messages[&new], None);
        assert!(table.prepared.is_empty());
    }

    #[test]
    fn only_routes_with_a_message_are_published() {
        let mut table = Table::default();
        let gsi = table.take().unwrap();
        assert_eq!(table.entries().len(), 24);
        table.prepare(gsi, message(0x4021));
        let entries = table.entries();
        assert_eq!((entries.len(), entries[24].gsi), (25, 24));
        assert_eq!(entries[24].type_, KVM_IRQ_ROUTING_MSI);
    }
}
