//! Events of the machine while the guest runs: the power button, and slots that are filled and emptied. The
//! guest receives them through a Generic Event Device (ACPI Specification 6.5, 5.6.9).
//!
//! An interrupt tells the guest's ACPI interpreter to read [`EVENT`] until it reads 0. Each read takes one
//! notification, with its target. To eject a device the guest writes the slot's number to [`EJECT`], and
//! after it has handled a notification it writes the number to [`ANSWER`]. A slot has at most one waiting
//! notification, so that a guest that never reads uses no more memory.

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

/// Notification of a slot: check whether a device is there (ACPI Specification 6.5, 5.6.6).
pub const DEVICE_CHECK: u8 = 1;
/// Notification of a slot: eject the device.
pub const EJECT_REQUEST: u8 = 3;
/// Notification of the power button: it was pressed.
pub const POWER_BUTTON: u8 = 0x80;

/// The guest's number for the slot of a root port.
pub fn slot_number(port: PortIndex) -> u16 {
    u16::try_from(port.get() + 1).unwrap_or(u16::MAX)
}

/// The event registers and the waiting notifications.
pub struct PlatformEvents {
    state: Mutex<State>,
    trigger: EventFd,
}

#[derive(Default)]
struct State {
    power_button: bool,
    slots: Vec<Slot>,
}

/// A slot and its notifications.
#[derive(Debug, Clone, Copy)]
struct Slot {
    port: PortIndex,
    occupied: bool,
    notification: Option<u8>,
    /// Notifications that the guest has read and not answered.
    unanswered: u32,
    /// Its device was removed without the guest's consent: what the guest writes for this slot may refer to
    /// that device.
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
    /// Events of a machine whose `ports` have slots. Each event writes to `trigger`.
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
        self.raise();
    }

    /// Marks a slot as occupied, without a notification.
    pub fn fill(&self, port: PortIndex) {
        self.change(port, |slot| slot.occupied = true);
    }

    /// Tells the guest that a device is in a slot.
    pub fn announce(&self, port: PortIndex) {
        self.change(port, |slot| {
            slot.occupied = true;
            slot.notification = Some(DEVICE_CHECK);
        });
        self.raise();
    }

    /// Asks the guest to eject the device in a slot; asks again if it did so before.
    pub fn request_eject(&self, port: PortIndex) {
        self.change(port, |slot| {
            if slot.occupied {
                slot.notification = Some(EJECT_REQUEST);
            }
        });
        self.raise();
    }

    /// Marks a slot as empty. With `tell`, it tells the guest, which has not ejected the device.
    pub fn empty(&self, port: PortIndex, tell: bool) {
        self.change(port, |slot| {
            slot.occupied = false;
            slot.notification = tell.then_some(DEVICE_CHECK);
            slot.stale |= tell;
        });
        if tell {
            self.raise();
        }
    }

    /// Whether a device is in a slot that the guest has not ejected.
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

    /// Tells the guest again if a notification waits. Returns whether one does. An interrupt is lost if it
    /// arrives while a booting guest has its line masked.
    pub fn remind(&self) -> bool {
        let state = self.lock();
        let waits =
            state.power_button || state.slots.iter().any(|slot| slot.notification.is_some());
        drop(state);
        if waits {
            self.raise();
        }
        waits
    }

    /// Drops all waiting notifications: a guest checks its slots when it starts.
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

    fn raise(&self) {
        // It fails only when the counter is full: then the interrupt is already pending.
        let _ = self.trigger.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes the next waiting notification.
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
            // The guest is asked to eject the present device.
            slot.stale &= notification != EJECT_REQUEST;
            u32::from(notification) << 16 | u32::from(slot_number(slot.port))
        })
    }

    fn slot(&mut self, number: u32) -> Option<&mut Slot> {
        let mut slots = self.slots.iter_mut();
        slots.find(|slot| u32::from(slot_number(slot.port)) == number)
    }

    /// Marks a slot as ejected by the guest. `None` if it was so before: only the owner fills it again.
    fn eject(&mut self, number: u32) -> Option<PortIndex> {
        let slot = self.slot(number).filter(|slot| !slot.stale)?;
        slot.notification = None;
        std::mem::take(&mut slot.occupied).then_some(slot.port)
    }

    /// The guest has handled a notification of a slot.
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
            // A narrower access would lose the rest of an event.
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
            // Too late: that device was removed.
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
