//! The address of a PCI function of the host.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::base::text::written_as_text;

/// The address of a PCI function of the host: domain, bus, device, function.
///
/// Written `0000:01:00.0`; `01:00.0` is read as domain 0. Domains beyond 16 bits exist (VMD).
/// Ordered as the numbers are, which is also the order of allocation.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct HostBdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// Text that is no PCI address.
#[derive(Debug, Error)]
#[error("\"{0}\" is not a PCI address: write it like 0000:01:00.0 or 01:00.0")]
pub struct BdfError(pub(crate) String);

impl HostBdf {
    /// An address from its numbers; none if the device is over 31 or the function over 7.
    pub fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        (device < 32 && function < 8).then_some(Self {
            domain,
            bus,
            device,
            function,
        })
    }

    /// The address that a sysfs path such as `/sys/bus/pci/devices/0000:01:00.0` ends with.
    pub(crate) fn from_sysfs_path(path: &Path) -> Result<Self, BdfError> {
        match path.file_name().and_then(|name| name.to_str()) {
            Some(name) => name.parse(),
            None => Err(BdfError(path.display().to_string())),
        }
    }

    /// Whether two functions have domain, bus and device number in common.
    pub(crate) fn is_in_slot_of(self, other: Self) -> bool {
        (self.domain, self.bus, self.device) == (other.domain, other.bus, other.device)
    }

    /// PCI domain (segment).
    pub fn domain(self) -> u32 {
        self.domain
    }

    /// Bus number.
    pub fn bus(self) -> u8 {
        self.bus
    }

    /// Device number, below 32.
    pub fn device(self) -> u8 {
        self.device
    }

    /// Function number, below 8.
    pub fn function(self) -> u8 {
        self.function
    }
}

impl fmt::Display for HostBdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!(
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.domain, self.bus, self.device, self.function
        );
        f.pad(&text)
    }
}

impl FromStr for HostBdf {
    type Err = BdfError;

    fn from_str(text: &str) -> Result<Self, BdfError> {
        parse(text).ok_or_else(|| BdfError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<HostBdf> {
    let (rest, function) = text.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = match rest.rsplit_once(':') {
        Some((domain, bus)) => (hex(domain, 4..=8)?, bus),
        None => (0, rest),
    };
    HostBdf::new(
        domain,
        u8::try_from(hex(bus, 2..=2)?).ok()?,
        u8::try_from(hex(device, 2..=2)?).ok()?,
        u8::try_from(hex(function, 1..=1)?).ok()?,
    )
}

/// Hex digits only, as many as `digits` allows: `from_str_radix` alone would take a sign.
pub(crate) fn hex(text: &str, digits: std::ops::RangeInclusive<usize>) -> Option<u32> {
    let fits = digits.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    fits.then(|| u32::from_str_radix(text, 16).ok())?
}

written_as_text!(HostBdf);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn long_and_short_addresses_are_read() {
        for (text, shown) in [
            ("0000:01:00.0", "0000:01:00.0"),
            ("01:00.0", "0000:01:00.0"),
            ("0001:AF:1f.7", "0001:af:1f.7"),
            ("10000:e1:00.0", "10000:e1:00.0"),
        ] {
            assert_eq!(text.parse::<HostBdf>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "nvme",
            "01:00",
            "01:20.0",
            "01:00.8",
            "1:00.0",
            "0000:01:00.0 ",
            "+000:01:00.0",
            "000:01:00.0",
        ] {
            let error = text.parse::<HostBdf>().unwrap_err().to_string();
            assert!(error.contains("0000:01:00.0"), "{error}");
        }
    }

    #[test]
    fn a_sysfs_path_names_its_device() {
        let path = Path::new("/sys/bus/pci/devices/0000:01:00.0/");
        assert_eq!(HostBdf::from_sysfs_path(path).unwrap().bus(), 1);
        assert!(HostBdf::from_sysfs_path(Path::new("/")).is_err());
    }

    proptest! {
        #[test]
        fn printed_addresses_read_back(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let bdf = HostBdf::new(domain, bus, device, function).unwrap();
            prop_assert_eq!(bdf.to_string().parse::<HostBdf>().unwrap(), bdf);
        }

        #[test]
        fn order_is_that_of_the_numbers(a: (u16, u8), b: (u16, u8)) {
            let of = |(domain, bus): (u16, u8)| HostBdf::new(u32::from(domain), bus, 0, 0).unwrap();
            prop_assert_eq!(of(a).cmp(&of(b)), a.cmp(&b));
        }
    }
}
