//! What every PCI function of the guest is, and what it needs from the owner of the address space.

use std::any::Any;
use std::io;
use std::sync::Arc;

use crate::bus::{BusDevice, BusError};
use crate::mapping::HostMapping;

/// One PCI function as the guest sees it.
///
/// Configuration accesses are 1, 2 or 4 bytes, naturally aligned, inside the 4096 bytes of the
/// function's configuration space (PCI Express Base Specification 7.2); the bus splits or refuses
/// anything else.
pub trait PciDevice: Send + Sync {
    /// Fills `data` from the configuration space at `offset`.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Takes a write to the configuration space. Returns whether the BARs that should be mapped
    /// have changed, in which case the owner of the address space calls [`Self::remap`] next.
    fn write_config(&self, offset: u16, data: &[u8]) -> bool;

    /// Brings what is mapped into `space` in line with the BARs and the decode bits: first takes
    /// away every placement that no longer holds, then lets the hardware follow, then maps what is
    /// new. Idempotent, and safe to call from several vCPUs at once: the last call wins.
    fn remap(&self, space: &dyn BarSpace);

    /// Brings the function back to the state it had when the guest was first started.
    ///
    /// # Errors
    /// The device behind it could not be reset.
    fn reset(&self, space: &dyn BarSpace) -> io::Result<()>;
}

/// Where a BAR is mapped: implemented by the owner of the guest's address space.
pub trait BarSpace {
    /// Makes one placement visible to the guest until the returned guard is dropped.
    ///
    /// # Errors
    /// The placement overlaps RAM, another device or the end of the address space, or the
    /// hypervisor refuses it. Nothing is mapped then.
    fn map(&self, placement: &BarPlacement) -> Result<BarGuard, BarSpaceError>;
}

/// Dropping it takes the mapping away.
pub type BarGuard = Box<dyn Any + Send + Sync>;

/// Why a BAR could not be mapped where the guest asked for it.
#[derive(Debug, thiserror::Error)]
pub enum BarSpaceError {
    /// Something else is there, or the range makes no sense.
    #[error(transparent)]
    Range(#[from] BusError),
    /// The hypervisor refused the memory slot.
    #[error("memory slot of {size:#x} bytes at guest address {guest:#x}")]
    Slot {
        /// Guest-physical address.
        guest: u64,
        /// Size in bytes.
        size: u64,
        /// The hypervisor's answer.
        #[source]
        source: io::Error,
    },
}

/// One BAR at one place, ready to be mapped.
#[derive(Clone)]
pub struct BarPlacement {
    /// Whether the BAR decodes I/O ports instead of memory.
    pub io: bool,
    /// Guest-physical address, or I/O port, of the BAR's first byte.
    pub base: u64,
    /// Size of the whole BAR in bytes, a power of two.
    pub size: u64,
    /// What the BAR is made of, in ascending order, without overlaps. Bytes that no segment covers
    /// read as all ones.
    pub segments: Arc<[Segment]>,
}

/// A part of a BAR.
#[derive(Clone)]
pub struct Segment {
    /// Offset of its first byte in the BAR.
    pub offset: u64,
    /// How it is served.
    pub kind: SegmentKind,
}

/// How a part of a BAR is served.
#[derive(Clone)]
pub enum SegmentKind {
    /// The guest reaches host memory with no exit. Page-aligned in offset and size.
    Direct(Arc<HostMapping>),
    /// Every access is trapped and goes to `device`, with offsets relative to the segment.
    Trapped {
        /// Length in bytes.
        len: u64,
        /// Who answers.
        device: Arc<dyn BusDevice>,
    },
}
