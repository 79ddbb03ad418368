//! The BARs of a type-0 function: the registers that a guest reads, and what is mapped for them.

use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use super::registers;
use super::{BarGuard, BarPlacement, BarSpace, Segment};
use crate::warn_limited;

/// Number of BAR registers of a type-0 function, without that of the expansion ROM.
pub const BAR_COUNT: usize = 6;
/// The expansion ROM's number among the BARs.
pub const ROM: u8 = BAR_COUNT as u8;
/// All registers that hold addresses.
const REGISTERS: usize = BAR_COUNT + 1;

const IO_FLAGS: u32 = 0b11;
const MEMORY_FLAGS: u32 = 0b1111;
/// The bits of the ROM's register that hold no address; all but the lowest are reserved.
const ROM_FLAGS: u32 = 0x7ff;
/// The ROM is decoded if memory is.
const ROM_ENABLE: u32 = 1 << 0;
const IS_IO: u32 = 1 << 0;
const IS_64_BIT: u32 = 0b10 << 1;
const TYPE: u32 = 0b11 << 1;
const PREFETCHABLE: u32 = 1 << 3;

/// The sizes that an expansion ROM can have.
pub const ROM_SIZES: RangeInclusive<u64> = 2 << 10..=16 << 20;

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
    /// The expansion ROM: memory below 4 GiB, with an enable bit of its own (PCI Express Base Specification 6.0,
    /// 7.5.1.2.4).
    Rom,
}

impl BarKind {
    /// The kind of BAR in the low bits of a register.
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

    /// Whether reads have no side effects. Reads of I/O ports may have some.
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
            BarKind::Rom => ROM_FLAGS,
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => MEMORY_FLAGS,
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
            BarKind::Rom => 0,
        }
    }
}

/// One BAR of a function.
#[derive(Clone)]
pub struct Bar {
    /// Its register, 0 to 5, or [`ROM`].
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Size in bytes: a power of two, at least 16 for memory, 4 for I/O, and 2 KiB for a ROM.
    pub size: u64,
    /// Its parts, as in [`BarPlacement::segments`].
    pub segments: Arc<[Segment]>,
}

/// The name of a BAR in messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarName(pub u8);

impl fmt::Display for BarName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ROM => f.write_str("the expansion ROM"),
            index => write!(f, "BAR {index}"),
        }
    }
}

/// Why a set of BARs is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// There is no such register, or another BAR has it already.
    #[error("{} does not exist or is taken by the BAR before it", BarName(*index))]
    Register {
        /// The register asked for.
        index: u8,
    },
    /// The size is no power of two, too small, or too large for the kind of BAR.
    #[error("{} cannot have a size of {size:#x} bytes", BarName(*index))]
    Size {
        /// The BAR's register.
        index: u8,
        /// The size asked for.
        size: u64,
    },
}

/// Which accesses a function decodes: the BAR bits of its command register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decode {
    /// Memory BARs are decoded.
    pub memory: bool,
    /// I/O BARs are decoded.
    pub io: bool,
}

impl Decode {
    /// Nothing is decoded: after a reset, and outside of power state D0.
    pub const NONE: Self = Self {
        memory: false,
        io: false,
    };

    /// The accesses that the command register enables.
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
    bars: [Option<Bar>; REGISTERS],
    /// The last write, including the bits that the size makes read-only: they distinguish a sizing probe from
    /// an address.
    written: [u32; REGISTERS],
    mapped: [Option<Mapped>; REGISTERS],
    /// First address that the guest cannot reach.
    memory_end: u64,
}

impl BarSet {
    /// The BARs of a function in a guest with `address_bits` bits of physical address. Log lines name the
    /// function `label`. All BARs begin unassigned.
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
            written: [0; REGISTERS],
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
        let registers = match bar.kind {
            BarKind::Rom => BAR_COUNT..REGISTERS,
            _ => 0..BAR_COUNT,
        };
        let exist = registers.contains(&index) && registers.contains(&last);
        if !exist || (index..=last).any(|register| self.taken(register)) {
            return Err(BarError::Register { index: bar.index });
        }
        let sizes = match bar.kind {
            BarKind::Io => 4..=1 << 15,
            BarKind::Memory32 { .. } => 16..=1 << 31,
            BarKind::Memory64 { .. } => 16..=1 << 63,
            BarKind::Rom => ROM_SIZES,
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

    /// Whether [`Self::read`] and [`Self::write`] handle the register at `offset` of the configuration space.
    pub fn handles(offset: u16) -> bool {
        register_at(offset.into()).is_some()
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

    /// The address in BAR `index`, 0 if it is unassigned; undefined while the guest sizes it. `None` if there
    /// is no such BAR.
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

    /// Clears every BAR's address, as a reset does.
    pub fn unassign(&mut self) {
        self.written = [0; REGISTERS];
    }

    /// Whether [`Self::remap`] has something to do.
    pub fn is_stale(&self, decode: Decode) -> bool {
        (0..REGISTERS).any(|index| {
            let mapped = self.mapped[index].as_ref().map(|mapped| mapped.base);
            mapped != self.wanted(index, decode)
        })
    }

    /// Makes the mappings those of the registers and `decode`: removes every mapping that is no longer valid,
    /// calls `hardware`, which sets the device's own registers, then adds new mappings. Idempotent.
    ///
    /// A BAR that `space` does not forward stays unmapped, and so does one that cannot be mapped, which is logged,
    /// until the next call.
    pub fn remap(&mut self, decode: Decode, space: &dyn BarSpace, hardware: impl FnOnce()) {
        let wanted: [Option<BarPlacement>; REGISTERS] = std::array::from_fn(|index| {
            let placement = self.placement(index, self.wanted(index, decode)?)?;
            space.forwards(&placement).then_some(placement)
        });
        for (mapped, placement) in self.mapped.iter_mut().zip(&wanted) {
            let base = placement.as_ref().map(|placement| placement.base);
            if mapped.as_ref().map(|mapped| mapped.base) != base {
                *mapped = None;
            }
        }
        hardware();
        for (index, placement) in wanted.into_iter().enumerate() {
            if let Some(placement) = placement {
                self.map(index, &placement, space);
            }
        }
    }

    /// Removes every mapping.
    pub fn unmap(&mut self) {
        self.mapped = Default::default();
    }

    /// BAR `index` at `base`.
    fn placement(&self, index: usize, base: u64) -> Option<BarPlacement> {
        let bar = self.bars[index].as_ref()?;
        Some(BarPlacement {
            io: bar.kind == BarKind::Io,
            base,
            size: bar.size,
            segments: Arc::clone(&bar.segments),
        })
    }

    fn map(&mut self, index: usize, placement: &BarPlacement, space: &dyn BarSpace) {
        if self.mapped[index].is_some() {
            return;
        }
        let BarPlacement { base, size, .. } = *placement;
        match space.map(placement) {
            Ok(guard) => {
                self.mapped[index] = Some(Mapped {
                    base,
                    _guard: guard,
                });
            }
            Err(error) => warn_limited!(
                device = %self.label,
                bar = %BarName(index as u8),
                base = format_args!("{base:#x}"),
                size = format_args!("{size:#x}"),
                error = &error as &dyn std::error::Error,
                "BAR stays unmapped"
            ),
        }
    }

    /// Where BAR `index` has to be mapped; `None` if it is disabled, unassigned, being sized, or out of reach.
    fn wanted(&self, index: usize, decode: Decode) -> Option<u64> {
        let bar = self.bars[index].as_ref()?;
        let (enabled, end) = match bar.kind {
            BarKind::Io => (decode.io, 1 << 16),
            BarKind::Memory32 { .. } => (decode.memory, self.memory_end.min(1 << 32)),
            BarKind::Memory64 { .. } => (decode.memory, self.memory_end),
            BarKind::Rom => {
                let enabled = decode.memory && self.written[index] & ROM_ENABLE != 0;
                (enabled, self.memory_end.min(1 << 32))
            }
        };
        let base = self.address(bar.index)?;
        let last = base.checked_add(bar.size - 1)?;
        let fits = base != 0 && last < end;
        (enabled && fits && !self.is_sizing(index, bar, last)).then_some(base)
    }

    /// A probe writes ones to all address bits, or at least to the writable ones. In the second case the BAR
    /// would end at 4 GiB, where no BAR belongs: on x86 the reset vector is there.
    fn is_sizing(&self, index: usize, bar: &Bar, last: u64) -> bool {
        self.written[index] | bar.kind.flag_mask() == u32::MAX || last == u64::from(u32::MAX)
    }

    fn register(&self, index: usize) -> u32 {
        let written = self.written[index];
        if let Some(bar) = &self.bars[index] {
            let enabled = match bar.kind {
                BarKind::Rom => written & ROM_ENABLE,
                _ => 0,
            };
            written & !(bar.size - 1) as u32 | bar.kind.flags() | enabled
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

/// The register and the byte in it at an offset of the configuration space.
fn register_at(offset: u32) -> Option<(usize, usize)> {
    const BARS: Range<u32> = registers::BARS.start as u32..registers::BARS.end as u32;
    const EXPANSION_ROM: Range<u32> =
        registers::EXPANSION_ROM.start as u32..registers::EXPANSION_ROM.end as u32;
    let (first, start) = match offset {
        offset if BARS.contains(&offset) => (0, BARS.start),
        offset if EXPANSION_ROM.contains(&offset) => (usize::from(ROM), EXPANSION_ROM.start),
        _ => return None,
    };
    let at = (offset - start) as usize;
    Some((first + at / 4, at % 4))
}

#[cfg(test)]
mod tests;
