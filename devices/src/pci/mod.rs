//! PCI: addresses, configuration space, BARs, MSI-X, root ports, and the bus that joins them.

mod bdf;
mod device;
mod msi;

pub use bdf::{GuestBdf, InvalidBdf};
pub use device::{
    BarGuard, BarPlacement, BarSpace, BarSpaceError, PciDevice, Segment, SegmentKind,
};
pub use msi::{MsiMessage, MsiRoute, MsiRouter};
