//! Which devices share a slot.

use std::cmp::Reverse;

use gantry_resources::base::HostBdf;

use crate::passthrough::FunctionId;

/// Sorts functions into slots: for each slot, the indexes of its functions and their function numbers. The
/// functions of one host device share a slot and keep their numbers if function 0 is among them. Every other
/// function has a slot of its own, and so has every virtual function: a client that detaches a slot loses all
/// functions in it.
pub fn arrange(devices: &[FunctionId]) -> Vec<Vec<(usize, u8)>> {
    let place = |device: &FunctionId| match device.name.pci() {
        Some(bdf) if !device.virtual_function => Ok((bdf.domain(), bdf.bus(), bdf.device())),
        _ => Err(device.name),
    };
    let number = |device: &FunctionId| device.name.pci().map_or(0, HostBdf::function);
    let whole = |device: &FunctionId| {
        devices
            .iter()
            .any(|other| place(other) == place(device) && number(other) == 0)
    };
    let mut slots: Vec<Vec<(usize, u8)>> = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        let same = |slot: &&mut Vec<(usize, u8)>| {
            slot.iter().any(|(other, _)| {
                devices.get(*other).map(place) == Some(place(device))
                    && devices.get(*other).is_some_and(whole)
            })
        };
        match slots.iter_mut().find(same).filter(|_| whole(device)) {
            Some(slot) => slot.push((index, number(device))),
            None if whole(device) => slots.push(vec![(index, number(device))]),
            None => slots.push(vec![(index, 0)]),
        }
    }
    for slot in &mut slots {
        // A guest looks for other functions only if it finds function 0, so function 0 comes last.
        slot.sort_by_key(|(_, function)| Reverse(*function));
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arranged(devices: &[&str]) -> Vec<Vec<(usize, u8)>> {
        arrange(&functions(devices, false))
    }

    fn functions(devices: &[&str], virtual_function: bool) -> Vec<FunctionId> {
        let function = |text: &&str| FunctionId {
            name: text.parse().unwrap(),
            virtual_function,
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
