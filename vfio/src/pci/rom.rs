//! The expansion ROM of a function: the device's own, an image from a file, or none.
//!
//! VFIO lets a ROM be read, not mapped, and prepares the device for each call. So the first access of the guest
//! reads the whole image, and this and all others are answered from the copy. They trap: a driver reads a ROM
//! once, if at all, and a memory slot for it would have to be read-only and made of whole pages.

use std::error::Error;
use std::sync::{Arc, OnceLock};

use gantry_devices::bus::{BusDevice, Effect};
use gantry_devices::pci::{Bar, BarKind, ROM, ROM_SIZES, Segment, SegmentKind};
use gantry_devices::warn_limited;

use crate::host::{DeviceIo, Region};

/// Which expansion ROM a function has in the guest.
#[derive(Debug, Clone, Default)]
pub enum Rom {
    /// That of the device, if it has one.
    #[default]
    Device,
    /// This one.
    Image(RomImage),
    /// None.
    None,
}

/// The bytes of an expansion ROM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RomImage(Arc<[u8]>);

/// Why bytes are no expansion ROM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RomError {
    /// They do not begin as one.
    #[error("it is no expansion ROM: it does not begin with the bytes 55 AA")]
    Signature,
    /// They are too many.
    #[error("it is longer than an expansion ROM can be, {} MiB", ROM_SIZES.end() >> 20)]
    Size,
}

impl RomImage {
    /// The most bytes that one can have.
    pub const MAX: u64 = *ROM_SIZES.end();
    /// How each begins (PCI Firmware Specification 3.3, 5.1).
    const SIGNATURE: [u8; 2] = [0x55, 0xaa];

    /// An image of these bytes.
    ///
    /// # Errors
    /// They are too many, or do not begin with the signature.
    pub fn new(bytes: impl Into<Arc<[u8]>>) -> Result<Self, RomError> {
        let bytes = bytes.into();
        if !bytes.starts_with(&Self::SIGNATURE) {
            return Err(RomError::Signature);
        }
        match bytes.len() as u64 > Self::MAX {
            true => Err(RomError::Size),
            false => Ok(Self(bytes)),
        }
    }
}

/// The BAR of a function's expansion ROM, if the guest gets one.
pub(super) fn open(io: &Arc<dyn DeviceIo>, rom: Rom) -> Option<Bar> {
    let (size, image) = match rom {
        Rom::None => return None,
        Rom::Image(RomImage(image)) => {
            let size = (image.len() as u64).next_power_of_two();
            (size.max(*ROM_SIZES.start()), OnceLock::from(image))
        }
        Rom::Device => (io.region(Region::ROM).size, OnceLock::new()),
    };
    if size == 0 {
        return None;
    }
    if !ROM_SIZES.contains(&size) || !size.is_power_of_two() {
        let size = format_args!("{size:#x}");
        tracing::info!(device = io.name(), %size, "the guest gets no expansion ROM of this size");
        return None;
    }
    let device = Arc::new(RomWindow {
        io: Arc::clone(io),
        size,
        image,
    });
    let segment = Segment {
        offset: 0,
        kind: SegmentKind::Trapped { len: size, device },
    };
    Some(Bar {
        index: ROM,
        kind: BarKind::Rom,
        size,
        segments: [segment].into(),
    })
}

/// Answers accesses to the ROM.
struct RomWindow {
    io: Arc<dyn DeviceIo>,
    size: u64,
    /// Once it is known.
    image: OnceLock<Arc<[u8]>>,
}

impl RomWindow {
    fn image(&self) -> crate::Result<&[u8]> {
        if let Some(image) = self.image.get() {
            return Ok(image);
        }
        let mut image = vec![0; self.size as usize];
        self.io.read(Region::ROM, 0, &mut image)?;
        Ok(self.image.get_or_init(|| image.into()))
    }
}

impl BusDevice for RomWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Also behind the image.
        data.fill(0xff);
        match self.image() {
            Ok(image) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let rest = image.get(start..).unwrap_or_default();
                for (byte, from) in data.iter_mut().zip(rest) {
                    *byte = *from;
                }
            }
            Err(error) => {
                warn_limited!(error = &error as &dyn Error, "guest reads all ones");
            }
        }
    }

    /// It is read-only.
    fn write(&self, _offset: u64, _data: &[u8]) -> Effect {
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeDevice;

    fn read(bar: &Bar, offset: u64) -> [u8; 4] {
        let [segment] = &*bar.segments else {
            panic!("one segment")
        };
        let SegmentKind::Trapped { device, .. } = &segment.kind else {
            panic!("it traps")
        };
        let mut data = [0; 4];
        device.read(offset, &mut data);
        assert!(matches!(device.write(offset, &data), Effect::None));
        data
    }

    fn device(size: u64) -> (Arc<FakeDevice>, Arc<dyn DeviceIo>) {
        let mut device = FakeDevice::new();
        device.regions[Region::ROM.index()].size = size;
        let device = Arc::new(device);
        (device.clone(), device)
    }

    #[test]
    fn the_devices_own_is_read_once_and_only_when_the_guest_reads_it() {
        let (device, io) = device(0x1_0000);
        let bar = open(&io, Rom::Device).unwrap();
        assert_eq!((bar.index, bar.kind, bar.size), (6, BarKind::Rom, 0x1_0000));
        device.trace.fail_after(0);
        assert_eq!(read(&bar, 0x10), [0xff; 4]);
        assert_eq!(device.trace.failed().unwrap(), "read expansion ROM 0x0");
        assert_eq!(read(&bar, 0x10), [0x10, 0x11, 0x12, 0x13]);
        device.trace.fail_after(0);
        assert_eq!(read(&bar, 0x20), [0x20, 0x21, 0x22, 0x23]);
        assert_eq!(device.trace.failed(), None, "from the copy");
        assert_eq!(device.trace.take(), [] as [&str; 0], "nothing is written");
    }

    #[test]
    fn an_image_replaces_the_devices_own_and_behind_it_are_ones() {
        let (device, io) = device(0x1_0000);
        let image = RomImage::new(vec![0x55, 0xaa, 1, 2, 3]).unwrap();
        let bar = open(&io, Rom::Image(image)).unwrap();
        assert_eq!(bar.size, 2048);
        device.trace.fail_after(0);
        assert_eq!(read(&bar, 0), [0x55, 0xaa, 1, 2]);
        assert_eq!(read(&bar, 3), [2, 3, 0xff, 0xff]);
        for offset in [5, 2044, u64::MAX] {
            assert_eq!(read(&bar, offset), [0xff; 4]);
        }
        assert_eq!(device.trace.failed(), None);
    }

    #[test]
    fn there_is_none_where_none_is_wanted_or_the_device_has_none_of_use() {
        for size in [0, 1024, 0x3000, 32 << 20, u64::MAX] {
            assert!(open(&device(size).1, Rom::Device).is_none(), "{size:#x}");
        }
        assert!(open(&device(0x1_0000).1, Rom::None).is_none());
    }

    #[test]
    fn only_what_begins_as_a_rom_and_is_no_longer_than_one_is_an_image() {
        for bytes in [&[][..], &[0x55], &[0xaa, 0x55], &[0x7f, b'E', b'L', b'F']] {
            assert_eq!(RomImage::new(bytes), Err(RomError::Signature));
        }
        let mut long = vec![0; (16 << 20) + 1];
        long[..2].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(RomImage::new(&long[..]), Err(RomError::Size));
        assert!(RomImage::new(&long[..16 << 20]).is_ok());
    }
}
