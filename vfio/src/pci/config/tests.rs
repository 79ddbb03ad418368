//! Tests of the configuration space that guests get.

use std::sync::Mutex;

use gantry_devices::pci::{Backing, NoBacking};
use proptest::prelude::*;

use super::*;
use crate::testing;

const MSIX: Deliverable = Deliverable {
    msi: 0,
    msix: true,
    intx: false,
};
const NEITHER: Deliverable = Deliverable {
    msi: 0,
    msix: false,
    intx: false,
};

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

/// Hardware that remembers what is written to it.
#[derive(Default)]
struct Written(Mutex<Vec<Vec<u8>>>);

impl Backing for Written {
    fn read(&self, _offset: u16, _data: &mut [u8]) {}

    fn write(&self, _offset: u16, data: &[u8]) {
        self.0.lock().unwrap().push(data.to_vec());
    }
}

fn guest_reads(plan: &Plan, physical: &[u8], offset: u16) -> u32 {
    let mut data = [0; 4];
    plan.space.read(offset, &mut data, &Bytes(physical));
    u32::from_le_bytes(data)
}

#[test]
fn a_space_that_ends_early_reads_as_zeros_behind_its_end() {
    let physical = &testing::config()[..255];
    let short = plan(physical, NEITHER).unwrap();
    assert_eq!(guest_reads(&short, physical, 0x00), 0x0010_1b36);
    assert_eq!(guest_reads(&short, physical, 0xfc) >> 24, 0);
    assert!(plan(&physical[..63], NEITHER).is_err());
}

#[test]
fn the_header_is_that_of_a_lone_function_at_rest() {
    let physical = testing::config();
    let plan = plan(&physical, MSIX).unwrap();
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
    let plan = plan(&physical, MSIX).unwrap();
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
    let lone = plan(&physical, MSIX).unwrap();
    assert_eq!(guest_reads(&lone, &physical, 0x100), 0);
    physical[0x100..0x104].copy_from_slice(&0x2002_0001_u32.to_le_bytes());
    let first = plan(&physical, MSIX).unwrap();
    assert_eq!(guest_reads(&first, &physical, 0x100), 0x2402_0001);
    let conventional = plan(&physical[..256], MSIX).unwrap();
    assert_eq!(guest_reads(&conventional, &physical, 0x100), 0);
}

#[test]
fn msix_says_where_it_is_and_only_its_two_bits_are_written() {
    let mut plan = plan(&testing::config(), MSIX).unwrap();
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
    let plan = plan(&physical, NEITHER).unwrap();
    assert_eq!(plan.msix, None);
    let listed = walk_standard(|offset| guest_reads(&plan, &physical, offset));
    assert!(listed.iter().all(|cap| cap.id != CapabilityId::MSI_X));
}

#[test]
fn the_pin_is_the_devices_own_where_the_guest_gets_intx() {
    let physical = testing::config();
    let intx = Deliverable {
        intx: true,
        ..NEITHER
    };
    let plan = plan(&physical, intx).unwrap();
    assert_eq!(guest_reads(&plan, &physical, 0x3c), 0x0100);
}

#[test]
fn msi_is_emulated_where_the_host_can_deliver_it() {
    let physical = testing::config();
    let both = Deliverable {
        msi: 1,
        msix: true,
        intx: false,
    };
    let mut plan = plan(&physical, both).unwrap();
    let listed = walk_standard(|offset| guest_reads(&plan, &physical, offset));
    let ids: Vec<_> = listed.iter().map(|cap| cap.offset).collect();
    assert_eq!(
        ids,
        [testing::PM, testing::MSI, testing::EXPRESS, testing::MSIX]
    );
    let msi = plan.msi.unwrap();
    assert_eq!((msi.offset, msi.layout.size()), (testing::MSI, 24));
    let registers = |plan: &Plan| {
        let dwords = [0, 4, 8, 12, 16, 20];
        dwords.map(|at| guest_reads(plan, &physical, testing::MSI + at))
    };
    assert_eq!(registers(&plan), [0x0180_7005, 0, 0, 0, 0, 0], "off");
    for at in [0, 4, 8, 12, 16, 20] {
        plan.space.write(testing::MSI + at, &[0xff; 4], &NoBacking);
    }
    let written = [0x01f1_7005, 0xffff_fffc, 0xffff_ffff, 0xffff, 1, 0];
    assert_eq!(registers(&plan), written);
}

/// The table of capabilities that guests get: each in a space of its own, and written at each width.
#[test]
fn each_capability_is_shown_or_hidden() {
    let deliverable = Deliverable {
        msi: 1,
        msix: true,
        intx: false,
    };
    for id in 1..=0x15 {
        let mut physical = vec![0; 4096];
        physical[0x06] = 0x10;
        physical[0x34] = 0x40;
        physical[0x40] = id;
        physical[0x44..0x60].fill(0xaa);
        let plan = plan(&physical, deliverable).unwrap();
        let reads = |offset| guest_reads(&plan, &physical, offset);
        let shown = walk_standard(reads).iter().any(|cap| cap.id.0 == id);
        assert_eq!(shown, id != 0x14, "{id:#04x}");
        assert!(shown || reads(0x40) == 0, "{id:#04x}");
    }
    let hidden = [
        0x0e, 0x0f, 0x10, 0x12, 0x13, 0x15, 0x1b, 0x1d, 0x1e, 0x1f, 0x24,
    ];
    // Power budgeting, and what vendors define.
    let written = [0x04, 0x0b, 0x23];
    for id in 1_u16..=0x34 {
        let mut physical = vec![0; 4096];
        physical[0x100..0x104].copy_from_slice(&(0x1501_0003_u32).to_le_bytes());
        physical[0x150..0x154].copy_from_slice(&(0x0001_0000 | u32::from(id)).to_le_bytes());
        physical[0x154..0x158].fill(0xaa);
        let mut plan = plan(&physical, deliverable).unwrap();
        let device = Written::default();
        for data in [&[1][..], &[2; 2], &[4; 4]] {
            plan.space.write(0x154, data, &device);
        }
        let reached = device.0.into_inner().unwrap();
        let expected: &[&[u8]] = match written.contains(&id) {
            true => &[&[1], &[2; 2], &[4; 4]],
            false => &[],
        };
        assert_eq!(reached, expected, "{id:#06x}");
        let reads = |offset| guest_reads(&plan, &physical, offset);
        let listed = walk_extended(reads);
        let shown = listed.iter().any(|cap| cap.offset == 0x150);
        assert_eq!(shown, !hidden.contains(&id), "{id:#06x}");
        let registers = if shown { 0xaaaa_aaaa } else { 0 };
        assert_eq!(reads(0x154), registers, "{id:#06x}");
        assert!(listed.iter().any(|cap| cap.offset == 0x100));
    }
}

#[test]
fn power_states_are_those_that_the_function_has() {
    let plan = plan(&testing::config(), MSIX).unwrap();
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
    let there = plan(&physical, MSIX).unwrap();
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
    let plain = plan(&ordinary, MSIX).unwrap();
    assert_eq!(guest_reads(&plain, &ordinary, testing::EXPRESS + 0x0c), 0);
}

#[test]
fn what_is_no_endpoint_is_refused() {
    let mut bridge = testing::config();
    bridge[0x0e] = 0x81;
    assert!(plan(&bridge, MSIX).unwrap_err().contains("bridge"));
    assert!(plan(&[0xff; 4096], MSIX).unwrap_err().contains("all ones"));
    assert!(plan(&[], MSIX).is_err());
    // VFIO answers the vendor's id itself.
    let mut gone = [0xff; 4096];
    gone[..4].copy_from_slice(&testing::config()[..4]);
    assert!(plan(&gone, MSIX).unwrap_err().contains("all ones"));
}

/// TRAPS 14: pointers in a circle, and lists that run into nothing.
#[test]
fn broken_lists_end() {
    let mut circle = testing::config();
    circle[usize::from(testing::MSIX) + 1] = testing::PM as u8;
    circle[0x240..0x244].copy_from_slice(&0x1001_0003_u32.to_le_bytes());
    let plan = plan(&circle, MSIX).unwrap();
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
        if let Ok(plan) = plan(&physical, Deliverable { msi: 0, msix, intx: false }) {
            let reads = |offset| guest_reads(&plan, &physical, offset);
            for found in walk_standard(reads) {
                prop_assert_ne!(found.id, CapabilityId::MSI);
            }
            for found in walk_extended(reads) {
                prop_assert_ne!(capabilities::extended(found.id), Treatment::Hidden);
            }
        }
    }
}
