//! Tests of the configuration space that guests get.

use gantry_devices::pci::{Backing, NoBacking};
use proptest::prelude::*;

use super::*;
use crate::testing;

/// The hardware, as far as configuration space goes.
struct Bytes<'a>(&'a [u8]);

impl Backing for Bytes<'_> {
    fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = self.0[at];
        }
    }

    fn write(&self, _offset: u16, _data: &[u8]) {}
}

fn guest_reads(plan: &Plan, physical: &[u8], offset: u16) -> u32 {
    let mut data = [0; 4];
    plan.space.read(offset, &mut data, &Bytes(physical));
    u32::from_le_bytes(data)
}

#[test]
fn a_space_that_ends_early_reads_as_zeros_behind_its_end() {
    let physical = &testing::config()[..255];
    let short = plan(physical, false).unwrap();
    assert_eq!(guest_reads(&short, physical, 0x00), 0x0010_1b36);
    assert_eq!(guest_reads(&short, physical, 0xfc) >> 24, 0);
    assert!(plan(&physical[..63], false).is_err());
}

#[test]
fn the_header_is_that_of_a_lone_function_at_rest() {
    let physical = testing::config();
    let plan = plan(&physical, true).unwrap();
    let reads = |offset| guest_reads(&plan, &physical, offset);
    assert_eq!(reads(0x00), 0x0010_1b36);
    assert_eq!(
        reads(0x04),
        0x0010_0000,
        "command off, INTx not asserted, capabilities"
    );
    assert_eq!(reads(0x08), 0x0108_0202);
    assert_eq!(reads(0x0c), 0x0000_0000, "one function, no self test");
    assert_eq!(reads(0x34) & 0xff, u32::from(testing::PM));
    assert_eq!(reads(0x3c), 0, "no interrupt pin");
}

#[test]
fn capabilities_that_guests_do_not_get_are_neither_listed_nor_readable() {
    let physical = testing::config();
    let plan = plan(&physical, true).unwrap();
    let reads = |offset| guest_reads(&plan, &physical, offset);
    let listed: Vec<_> = walk_standard(reads).iter().map(|cap| cap.offset).collect();
    assert_eq!(listed, [testing::PM, testing::EXPRESS, testing::MSIX]);
    let hidden = (testing::MSI..testing::MSI + 24).step_by(4);
    assert!(hidden.into_iter().all(|offset| reads(offset) == 0));

    let listed: Vec<_> = walk_extended(reads).iter().map(|cap| cap.offset).collect();
    assert_eq!(listed, [0x140, 0x240]);
    assert_eq!(
        reads(0x100),
        0x1401_0000,
        "an empty capability begins the list"
    );
    let hidden = (0x200..0x240).step_by(4).chain([0x104]);
    assert!(hidden.into_iter().all(|offset| reads(offset) == 0));
}

#[test]
fn extended_lists_may_be_empty_or_begin_with_what_is_kept() {
    let mut physical = testing::config();
    physical[0x100..0x104].copy_from_slice(&0x0001_000e_u32.to_le_bytes());
    let lone = plan(&physical, true).unwrap();
    assert_eq!(guest_reads(&lone, &physical, 0x100), 0);
    physical[0x100..0x104].copy_from_slice(&0x2002_0001_u32.to_le_bytes());
    let first = plan(&physical, true).unwrap();
    assert_eq!(guest_reads(&first, &physical, 0x100), 0x2402_0001);
    let conventional = plan(&physical[..256], true).unwrap();
    assert_eq!(guest_reads(&conventional, &physical, 0x100), 0);
}

#[test]
fn msix_says_where_it_is_and_only_its_two_bits_are_written() {
    let mut plan = plan(&testing::config(), true).unwrap();
    let msix = plan.msix.unwrap();
    assert_eq!((msix.control, msix.layout.vectors), (testing::MSIX + 2, 65));
    let at = |offset| InBar { bar: 0, offset };
    assert_eq!(msix.layout.table, at(testing::MSIX_TABLE));
    assert_eq!(msix.layout.pba, at(testing::MSIX_PBA));
    plan.space.write(testing::MSIX, &[0xff; 4], &NoBacking);
    let header: [u8; 4] = plan.space.get(testing::MSIX);
    assert_eq!(header, [0x11, 0, 64, 0xc0]);
}

#[test]
fn msix_that_the_host_cannot_deliver_is_hidden() {
    let physical = testing::config();
    let plan = plan(&physical, false).unwrap();
    assert_eq!(plan.msix, None);
    let listed = walk_standard(|offset| guest_reads(&plan, &physical, offset));
    assert!(listed.iter().all(|cap| cap.id != CapabilityId::MSI_X));
}

#[test]
fn power_states_are_those_that_the_function_has() {
    let plan = plan(&testing::config(), true).unwrap();
    let power = plan.power.unwrap();
    assert_eq!(power.control, testing::PM + 4);
    assert_eq!(
        [0, 1, 2, 3].map(|state| power.supports(state)),
        [true, false, true, true]
    );
    let [low]: [u8; 1] = plan.space.get(power.control);
    assert_eq!(low, 0x08, "in D0, and what else the register says");
}

#[test]
fn an_endpoint_of_the_root_complex_becomes_one_behind_a_port() {
    let physical = testing::config();
    let there = plan(&physical, true).unwrap();
    assert_eq!(guest_reads(&there, &physical, testing::EXPRESS) >> 16, 0x02);
    assert_eq!(
        guest_reads(&there, &physical, testing::EXPRESS + 0x0c),
        0x11
    );
    assert_eq!(
        guest_reads(&there, &physical, testing::EXPRESS + 0x10) >> 16,
        0x11
    );
    let mut ordinary = physical.clone();
    ordinary[usize::from(testing::EXPRESS) + 2] = 0x02;
    let plain = plan(&ordinary, true).unwrap();
    assert_eq!(guest_reads(&plain, &ordinary, testing::EXPRESS + 0x0c), 0);
}

#[test]
fn what_is_no_endpoint_is_refused() {
    let mut bridge = testing::config();
    bridge[0x0e] = 0x81;
    assert!(plan(&bridge, true).unwrap_err().contains("bridge"));
    assert!(plan(&[0xff; 4096], true).unwrap_err().contains("all ones"));
    assert!(plan(&[], true).is_err());
}

/// TRAPS 14: pointers in a circle, and lists that run into nothing.
#[test]
fn broken_lists_end() {
    let mut circle = testing::config();
    circle[usize::from(testing::MSIX) + 1] = testing::PM as u8;
    circle[0x240..0x244].copy_from_slice(&0x1001_0003_u32.to_le_bytes());
    let plan = plan(&circle, true).unwrap();
    let reads = |offset| guest_reads(&plan, &circle, offset);
    assert_eq!(reads(testing::MSIX) >> 8 & 0xff, 0);
    assert_eq!(reads(0x240) >> 20, 0);
}

proptest! {
    #[test]
    fn any_device_is_planned_or_refused(
        mut physical in proptest::collection::vec(any::<u8>(), 4096),
        lists in proptest::collection::vec((0_u16..64, 0_u8..24, any::<u8>()), 0..8),
        msix in any::<bool>(),
    ) {
        physical[0x0e] &= 0x80;
        physical[0x06] |= 0x10;
        for (slot, id, next) in lists {
            physical[usize::from(slot) * 4] = id;
            physical[usize::from(slot) * 4 + 1] = next;
        }
        if let Ok(plan) = plan(&physical, msix) {
            let reads = |offset| guest_reads(&plan, &physical, offset);
            for found in walk_standard(reads) {
                prop_assert_ne!(found.id, CapabilityId::MSI);
            }
            for found in walk_extended(reads) {
                prop_assert!(!HIDDEN_EXTENDED.contains(&found.id));
            }
        }
    }
}
