//! VFIO for a gantry VM: `host` calls the kernel, `pci` makes a guest's function of a host device, `measure` says what a
//! device does.
//!
//! [`host::DeviceIo`] is between the two: a passed-through function reaches its device through it, be it the
//! kernel's VFIO, a process that serves vfio-user, or a test's fake.
//!
//! Drop order is part of the contract: device fds, then their [`host::Attachment`], then the [`host::Container`] or
//! [`host::Ioas`].
//! Each holds the next, so that dropping the last user is enough.

mod error;
pub mod host;
pub mod measure;
pub mod pci;
#[cfg(test)]
mod testing;

pub use error::Error;

/// What a fallible call of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;
