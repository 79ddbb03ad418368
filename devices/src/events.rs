//! What happens to the machine while the guest runs: the power button, and slots that are filled
//! and emptied. The guest hears of it through a Generic Event Device (ACPI Specification 6.5, 5.6.9).
//!
//! An interrupt tells the guest's ACPI interpreter to read [`EVENT`] until it reads 0. Each read takes
//! one notification: for whom, and which. A guest that has let go of a device writes its slot's
//! number to [`EJECT`], and one that has done what a notification asked for says so at [`ANSWER`]. A slot
//! has at most one notification waiting, so nothing piles up for a guest that never reads.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::device::PortIndex;
use crate::device::{BusDevice, Effect};
use crate::warn_limited;

/// Offset of the event register, 32 bits, read-only: the slot's number, or 0 for the machine itself,
/// and in bits 23 to 16 the value of the notification. 0 if there is none.
pub const EVENT: u64 = 0;
/// Offset of the eject register, 32 bits, write-only: the number of the slot.
pub const EJECT: u64 = 4;
/// Offset of the answer register, 32 bits, write-only: the number of the slot.
pub const ANSWER: u64 = 8;
/// Bytes of registers.
pub const LEN: u64 = 12;

/// Notification of a slot: look whether something is there (ACPI Specification 6.5, 5.6.6).
pub const DEVICE_CHECK: u8 = 1;
/// Notification of a slot: let go of what is there.
pub const EJECT_REQUEST: u8 = 3;
/// Notification of the power button: it was pressed.
pub const POWER_BUTTON: u8 = 0x80;

/// The number by which the guest knows the slot of a root port.
pub fn slot_number(port: PortIndex) -> u16 {
    u16::try_from(port.get() + 1).unwrap_or(u16::MAX)
}

/// The registers of the events, and what waits to be read.
pub struct PlatformEvents {
    state: Mutex<State>,
    trigger: EventFd,
}

#[derive(Default)]
struct State {
    power_button: bool,
    slots: Vec<Slot>,
}

/// What the guest has yet to hear of a slot, and what is to be heard from it.
#[derive(Debug, Clone, Copy)]
struct Slot {
    port: PortIndex,
    occupied: bool,
    notification: Option<u8>,
    /// Notifications that were read, and not answered yet.
    unanswered: u32,
    /// What was in it was taken away unasked: what the guest says of the slot may be of that.
    stale: bool,
}

/// What the guest knows of an empty slot, from the best to fill to the worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SlotState {
    /// The guest knows that the slot is empty.
    Acknowledged,
    /// The guest has read that the slot was emptied, and may still be handling it: it could take a new device
    /// for the old one.
    Read,
    /// The guest has not read that the slot was emptied: it would take a new device for the old one.
    Unread,
}

impl PlatformEvents {
    /// Events of a machine whose `ports` have slots, told of by writing to `trigger`.
    pub fn new(ports: impl IntoIterator<Item = PortIndex>, trigger: EventFd) -> Self {
        let slots = ports.into_iter().map(|port| Slot {
            port,
            occupied: false,
            notification: None,
            unanswered: 0,
            stale: false,
        });
        let state = State {
            power_button: false,
            slots: slots.collect(),
        };
        Self {
            state: Mutex::new(state),
            trigger,
        }
    }

    /// Tells the guest that the power button was pressed.
    pub fn press_power_button(&self) {
        self.lock().power_button = true;
        self.ring();
    }

    /// Says that something is in a slot, of which a guest that runs has not been told.
    pub fn fill(&self, port: PortIndex) {
        self.change(port, |slot| slot.occupied = true);
    }

    /// Tells the guest that something is in a slot.
    pub fn announce(&self, port: PortIndex) {
        self.change(port, |slot| {
            slot.occupied = true;
            slot.notification = Some(DEVICE_CHECK);
        });
        self.ring();
    }

    /// Asks the guest to let go of what is in a slot; asks again if it was asked before.
    pub fn request_eject(&self, port: PortIndex) {
        self.change(port, |slot| {
            if slot.occupied {
                slot.notification = Some(EJECT_REQUEST);
            }
        });
        self.ring();
    }

    /// Says that a slot is empty, and tells a guest that has not let go of what was in it.
    pub fn empty(&self, port: PortIndex, tell: bool) {
        self.change(port, |slot| {
            slot.occupied = false;
            slot.notification = tell.then_some(DEVICE_CHECK);
            slot.stale |= tell;
        });
        if tell {
            self.ring();
        }
    }

    /// Whether something is in a slot that the guest has not let go of.
    pub fn is_occupied(&self, port: PortIndex) -> bool {
        let state = self.lock();
        let mut slots = state.slots.iter();
        slots.any(|slot| slot.port == port && slot.occupied)
    }

    /// What the guest knows of a slot that is empty.
    pub fn slot_state(&self, port: PortIndex) -> SlotState {
        let state = self.lock();
        let slot = state.slots.iter().find(|slot| slot.port == port);
        match slot.filter(|slot| slot.stale) {
            None => SlotState::Acknowledged,
            Some(slot) if slot.notification.is_none() => SlotState::Read,
            Some(_) => SlotState::Unread,
        }
    }

    /// Tells the guest again if it has not read all there is; whether that was so. An interrupt that
    /// comes while a booting guest has its line masked is lost.
    pub fn remind(&self) -> bool {
        let state = self.lock();
        let waits =
            state.power_button || state.slots.iter().any(|slot| slot.notification.is_some());
        drop(state);
        if waits {
            self.ring();
        }
        waits
    }

    /// Forgets what waits: a guest that starts looks at its slots by itself.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.power_button = false;
        for slot in &mut state.slots {
            slot.notification = None;
            slot.unanswered = 0;
            slot.stale = false;
        }
    }

    fn change(&self, port: PortIndex, change: impl FnOnce(&mut Slot)) {
        let mut state = self.lock();
        if let Some(slot) = state.slots.iter_mut().find(|slot| slot.port == port) {
            change(slot);
        }
    }

    fn ring(&self) {
        // Fails only when the counter is full, and then the interrupt is on its way.
        let _ = self.trigger.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The next notification, which is then no longer waiting.
    fn take(&mut self) -> u32 {
        if std::mem::take(&mut self.power_button) {
            return u32::from(POWER_BUTTON) << 16;
        }
        let next = self
            .slots
            .iter_mut()
            .find_map(|slot| Some((slot.notification.take()?, slot)));
        next.map_or(0, |(notification, slot)| {
            slot.unanswered = slot.unanswered.saturating_add(1);
            // It is of what is there now that the guest is asked to let go.
            slot.stale &= notification != EJECT_REQUEST;
            u32::from(notification) << 16 | u32::from(slot_number(slot.port))
        })
    }

    fn slot(&mut self, number: u32) -> Option<&mut Slot> {
        let mut slots = self.slots.iter_mut();
        slots.find(|slot| u32::from(slot_number(slot.port)) == number)
    }

    /// The slot that the guest has emptied. Only once: it is the owner who fills it again.
    fn eject(&mut self, number: u32) -> Option<PortIndex> {
        let slot = self.slot(number).filter(|slot| !slot.stale)?;
        slot.notification = None;
        std::mem::take(&mut slot.occupied).then_some(slot.port)
    }

    /// The guest has done what a notification of a slot asked for.
    fn answer(&mut self, number: u32) {
        if let Some(slot) = self.slot(number) {
            slot.unanswered = slot.unanswered.saturating_sub(1);
            slot.stale &= slot.unanswered > 0 || slot.notification.is_some();
        }
    }
}

impl BusDevice for PlatformEvents {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(event) if offset == EVENT => *event = self.lock().take().to_le_bytes(),
            // Anything narrower would lose the rest of an event.
            _ => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let Ok(number) = data.try_into().map(u32::from_le_bytes) else {
            return Effect::None;
        };
        if offset == ANSWER {
            self.lock().answer(number);
        }
        if offset != EJECT {
            return Effect::None;
        }
        let mut state = self.lock();
        match state.eject(number) {
            Some(port) => Effect::Eject(port),
            // Too late: that was taken away.
            None if state.slot(number).is_some_and(|slot| slot.stale) => Effect::None,
            None => {
                warn_limited!(
                    number,
                    "guest ejects from a slot that is empty or not there"
                );
                Effect::None
            }
        }
    }
}

#[cfg(test)]
mod tests;
