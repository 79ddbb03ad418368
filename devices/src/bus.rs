//! Buses: which device answers at a guest address.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

pub use crate::device::{BusDevice, BusError, Effect};

struct Entry {
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space of devices: guest-physical MMIO, or the 64 KiB of I/O ports.
#[derive(Default)]
pub struct Bus {
    // Read-locked only for the look-up, never during an access to a device.
    entries: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// Lets `device` answer the `len` bytes from `base` on.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps another device's.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|more| base.checked_add(more))
            .ok_or(BusError::BadRange { base, len })?;
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&other, _)) = entries
            .range(..=last)
            .next_back()
            .filter(|(_, entry)| entry.last >= base)
        {
            return Err(BusError::Overlap { base, last, other });
        }
        entries.insert(base, Entry { last, device });
        Ok(())
    }

    /// Removes the device whose range begins at `base`, if there is one.
    pub fn remove(&self, base: u64) {
        self.entries
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&base);
    }

    /// Reads `data.len()` bytes at `address`; all ones where no device answers.
    /// Returns whether a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes `data` at `address`. `None` where no device answers: the write is lost.
    pub fn write(&self, address: u64, data: &[u8]) -> Option<Effect> {
        let (offset, device) = self.find(address, data.len())?;
        Some(device.write(offset, data))
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let end = address.checked_add((len as u64).checked_sub(1)?)?;
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let (&base, entry) = entries.range(..=address).next_back()?;
        (entry.last >= end).then(|| (address - base, Arc::clone(&entry.device)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0.wrapping_add(offset as u8));
        }

        fn write(&self, _offset: u64, _data: &[u8]) -> Effect {
            Effect::Reset
        }
    }

    #[test]
    fn accesses_reach_the_device_with_relative_offsets() {
        let bus = Bus::default();
        bus.insert(0x1000, 0x10, Arc::new(Echo(0))).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x1004, &mut data));
        assert_eq!(data, [4, 4]);
        assert!(matches!(bus.write(0x100f, &[0]), Some(Effect::Reset)));
    }

    #[test]
    fn holes_and_straddling_accesses_read_all_ones_and_lose_writes() {
        let bus = Bus::default();
        bus.insert(0x1000, 0x10, Arc::new(Echo(0))).unwrap();
        for address in [0xfff, 0x100d, 0x1010, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(bus.write(address, &data).is_none());
        }
    }

    #[test]
    fn overlaps_and_bad_ranges_are_refused() {
        let bus = Bus::default();
        bus.insert(0x1000, 0x10, Arc::new(Echo(0))).unwrap();
        for (base, len) in [(0x100f, 1), (0xff0, 0x11), (0x1000, 0x10), (0, 0x10000)] {
            let refused = bus.insert(base, len, Arc::new(Echo(1)));
            assert!(
                matches!(refused, Err(BusError::Overlap { other: 0x1000, .. })),
                "{base:#x}"
            );
        }
        for (base, len) in [(0, 0), (u64::MAX, 2)] {
            let refused = bus.insert(base, len, Arc::new(Echo(1)));
            assert_eq!(refused, Err(BusError::BadRange { base, len }));
        }
        bus.insert(0x1010, 1, Arc::new(Echo(1))).unwrap();
        bus.remove(0x1000);
        bus.insert(0xff0, 0x20, Arc::new(Echo(2))).unwrap();
        let answers = |address| {
            let mut data = [0];
            bus.read(address, &mut data).then_some(data[0])
        };
        assert_eq!(answers(0xfef), None);
        assert_eq!(answers(0x1000), Some(0x12));
        assert_eq!(answers(0x1010), Some(1));
    }
}
