//! The guest's address space: sole owner of memory slots and bus ranges, for memory and I/O ports.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use gantry_devices::bus::{Bus, BusDevice, BusError};
use gantry_devices::mapping::HostMapping;
use gantry_devices::pci::{BarGuard, BarPlacement, BarSpace, BarSpaceError, Segment, SegmentKind};
use kvm_ioctls::{IoEventAddress, VmFd};

use crate::kvm::{Doorbell, MemorySlots, SlotGuard};

/// Memory slots, MMIO and ports of one VM. Every insertion returns a guard that removes it when dropped.
pub struct AddressSpace {
    vm: Arc<VmFd>,
    slots: Arc<MemorySlots>,
    mmio: Arc<Bus>,
    ports: Arc<Bus>,
    memory_claims: Arc<Claims>,
    port_claims: Arc<Claims>,
}

impl AddressSpace {
    /// The empty address space of a VM.
    pub fn new(vm: &Arc<VmFd>) -> Self {
        Self {
            vm: Arc::clone(vm),
            slots: MemorySlots::new(Arc::clone(vm)),
            mmio: Arc::default(),
            ports: Arc::default(),
            memory_claims: Arc::default(),
            port_claims: Arc::default(),
        }
    }

    /// The bus for memory accesses that trap.
    pub fn mmio(&self) -> &Bus {
        &self.mmio
    }

    /// The bus for I/O ports.
    pub fn ports(&self) -> &Bus {
        &self.ports
    }

    /// Shows RAM to the guest.
    ///
    /// # Errors
    /// The range is taken, or the hypervisor refused it.
    pub fn add_ram(&self, guest: u64, mapping: &Arc<HostMapping>) -> Result<Guard, BarSpaceError> {
        let size = mapping.size() as u64;
        let claim = Claims::claim(&self.memory_claims, guest, size)?;
        let slot = self.slots.map(guest, mapping, 0, size);
        let slot = slot.map_err(|source| BarSpaceError::Slot {
            guest,
            size,
            source,
        })?;
        let mut guard = Guard::empty(claim);
        guard.slots.push(slot);
        Ok(guard)
    }

    /// Has `device` answer the `len` bytes of memory from `base` on.
    ///
    /// # Errors
    /// The range is taken or makes no sense.
    pub fn add_mmio(
        &self,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<Guard, BusError> {
        trap(&self.memory_claims, &self.mmio, base, len, device)
    }

    /// Has `device` answer the `len` I/O ports from `base` on.
    ///
    /// # Errors
    /// The ports are taken or make no sense.
    pub fn add_ports(
        &self,
        base: u16,
        len: u16,
        device: Arc<dyn BusDevice>,
    ) -> Result<Guard, BusError> {
        trap(
            &self.port_claims,
            &self.ports,
            base.into(),
            len.into(),
            device,
        )
    }

    /// Reserves a range of memory, such as that of the interrupt controllers in the kernel, so that the guest
    /// can place no BAR there.
    ///
    /// # Errors
    /// The range is taken or makes no sense.
    pub fn reserve(&self, base: u64, len: u64) -> Result<Guard, BusError> {
        let claim = Claims::claim(&self.memory_claims, base, len)?;
        Ok(Guard::empty(claim))
    }

    fn map_segment(
        &self,
        placement: &BarPlacement,
        segment: &Segment,
        guard: &mut Guard,
    ) -> Result<(), BarSpaceError> {
        let base = placement.base.saturating_add(segment.offset);
        match &segment.kind {
            SegmentKind::Trapped { len, device } => {
                let bus = if placement.io {
                    &self.ports
                } else {
                    &self.mmio
                };
                guard
                    .trapped
                    .push(Trapped::insert(bus, base, *len, Arc::clone(device))?);
            }
            SegmentKind::Direct(mapping) => {
                let size = mapping.size() as u64;
                let slot = self.slots.map(base, mapping, 0, size);
                let slot = slot.map_err(|source| slot_error(base, size, source))?;
                guard.slots.push(slot);
            }
            SegmentKind::Doorbells { stride, events } => {
                for (index, event) in (0..).zip(events.iter()) {
                    let at = base.saturating_add(index * stride);
                    let at = match placement.io {
                        true => IoEventAddress::Pio(at),
                        false => IoEventAddress::Mmio(at),
                    };
                    let doorbell = Doorbell::new(&self.vm, at, event);
                    guard
                        .doorbells
                        .push(doorbell.map_err(|source| slot_error(base, *stride, source))?);
                }
            }
        }
        Ok(())
    }
}

fn slot_error(guest: u64, size: u64, source: io::Error) -> BarSpaceError {
    BarSpaceError::Slot {
        guest,
        size,
        source,
    }
}

fn trap(
    claims: &Arc<Claims>,
    bus: &Arc<Bus>,
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
) -> Result<Guard, BusError> {
    let claim = Claims::claim(claims, base, len)?;
    let mut guard = Guard::empty(claim);
    guard.trapped.push(Trapped::insert(bus, base, len, device)?);
    Ok(guard)
}

impl BarSpace for AddressSpace {
    fn map(&self, placement: &BarPlacement) -> Result<BarGuard, BarSpaceError> {
        let claims = if placement.io {
            &self.port_claims
        } else {
            &self.memory_claims
        };
        let claim = Claims::claim(claims, placement.base, placement.size)?;
        let mut guard = Guard::empty(claim);
        for segment in placement.segments.iter() {
            self.map_segment(placement, segment, &mut guard)?;
        }
        Ok(Box::new(guard))
    }
}

/// A range of the address space. Dropping it removes the range.
pub struct Guard {
    // Dropped in this order: first the handlers, last the claim to the range.
    doorbells: Vec<Doorbell>,
    trapped: Vec<Trapped>,
    slots: Vec<SlotGuard>,
    _claim: Claim,
}

impl Guard {
    /// A range in which there is nothing yet.
    fn empty(claim: Claim) -> Self {
        Self {
            doorbells: Vec::new(),
            trapped: Vec::new(),
            slots: Vec::new(),
            _claim: claim,
        }
    }
}

/// A range on a bus. Dropping it removes the range.
struct Trapped {
    bus: Arc<Bus>,
    base: u64,
}

impl Trapped {
    fn insert(
        bus: &Arc<Bus>,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<Self, BusError> {
        bus.insert(base, len, device)?;
        Ok(Self {
            bus: Arc::clone(bus),
            base,
        })
    }
}

impl Drop for Trapped {
    fn drop(&mut self) {
        self.bus.remove(self.base);
    }
}

/// The ranges that are taken, by memory slots and by buses. A memory slot and a trapped range must never
/// overlap, which neither the kernel nor a bus would notice alone.
#[derive(Default)]
struct Claims(Mutex<BTreeMap<u64, u64>>);

struct Claim {
    claims: Arc<Claims>,
    base: u64,
}

impl Claims {
    fn claim(claims: &Arc<Self>, base: u64, len: u64) -> Result<Claim, BusError> {
        let last = len.checked_sub(1).and_then(|more| base.checked_add(more));
        let last = last.ok_or(BusError::BadRange { base, len })?;
        let mut taken = claims.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((&other, _)) = taken
            .range(..=last)
            .next_back()
            .filter(|(_, end)| **end >= base)
        {
            return Err(BusError::Overlap { base, last, other });
        }
        taken.insert(base, last);
        Ok(Claim {
            claims: Arc::clone(claims),
            base,
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.base);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever guests do with their BARs: no two things have one address, and what has left is free again.
        #[test]
        fn claims_never_overlap_and_refuse_nothing_else(
            steps in proptest::collection::vec((any::<bool>(), 0_u64..64, 1_u64..16), 0..60),
        ) {
            let claims = Arc::new(Claims::default());
            let mut held: Vec<(u64, u64, Claim)> = Vec::new();
            for (take, base, len) in steps {
                if !take && !held.is_empty() {
                    held.swap_remove(base as usize % held.len());
                    continue;
                }
                let meets = |other: &(u64, u64, Claim)| base < other.0 + other.1 && other.0 < base + len;
                let free = !held.iter().any(meets);
                let claim = Claims::claim(&claims, base, len);
                prop_assert_eq!(claim.is_ok(), free);
                held.extend(claim.ok().map(|claim| (base, len, claim)));
            }
            drop(held);
            prop_assert!(claims.0.lock().unwrap().is_empty());
        }
    }

    #[test]
    fn claims_refuse_overlaps_and_come_back_when_dropped() {
        let claims = Arc::new(Claims::default());
        let first = Claims::claim(&claims, 0x1000, 0x1000).unwrap();
        for (base, len) in [(0x1fff, 1), (0, 0x1001), (0x1800, 0x10), (0, u64::MAX)] {
            assert!(
                Claims::claim(&claims, base, len).is_err(),
                "{base:#x} {len:#x}"
            );
        }
        let _below = Claims::claim(&claims, 0, 0x1000).unwrap();
        drop(first);
        let _again = Claims::claim(&claims, 0x1800, 0x10).unwrap();
    }
}
