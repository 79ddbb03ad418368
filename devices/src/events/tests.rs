//! Slots, buttons and what the guest has read of them.

use proptest::prelude::*;

use super::*;
use crate::pci::PciSegment;

fn ports(count: usize) -> Vec<PortIndex> {
    let mut segment = PciSegment::new([0..=0xff]).unwrap();
    (0..count)
        .map(|_| segment.add_root_port(0).unwrap())
        .collect()
}

fn events(count: usize) -> (Vec<PortIndex>, PlatformEvents) {
    let ports = ports(count);
    let trigger = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    (ports.clone(), PlatformEvents::new(ports, trigger))
}

fn next(events: &PlatformEvents) -> (u16, u8) {
    let mut data = [0; 4];
    events.read(EVENT, &mut data);
    let event = u32::from_le_bytes(data);
    (event as u16, (event >> 16) as u8)
}

fn eject(events: &PlatformEvents, number: u32) -> Option<PortIndex> {
    match events.write(EJECT, &number.to_le_bytes()) {
        Effect::Eject(port) => Some(port),
        _ => None,
    }
}

#[test]
fn each_event_is_read_once() {
    let (ports, events) = events(3);
    assert_eq!(next(&events), (0, 0));
    events.announce(ports[2]);
    events.press_power_button();
    events.press_power_button();
    assert_eq!(events.trigger.read().unwrap(), 3);
    assert_eq!(next(&events), (0, POWER_BUTTON));
    assert!(events.remind());
    assert_eq!(events.trigger.read().unwrap(), 1);
    assert_eq!(next(&events), (3, DEVICE_CHECK));
    assert!(!events.remind());
    assert_eq!(next(&events), (0, 0));
}

#[test]
fn a_slot_is_filled_asked_for_and_emptied() {
    let (ports, events) = events(2);
    events.request_eject(ports[0]);
    assert_eq!(next(&events), (0, 0), "nothing to let go of");
    assert_eq!(eject(&events, 1), None);
    events.announce(ports[0]);
    // A guest that has not looked yet is asked to let go at once.
    events.request_eject(ports[0]);
    assert_eq!(next(&events), (1, EJECT_REQUEST));
    events.request_eject(ports[0]);
    assert_eq!(next(&events), (1, EJECT_REQUEST), "asked again");
    assert_eq!(eject(&events, 1), Some(ports[0]));
    assert_eq!(eject(&events, 1), None, "only once");
    events.empty(ports[0], false);
    assert_eq!(next(&events), (0, 0));
    events.announce(ports[0]);
    assert_eq!(next(&events), (1, DEVICE_CHECK));
}

#[test]
fn a_guest_that_was_not_asked_is_told() {
    let (ports, events) = events(1);
    events.fill(ports[0]);
    assert_eq!(next(&events), (0, 0));
    events.empty(ports[0], true);
    assert_eq!(next(&events), (1, DEVICE_CHECK));
    assert_eq!(eject(&events, 1), None);
}

fn answer(events: &PlatformEvents, number: u32) {
    let _ = events.write(ANSWER, &number.to_le_bytes());
}

#[test]
fn a_slot_that_was_emptied_unasked_is_known_to_be_once_the_guest_has_looked() {
    let (ports, events) = events(1);
    let port = ports[0];
    events.announce(port);
    assert_eq!(next(&events), (1, DEVICE_CHECK));
    events.empty(port, true);
    assert_eq!(events.slot_state(port), SlotState::Unread);
    answer(&events, 1);
    assert_eq!(
        events.slot_state(port),
        SlotState::Unread,
        "that was the first"
    );
    assert_eq!(next(&events), (1, DEVICE_CHECK));
    assert_eq!(events.slot_state(port), SlotState::Read);
    answer(&events, 1);
    assert_eq!(events.slot_state(port), SlotState::Acknowledged);
    // Both are read before either is answered.
    events.announce(port);
    next(&events);
    events.empty(port, true);
    next(&events);
    answer(&events, 1);
    assert_eq!(events.slot_state(port), SlotState::Read);
    answer(&events, 1);
    assert_eq!(events.slot_state(port), SlotState::Acknowledged);
    answer(&events, 1);
    answer(&events, 9);
    events.announce(port);
    events.empty(port, false);
    assert_eq!(
        events.slot_state(port),
        SlotState::Acknowledged,
        "the guest did it"
    );
}

#[test]
fn a_late_eject_does_not_reach_what_came_since() {
    let (ports, events) = events(1);
    let port = ports[0];
    events.fill(port);
    events.request_eject(port);
    assert_eq!(next(&events), (1, EJECT_REQUEST));
    // The guest takes too long.
    events.empty(port, true);
    assert_eq!(next(&events), (1, DEVICE_CHECK));
    events.announce(port);
    assert_eq!(eject(&events, 1), None);
    assert!(events.is_occupied(port));
    // Once it is asked to let go of what is there now, it may.
    events.request_eject(port);
    assert_eq!(eject(&events, 1), None, "it has not read that");
    assert_eq!(next(&events), (1, EJECT_REQUEST));
    assert_eq!(eject(&events, 1), Some(port));
    assert!(!events.is_occupied(port));
}

#[test]
fn a_guest_may_eject_by_itself_once_it_knows_what_is_there() {
    let (ports, events) = events(1);
    let port = ports[0];
    events.fill(port);
    events.empty(port, true);
    next(&events);
    events.announce(port);
    next(&events);
    answer(&events, 1);
    assert_eq!(eject(&events, 1), None);
    answer(&events, 1);
    assert_eq!(eject(&events, 1), Some(port));
    events.fill(port);
    events.empty(port, true);
    events.reset();
    assert_eq!(events.slot_state(port), SlotState::Acknowledged);
}

#[test]
fn a_reset_forgets_what_waits_and_keeps_what_is_there() {
    let (ports, events) = events(1);
    events.announce(ports[0]);
    events.press_power_button();
    events.reset();
    assert_eq!(next(&events), (0, 0));
    assert_eq!(eject(&events, 1), Some(ports[0]));
}

proptest! {
    /// Whatever a guest does, a slot is ejected at most once for each time that it was filled,
    /// and the guest's reads come to an end.
    #[test]
    fn ejects_follow_fillings(deeds in prop::collection::vec((0..5_u8, 0..4_usize, any::<u64>()), 0..200)) {
        let (ports, events) = events(3);
        let mut filled = [false; 3];
        for (deed, slot, anything) in deeds {
            let number = slot as u32;
            match (deed, slot.checked_sub(1)) {
                (0, Some(slot)) if !filled[slot] => {
                    events.announce(ports[slot]);
                    filled[slot] = true;
                }
                (1, Some(slot)) => events.request_eject(ports[slot]),
                (2, _) => {
                    let ejected = eject(&events, number);
                    let was = slot.checked_sub(1).is_some_and(|slot| filled[slot]);
                    prop_assert_eq!(ejected.is_some(), was);
                    if let Some(port) = ejected {
                        filled[port.get()] = false;
                    }
                }
                (3, _) => {
                    let mut data = vec![0; (anything % 9) as usize];
                    events.read(anything >> 8, &mut data);
                    let _ = events.write(anything >> 8 | 8, &data);
                }
                _ => {
                    let read = (0..10).take_while(|_| next(&events) != (0, 0)).count();
                    prop_assert!(read <= 3);
                }
            }
        }
    }
}
