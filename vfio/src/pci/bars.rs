//! How each BAR of a device is served: which pages the guest reaches directly, and which trap.

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

/// A part of a BAR, and whether the guest reaches it without a trap.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    range: Range<u64>,
    direct: bool,
}

/// The BARs of the device, mapped into this process where the guest will reach them directly.
///
/// # Errors
/// The kernel refuses a mapping; all others are undone.
pub(super) fn open(
    io: &Arc<dyn DeviceIo>,
    physical: &[u8],
    interrupts: Option<&Arc<Interrupts>>,
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
    interrupts: Option<&Arc<Interrupts>>,
) -> Result<Arc<[Segment]>> {
    let info = io.region(region);
    let emulated = interrupts.map_or_else(Vec::new, |interrupts| interrupts.ranges(region));
    let mut segments = Vec::new();
    for Piece { range, direct } in pieces(info.size, &info.areas, &emulated) {
        let len = range.end - range.start;
        let kind = if direct {
            let offset = range.start;
            SegmentKind::Direct(io.map(region, MmapArea { offset, len })?)
        } else {
            let near = emulated.iter().any(|emulated| meet(emulated, &range));
            let interrupts = interrupts.filter(|_| near);
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

/// Cuts a BAR of `size` bytes into pieces, in ascending order: direct where the host can map it,
/// except for the pages on which something is `emulated`.
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
        // Areas that overlap come from no driver known; what has a place already keeps it.
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

fn meet(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
