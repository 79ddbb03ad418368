//! Host devices in a VM: leased, opened, and made functions of the guest.
//!
//! The path of a device, at boot and at hot-plug: [`Acquirer`] leases it and puts its IOMMU group into the VM's
//! address space; `Opening` opens it; [`AttachedDevice`] is the function of the guest until it is dropped.

mod acquire;
mod counters;
mod device;
mod error;
mod events;
mod io_address_space;
mod lease;
mod measured;
mod opening;
mod prefault;
mod resets;
mod roms;
mod sent;
#[cfg(test)]
pub mod testing;

pub use acquire::{AcquiredDevices, Acquirer, Lessor, forbidden};
pub use counters::interrupts;
pub use device::AttachedDevice;
pub use error::DeviceError;
pub use events::{DeviceEvent, DeviceEventListener, DeviceEvents, DeviceKey, DeviceNotify};
pub use io_address_space::{IoAddressSpace, RamRanges};
pub use lease::FunctionId;
pub use measured::MeasuredDevices;
pub use prefault::Prefault;
pub use resets::{RESET_TIMEOUT, reset_all, resets_of};
pub use roms::RomFiles;
pub use sent::SentDevice;
