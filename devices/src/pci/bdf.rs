//! The address of a PCI function in the guest.

use std::fmt;

/// Bus, device and function of a function in the guest, in segment 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestBdf(u16);

/// A device number over 31 or a function number over 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no PCI function {device:#x}.{function:#x}: devices go to 0x1f, functions to 7")]
pub struct InvalidBdf {
    /// The device number asked for.
    pub device: u8,
    /// The function number asked for.
    pub function: u8,
}

impl GuestBdf {
    /// The function at `bus`, `device` (0 to 31) and `function` (0 to 7).
    ///
    /// # Errors
    /// The device or function number is out of range.
    pub const fn new(bus: u8, device: u8, function: u8) -> Result<Self, InvalidBdf> {
        if device > 0x1f || function > 7 {
            return Err(InvalidBdf { device, function });
        }
        Ok(Self(
            (bus as u16) << 8 | (device as u16) << 3 | function as u16,
        ))
    }

    /// From the 16 bits that requester ids, ECAM and port CF8 use.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The 16 bits: bus in 15..8, device in 7..3, function in 2..0.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// The bus number.
    pub const fn bus(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// The device number, 0 to 31.
    pub const fn device(self) -> u8 {
        (self.0 >> 3) as u8 & 0x1f
    }

    /// The function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0 as u8 & 7
    }
}

impl fmt::Display for GuestBdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "0000:{:02x}:{:02x}.{}",
            self.bus(),
            self.device(),
            self.function()
        )
    }
}

impl fmt::Debug for GuestBdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_bits_agree() {
        let bdf = GuestBdf::new(0x12, 0x1f, 7).unwrap();
        assert_eq!((bdf.bus(), bdf.device(), bdf.function()), (0x12, 0x1f, 7));
        assert_eq!(bdf, GuestBdf::from_bits(0x12ff));
        assert_eq!(bdf.to_string(), "0000:12:1f.7");
        assert!(GuestBdf::new(0, 32, 0).is_err());
        assert!(GuestBdf::new(0, 0, 8).is_err());
    }
}
