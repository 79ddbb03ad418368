//! A BAR of a measured device, mapped.
#![allow(unsafe_code)] // Access to registers of a device.

use std::sync::Arc;

use gantry_devices::mapping::HostMapping;

use crate::Result;
use crate::host::{DeviceIo, MmapArea, Region};

/// The longest part of a BAR that is mapped.
const LONGEST: u64 = 16 << 20;

/// The first part of a BAR that can be mapped, for accesses of 8 to 64 bits.
pub struct Registers {
    memory: Arc<HostMapping>,
    area: MmapArea,
}

impl Registers {
    /// Maps what of a BAR can be mapped; `None` if that is nothing.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn map(io: &dyn DeviceIo, bar: u8) -> Result<Option<Self>> {
        let region = Region::bar(bar);
        let area = region.and_then(|region| Some((region, *io.region(region).areas.first()?)));
        let Some((region, mut area)) = area else {
            return Ok(None);
        };
        area.len = area.len.min(LONGEST);
        let memory = io.map(region, area)?;
        Ok(Some(Self { memory, area }))
    }

    /// Bytes that are mapped from the begin of the BAR on; 0 if its begin is not mapped.
    pub fn len(&self) -> u64 {
        match self.area.offset {
            0 => self.area.len,
            _ => 0,
        }
    }

    /// Where an access of `T` at `offset` of the BAR goes; `None` outside of what is mapped, or unaligned.
    fn at<T>(&self, offset: u64) -> Option<*mut T> {
        let inside = usize::try_from(offset.checked_sub(self.area.offset)?).ok()?;
        let end = inside.checked_add(size_of::<T>())?;
        let fits = end <= self.memory.size() && inside.is_multiple_of(align_of::<T>());
        fits.then(|| self.memory.as_ptr().wrapping_add(inside).cast())
    }

    /// Reads a register of the width of `T`, which is an integer; `None` outside of what is mapped.
    pub fn read<T: Word>(&self, offset: u64) -> Option<T> {
        // SAFETY: `at` gives aligned addresses inside a mapping that `self` keeps, of an integer that has any value.
        self.at(offset)
            .map(|at: *mut T| unsafe { at.read_volatile() })
    }

    /// Writes a register of the width of `T`; nothing outside of what is mapped.
    pub fn write<T: Word>(&self, offset: u64, value: T) {
        if let Some(at) = self.at::<T>(offset) {
            // SAFETY: `at` gives aligned addresses inside a mapping that `self` keeps; its bytes are the device's, and
            // nothing refers to them.
            unsafe { at.write_volatile(value) };
        }
    }
}

/// An integer of the width of an access.
pub trait Word: Copy {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}
