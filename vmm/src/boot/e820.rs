//! The guest's memory map: RAM and reserved ranges.

use std::ops::Range;
use std::path::Path;

use super::BootError;
use crate::layout::{LEGACY_HOLE, LOW_RAM_END, Layout, free};

/// Entries that fit into the zero page; Linux's PVH entry copies them there as well.
pub const MAX_ENTRIES: usize = 128;

/// What a range is, in the numbers of ACPI 6.5, section 15 (also those of PVH).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// For the guest to use.
    Ram = 1,
    /// To be left alone.
    Reserved = 2,
    /// ACPI tables.
    Acpi = 3,
}

/// One range of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First guest-physical address.
    pub start: u64,
    /// First address beyond.
    pub end: u64,
    /// What it is.
    pub kind: Kind,
}

/// The map of a layout, in address order, without overlaps.
pub fn map(layout: &Layout) -> Vec<Entry> {
    let acpi = layout.acpi.start..layout.acpi.end();
    let taken = [LEGACY_HOLE, acpi.clone()];
    let ram = layout
        .ram
        .iter()
        .flat_map(|range| free(range.start..range.end(), &taken, 1))
        .map(|range| entry(range, Kind::Ram));
    let reserved = layout
        .holes
        .iter()
        .chain([&layout.ecam])
        .map(|range| entry(*range.start()..range.end() + 1, Kind::Reserved));
    let mut entries: Vec<_> = ram.chain(reserved).collect();
    entries.push(entry(acpi, Kind::Acpi));
    entries.sort_by_key(|entry| entry.start);
    entries
}

/// The end of RAM below 4 GiB.
pub fn low_ram_end(map: &[Entry]) -> u64 {
    let low = map
        .iter()
        .filter(|entry| entry.kind == Kind::Ram && entry.start < LOW_RAM_END);
    low.map(|entry| entry.end).max().unwrap_or(0)
}

/// Makes sure that a kernel finds RAM where it must lie.
pub fn check_room(map: &[Entry], place: Range<u64>, path: &Path) -> Result<(), BootError> {
    let holds = |entry: &Entry| entry.start <= place.start && place.end <= entry.end;
    if map
        .iter()
        .any(|entry| entry.kind == Kind::Ram && holds(entry))
    {
        return Ok(());
    }
    Err(BootError::KernelRoom {
        path: path.to_owned(),
        start: place.start,
        end: place.end,
        low_ram: low_ram_end(map),
    })
}

fn entry(range: Range<u64>, kind: Kind) -> Entry {
    Entry {
        start: range.start,
        end: range.end,
        kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::LayoutInputs;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn map_of(ram: u64, reserved: &[std::ops::RangeInclusive<u64>]) -> Vec<Entry> {
        let inputs = LayoutInputs {
            root_ports: 255,
            ram,
            physical_bits: 46,
            iova: &[],
            reserved,
        };
        map(&Layout::plan(&inputs).unwrap())
    }

    #[test]
    fn a_plain_guest() {
        let entries = map_of(3 * GIB, &[]);
        let expected = [
            (0, 0xa_0000, Kind::Ram),
            (0xe_0000, 0xf_0000, Kind::Acpi),
            (0x10_0000, 2 * GIB, Kind::Ram),
            (0xe000_0000, 0xf000_0000, Kind::Reserved),
            (4 * GIB, 5 * GIB, Kind::Ram),
        ];
        assert_eq!(
            entries,
            expected.map(|(start, end, kind)| Entry { start, end, kind })
        );
    }

    #[test]
    fn holes_and_moved_tables_are_not_ram() {
        let hole = 0x7b80_0000..=0x7fff_ffff;
        let entries = map_of(3 * GIB, &[0xe_8000..=0xe_8fff, hole]);
        let expected = [
            (0, 0xa_0000, Kind::Ram),
            (0xe_8000, 0xe_9000, Kind::Reserved),
            (0x10_0000, 2 * MIB, Kind::Ram),
            (2 * MIB, 0x7b7f_0000, Kind::Ram),
            (0x7b7f_0000, 0x7b80_0000, Kind::Acpi),
            (0x7b80_0000, 0x8000_0000, Kind::Reserved),
            (0xe000_0000, 0xf000_0000, Kind::Reserved),
            (
                4 * GIB,
                5 * GIB + 0x0480_1000 + 0x7b80_0000 - 0x7b80_0000,
                Kind::Ram,
            ),
        ];
        assert_eq!(
            entries,
            expected.map(|(start, end, kind)| Entry { start, end, kind })
        );
    }

    #[test]
    fn entries_never_overlap() {
        for ram in [2 * MIB, 64 * MIB, 2 * GIB, 2 * GIB + 4096, 40 * GIB] {
            let entries = map_of(ram, &[5 * GIB..=5 * GIB, 0x1000_0000..=0x1fff_ffff]);
            for pair in entries.windows(2) {
                assert!(pair[0].end <= pair[1].start, "{pair:x?}");
            }
            assert!(entries.iter().all(|entry| entry.start < entry.end));
        }
    }
}
