//! The two ways of a guest to configuration space: the ECAM window and the ports 0xcf8 to 0xcff.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::registers::CONFIG_SIZE;
use super::{GuestBdf, PciSegment};
use crate::bus::{BusDevice, Effect};

/// The bytes of the ECAM window that one bus takes up.
pub const ECAM_BYTES_PER_BUS: u64 = 256 * CONFIG_SIZE as u64;
/// The first of the configuration ports.
pub const CONFIG_PORTS: u16 = 0xcf8;
/// How many configuration ports there are.
pub const CONFIG_PORTS_LEN: u16 = 8;

/// The memory window on all configuration space (PCI Express Base Specification 6.0, 7.2.2).
/// It begins with bus 0, [`ECAM_BYTES_PER_BUS`] each.
pub struct EcamWindow(Arc<PciSegment>);

impl EcamWindow {
    /// The window on `segment`.
    pub fn new(segment: Arc<PciSegment>) -> Self {
        Self(segment)
    }

    fn target(offset: u64) -> Option<(GuestBdf, u16)> {
        let size = u64::from(CONFIG_SIZE);
        let at = u16::try_from(offset / size).ok()?;
        Some((GuestBdf::from_bits(at), (offset % size) as u16))
    }
}

impl BusDevice for EcamWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset) {
            Some((at, register)) => self.0.read_config(at, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        match Self::target(offset) {
            Some((at, register)) => self.0.write_config(at, register, data),
            None => Effect::None,
        }
    }
}

/// The address port accepts dwords only: bytes in it belong to other devices, the reset register
/// at 0xcf9 of chipsets for one.
const ADDRESS: u64 = 0;
/// First of the four data ports.
const DATA: u64 = 4;
/// Address: accesses to the data ports go to configuration space.
const ENABLE: u32 = 1 << 31;
/// Address: enable, bus, device, function, dword. The other bits are reserved.
const IMPLEMENTED: u32 = 0x80ff_fffc;

/// The ports 0xcf8 to 0xcff (PCI Local Bus Specification 3.0, 3.2.2.3.2), for the first 256 bytes
/// of each function. Guests serialise their accesses.
pub struct ConfigPorts {
    segment: Arc<PciSegment>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// The ports to `segment`.
    pub fn new(segment: Arc<PciSegment>) -> Self {
        Self {
            segment,
            address: AtomicU32::new(0),
        }
    }

    /// The register that an access to the data ports is meant for.
    fn target(&self, offset: u64) -> Option<(GuestBdf, u16)> {
        let lane = offset.checked_sub(DATA).filter(|lane| *lane < 4)?;
        let address = self.address.load(Ordering::Relaxed);
        let at = GuestBdf::from_bits((address >> 8) as u16);
        (address & ENABLE != 0).then_some((at, address as u16 & 0xfc | lane as u16))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == ADDRESS && data.len() == 4 {
            let address = self.address.load(Ordering::Relaxed);
            data.copy_from_slice(&address.to_le_bytes());
            return;
        }
        match self.target(offset) {
            Some((at, register)) => self.segment.read_config(at, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        if offset == ADDRESS
            && let Ok(address) = data.try_into()
        {
            let address = u32::from_le_bytes(address) & IMPLEMENTED;
            self.address.store(address, Ordering::Relaxed);
            return Effect::None;
        }
        match self.target(offset) {
            Some((at, register)) => self.segment.write_config(at, register, data),
            None => Effect::None,
        }
    }
}
