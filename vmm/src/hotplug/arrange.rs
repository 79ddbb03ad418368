//! Which devices share a slot.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use gantry_resources::base::HostBdf;

use crate::passthrough::FunctionId;

/// Sorts functions into slots: for each slot, the indexes of its functions and their function numbers. The
/// functions of one host device share a slot and keep their numbers if function 0 is among them. Every other
/// function has a slot of its own, and so has every virtual function: a client that detaches a slot loses all
/// functions in it. `None` is a device that is none of the host's.
pub fn arrange(devices: &[Option<FunctionId>]) -> Vec<Vec<(usize, u8)>> {
    let number = |device: &FunctionId| device.name.pci().map_or(0, HostBdf::function);
    // The host device that a function is a part of, unless it is one of its own.
    let place = |device: &FunctionId| {
        let bdf = device.name.pci().filter(|_| !device.virtual_function)?;
        Some((bdf.domain(), bdf.bus(), bdf.device()))
    };
    let first = devices.iter().flatten().filter(|one| number(one) == 0);
    let whole: BTreeSet<_> = first.filter_map(place).collect();
    let mut slots: Vec<(Option<_>, Vec<(usize, u8)>)> = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        let shared = device.and_then(|device| {
            let place = place(&device).filter(|place| whole.contains(place))?;
            Some((place, number(&device)))
        });
        let (place, number) = shared.map_or((None, 0), |(place, number)| (Some(place), number));
        let mut others = slots.iter_mut();
        match others.find(|(other, _)| place.is_some() && *other == place) {
            Some((_, slot)) => slot.push((index, number)),
            None => slots.push((place, vec![(index, number)])),
        }
    }
    let sorted = slots.into_iter().map(|(_, mut slot)| {
        // A guest looks for other functions only if it finds function 0, so function 0 comes last.
        slot.sort_by_key(|(_, function)| Reverse(*function));
        slot
    });
    sorted.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arranged(devices: &[&str]) -> Vec<Vec<(usize, u8)>> {
        arrange(&functions(devices, false))
    }

    fn functions(devices: &[&str], virtual_function: bool) -> Vec<Option<FunctionId>> {
        let function = |text: &&str| {
            Some(FunctionId {
                name: text.parse().unwrap(),
                virtual_function,
            })
        };
        devices.iter().map(function).collect()
    }

    #[test]
    fn functions_of_a_device_stay_together_if_it_is_whole() {
        assert_eq!(arranged(&[]), Vec::<Vec<_>>::new());
        assert_eq!(
            arranged(&["01:00.0", "02:00.0", "01:00.1"]),
            [vec![(2, 1), (0, 0)], vec![(1, 0)]]
        );
        // Without function 0 a guest would find none of them.
        assert_eq!(
            arranged(&["01:00.1", "01:00.2"]),
            [vec![(0, 0)], vec![(1, 0)]]
        );
        assert_eq!(
            arranged(&["01:00.3", "0001:01:00.0", "01:00.0"]),
            [vec![(0, 3), (2, 0)], vec![(1, 0)]]
        );
    }

    #[test]
    fn what_is_no_device_of_the_host_has_a_slot_of_its_own() {
        let mut devices = functions(&["01:00.1", "01:00.0"], false);
        devices.insert(1, None);
        devices.push(None);
        let slots = [vec![(0, 1), (2, 0)], vec![(1, 0)], vec![(3, 0)]];
        assert_eq!(arrange(&devices), slots);
    }

    #[test]
    fn virtual_functions_have_slots_of_their_own() {
        let mut devices = functions(&["03:10.0", "03:10.2", "03:10.1"], true);
        devices.extend(functions(&["01:00.1", "01:00.0"], false));
        assert_eq!(
            arrange(&devices),
            [
                vec![(0, 0)],
                vec![(1, 0)],
                vec![(2, 0)],
                vec![(3, 1), (4, 0)]
            ]
        );
        // With ARI they may have the address of a function of the card itself.
        let mut devices = functions(&["01:00.0"], false);
        devices.extend(functions(&["01:00.1"], true));
        assert_eq!(arrange(&devices), [vec![(0, 0)], vec![(1, 0)]]);
    }
}
