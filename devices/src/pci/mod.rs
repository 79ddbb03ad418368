//! PCI: addresses, configuration space, BARs, MSI-X, root ports, and the bus that joins them.

mod bars;
mod bdf;
pub mod capability;
mod config;
mod device;
mod msi;
mod msix;
pub mod registers;

pub use bars::{BAR_COUNT, Bar, BarError, BarKind, BarRegisters, BarSet, Decode};
pub use bdf::{GuestBdf, InvalidBdf};
pub use capability::{Capability, CapabilityId, ExtendedCapability, ExtendedCapabilityId};
pub use config::{Area, Backing, ConfigSpace, NoBacking};
pub use device::{
    BarGuard, BarPlacement, BarSpace, BarSpaceError, PciDevice, Segment, SegmentKind,
};
pub use msi::{MsiMessage, MsiRoute, MsiRouter};
pub use msix::{Changes, ENTRY_SIZE, MAX_VECTORS, MsixTable};
