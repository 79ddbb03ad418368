//! The virtual hardware of a gantry VM: state machines that know neither KVM, VFIO, files nor JSON.
//!
//! A device answers reads and writes from a [`bus::Bus`]. A write returns what it changes outside of the
//! device as a [`bus::Effect`], which the owner of the address space applies with no lock held; no device
//! calls back into its bus.

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
pub mod ram;
pub mod serial;
pub mod virtio;
