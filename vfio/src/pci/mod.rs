//! The guest's side: a host PCI device as a function of the guest's PCI bus.

mod device;

pub use device::PassthroughDevice;
