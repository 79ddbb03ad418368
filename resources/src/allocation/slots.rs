//! How many slots of a VM devices take, before any of them is leased.

use std::collections::BTreeMap;

use super::choose::{Pick, choose};
use super::{AllocateError, Look};
use crate::allocation::Lease;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::pools::request::{Placement, Request};

/// The slots that the requests would take as things are, for a VM that has the leases `own`.
pub(crate) fn slots_needed(
    paths: &HostPaths,
    requests: &[Request],
    placement: &Placement,
    own: &[&Lease],
) -> Result<usize, AllocateError> {
    let look = Look::at(paths)?.beside(own);
    let picks = choose(look.view(), requests, placement)?;
    let functions = picks.iter().filter_map(Pick::device);
    let physical = functions.filter(|device| device.physfn.is_none());
    let physical: Vec<HostBdf> = physical.map(|device| device.bdf).collect();
    Ok(picks.len() - physical.len() + slots_of(&physical))
}

/// The slots of physical functions: those of one device share a slot if function 0 is among them, without which a
/// guest finds no other.
fn slots_of(functions: &[HostBdf]) -> usize {
    let mut devices: BTreeMap<_, Vec<u8>> = BTreeMap::new();
    for bdf in functions {
        let device = (bdf.domain(), bdf.bus(), bdf.device());
        devices.entry(device).or_default().push(bdf.function());
    }
    let slots = devices
        .values()
        .map(|functions| match functions.contains(&0) {
            true => 1,
            false => functions.len(),
        });
    slots.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_a_device_share_a_slot_if_it_is_whole() {
        let slots = |devices: &[&str]| {
            let devices: Vec<HostBdf> = devices.iter().map(|bdf| bdf.parse().unwrap()).collect();
            slots_of(&devices)
        };
        assert_eq!(slots(&[]), 0);
        assert_eq!(slots(&["01:00.0", "02:00.0", "01:00.1"]), 2);
        assert_eq!(slots(&["01:00.1", "01:00.2"]), 2);
        assert_eq!(slots(&["01:00.0", "0001:01:00.0"]), 2);
    }
}
