//! Guest RAM, as this process reads and writes it by guest-physical address.
#![allow(unsafe_code)] // vm-memory takes our mappings by raw address.

use std::io;
use std::sync::Arc;

use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::mapping::HostMapping;

/// First guest-physical address and memory of each range.
pub type RamRanges = Arc<[(u64, Arc<HostMapping>)]>;

/// Access to all of the guest's RAM. The memory stays mapped for as long as a view of it is there.
#[derive(Clone)]
pub struct RamView {
    // Declared first: it refers to the mappings by address.
    memory: GuestMemoryMmap,
    ranges: RamRanges,
}

impl RamView {
    /// A view of these ranges.
    ///
    /// # Errors
    /// The ranges overlap, or one runs past the end of the address space.
    pub fn new(ranges: RamRanges) -> io::Result<Self> {
        let regions = ranges
            .iter()
            .map(|(guest, mapping)| region(*guest, mapping))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            memory: GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?,
            ranges,
        })
    }

    /// The ranges.
    pub fn ranges(&self) -> &RamRanges {
        &self.ranges
    }

    /// For reading and writing by guest-physical address.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }
}

fn region(guest: u64, mapping: &HostMapping) -> io::Result<GuestRegionMmap> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let (start, len) = (mapping.as_ptr(), mapping.size());
    // SAFETY: the range is mapped so for as long as the `HostMapping` lives, which the view drops only after
    // the region; vm-memory does not unmap what it did not map.
    let region = unsafe { MmapRegion::build_raw(start, len, protection, flags) };
    GuestRegionMmap::new(region.map_err(io::Error::other)?, GuestAddress(guest))
        .ok_or_else(|| io::Error::other("guest RAM runs past the end of the address space"))
}
