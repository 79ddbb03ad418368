//! PCI: addresses, configuration space, BARs, MSI-X, root ports, and the bus that joins them.

mod access;
mod bars;
mod bdf;
pub mod capability;
mod config;
#[cfg(test)]
pub(crate) mod fake;
pub mod firmware;
mod host_bridge;
pub mod interrupts;
pub mod registers;
mod root_port;
mod segment;

pub use crate::device::{
    BarGuard, BarPlacement, BarSpace, BarSpaceError, PciDevice, PortIndex, Segment, SegmentKind,
};
pub use access::{CONFIG_PORTS, CONFIG_PORTS_LEN, ConfigPorts, ECAM_BYTES_PER_BUS, EcamWindow};
pub use bars::{BAR_COUNT, Bar, BarError, BarKind, BarName, BarSet, Decode, ROM, ROM_SIZES};
pub use bdf::{GuestBdf, InvalidBdf};
pub use capability::{Capability, CapabilityId, ExtendedCapability, ExtendedCapabilityId};
pub use config::{Area, Backing, ConfigSpace, NoBacking};
pub use host_bridge::HostBridge;
pub use interrupts::{IntxLine, MsiMessage, MsiRoute, MsiRouter};
pub use root_port::{PortWindows, RootPort};
pub use segment::{PciSegment, SegmentError, SlotGuard};
