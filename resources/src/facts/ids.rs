//! The identity of a PCI function: vendor, device and class, with their names in pci.ids.

use std::fmt;

use serde::Serialize;

use crate::facts::names::{Key, name};

/// A vendor and a device id, shown `1b36:0010`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(into = "String")]
pub struct PciId {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
}

impl PciId {
    /// The vendor's name.
    pub fn vendor_name(self) -> Option<&'static str> {
        name(Key::Vendor(self.vendor))
    }

    /// The device's name.
    pub fn device_name(self) -> Option<&'static str> {
        name(Key::Device(self.vendor, self.device))
    }
}

impl fmt::Display for PciId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:04x}:{:04x}", self.vendor, self.device))
    }
}

impl From<PciId> for String {
    fn from(id: PciId) -> Self {
        id.to_string()
    }
}

/// The 24-bit class code: base class, subclass, programming interface. Shown `010802`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(into = "String")]
pub struct PciClass(u32);

impl PciClass {
    /// A class from its lower 24 bits.
    pub fn new(code: u32) -> Self {
        Self(code & 0xff_ffff)
    }

    /// All 24 bits.
    pub fn code(self) -> u32 {
        self.0
    }

    /// Base class, such as 0x01 for mass storage.
    pub fn base(self) -> u8 {
        (self.0 >> 16) as u8
    }

    /// Subclass, such as 0x08 for non-volatile memory among mass storage.
    pub fn sub(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// A bridge of the host: host, ISA or PCI bridge. "Other bridge" (0680) does not count: NVSwitches have
    /// this class and are endpoints.
    pub fn is_bridge(self) -> bool {
        self.base() == 0x06 && self.sub() != 0x80
    }

    /// A bridge with a secondary bus (PCI-to-PCI, CardBus): header type 1 or 2.
    pub(crate) fn is_bus_bridge(self) -> bool {
        self.base() == 0x06 && matches!(self.sub(), 0x04 | 0x07 | 0x09)
    }

    /// Name of the subclass, or else of the base class.
    pub fn name(self) -> Option<&'static str> {
        name(Key::Subclass(self.base(), self.sub())).or_else(|| name(Key::Class(self.base())))
    }
}

impl fmt::Display for PciClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:06x}", self.0))
    }
}

impl From<PciClass> for String {
    fn from(class: PciClass) -> Self {
        class.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_pci_ids() {
        let nvme = PciId {
            vendor: 0x1b36,
            device: 0x0010,
        };
        assert_eq!(nvme.vendor_name(), Some("Red Hat, Inc."));
        assert!(
            nvme.device_name()
                .is_some_and(|name| name.contains("NVM Express"))
        );
        assert_eq!(
            PciId {
                vendor: 0x1b36,
                device: 0xfffe
            }
            .device_name(),
            None
        );
        assert_eq!(
            PciClass::new(0x010802).name(),
            Some("Non-Volatile memory controller")
        );
        assert_eq!(
            PciClass::new(0x01fe00).name(),
            Some("Mass storage controller")
        );
        assert_eq!(PciClass::new(0xfd0000).name(), None);
    }

    #[test]
    fn an_nvswitch_is_no_bridge_of_the_host() {
        for (code, bridge, bus) in [
            (0x060000, true, false),
            (0x060100, true, false),
            (0x060400, true, true),
            (0x068000, false, false),
        ] {
            let class = PciClass::new(code);
            assert_eq!(
                (class.is_bridge(), class.is_bus_bridge()),
                (bridge, bus),
                "{class}"
            );
        }
    }
}
