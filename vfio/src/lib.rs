//! VFIO for a gantry VM: `host` speaks to the kernel, `pci` turns a host device into a guest's.
//!
//! The two halves meet at [`host::DeviceIo`]: what a passed-through function needs from whatever
//! stands behind it, be it the kernel's VFIO, a process that serves vfio-user, or a test's fake.
//!
//! Drop order is part of the contract: device fds, then their [`host::Group`], then the
//! [`host::Container`]. Each holds the next, so that dropping the last user is enough.

mod error;
pub mod host;
pub mod pci;
#[cfg(test)]
mod testing;

pub use error::Error;

/// What a fallible call of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;
