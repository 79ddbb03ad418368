//! The traits between devices and the owner of the VM, and the effects of a guest's write.
//!
//! The traits refer to each other (an effect can ask to remap a function, and devices answer accesses to its
//! BARs), so they are in one module, below the bus and PCI.

use std::any::Any;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::mapping::HostMapping;

/// A device, or a window of one, that answers accesses on a [`Bus`].
///
/// Accesses are 1, 2, 4 or 8 bytes, little endian, with `offset` relative to the range under which
/// the device was inserted. Several vCPUs call at once: a device guards its own state.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes a guest's write at `offset`. Returns what the owner of the VM has to do next.
    fn write(&self, offset: u64, data: &[u8]) -> Effect;
}

/// What the owner of the VM has to do after a guest's write. The owner does it after it has released every
/// lock that it took for the write.
#[must_use = "an effect does nothing until the owner of the VM applies it"]
#[derive(Clone)]
pub enum Effect {
    /// Nothing outside the device.
    None,
    /// BARs behind this root port moved, appeared or disappeared: call [`crate::pci::PciSegment::remap`].
    Remap(PortIndex),
    /// The guest asked to be powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel has panicked.
    Panic(Panic),
    /// The guest has ejected the device in the slot of this root port.
    Eject(PortIndex),
}

impl std::fmt::Debug for Effect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Effect::None => "None",
            Effect::Remap(_) => "Remap",
            Effect::PowerOff => "PowerOff",
            Effect::Reset => "Reset",
            Effect::Panic(_) => "Panic",
            Effect::Eject(_) => "Eject",
        })
    }
}

/// Why a range could not be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range has no bytes or runs past the end of the address space.
    #[error("bus range of {len:#x} bytes at {base:#x} is empty or wraps")]
    BadRange {
        /// First address of the range.
        base: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Another device already answers somewhere in the range.
    #[error("bus range {base:#x}..={last:#x} overlaps the device at {other:#x}")]
    Overlap {
        /// First address of the refused range.
        base: u64,
        /// Last address of the refused range.
        last: u64,
        /// First address of the range that it overlaps.
        other: u64,
    },
}

/// A root port of a PCI segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortIndex(pub(crate) usize);

impl PortIndex {
    /// The port's number, from 0 on in the order in which ports were added.
    pub const fn get(self) -> usize {
        self.0
    }
}

/// What the guest's kernel does after a panic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Panic {
    /// It stops or resets the machine.
    End,
    /// It starts its crash kernel.
    CrashKernel,
}

/// One PCI function as the guest sees it.
///
/// Configuration accesses are 1, 2 or 4 bytes, naturally aligned, inside the 4096 bytes of the
/// function's configuration space (PCI Express Base Specification 7.2); the bus splits or refuses
/// anything else.
pub trait PciDevice: Send + Sync {
    /// Fills `data` from the configuration space at `offset`.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Takes a write to the configuration space. Returns whether the BARs that should be mapped, its own or, of a
    /// root port, those behind it, have changed.
    fn write_config(&self, offset: u16, data: &[u8]) -> bool;

    /// Makes the mappings in `space` those of the BARs and the decode bits: first removes every mapping
    /// that is no longer valid, then sets the hardware, then adds new mappings. Idempotent, and safe to
    /// call from several vCPUs at once: the last call wins.
    fn remap(&self, space: &dyn BarSpace);

    /// Resets the function to its state at the first start of the guest.
    ///
    /// # Errors
    /// The device behind it could not be reset.
    fn reset(&self, space: &dyn BarSpace) -> io::Result<()>;
}

/// Where a BAR is mapped: implemented by the owner of the guest's address space, and by the root port between it and
/// a function.
pub trait BarSpace {
    /// Whether accesses to this place reach a function behind it. A BAR is not mapped where they do not.
    fn forwards(&self, placement: &BarPlacement) -> bool {
        let _ = placement;
        true
    }

    /// Makes one placement visible to the guest until the returned guard is dropped.
    ///
    /// # Errors
    /// The placement overlaps RAM, another device or the end of the address space, or the
    /// hypervisor refuses it. Nothing is mapped then.
    fn map(&self, placement: &BarPlacement) -> Result<BarGuard, BarSpaceError>;
}

/// Dropping it removes the mapping.
pub type BarGuard = Box<dyn Any + Send + Sync>;

/// Why a BAR could not be mapped where the guest asked for it.
#[derive(Debug, thiserror::Error)]
pub enum BarSpaceError {
    /// The range is taken or invalid.
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
    /// The parts of the BAR, in ascending order, without overlaps. Bytes that no segment covers read as
    /// all ones.
    pub segments: Arc<[Segment]>,
}

/// A part of a BAR.
#[derive(Clone)]
pub struct Segment {
    /// Offset of its first byte in the BAR.
    pub offset: u64,
    /// How accesses reach it.
    pub kind: SegmentKind,
}

/// How accesses reach a part of a BAR.
#[derive(Clone)]
pub enum SegmentKind {
    /// The guest accesses host memory without an exit. Page-aligned in offset and size.
    Direct(Arc<HostMapping>),
    /// Every access is trapped and goes to `device`, with offsets relative to the segment.
    Trapped {
        /// Length in bytes.
        len: u64,
        /// The device that answers.
        device: Arc<dyn BusDevice>,
    },
    /// A write signals an eventfd, without an exit to this process. Reads give all ones.
    Doorbells {
        /// Bytes from one doorbell to the next.
        stride: u64,
        /// What the doorbells signal, from the first on.
        events: Arc<[Arc<EventFd>]>,
    },
}
