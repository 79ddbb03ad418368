//! Where the MSI-X table and the pending bits of a function are in its BARs.

use std::ops::Range;

use super::MsixTable;

/// A place in a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InBar {
    /// The BAR's register. 6 and 7 are invalid, and no function has such a BAR.
    pub bar: u8,
    /// Offset in the BAR.
    pub offset: u64,
}

impl InBar {
    /// From the table and the pending bit registers of the capability (PCI Express Base Specification
    /// 6.0, 7.7.2.3).
    pub const fn from_register(value: u32) -> Self {
        Self {
            bar: value as u8 & 7,
            offset: (value & !7) as u64,
        }
    }
}

/// What the MSI-X capability of a function says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixLayout {
    /// Number of vectors.
    pub vectors: u16,
    /// Where the table is.
    pub table: InBar,
    /// Where the pending bits are.
    pub pba: InBar,
}

/// The MSI-X table lies outside of the function's BARs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("its MSI-X table lies outside of its BARs")]
pub struct OutsideBar;

/// The MSI-X table and the pending bits of a function, in its BARs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MsixStructures {
    vectors: u16,
    table: Structure,
    pba: Option<Structure>,
}

/// One of the two.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Structure {
    bar: u8,
    range: Range<u64>,
}

/// What an access to a BAR meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// The table, at an offset.
    Table(u64),
    /// The pending bits, at an offset.
    Pending(u64),
    /// The edge of one of them. A naturally aligned access never does.
    Edge,
    /// Neither.
    Elsewhere,
}

impl Structure {
    /// The structure of `len` bytes at `place`, if the BAR is large enough.
    fn find(place: InBar, len: u64, bar_size: &impl Fn(u8) -> u64) -> Option<Self> {
        let end = place.offset.checked_add(len)?;
        (end <= bar_size(place.bar)).then_some(Self {
            bar: place.bar,
            range: place.offset..end,
        })
    }

    fn meets(&self, bar: u8, access: &Range<u64>) -> bool {
        bar == self.bar && access.start < self.range.end && self.range.start < access.end
    }

    /// The offset of an access in the structure, if all of the access lies in it.
    fn offset_of(&self, access: &Range<u64>) -> Option<u64> {
        let inside = access.end <= self.range.end;
        access
            .start
            .checked_sub(self.range.start)
            .filter(|_| inside)
    }
}

impl MsixStructures {
    /// The structures of `layout` in a function whose BARs have the size `bar_size`, 0 where there is none.
    ///
    /// # Errors
    /// The table lies outside of the BARs. Some devices point outside with their pending bits, which their
    /// drivers do not read: these are left out.
    pub fn new(layout: &MsixLayout, bar_size: impl Fn(u8) -> u64) -> Result<Self, OutsideBar> {
        let table = MsixTable::new(layout.vectors);
        Ok(Self {
            vectors: table.vectors(),
            table: Structure::find(layout.table, table.table_len(), &bar_size).ok_or(OutsideBar)?,
            pba: Structure::find(layout.pba, table.pba_len(), &bar_size),
        })
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// The parts of a BAR that they cover.
    pub fn ranges(&self, bar: u8) -> Vec<Range<u64>> {
        std::iter::once(&self.table)
            .chain(&self.pba)
            .filter(|structure| structure.bar == bar)
            .map(|structure| structure.range.clone())
            .collect()
    }

    /// What an access of `len` bytes at offset `at` of a BAR meets.
    pub(super) fn target(&self, bar: u8, at: u64, len: usize) -> Target {
        let access = at..at.saturating_add(len as u64);
        if self.table.meets(bar, &access) {
            let offset = self.table.offset_of(&access);
            return offset.map_or(Target::Edge, Target::Table);
        }
        match &self.pba {
            Some(pba) if pba.meets(bar, &access) => {
                pba.offset_of(&access).map_or(Target::Edge, Target::Pending)
            }
            _ => Target::Elsewhere,
        }
    }
}
