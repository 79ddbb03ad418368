//! The MSI-X table: what a write changes.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const MESSAGE: MsiMessage = MsiMessage {
    address: 0xfee0_1000,
    data: 0x41,
};

/// Writes a whole entry, and unmasks it.
fn arm(table: &mut MsixTable, vector: u64, message: MsiMessage) -> Changes {
    let at = vector * ENTRY_SIZE;
    let mut changes = table.write_table(at, &message.address.to_le_bytes());
    changes.extend(table.write_table(at + 8, &message.data.to_le_bytes()));
    changes.extend(table.write_table(at + 12, &0_u32.to_le_bytes()));
    changes
}

fn dword(table: &MsixTable, offset: u64) -> u32 {
    let mut data = [0; 4];
    table.read_table(offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn vectors_start_masked_and_off() {
    let table = MsixTable::new(3);
    assert_eq!(table.control(), 2);
    assert!(!table.is_enabled());
    for vector in 0..3 {
        assert_eq!(dword(&table, vector * ENTRY_SIZE + 12), 1);
    }
    assert_eq!((table.table_len(), table.pba_len()), (48, 8));
}

#[test]
fn a_vector_is_effective_when_nothing_masks_it() {
    let mut table = MsixTable::new(4);
    assert_eq!(arm(&mut table, 2, MESSAGE), []);
    assert_eq!(
        table.write_control(2, &0x8000_u16.to_le_bytes()),
        [(2, Some(MESSAGE))]
    );
    assert_eq!(
        table.write_control(2, &0xc000_u16.to_le_bytes()),
        [(2, None)]
    );
    assert_eq!(
        table.write_control(2, &0x8000_u16.to_le_bytes()),
        [(2, Some(MESSAGE))]
    );
    let mask = table.write_table(2 * ENTRY_SIZE + 12, &[1, 0, 0, 0]);
    assert_eq!(mask, [(2, None)]);
    let moved = MsiMessage {
        data: 0x42,
        ..MESSAGE
    };
    assert_eq!(arm(&mut table, 2, moved), [(2, Some(moved))]);
    assert_eq!(table.reset(), [(2, None)]);
    assert_eq!(dword(&table, 2 * ENTRY_SIZE), 0);
}

#[test]
fn every_width_of_a_control_write_counts_and_the_size_is_read_only() {
    let whole: [(u16, &[u8]); 3] = [
        (0, &[0x11, 0x70, 0xff, 0xbf]),
        (2, &[0xff, 0xbf]),
        (3, &[0xbf]),
    ];
    for (offset, data) in whole {
        let mut table = MsixTable::new(8);
        table.write_control(offset, data);
        assert_eq!(table.control(), 0x8007, "{offset} {data:?}");
    }
    let mut table = MsixTable::new(8);
    for (offset, data) in [(0, &[0xff; 2][..]), (2, &[0xff]), (4, &[0xff; 4])] {
        table.write_control(offset, data);
        assert_eq!(table.control(), 7);
    }
}

#[test]
fn a_qword_unmasks_and_sets_the_data_at_once() {
    let mut table = MsixTable::new(1);
    table.write_control(2, &[0, 0x80]);
    table.write_table(0, &MESSAGE.address.to_le_bytes());
    let changes = table.write_table(8, &u64::from(MESSAGE.data).to_le_bytes());
    assert_eq!(changes, [(0, Some(MESSAGE))]);
}

#[test]
fn the_message_of_a_live_vector_can_change() {
    let mut table = MsixTable::new(1);
    table.write_control(2, &[0, 0x80]);
    arm(&mut table, 0, MESSAGE);
    assert_eq!(table.write_table(8, &MESSAGE.data.to_le_bytes()), []);
    let data = 7_u32;
    assert_eq!(
        table.write_table(8, &data.to_le_bytes()),
        [(0, Some(MsiMessage { data, ..MESSAGE }))]
    );
}

#[test]
fn reserved_bits_read_as_zero() {
    let mut table = MsixTable::new(1);
    table.write_table(0, &[0xff; 16]);
    assert_eq!(dword(&table, 0), 0xffff_fffc);
    assert_eq!(dword(&table, 12), 1);
}

#[test]
fn the_table_size_is_clamped() {
    assert_eq!(MsixTable::new(0).vectors(), 1);
    assert_eq!(MsixTable::new(u16::MAX).vectors(), 2048);
    assert_eq!(MsixTable::new(u16::MAX).pba_len(), 256);
}

#[test]
fn pending_bits_are_asked_for_each_vector() {
    let table = MsixTable::new(70);
    let mut data = [0xff; 16];
    table.read_pba(0, &mut data, |vector| {
        assert!(vector < 70);
        vector % 3 == 0
    });
    let bits = u128::from_le_bytes(data);
    for vector in 0..128 {
        let pending = vector < 70 && vector % 3 == 0;
        assert_eq!(bits >> vector & 1 == 1, pending, "{vector}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Table(u64, Vec<u8>),
    Control(u16, Vec<u8>),
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let data = || vec(prop_oneof![any::<u8>(), Just(0), Just(0x80)], 0..20);
    let at = prop_oneof![
        8 => (0_u64..24).prop_map(|dword| dword * 4),
        2 => 0_u64..100,
        1 => any::<u64>(),
    ];
    let step = prop_oneof![
        8 => (at, data()).prop_map(|(at, data)| Step::Table(at, data)),
        4 => (0..6_u16, data()).prop_map(|(at, data)| Step::Control(at, data)),
        1 => (any::<u16>(), data()).prop_map(|(at, data)| Step::Control(at, data)),
        1 => Just(Step::Reset),
    ];
    vec(step, 0..60)
}

proptest! {
    /// Whoever applies the changes always has what the registers, read as a guest would, say.
    #[test]
    fn changes_add_up_to_the_effective_state(steps in steps()) {
        let mut table = MsixTable::new(5);
        let mut applied = BTreeMap::new();
        for step in steps {
            let changes = match step {
                Step::Table(at, data) => table.write_table(at, &data),
                Step::Control(at, data) => table.write_control(at, &data),
                Step::Reset => table.reset(),
            };
            for (vector, message) in changes {
                let before = match message {
                    Some(message) => applied.insert(vector, message),
                    None => applied.remove(&vector),
                };
                prop_assert!(before != message, "a change that changes nothing");
            }
            let live = table.control() & 0xc000 == 0x8000;
            let expected: BTreeMap<u16, MsiMessage> = (0..5_u16)
                .filter_map(|vector| {
                    let at = u64::from(vector) * ENTRY_SIZE;
                    let high = u64::from(dword(&table, at + 4)) << 32;
                    let message = MsiMessage {
                        address: high | u64::from(dword(&table, at)),
                        data: dword(&table, at + 8),
                    };
                    (live && dword(&table, at + 12) == 0).then_some((vector, message))
                })
                .collect();
            prop_assert_eq!(&applied, &expected);
            prop_assert_eq!(table.control() & 0x3fff, 4);
        }
    }

    #[test]
    fn reads_anywhere_are_harmless(offset in any::<u64>(), near in 0_u64..200, len in 0..20_usize) {
        let table = MsixTable::new(5);
        for at in [offset, near, u64::MAX - near] {
            let mut data = vec![0xaa; len];
            table.read_table(at, &mut data);
            if at >= table.table_len() {
                prop_assert!(data.iter().all(|byte| *byte == 0));
            }
            table.read_pba(at, &mut data, |_| true);
            if at >= 1 {
                prop_assert!(data.iter().all(|byte| *byte == 0));
            }
        }
    }
}
