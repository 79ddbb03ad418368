//! Memory that a measured device reaches, and where each of its pages is to the device.
#![allow(unsafe_code)] // Pinning memory, and access to memory that a device writes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use gantry_devices::mapping::HostMapping;

use crate::host::{DmaMapping, DmaSpace};
use crate::{Error, Result};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes in all: a huge page, whose parts lie behind each other for the device too.
const SIZE: usize = 2 << 20;

/// Memory for queues and buffers of a device.
pub struct DmaPages {
    // Dropped before the memory that it maps.
    _mapping: Option<DmaMapping>,
    memory: Arc<HostMapping>,
    /// Where each page is to the device.
    addresses: Vec<u64>,
}

/// Pages that lie behind each other, for this process and for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub page: usize,
    /// Where it is to the device.
    pub address: u64,
}

impl DmaPages {
    /// Memory that an IOMMU maps for the devices of `space`.
    ///
    /// # Errors
    /// There is no memory, no address for it, or the kernel refuses.
    pub fn mapped(space: &DmaSpace) -> Result<Self> {
        let memory = memory()?;
        let ranges = space.iova_ranges()?;
        let size = SIZE as u64;
        // Not at 0, which some devices take for no address.
        let fits = |start: u64, end: u64| {
            let first = start.max(1).checked_next_multiple_of(size)?;
            (first.checked_add(size - 1)? <= end).then_some(first)
        };
        let found = match &*ranges {
            [] => Some(size),
            ranges => ranges
                .iter()
                .find_map(|range| fits(*range.start(), *range.end())),
        };
        let iova = found.ok_or_else(|| {
            failed(
                "finding room in the IOMMU's ranges",
                io::ErrorKind::OutOfMemory,
            )
        })?;
        let mapping = space.map(iova, &memory, || false)?;
        Ok(Self {
            _mapping: Some(mapping),
            addresses: (0..SIZE / PAGE)
                .map(|page| iova + (page * PAGE) as u64)
                .collect(),
            memory,
        })
    }

    /// Memory of a guest without an IOMMU: its devices reach physical memory.
    ///
    /// # Errors
    /// There is no memory, or the kernel does not say where it is.
    pub fn physical() -> Result<Self> {
        let memory = memory()?;
        // SAFETY: the range is that of `memory`; locking pages changes no byte of them.
        let locked = unsafe { libc::mlock(memory.as_ptr().cast(), memory.size()) };
        if locked != 0 {
            return Err(failed("mlock", io::Error::last_os_error()));
        }
        let map = File::open("/proc/self/pagemap")
            .map_err(|error| failed("opening /proc/self/pagemap", error))?;
        let first = memory.address() / PAGE as u64;
        let addresses = (0..(SIZE / PAGE) as u64).map(|page| {
            let mut entry = [0; 8];
            map.read_exact_at(&mut entry, (first + page) * 8)
                .map_err(|error| failed("reading /proc/self/pagemap", error))?;
            physical(u64::from_le_bytes(entry))
                .ok_or_else(|| failed("finding a physical page", io::ErrorKind::PermissionDenied))
        });
        Ok(Self {
            _mapping: None,
            addresses: addresses.collect::<Result<_>>()?,
            memory,
        })
    }

    /// The first `count` pages from `page` on that lie behind each other to the device too.
    pub fn run(&self, page: usize, count: usize) -> Option<Run> {
        let starts = page..=self.addresses.len().checked_sub(count)?;
        let mut starts = starts.filter_map(|start| {
            let pages = self.addresses.get(start..start + count)?;
            let address = *pages.first()?;
            let mut expected = (0..).map(|index| address + index * PAGE as u64);
            pages
                .iter()
                .all(|page| Some(*page) == expected.next())
                .then_some(Run {
                    page: start,
                    address,
                })
        });
        starts.next()
    }

    /// Where a page is to the device; 0 beyond the memory.
    pub fn address(&self, page: usize) -> u64 {
        self.addresses.get(page).copied().unwrap_or_default()
    }

    /// Reads 32 bits at a byte offset, which is a multiple of 4; 0 beyond the memory.
    pub fn read32(&self, offset: usize) -> u32 {
        let word = self.word(offset);
        // SAFETY: the aligned word lies in memory that `self` keeps mapped; the device may change it, which a volatile
        // read allows for.
        word.map_or(0, |at| unsafe { at.read_volatile() })
    }

    /// Writes 32 bits at a byte offset, which is a multiple of 4; nothing beyond the memory.
    pub fn write32(&self, offset: usize, value: u32) {
        if let Some(at) = self.word(offset) {
            // SAFETY: as in `read32`.
            unsafe { at.write_volatile(value) };
        }
    }

    /// The word at a byte offset, if it is aligned and inside.
    fn word(&self, offset: usize) -> Option<*mut u32> {
        let end = offset.checked_add(4)?;
        let fits = offset.is_multiple_of(4) && end <= self.memory.size();
        fits.then(|| self.memory.as_ptr().wrapping_add(offset).cast())
    }
}

/// The physical address of a page, from its entry in the page map; `None` if the page is not there, or the kernel
/// hides where it is.
fn physical(entry: u64) -> Option<u64> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let frame = entry & FRAME;
    (entry & PRESENT != 0 && frame != 0).then_some(frame * PAGE as u64)
}

fn memory() -> Result<Arc<HostMapping>> {
    let memory = HostMapping::anonymous(SIZE, SIZE).map_err(|error| failed("mmap", error))?;
    memory
        .populate(0, SIZE)
        .map_err(|error| failed("madvise", error))?;
    Ok(Arc::new(memory))
}

fn failed(call: &'static str, source: impl Into<io::Error>) -> Error {
    Error::Dma {
        call,
        iova: 0,
        len: SIZE as u64,
        source: source.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(addresses: &[u64]) -> DmaPages {
        DmaPages {
            _mapping: None,
            memory: Arc::new(HostMapping::anonymous(SIZE, PAGE).unwrap()),
            addresses: addresses.iter().map(|page| page * PAGE as u64).collect(),
        }
    }

    #[test]
    fn a_run_is_where_pages_follow_each_other() {
        let pages = pages(&[9, 4, 5, 6, 2]);
        assert_eq!(
            pages.run(0, 3).map(|run| (run.page, run.address)),
            Some((1, 4 * 4096))
        );
        assert_eq!(pages.run(0, 1).unwrap().page, 0);
        assert_eq!(pages.run(2, 2).unwrap().page, 2);
        assert_eq!(pages.run(0, 4), None);
        assert_eq!(pages.run(0, 6), None);
    }

    #[test]
    fn words_are_read_as_they_were_written_and_none_beyond_the_end() {
        let pages = pages(&[1]);
        pages.write32(SIZE - 4, 7);
        pages.write32(SIZE, 8);
        assert_eq!(
            (pages.read32(SIZE - 4), pages.read32(SIZE), pages.read32(2)),
            (7, 0, 0)
        );
    }

    #[test]
    fn a_page_that_is_hidden_or_gone_has_no_address() {
        assert_eq!(physical((1 << 63) | 0x1234), Some(0x123_4000));
        assert_eq!(physical(1 << 63), None);
        assert_eq!(physical(0x1234), None);
    }
}
