//! The virtual hardware of a gantry VM: state machines that know neither KVM, VFIO, files nor JSON.
//!
//! A device answers reads and writes that come down a [`bus::Bus`]. What a write changes outside
//! the device comes back up as a [`bus::Effect`], applied by the owner of the address space with no
//! lock held; no device calls back into the bus it sits on.

pub mod bounded;
pub mod bounded_writer;
pub mod bus;
mod device;
pub mod events;
pub mod limit;
pub mod mapping;
pub mod panic;
pub mod pci;
pub mod power;
pub mod serial;
