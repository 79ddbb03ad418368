//! How many slots of a VM devices take, before any of them is leased.

use std::collections::BTreeMap;

use super::AllocateError;
use super::choose::Pick;
use crate::base::bdf::HostBdf;

/// Refuses devices that need more slots than are `free`, if slots are counted.
pub(super) fn have_slots(picks: &[Pick<'_>], free: Option<usize>) -> Result<(), AllocateError> {
    let functions = picks.iter().filter_map(Pick::device);
    let physical = functions.filter(|device| device.physfn.is_none());
    let physical: Vec<HostBdf> = physical.map(|device| device.bdf).collect();
    let (whole, alone) = slots_of(&physical);
    let needed = picks.len() - physical.len() + whole + alone.len();
    match free {
        Some(free) if needed > free => Err(AllocateError::NoSlots {
            needed,
            free,
            alone: if alone.len() > 1 { alone } else { Vec::new() },
        }),
        _ => Ok(()),
    }
}

/// The slots of physical functions: how many hold a device with its function 0, and the functions that take one
/// each, as without function 0 a guest finds no other.
fn slots_of(functions: &[HostBdf]) -> (usize, Vec<HostBdf>) {
    let mut devices: BTreeMap<_, Vec<HostBdf>> = BTreeMap::new();
    for bdf in functions {
        let device = (bdf.domain(), bdf.bus(), bdf.device());
        devices.entry(device).or_default().push(*bdf);
    }
    let is_whole = |functions: &Vec<HostBdf>| functions.iter().any(|bdf| bdf.function() == 0);
    let (whole, parts): (Vec<_>, Vec<_>) = devices.into_values().partition(is_whole);
    (whole.len(), parts.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_a_device_share_a_slot_if_it_is_whole() {
        let slots = |devices: &[&str]| {
            let devices: Vec<HostBdf> = devices.iter().map(|bdf| bdf.parse().unwrap()).collect();
            let (whole, alone) = slots_of(&devices);
            whole + alone.len()
        };
        assert_eq!(slots(&[]), 0);
        assert_eq!(slots(&["01:00.0", "02:00.0", "01:00.1"]), 2);
        assert_eq!(slots(&["01:00.1", "01:00.2"]), 2);
        assert_eq!(slots(&["01:00.0", "0001:01:00.0"]), 2);
    }
}
