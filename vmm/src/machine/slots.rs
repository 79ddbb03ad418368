//! The slots that devices can be plugged into while the guest runs.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gantry_devices::events::{PlatformEvents, SlotState};
use gantry_devices::pci::{BarSpace, PciSegment, PortIndex};

/// The slots of a running VM. The guest assigns their bus numbers and acknowledges ejects, so both are looked
/// up each time.
#[derive(Clone)]
pub struct SlotTable {
    ports: Arc<[PortIndex]>,
    pci: Arc<PciSegment>,
    space: Arc<dyn BarSpace + Send + Sync>,
    events: Arc<PlatformEvents>,
    /// Slots whose devices were taken out but may still be reached by the guest, and may still write to RAM.
    draining: Arc<Mutex<BTreeSet<PortIndex>>>,
}

/// Dropping it says that the devices of a slot have stopped: the slot can be filled again.
pub struct DrainGuard {
    draining: Arc<Mutex<BTreeSet<PortIndex>>>,
    port: PortIndex,
}

impl Drop for DrainGuard {
    fn drop(&mut self) {
        lock(&self.draining).remove(&self.port);
    }
}

impl SlotTable {
    /// The slots of these ports, with BARs in `space`.
    pub fn new(
        ports: impl IntoIterator<Item = PortIndex>,
        pci: &Arc<PciSegment>,
        space: Arc<dyn BarSpace + Send + Sync>,
        events: &Arc<PlatformEvents>,
    ) -> Self {
        Self {
            ports: ports.into_iter().collect(),
            pci: Arc::clone(pci),
            space,
            events: Arc::clone(events),
            draining: Arc::default(),
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.ports.len()
    }

    /// The PCI segment with all ports, hot-plug slots or not.
    pub fn pci(&self) -> &Arc<PciSegment> {
        &self.pci
    }

    /// What the guest is told of the slots.
    pub fn events(&self) -> &PlatformEvents {
        &self.events
    }

    /// The free slots, those that the guest has acknowledged as empty first. The caller knows which are
    /// `occupied`.
    pub fn free(&self, occupied: impl Fn(PortIndex) -> bool) -> Vec<PortIndex> {
        let draining = lock(&self.draining);
        let ports = self.ports.iter().copied();
        let empty = ports.filter(|port| !occupied(*port) && !draining.contains(port));
        let mut free: Vec<_> = empty
            .map(|port| (self.events.slot_state(port), port))
            .filter(|(state, _)| *state < SlotState::Unread)
            .collect();
        free.sort();
        free.into_iter().map(|(_, port)| port).collect()
    }

    /// The bus behind a port, as the guest has numbered it.
    pub fn bus(&self, port: PortIndex) -> u8 {
        let found = self.pci.ports().find(|(other, ..)| *other == port);
        found.map_or(0, |(_, _, port)| port.secondary_bus())
    }

    /// Keeps a slot from being filled until its former devices have stopped.
    pub fn drain(&self, port: PortIndex) -> DrainGuard {
        lock(&self.draining).insert(port);
        DrainGuard {
            draining: Arc::clone(&self.draining),
            port,
        }
    }

    /// Maps what could not be mapped as long as devices that have left were in its place.
    pub fn retry_refused(&self) {
        self.pci.retry_refused(&*self.space);
    }

    /// Whether a device is still on its way out of a slot.
    #[cfg(test)]
    pub fn is_draining(&self, port: PortIndex) -> bool {
        lock(&self.draining).contains(&port)
    }
}

fn lock(draining: &Mutex<BTreeSet<PortIndex>>) -> MutexGuard<'_, BTreeSet<PortIndex>> {
    draining.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An address space in which nothing is mapped.
#[cfg(test)]
pub struct NoSpace;

#[cfg(test)]
impl BarSpace for NoSpace {
    fn map(
        &self,
        _: &gantry_devices::pci::BarPlacement,
    ) -> Result<gantry_devices::pci::BarGuard, gantry_devices::pci::BarSpaceError> {
        Ok(Box::new(()))
    }
}
