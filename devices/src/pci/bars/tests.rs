//! BARs: what a guest writes, and what is mapped for it.

use proptest::prelude::*;

use super::super::fake::{Event, FakeSpace, bar};
use super::*;

const MEM32: BarKind = BarKind::Memory32 {
    prefetchable: false,
};
const MEM64: BarKind = BarKind::Memory64 { prefetchable: true };
const ALL: Decode = Decode {
    memory: true,
    io: true,
};

/// BAR 0: 16 KiB at 32 bits; BAR 1: 256 ports; BAR 2 and 3: 8 GiB at 64 bits.
fn set() -> BarSet {
    let bars = [
        bar(0, MEM32, 0x4000),
        bar(1, BarKind::Io, 0x100),
        bar(2, MEM64, 8 << 30),
    ];
    BarSet::new("test", bars, 40).unwrap()
}

impl BarSet {
    /// Writes `address` to BAR `index` as firmware does; without effect where there is none.
    fn program(&mut self, index: u8, address: u64) {
        let Some(Some(bar)) = self.bars.get(usize::from(index)) else {
            return;
        };
        let register = match index {
            ROM => registers::EXPANSION_ROM.start,
            _ => registers::BARS.start + 4 * u16::from(index),
        };
        let len = if bar.kind.is_64_bit() { 8 } else { 4 };
        self.write(register, &address.to_le_bytes()[..len]);
    }
}

fn dword(set: &BarSet, offset: u16) -> u32 {
    let mut data = [0; 4];
    set.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(set: &mut BarSet, offset: u16, value: u32) {
    set.write(offset, &value.to_le_bytes());
}

fn remap(set: &mut BarSet, decode: Decode, space: &FakeSpace) -> Vec<Event> {
    set.remap(decode, space, || space.note(Event::Hardware));
    space.events()
}

#[test]
fn sizing_answers_the_size_and_the_kind() {
    let mut set = set();
    for probe in [0xffff_ffff, 0xffff_fff0, 0xffff_fffc] {
        for register in registers::BARS.step_by(4) {
            write(&mut set, register, probe);
        }
        assert_eq!(dword(&set, 0x10), 0xffff_c000);
        assert_eq!(dword(&set, 0x14), 0xffff_ff01);
        assert_eq!(dword(&set, 0x18), 0x0000_000c);
        assert_eq!(dword(&set, 0x1c), probe & 0xffff_fffe);
        assert_eq!(dword(&set, 0x20), 0);
        assert_eq!(dword(&set, 0x30), 0);
        let space = FakeSpace::default();
        assert_eq!(remap(&mut set, ALL, &space), [Event::Hardware]);
    }
}

#[test]
fn bytes_and_words_count_as_dwords_do() {
    let mut set = set();
    set.write(0x10, &[0xff]);
    set.write(0x11, &[0x5f]);
    set.write(0x12, &[0x34, 0x12]);
    assert_eq!(set.address(0), Some(0x1234_4000));
    let mut word = [0; 2];
    set.read(0x12, &mut word);
    assert_eq!(word, [0x34, 0x12]);
}

#[test]
fn moved_bars_are_all_unmapped_before_any_is_mapped() {
    let mut set = set();
    let space = FakeSpace::default();
    set.program(0, 0xc000_0000);
    set.program(2, 0x40_0000_0000);
    let [map, unmap] = [Event::Map, Event::Unmap];
    let (a, b, c) = (0xc000_0000, 0x40_0000_0000, 0xd000_0000);
    let hardware = Event::Hardware;
    assert_eq!(remap(&mut set, ALL, &space), [hardware, map(a), map(b)]);
    assert!(!set.is_stale(ALL));
    assert_eq!(remap(&mut set, ALL, &space), [hardware], "idempotent");
    set.program(0, c);
    set.program(2, b + (8 << 30));
    assert!(set.is_stale(ALL));
    let moved = remap(&mut set, ALL, &space);
    let b_moved = b + (8 << 30);
    assert_eq!(moved, [unmap(a), unmap(b), hardware, map(c), map(b_moved)]);
    let off = remap(&mut set, Decode::NONE, &space);
    assert_eq!(off, [unmap(c), unmap(b_moved), hardware]);
    let ports_only = Decode {
        memory: false,
        io: true,
    };
    set.program(1, 0xc100);
    let io = remap(&mut set, ports_only, &space);
    assert_eq!(io, [hardware, map(0xc100)]);
    drop(set);
    assert_eq!(space.events(), [unmap(0xc100)]);
}

#[test]
fn a_bar_that_cannot_be_mapped_waits_for_the_next_time() {
    let mut set = set();
    let space = FakeSpace::default();
    space.taken.lock().unwrap().push(0xc000_0000);
    set.program(0, 0xc000_0000);
    set.program(1, 0xc000);
    assert_eq!(
        remap(&mut set, ALL, &space),
        [
            Event::Hardware,
            Event::Refused(0xc000_0000),
            Event::Map(0xc000)
        ]
    );
    assert!(set.is_stale(ALL));
    space.taken.lock().unwrap().clear();
    assert_eq!(
        remap(&mut set, ALL, &space),
        [Event::Hardware, Event::Map(0xc000_0000)]
    );
}

#[test]
fn places_where_no_bar_belongs_are_not_mapped() {
    let mut set = set();
    let top = 1_u64 << 40;
    for (index, address) in [
        (0, 0),
        (0, 0xffff_c000), // The sizing pattern.
        (1, 0),
        (1, 0x1_0000),
        (1, 0xffff_ff00),
        (2, 0),
        (2, top),
        (2, u64::MAX),
    ] {
        set.unassign();
        set.program(index, address);
        assert!(!set.is_stale(ALL), "BAR {index} at {address:#x}");
    }
    for (index, address) in [(0, 0xffff_8000), (1, 0xff00), (2, top - (8 << 30))] {
        set.unassign();
        set.program(index, address);
        assert!(set.is_stale(ALL), "BAR {index} at {address:#x}");
    }
}

#[test]
fn half_of_a_64_bit_bar_being_sized_unmaps_it() {
    let mut set = set();
    let space = FakeSpace::default();
    set.program(2, 0x40_0000_0000);
    remap(&mut set, ALL, &space);
    write(&mut set, 0x18, u32::MAX);
    assert_eq!(
        remap(&mut set, ALL, &space),
        [Event::Unmap(0x40_0000_0000), Event::Hardware]
    );
    write(&mut set, 0x18, 0xc);
    assert_eq!(
        remap(&mut set, ALL, &space),
        [Event::Hardware, Event::Map(0x40_0000_0000)]
    );
}

#[test]
fn bars_that_make_no_sense_are_refused() {
    let refused = |bars: Vec<Bar>| BarSet::new("test", bars, 40).err();
    let rom = |index, size| refused(vec![bar(index, BarKind::Rom, size)]);
    for index in [0, 5, 7] {
        assert_eq!(rom(index, 0x1000), Some(BarError::Register { index }));
    }
    for size in [1 << 10, 0x3000, 1 << 25] {
        assert_eq!(rom(ROM, size), Some(BarError::Size { index: ROM, size }));
    }
    assert_eq!((rom(ROM, 1 << 11), rom(ROM, 1 << 24)), (None, None));
    let register = |index| Some(BarError::Register { index });
    let size = |index, size| Some(BarError::Size { index, size });
    assert_eq!(refused(vec![bar(6, MEM32, 16)]), register(6));
    assert_eq!(refused(vec![bar(5, MEM64, 16)]), register(5));
    let twice = vec![bar(1, MEM32, 16), bar(1, MEM32, 16)];
    assert_eq!(refused(twice), register(1));
    let overlap = vec![bar(0, MEM64, 16), bar(1, MEM32, 16)];
    assert_eq!(refused(overlap), register(1));
    let overlap = vec![bar(1, MEM32, 16), bar(0, MEM64, 16)];
    assert_eq!(refused(overlap), register(0));
    assert_eq!(refused(vec![bar(0, MEM32, 0)]), size(0, 0));
    assert_eq!(refused(vec![bar(0, MEM32, 8)]), size(0, 8));
    assert_eq!(refused(vec![bar(0, MEM32, 48)]), size(0, 48));
    assert_eq!(refused(vec![bar(0, MEM32, 1 << 32)]), size(0, 1 << 32));
    assert_eq!(
        refused(vec![bar(0, BarKind::Io, 1 << 16)]),
        size(0, 1 << 16)
    );
}

#[test]
fn a_rom_has_a_register_of_its_own_with_an_enable_bit() {
    let (base, bar0) = (0xd000_0000, 0xc000_0000);
    let bars = [bar(0, MEM32, 0x4000), bar(ROM, BarKind::Rom, 0x1000)];
    let mut set = BarSet::new("test", bars, 40).unwrap();
    let space = FakeSpace::default();
    for probe in [0xffff_f800, 0xffff_fffe, 0xffff_ffff] {
        write(&mut set, 0x30, probe);
        assert_eq!(dword(&set, 0x30), 0xffff_f000 | probe & 1);
        assert!(!set.is_stale(ALL), "{probe:#x}");
    }
    set.program(0, bar0);
    write(&mut set, 0x30, base | 0x7ff);
    assert_eq!(dword(&set, 0x30), base | 1, "the other bits are reserved");
    assert_eq!(
        (set.address(ROM), set.address(0)),
        (Some(base.into()), Some(bar0))
    );
    let mapped = remap(&mut set, ALL, &space);
    assert_eq!(mapped[1..], [Event::Map(bar0), Event::Map(base.into())]);
    set.write(0x30, &[0]);
    let disabled = remap(&mut set, ALL, &space);
    assert_eq!(disabled[..1], [Event::Unmap(base.into())]);
    let ports = Decode {
        io: true,
        ..Decode::NONE
    };
    set.write(0x30, &[1]);
    assert_eq!(remap(&mut set, ports, &space)[..1], [Event::Unmap(bar0)]);
    set.unassign();
    assert_eq!(dword(&set, 0x30), 0);
}

#[test]
fn missing_bars_have_no_address() {
    let (mut set, unassigned) = (set(), set());
    for index in [3, 4, 5, ROM, 7, 255] {
        set.program(index, 0xc000_0000);
        assert_eq!(set.address(index), None);
    }
    assert!(
        (0x10..0x28)
            .step_by(4)
            .all(|at| dword(&set, at) == dword(&unassigned, at))
    );
}

proptest! {
    /// Whatever is written: the size bits read as the sizes say, and what is mapped afterwards
    /// is aligned, inside the guest's reach, and nothing once decoding is off.
    #[test]
    fn any_writes_leave_a_sane_state(
        writes in proptest::collection::vec(
            (any::<u16>(), proptest::collection::vec(any::<u8>(), 0..9)), 0..40),
        near in proptest::collection::vec((0x0c_u16..0x38, any::<[u8; 4]>()), 0..40),
    ) {
        let mut set = set();
        set.add(bar(ROM, BarKind::Rom, 0x1_0000)).unwrap();
        let space = FakeSpace::default();
        let near = near.iter().map(|(offset, data)| (*offset, data.as_slice()));
        let far = writes.iter().map(|(offset, data)| (*offset, data.as_slice()));
        for (offset, data) in near.chain(far) {
            set.write(offset, data);
            let mut back = vec![0; data.len()];
            set.read(offset, &mut back);
            set.remap(ALL, &space, || {});
        }
        prop_assert_eq!(dword(&set, 0x10) & 0x3fff, 0);
        prop_assert_eq!(dword(&set, 0x14) & 0xff, 1);
        prop_assert_eq!(dword(&set, 0x18), 0xc);
        prop_assert_eq!(dword(&set, 0x1c) & 1, 0);
        prop_assert_eq!((dword(&set, 0x20), dword(&set, 0x24)), (0, 0));
        prop_assert_eq!(dword(&set, 0x30) & 0xfffe, 0);
        for event in space.events() {
            if let Event::Map(base) = event {
                prop_assert!(base != 0 && base < 1 << 40);
                prop_assert_eq!(base % 0x100, 0);
            }
        }
        set.remap(Decode::NONE, &space, || {});
        prop_assert!(set.mapped.iter().all(Option::is_none));
    }
}
