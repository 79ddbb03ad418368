//! The passed-through function: configuration space, BARs and interrupts of a host device.

use std::io;
use std::sync::Arc;

use gantry_devices::pci::{BarSpace, MsiRouter, PciDevice};

use crate::Result;
use crate::host::DeviceIo;

/// A host device as a PCI function of the guest.
pub struct PassthroughDevice {
    io: Arc<dyn DeviceIo>,
}

impl PassthroughDevice {
    /// Makes a function of the device behind `io`, with interrupts through `router`.
    ///
    /// # Errors
    /// The device cannot be read, or what it says of itself makes no sense.
    pub fn new(io: Arc<dyn DeviceIo>, _router: Arc<dyn MsiRouter>) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { io }))
    }
}

impl PciDevice for PassthroughDevice {
    fn read_config(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_config(&self, _offset: u16, _data: &[u8]) -> bool {
        false
    }

    fn remap(&self, _space: &dyn BarSpace) {}

    fn reset(&self, _space: &dyn BarSpace) -> io::Result<()> {
        self.io.reset().map_err(io::Error::other)
    }
}
