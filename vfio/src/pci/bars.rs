//! The parts of each BAR of a device: pages that the guest accesses directly, and pages that trap.

use std::ops::Range;
use std::sync::Arc;

use gantry_devices::pci::registers::BARS;
use gantry_devices::pci::{BAR_COUNT, Bar, BarKind, Segment, SegmentKind};

use super::interrupts::Interrupts;
use super::window::Window;
use crate::Result;
use crate::host::{DeviceIo, MmapArea, Region};

/// The granularity of mappings, in bytes.
const PAGE: u64 = 4096;

/// A part of a BAR, and whether the guest accesses it directly.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    range: Range<u64>,
    direct: bool,
}

/// The BARs of the device. Parts that the guest will access directly are mapped into this process.
///
/// # Errors
/// The kernel refuses a mapping; all others are undone.
pub(super) fn open(
    io: &Arc<dyn DeviceIo>,
    physical: &[u8],
    interrupts: &Arc<Interrupts>,
) -> Result<Vec<Bar>> {
    let mut bars = Vec::new();
    let mut index = 0;
    while index < BAR_COUNT as u8 {
        let kind = BarKind::from_register(register(physical, index));
        let present = Region::bar(index).filter(|&region| io.region(region).size > 0);
        if let Some(region) = present {
            bars.push(Bar {
                index,
                kind,
                size: io.region(region).size,
                segments: segments(io, region, interrupts)?,
            });
        }
        index += if present.is_some() && kind.is_64_bit() {
            2
        } else {
            1
        };
    }
    Ok(bars)
}

fn register(physical: &[u8], bar: u8) -> u32 {
    let at = usize::from(BARS.start) + 4 * usize::from(bar);
    let bytes = physical.get(at..).and_then(<[u8]>::first_chunk);
    bytes.copied().map_or(0, u32::from_le_bytes)
}

fn segments(
    io: &Arc<dyn DeviceIo>,
    region: Region,
    interrupts: &Arc<Interrupts>,
) -> Result<Arc<[Segment]>> {
    let info = io.region(region);
    let emulated = interrupts.ranges(region.bar_number());
    let mut segments = Vec::new();
    for Piece { range, direct } in pieces(info.size, &info.areas, &emulated) {
        let len = range.end - range.start;
        let kind = if direct {
            let offset = range.start;
            SegmentKind::Direct(io.map(region, MmapArea { offset, len })?)
        } else {
            let device = Window::new(io, region, range.start, interrupts);
            SegmentKind::Trapped {
                len,
                device: Arc::new(device),
            }
        };
        segments.push(Segment {
            offset: range.start,
            kind,
        });
    }
    Ok(segments.into())
}

/// Cuts a BAR of `size` bytes into pieces, in ascending order: direct where the host can map it, except for
/// pages that contain an `emulated` range.
fn pieces(size: u64, areas: &[MmapArea], emulated: &[Range<u64>]) -> Vec<Piece> {
    let mut traps: Vec<Range<u64>> = emulated.iter().map(pages).collect();
    traps.sort_by_key(|trap| trap.start);
    let mut direct = Vec::new();
    for area in areas {
        let mut start = area
            .offset
            .checked_next_multiple_of(PAGE)
            .unwrap_or(u64::MAX);
        let end = area.offset.saturating_add(area.len).min(size) / PAGE * PAGE;
        for trap in &traps {
            if trap.end > start && trap.start < end {
                direct.push(start..trap.start);
                start = trap.end;
            }
        }
        direct.push(start..end);
    }
    direct.sort_by_key(|range| range.start);

    let mut pieces = Vec::new();
    let mut at = 0;
    for range in direct.into_iter().filter(|range| !range.is_empty()) {
        // No known driver reports areas that overlap; the first area wins.
        if range.start < at {
            continue;
        }
        push(&mut pieces, at..range.start, false);
        at = range.end;
        push(&mut pieces, range, true);
    }
    push(&mut pieces, at..size, false);
    pieces
}

fn push(pieces: &mut Vec<Piece>, range: Range<u64>, direct: bool) {
    if !range.is_empty() {
        pieces.push(Piece { range, direct });
    }
}

/// The whole pages that a range touches.
fn pages(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE * PAGE..range.end.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::FakeDevice;

    fn no_interrupts(io: &Arc<dyn DeviceIo>) -> Arc<Interrupts> {
        let router = Arc::new(crate::testing::FakeRouter::new(&Arc::default(), 0));
        super::super::interrupts::new(io, router, None, None).unwrap()
    }

    fn area(offset: u64, len: u64) -> MmapArea {
        MmapArea { offset, len }
    }

    /// Start of each piece, and whether it is direct.
    fn cut(size: u64, areas: &[MmapArea], emulated: &[Range<u64>]) -> Vec<(u64, bool)> {
        let pieces = pieces(size, areas, emulated);
        pieces
            .iter()
            .map(|piece| (piece.range.start, piece.direct))
            .collect()
    }

    #[test]
    fn what_the_host_can_map_is_direct_and_the_rest_traps() {
        assert_eq!(cut(0x4000, &[area(0, 0x4000)], &[]), [(0, true)]);
        assert_eq!(cut(0x4000, &[], &[]), [(0, false)]);
        let sparse = [area(0, 0x1000), area(0x3000, 0x1000)];
        assert_eq!(
            cut(0x4000, &sparse, &[]),
            [(0, true), (0x1000, false), (0x3000, true)]
        );
    }

    #[test]
    fn pages_with_a_table_trap_however_it_lies_on_them() {
        let whole = [area(0, 0x8000)];
        // As NVMe controllers have it.
        let unaligned = [0x5200..0x5600, 0x5e00..0x5e08];
        assert_eq!(
            cut(0x8000, &whole, &unaligned),
            [(0, true), (0x5000, false), (0x6000, true)]
        );
        let across = [0x1ff0..0x2010, 0x7ff8..0x8000];
        assert_eq!(
            cut(0x8000, &whole, &across),
            [(0, true), (0x1000, false), (0x3000, true), (0x7000, false)]
        );
        assert_eq!(
            cut(0x1000, &[area(0, 0x1000)], std::slice::from_ref(&(0..0x10))),
            [(0, false)]
        );
        let apart = [0x2000..0x2010, 0..0x10];
        assert_eq!(
            cut(0x4000, &[area(0, 0x4000)], &apart),
            [(0, false), (0x1000, true), (0x2000, false), (0x3000, true)]
        );
    }

    #[test]
    fn sparse_areas_without_a_table_are_mapped_as_they_are() {
        let sparse = [area(0, 0x3000), area(0x4000, 0x2000)];
        let direct: Vec<_> = pieces(0x8000, &sparse, std::slice::from_ref(&(0x3000..0x3100)))
            .into_iter()
            .filter(|piece| piece.direct)
            .map(|piece| piece.range)
            .collect();
        assert_eq!(direct, [0..0x3000, 0x4000..0x6000]);
    }

    #[test]
    fn parts_of_pages_trap() {
        assert_eq!(cut(0x100, &[area(0, 0x100)], &[]), [(0, false)]);
        assert_eq!(
            cut(0x4000, &[area(0x800, 0x2000)], &[]),
            [(0, false), (0x1000, true), (0x2000, false)]
        );
    }

    #[test]
    fn bars_are_what_the_device_says_they_are() {
        let device = Arc::new(FakeDevice::new());
        let io: Arc<dyn DeviceIo> = device.clone();
        let bars = open(&io, &crate::testing::config(), &no_interrupts(&io)).unwrap();
        let seen: Vec<_> = bars
            .iter()
            .map(|bar| (bar.index, bar.kind, bar.size))
            .collect();
        assert_eq!(
            seen,
            [
                (
                    0,
                    BarKind::Memory64 {
                        prefetchable: false
                    },
                    0x8000
                ),
                (2, BarKind::Io, 0x20),
                (4, BarKind::Memory64 { prefetchable: true }, 1 << 20),
            ]
        );
        assert_eq!(device.mappings(), 2);
    }

    fn meet(a: &Range<u64>, b: &Range<u64>) -> bool {
        a.start < b.end && b.start < a.end
    }

    proptest! {
        #[test]
        fn pieces_cover_the_bar_once_and_never_give_away_what_is_emulated(
            size in (4_u32..20).prop_map(|bits| 1_u64 << bits),
            areas in proptest::collection::vec((0_u64..0x8_0000, 0_u64..0x8_0000), 0..5),
            emulated in proptest::collection::vec((0_u64..0x8_0000, 1_u64..0x3000), 0..3),
        ) {
            let mut areas: Vec<_> = areas.into_iter().map(|(at, len)| area(at, len)).collect();
            areas.sort_by_key(|area| area.offset);
            let emulated: Vec<_> = emulated.into_iter().map(|(at, len)| at..at + len).collect();
            let mut at = 0;
            for Piece { range, direct } in pieces(size, &areas, &emulated) {
                prop_assert_eq!(range.start, at);
                prop_assert!(range.end > range.start);
                at = range.end;
                if direct {
                    prop_assert!(range.start % PAGE == 0 && range.end % PAGE == 0);
                    prop_assert!(!emulated.iter().any(|emulated| meet(emulated, &range)));
                    prop_assert!(areas.iter().any(|area| area.offset <= range.start
                        && range.end <= area.offset + area.len));
                }
            }
            prop_assert_eq!(at, size);
        }
    }
}
