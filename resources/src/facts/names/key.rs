//! The key of a name and the form of its record: shared with the build script.

/// A thing with a name in pci.ids.
#[derive(Clone, Copy)]
pub(crate) enum Key {
    /// A vendor id.
    Vendor(u16),
    /// A device id of a vendor.
    Device(u16, u16),
    /// A base class.
    Class(u8),
    /// A subclass of a base class.
    Subclass(u8, u8),
}

impl Key {
    /// The number of this key, which no other key has.
    pub(crate) fn code(self) -> u64 {
        match self {
            Self::Vendor(vendor) => 1 << 32 | u64::from(vendor),
            Self::Device(vendor, device) => 2 << 32 | u64::from(vendor) << 16 | u64::from(device),
            Self::Class(base) => 3 << 32 | u64::from(base),
            Self::Subclass(base, sub) => 4 << 32 | u64::from(base) << 8 | u64::from(sub),
        }
    }
}

/// Bytes of a record.
#[allow(dead_code)] // the build script writes records, the crate reads them
pub(crate) const RECORD: usize = 16;

/// A record of the table: code, start and length in the text, little endian.
#[allow(dead_code)]
pub(crate) fn record(code: u64, start: u32, len: u32) -> [u8; RECORD] {
    (u128::from(code) | u128::from(start) << 64 | u128::from(len) << 96).to_le_bytes()
}

/// The parts of a record.
#[allow(dead_code)]
pub(crate) fn parts(record: [u8; RECORD]) -> (u64, usize, usize) {
    let bits = u128::from_le_bytes(record);
    (
        bits as u64,
        (bits >> 64) as u32 as usize,
        (bits >> 96) as usize,
    )
}
