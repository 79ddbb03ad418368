//! The BARs of a type-0 function: the registers a guest sees, and what is mapped because of them.

use std::ops::Range;
use std::sync::Arc;

use super::registers;
use super::{BarGuard, BarPlacement, BarSpace, Segment};
use crate::warn_limited;

/// Number of BAR registers of a type-0 function.
pub const BAR_COUNT: usize = 6;

const IO_FLAGS: u32 = 0b11;
const MEMORY_FLAGS: u32 = 0b1111;
const IS_IO: u32 = 1 << 0;
const IS_64_BIT: u32 = 0b10 << 1;
const TYPE: u32 = 0b11 << 1;
const PREFETCHABLE: u32 = 1 << 3;

/// What a BAR decodes (PCI Express Base Specification 6.0, 7.5.1.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere; takes up the next register as well.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

impl BarKind {
    /// What the low bits of a BAR register say.
    pub const fn from_register(value: u32) -> Self {
        let prefetchable = value & PREFETCHABLE != 0;
        if value & IS_IO != 0 {
            BarKind::Io
        } else if value & TYPE == IS_64_BIT {
            BarKind::Memory64 { prefetchable }
        } else {
            BarKind::Memory32 { prefetchable }
        }
    }

    /// Whether the BAR takes up two registers.
    pub const fn is_64_bit(self) -> bool {
        matches!(self, BarKind::Memory64 { .. })
    }

    /// Whether reads have no side effects. Never so for I/O ports.
    pub const fn is_prefetchable(self) -> bool {
        matches!(
            self,
            BarKind::Memory32 { prefetchable: true } | BarKind::Memory64 { prefetchable: true }
        )
    }

    /// The bits of the register that hold flags instead of an address.
    pub(super) const fn flag_mask(self) -> u32 {
        match self {
            BarKind::Io => IO_FLAGS,
            _ => MEMORY_FLAGS,
        }
    }

    const fn flags(self) -> u32 {
        let prefetchable = if self.is_prefetchable() {
            PREFETCHABLE
        } else {
            0
        };
        match self {
            BarKind::Io => IS_IO,
            BarKind::Memory32 { .. } => prefetchable,
            BarKind::Memory64 { .. } => IS_64_BIT | prefetchable,
        }
    }
}

/// One BAR of a function.
#[derive(Clone)]
pub struct Bar {
    /// Its register, 0 to 5.
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Size in bytes: a power of two, at least 16 for memory and 4 for I/O.
    pub size: u64,
    /// What it is made of, as in [`BarPlacement::segments`].
    pub segments: Arc<[Segment]>,
}

/// Why a set of BARs makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// There is no such register, or another BAR has it already.
    #[error("BAR {index} does not exist or is taken by the BAR before it")]
    Register {
        /// The register asked for.
        index: u8,
    },
    /// The size is no power of two, too small, or too large for the kind of BAR.
    #[error("BAR {index} cannot have a size of {size:#x} bytes")]
    Size {
        /// The BAR's register.
        index: u8,
        /// The size asked for.
        size: u64,
    },
}

/// Which accesses a function answers: its command register, as far as BARs go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decode {
    /// Memory BARs are decoded.
    pub memory: bool,
    /// I/O BARs are decoded.
    pub io: bool,
}

impl Decode {
    /// Nothing is decoded, as after a reset and outside power state D0.
    pub const NONE: Self = Self {
        memory: false,
        io: false,
    };

    /// What the command register enables.
    pub const fn from_command(command: u16) -> Self {
        Self {
            memory: command & registers::COMMAND_MEMORY != 0,
            io: command & registers::COMMAND_IO != 0,
        }
    }
}

/// A BAR that is mapped now. Dropping it unmaps.
struct Mapped {
    base: u64,
    _guard: BarGuard,
}

/// The BARs of one type-0 function: a shadow of the registers, never written to the hardware, and
/// the guards of what is mapped.
pub struct BarSet {
    /// Names the function in log lines.
    label: Arc<str>,
    bars: [Option<Bar>; BAR_COUNT],
    /// What was written last, with the bits that the size makes read-only still in it, so that a
    /// sizing probe can be told from an address.
    written: [u32; BAR_COUNT],
    mapped: [Option<Mapped>; BAR_COUNT],
    /// First address that the guest cannot reach.
    memory_end: u64,
}

impl BarSet {
    /// The BARs of the function that log lines call `label`, in a guest with `address_bits` bits of
    /// physical address. All of them begin unassigned.
    ///
    /// # Errors
    /// Two BARs want one register, or a size is not one that a BAR can have.
    pub fn new(
        label: impl Into<Arc<str>>,
        bars: impl IntoIterator<Item = Bar>,
        address_bits: u8,
    ) -> Result<Self, BarError> {
        let mut set = Self {
            label: label.into(),
            bars: Default::default(),
            written: [0; BAR_COUNT],
            mapped: Default::default(),
            memory_end: 1_u64
                .checked_shl(u32::from(address_bits))
                .unwrap_or(u64::MAX),
        };
        for bar in bars {
            set.add(bar)?;
        }
        Ok(set)
    }

    fn add(&mut self, bar: Bar) -> Result<(), BarError> {
        let index = usize::from(bar.index);
        let last = index + usize::from(bar.kind.is_64_bit());
        if last >= BAR_COUNT || (index..=last).any(|register| self.taken(register)) {
            return Err(BarError::Register { index: bar.index });
        }
        let sizes = match bar.kind {
            BarKind::Io => 4..=1 << 15,
            BarKind::Memory32 { .. } => 16..=1 << 31,
            BarKind::Memory64 { .. } => 16..=1 << 63,
        };
        if !bar.size.is_power_of_two() || !sizes.contains(&bar.size) {
            return Err(BarError::Size {
                index: bar.index,
                size: bar.size,
            });
        }
        self.bars[index] = Some(bar);
        Ok(())
    }

    fn taken(&self, register: usize) -> bool {
        self.bars[register].is_some() || self.high_half_of(register).is_some()
    }

    /// The BARs, in the order of their registers.
    pub fn bars(&self) -> impl Iterator<Item = &Bar> {
        self.bars.iter().flatten()
    }

    /// Whether the register at `offset` of the configuration space is answered here: the BARs, and
    /// the expansion ROM register, which says that there is none.
    pub fn handles(offset: u16) -> bool {
        registers::BARS.contains(&offset) || registers::EXPANSION_ROM.contains(&offset)
    }

    /// Fills `data` from the registers at `offset` of the configuration space.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(u32::from(offset)..) {
            *byte = match register_at(at) {
                Some((index, lane)) => self.register(index).to_le_bytes()[lane],
                None => 0,
            };
        }
    }

    /// Takes a write to the registers at `offset` of the configuration space. Nothing is mapped or
    /// unmapped before [`Self::remap`].
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (&byte, at) in data.iter().zip(u32::from(offset)..) {
            let Some((index, lane)) = register_at(at) else {
                continue;
            };
            let mut bytes = self.written[index].to_le_bytes();
            bytes[lane] = byte;
            self.written[index] = u32::from_le_bytes(bytes);
        }
    }

    /// The address in BAR `index`, 0 when it is unassigned, whatever it may be while the guest
    /// sizes it. `None` where there is no such BAR.
    pub fn address(&self, index: u8) -> Option<u64> {
        let bar = self.bars.get(usize::from(index))?.as_ref()?;
        let index = usize::from(index);
        let low = u64::from(self.written[index]);
        let high = match bar.kind {
            BarKind::Memory64 { .. } => u64::from(self.written[index + 1]) << 32,
            _ => 0,
        };
        Some((high | low) & !(bar.size - 1))
    }

    /// Takes every BAR's address away, as a reset does.
    pub fn unassign(&mut self) {
        self.written = [0; BAR_COUNT];
    }

    /// Whether [`Self::remap`] has something to do.
    pub fn is_stale(&self, decode: Decode) -> bool {
        (0..BAR_COUNT).any(|index| {
            let mapped = self.mapped[index].as_ref().map(|mapped| mapped.base);
            mapped != self.wanted(index, decode)
        })
    }

    /// Brings what is mapped in line with the registers and `decode`: takes away every placement
    /// that no longer holds, calls `hardware`, in which the device follows (its own command
    /// register, say), then maps what is new. Idempotent.
    ///
    /// A BAR that cannot be mapped is logged and stays unmapped until the next call.
    pub fn remap(&mut self, decode: Decode, space: &dyn BarSpace, hardware: impl FnOnce()) {
        let wanted: [Option<u64>; BAR_COUNT] =
            std::array::from_fn(|index| self.wanted(index, decode));
        for (mapped, base) in self.mapped.iter_mut().zip(wanted) {
            if mapped.as_ref().map(|mapped| mapped.base) != base {
                *mapped = None;
            }
        }
        hardware();
        for (index, base) in wanted.into_iter().enumerate() {
            if let Some(base) = base {
                self.map(index, base, space);
            }
        }
    }

    /// Takes every mapping away.
    pub fn unmap(&mut self) {
        self.mapped = Default::default();
    }

    fn map(&mut self, index: usize, base: u64, space: &dyn BarSpace) {
        let Some(bar) = &self.bars[index] else {
            return;
        };
        if self.mapped[index].is_some() {
            return;
        }
        let placement = BarPlacement {
            io: bar.kind == BarKind::Io,
            base,
            size: bar.size,
            segments: Arc::clone(&bar.segments),
        };
        match space.map(&placement) {
            Ok(guard) => {
                self.mapped[index] = Some(Mapped {
                    base,
                    _guard: guard,
                });
            }
            Err(error) => warn_limited!(
                device = %self.label,
                bar = index,
                base = format_args!("{base:#x}"),
                size = format_args!("{:#x}", bar.size),
                error = &error as &dyn std::error::Error,
                "BAR stays unmapped"
            ),
        }
    }

    /// Where BAR `index` belongs, unless it is disabled, unassigned, being sized, or out of reach.
    fn wanted(&self, index: usize, decode: Decode) -> Option<u64> {
        let bar = self.bars[index].as_ref()?;
        let (enabled, end) = match bar.kind {
            BarKind::Io => (decode.io, 1 << 16),
            BarKind::Memory32 { .. } => (decode.memory, self.memory_end.min(1 << 32)),
            BarKind::Memory64 { .. } => (decode.memory, self.memory_end),
        };
        let base = self.address(bar.index)?;
        let last = base.checked_add(bar.size - 1)?;
        let fits = base != 0 && last < end;
        (enabled && fits && !self.is_sizing(index, bar, last)).then_some(base)
    }

    /// A probe writes ones to all address bits, or at least to those that the size leaves writable.
    /// In the second case the BAR would end where 32-bit memory does, and none belongs there: on
    /// x86 that is the reset vector's place.
    fn is_sizing(&self, index: usize, bar: &Bar, last: u64) -> bool {
        self.written[index] | bar.kind.flag_mask() == u32::MAX || last == u64::from(u32::MAX)
    }

    fn register(&self, index: usize) -> u32 {
        let written = self.written[index];
        if let Some(bar) = &self.bars[index] {
            written & !(bar.size - 1) as u32 | bar.kind.flags()
        } else if let Some(bar) = self.high_half_of(index) {
            written & (!(bar.size - 1) >> 32) as u32
        } else {
            0
        }
    }

    fn high_half_of(&self, register: usize) -> Option<&Bar> {
        let low = self.bars[register.checked_sub(1)?].as_ref()?;
        low.kind.is_64_bit().then_some(low)
    }
}

/// The BAR register and the byte in it at an offset of the configuration space.
fn register_at(offset: u32) -> Option<(usize, usize)> {
    const BARS: Range<u32> = registers::BARS.start as u32..registers::BARS.end as u32;
    BARS.contains(&offset).then(|| {
        let at = (offset - BARS.start) as usize;
        (at / 4, at % 4)
    })
}

#[cfg(test)]
mod tests {
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
            let register = registers::BARS.start + 4 * u16::from(index);
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
    fn missing_bars_have_no_address() {
        let (mut set, unassigned) = (set(), set());
        for index in [3, 4, 5, 6, 255] {
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
            prop_assert_eq!((dword(&set, 0x20), dword(&set, 0x24), dword(&set, 0x30)), (0, 0, 0));
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
}
