//! Guest RAM: private anonymous memory, one mapping for each range of the layout.
#![allow(unsafe_code)] // The program's own pages are released by address.

use std::io;
use std::sync::Arc;

use gantry_devices::mapping::HostMapping;
use gantry_devices::ram::{RamRanges, RamView};
use vm_memory::GuestMemoryMmap;

use crate::host::placement::VmPlacement;
use crate::layout::RamRange;

/// Transparent huge pages begin at multiples of their size.
const HUGE_PAGE: usize = 2 << 20;

/// One range of guest RAM and the host memory behind it.
pub struct RamRegion {
    /// First guest-physical address.
    pub guest: u64,
    /// The memory; its size is the range's.
    pub mapping: Arc<HostMapping>,
}

/// The guest's RAM. No page of it exists before it is touched or pinned.
pub struct GuestRam {
    view: RamView,
    regions: Vec<RamRegion>,
}

impl GuestRam {
    /// Reserves memory for every range of the plan, from the VM's NUMA nodes.
    ///
    /// # Errors
    /// The host has no address space left, the ranges overlap, or the VM's nodes have no memory.
    pub fn new(plan: &[RamRange], placement: &VmPlacement) -> io::Result<Self> {
        let regions = plan
            .iter()
            .map(|range| RamRegion::new(range, placement))
            .collect::<io::Result<Vec<_>>>()?;
        let ranges = regions.iter();
        let ranges = ranges.map(|region| (region.guest, Arc::clone(&region.mapping)));
        let view = RamView::new(ranges.collect())?;
        Ok(Self { view, regions })
    }

    /// For reading and writing by guest-physical address.
    pub fn memory(&self) -> &GuestMemoryMmap {
        self.view.memory()
    }

    /// For emulated devices, which may outlive this value.
    pub fn view(&self) -> RamView {
        self.view.clone()
    }

    /// The ranges as devices are to see them.
    pub fn ranges(&self) -> RamRanges {
        Arc::clone(self.view.ranges())
    }

    /// The ranges, in guest-physical order.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }
}

impl RamRegion {
    fn new(range: &RamRange, placement: &VmPlacement) -> io::Result<Self> {
        let len = usize::try_from(range.len).map_err(io::Error::other)?;
        let mapping = HostMapping::anonymous(len, HUGE_PAGE)?;
        let nodes: Vec<u32> = placement.nodes.iter().collect();
        if !nodes.is_empty() {
            match mapping.place(&nodes, placement.strict) {
                Err(error) if placement.strict => return Err(error),
                // A placement that was not asked for is optional.
                Err(error) => tracing::warn!("cannot keep guest RAM near the devices: {error}"),
                Ok(()) => {}
            }
        }
        Ok(Self {
            guest: range.start,
            mapping: Arc::new(mapping),
        })
    }
}

/// Drops the pages of the program's code and constants: most of them were only needed at the start, and the
/// page cache has them if they are needed again.
pub fn release_program_pages() {
    // Defined by the linker: the beginning of the program and the end of its code.
    unsafe extern "C" {
        static __executable_start: u8;
        static etext: u8;
    }
    let start = (&raw const __executable_start).cast_mut();
    let len = (&raw const etext).addr().saturating_sub(start.addr());
    // SAFETY: what lies between the two is in segments that nobody may write, so it is as in the
    // file, from which the kernel maps it anew when it is next used, by whatever thread. Holes
    // between segments are an error that does no harm.
    let _ = unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTNEED) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_where_it_must_be_or_not_at_all() {
        let plan = [RamRange {
            start: 0,
            len: 2 << 20,
        }];
        let placement = |strict| VmPlacement {
            nodes: [1000].into_iter().collect(),
            strict,
            ..VmPlacement::default()
        };
        assert!(GuestRam::new(&plan, &placement(true)).is_err());
        assert!(GuestRam::new(&plan, &placement(false)).is_ok());
    }
}
