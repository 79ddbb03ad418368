//! The host bridge: function 0 of device 0 of a root bus, without registers that have an effect.

use std::io;

use super::config::{Area, ConfigSpace, NoBacking};
use super::registers::{DEVICE_ID, REVISION_ID, VENDOR_ID};
use super::{BarSpace, PciDevice};

/// Red Hat's vendor id, which also QEMU's devices have.
pub(super) const VENDOR: u16 = 0x1b36;
/// QEMU's generic PCIe host bridge. Linux knows no quirk for it and needs no driver.
const DEVICE: u16 = 0x0008;
/// Class 06 bridge, subclass 00 host bridge, programming interface 0.
const CLASS: u32 = 0x06_00_00;

/// A host bridge. Only ACPI describes its windows and bus numbers.
pub struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    /// A host bridge.
    pub fn new() -> Self {
        let config = ConfigSpace::new()
            .with(Area::read_only(VENDOR_ID, &VENDOR.to_le_bytes()))
            .with(Area::read_only(DEVICE_ID, &DEVICE.to_le_bytes()))
            .with(Area::read_only(REVISION_ID, &(CLASS << 8).to_le_bytes()));
        Self { config }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciDevice for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data, &NoBacking);
    }

    fn write_config(&self, _offset: u16, _data: &[u8]) -> bool {
        false
    }

    fn remap(&self, _space: &dyn BarSpace) {}

    fn reset(&self, _space: &dyn BarSpace) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_found_as_a_host_bridge_without_bars() {
        let bridge = HostBridge::new();
        let dword = |offset| {
            let mut data = [0; 4];
            bridge.read_config(offset, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(dword(0), 0x0008_1b36);
        assert_eq!(dword(8), 0x0600_0000);
        assert!(!bridge.write_config(0x10, &[0xff; 4]));
        assert_eq!(dword(0x10), 0);
        assert_eq!(dword(0x100), 0);
    }
}
