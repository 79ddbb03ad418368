//! How a guest accesses configuration space: the ECAM window and the ports 0xcf8 to 0xcff.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::registers::CONFIG_SIZE;
use super::{GuestBdf, PciSegment};
use crate::device::{BusDevice, Effect};

/// Bytes of the ECAM window for one bus.
pub const ECAM_BYTES_PER_BUS: u64 = 256 * CONFIG_SIZE as u64;
/// The first of the configuration ports.
pub const CONFIG_PORTS: u16 = 0xcf8;
/// How many configuration ports there are.
pub const CONFIG_PORTS_LEN: u16 = 8;

/// The memory window to all configuration space (PCI Express Base Specification 6.0, 7.2.2).
/// It begins with bus 0 and has [`ECAM_BYTES_PER_BUS`] for each bus.
pub struct EcamWindow(Arc<PciSegment>);

impl EcamWindow {
    /// The window to `segment`.
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

/// The address port accepts dwords only: its bytes belong to other devices, such as the reset register of
/// chipsets at 0xcf9.
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

    /// The register that an access to the data ports refers to.
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::BarKind;
    use super::super::fake::{Endpoint, FakeSpace, bar};
    use super::*;

    /// A root port with a device behind it, at bus 1.
    fn segment() -> Arc<PciSegment> {
        let mut segment = PciSegment::new([0..=0xff]).unwrap();
        let port = segment.add_root_port(0).unwrap();
        let bars = [
            bar(0, BarKind::Memory64 { prefetchable: true }, 1 << 20),
            bar(2, BarKind::Io, 16),
        ];
        segment.attach(port, 0, Endpoint::new(0x77, bars)).unwrap();
        Arc::new(segment)
    }

    fn read<const N: usize>(device: &dyn BusDevice, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        device.read(offset, &mut data);
        data
    }

    #[test]
    fn the_window_covers_all_functions() {
        let window = EcamWindow::new(segment());
        assert_eq!(read(&window, 0), [0x36, 0x1b, 8, 0]);
        assert_eq!(read(&window, 1 << 15), [0x36, 0x1b, 0x0c, 0]);
        assert_eq!(read(&window, 1 << 20), [0x34, 0x12, 0x77, 0]);
        assert_eq!(read(&window, (1 << 20) + 2), [0x77, 0]);
        assert_eq!(read(&window, (1 << 20) + 1), [0x12]);
        assert_eq!(read(&window, 1 << 12), [0xff; 4], "no such function");
        assert_eq!(read(&window, 2), [0xff; 4], "straddles dwords");
        assert_eq!(read(&window, 0), [0xff; 8], "no qwords");
        assert_eq!(read(&window, 256 << 20), [0xff; 4], "no such bus");
    }

    #[test]
    fn the_ports_reach_the_first_256_bytes() {
        let ports = ConfigPorts::new(segment());
        assert_eq!(read(&ports, 4), [0xff; 4], "not enabled");
        let _ = ports.write(0, &0x8001_0000_u32.to_le_bytes());
        assert_eq!(read(&ports, 0), 0x8001_0000_u32.to_le_bytes());
        assert_eq!(read(&ports, 4), [0x34, 0x12, 0x77, 0]);
        assert_eq!(read(&ports, 6), [0x77, 0]);
        assert_eq!(read(&ports, 7), [0]);
        assert_eq!(read(&ports, 5), [0xff; 2], "unaligned");
        let _ = ports.write(0, &0x8001_0004_u32.to_le_bytes());
        let _ = ports.write(4, &[4]);
        assert_eq!(read(&ports, 4), [4, 0]);
    }

    #[test]
    fn only_dwords_reach_the_address_port() {
        let ports = ConfigPorts::new(segment());
        let _ = ports.write(0, &0xffff_ffff_u32.to_le_bytes());
        let latched = 0x80ff_fffc_u32.to_le_bytes();
        assert_eq!(read(&ports, 0), latched);
        // 0xcf9 is the reset register of chipsets: writing it neither latches nor resets here.
        assert!(matches!(ports.write(1, &[6]), Effect::None));
        assert!(matches!(ports.write(0, &[0, 0]), Effect::None));
        assert!(matches!(ports.write(3, &[1]), Effect::None));
        assert_eq!(read(&ports, 0), latched);
        assert_eq!(read(&ports, 1), [0xff]);
    }

    #[test]
    fn effects_come_up_both_ways() {
        let segment = segment();
        let window = EcamWindow::new(Arc::clone(&segment));
        let ports = ConfigPorts::new(segment);
        let _ = window.write((1 << 20) + 0x10, &0xc000_0000_u32.to_le_bytes());
        let effect = window.write((1 << 20) + 4, &[2, 0]);
        assert!(matches!(effect, Effect::Remap(_)));
        let _ = ports.write(0, &0x8001_0004_u32.to_le_bytes());
        let effect = ports.write(4, &[2, 0]);
        assert!(matches!(effect, Effect::Remap(_)), "it is not mapped yet");
    }

    proptest! {
        /// A guest does what it likes, in the places that exist and in all others.
        #[test]
        fn hostile_accesses_do_no_harm(
            accesses in vec(
                (
                    prop_oneof![
                        any::<u64>(),
                        0_u64..0x50,
                        0x8000_u64..0x8050,
                        0x10_0000_u64..0x10_0050,
                        Just(u64::MAX),
                    ],
                    vec(prop_oneof![any::<u8>(), Just(0xff), Just(0)], 0..17),
                ),
                0..200,
            ),
        ) {
            let segment = segment();
            let window = EcamWindow::new(Arc::clone(&segment));
            let ports = ConfigPorts::new(Arc::clone(&segment));
            let space = FakeSpace::default();
            for (offset, mut data) in accesses {
                let effects = [
                    window.write(offset, &data),
                    ports.write(offset, &data),
                    ports.write(offset % 8, &data),
                ];
                for effect in effects {
                    if let Effect::Remap(port) = effect {
                        segment.remap(port, &space);
                    }
                }
                window.read(offset, &mut data);
                ports.read(offset, &mut data);
                ports.read(offset % 8, &mut data);
            }
            prop_assert_eq!(read(&window, 0), [0x36, 0x1b, 8, 0]);
        }
    }
}
