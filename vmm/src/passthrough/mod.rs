//! Devices of the host in a VM: leased, opened, and made functions of the guest.
//!
//! A device's way: a request gets a lease and an IOMMU group in the VM's address space ([`Acquirer`]), the device is
//! opened (`Opening`), and is a function of the guest ([`AttachedDevice`]) until that is dropped. Boot and hot-plug
//! go the same way.

mod acquire;
mod counters;
mod device;
mod error;
mod events;
mod io_address_space;
mod lease;
mod opening;
mod prefault;
#[cfg(test)]
pub mod testing;

pub use acquire::{AcquiredDevices, Acquirer, Lessor, forbidden};
pub use counters::interrupts;
pub use device::AttachedDevice;
pub use error::DeviceError;
pub use events::{DeviceEvent, DeviceEventListener, DeviceEvents, DeviceKey, DeviceNotify};
pub use io_address_space::{IoAddressSpace, RamRanges};
pub use lease::FunctionId;
pub use prefault::Prefault;
