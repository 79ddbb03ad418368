//! The configuration space of the device itself.

use gantry_devices::pci::Backing;
use gantry_devices::pci::capability::walk_extended;
use gantry_devices::pci::registers as reg;
use gantry_devices::warn_limited;

use super::config::{LIFE, is_silence};
use crate::Result;
use crate::host::{DeviceIo, Region};

/// The configuration space of the hardware.
pub(super) struct Hardware<'a>(pub &'a dyn DeviceIo);

impl Hardware<'_> {
    /// Whether the device does not answer: what is off the bus reads all-ones (PCI Express Base Specification
    /// 6.0, 2.3.2).
    pub fn is_silent(&self) -> bool {
        let mut life = [0; 4];
        let read = self.0.read(Region::CONFIG, LIFE.into(), &mut life);
        read.is_ok() && is_silence(u32::from_le_bytes(life))
    }
}

impl Backing for Hardware<'_> {
    fn read(&self, offset: u16, data: &mut [u8]) {
        if let Err(error) = self.0.read(Region::CONFIG, offset.into(), data) {
            data.fill(0xff);
            warn_limited!(
                error = &error as &dyn std::error::Error,
                "guest reads all ones"
            );
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if let Err(error) = self.0.write(Region::CONFIG, offset.into(), data) {
            warn_limited!(
                error = &error as &dyn std::error::Error,
                "guest's write is lost"
            );
        }
    }
}

/// The parts of the configuration space that the plan of the guest's needs: of the extended part, only the
/// beginning of each capability, as every dword is an access to the device.
pub(super) fn read_config(io: &dyn DeviceIo) -> Result<Vec<u8>> {
    const HEADER_AND_CAPABILITIES: usize = 256;
    const CAPABILITY_BEGINS: usize = 12;

    let size = io.region(Region::CONFIG).size;
    let mut physical = vec![0; size.min(reg::CONFIG_SIZE.into()) as usize];
    let standard = physical.len().min(HEADER_AND_CAPABILITIES);
    io.read(Region::CONFIG, 0, &mut physical[..standard])?;
    if physical.len() == standard {
        return Ok(physical);
    }
    let mut read = Ok(());
    walk_extended(|offset| {
        let end = physical.len().min(usize::from(offset) + CAPABILITY_BEGINS);
        let Some(begins) = physical.get_mut(usize::from(offset)..end) else {
            return 0;
        };
        if read.is_ok() {
            read = io.read(Region::CONFIG, offset.into(), begins);
        }
        begins.first_chunk().copied().map_or(0, u32::from_le_bytes)
    });
    read.map(|()| physical)
}
