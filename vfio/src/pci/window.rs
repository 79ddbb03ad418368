//! A part of a BAR that traps: MSI-X structures are emulated, other accesses go to the device.

use std::error::Error;
use std::sync::Arc;

use gantry_devices::bus::{BusDevice, Effect};
use gantry_devices::warn_limited;

use super::interrupts::Interrupts;
use crate::host::{DeviceIo, Region};

/// Answers accesses to a part of a region.
pub(super) struct Window {
    io: Arc<dyn DeviceIo>,
    region: Region,
    /// Offset of the part in the region.
    start: u64,
    interrupts: Arc<Interrupts>,
}

impl Window {
    /// The part of `region` from `start` on.
    pub fn new(
        io: &Arc<dyn DeviceIo>,
        region: Region,
        start: u64,
        interrupts: &Arc<Interrupts>,
    ) -> Self {
        Self {
            io: Arc::clone(io),
            region,
            start,
            interrupts: Arc::clone(interrupts),
        }
    }
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let at = self.start.saturating_add(offset);
        if self.interrupts.read(self.region.bar_number(), at, data) {
            return;
        }
        if let Err(error) = self.io.read(self.region, at, data) {
            data.fill(0xff);
            warn_limited!(error = &error as &dyn Error, "guest reads all ones");
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let at = self.start.saturating_add(offset);
        if self.interrupts.write(self.region.bar_number(), at, data) {
            return Effect::None;
        }
        if let Err(error) = self.io.write(self.region, at, data) {
            warn_limited!(error = &error as &dyn Error, "guest's write is lost");
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeDevice, FakeRouter};

    #[test]
    fn offsets_are_those_of_the_part_and_errors_are_the_guests_all_ones() {
        let device = Arc::new(FakeDevice::new());
        let io: Arc<dyn DeviceIo> = device.clone();
        let bar0 = Region::bar(0).unwrap();
        let router = Arc::new(FakeRouter::new(&device.trace, 0));
        let interrupts = super::super::interrupts::new(&io, router, None, None).unwrap();
        let window = Window::new(&io, bar0, 0x5000, &interrupts);
        assert!(matches!(window.write(0x10, &[1, 2]), Effect::None));
        assert_eq!(device.trace.take(), ["write BAR0 0x5010 [01, 02]"]);
        let mut data = [0; 4];
        window.read(0x0f, &mut data);
        assert_eq!(data, [0x0f, 1, 2, 0x12]);

        device.trace.fail_after(0);
        window.read(0x10, &mut data);
        assert_eq!(data, [0xff; 4]);
        device.trace.fail_after(0);
        assert!(matches!(window.write(0x10, &[9]), Effect::None));
        for far in [0x3000, u64::MAX] {
            window.read(far, &mut data);
            assert_eq!(data, [0xff; 4]);
        }
    }
}
