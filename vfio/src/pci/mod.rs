//! A host PCI device as a function of the guest's PCI bus.

mod bars;
mod capabilities;
mod config;
mod control;
mod device;
mod hardware;
mod interrupts;
mod reset;
mod rom;
mod window;

pub use device::{PassthroughDevice, PassthroughOptions};
pub use reset::{ResetScope, reset_scopes};
pub use rom::{Rom, RomError, RomImage};
