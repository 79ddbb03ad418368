//! The filters that select devices, and whether a device passes them.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::host::{HostBdf, hex};
use crate::ids::PciClass;
use crate::inventory::HostDevice;

/// Filters that must all hold for a device to match. There is at least one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Filters", into = "Filters")]
#[schemars(with = "Filters")]
pub struct Rule(Filters);

/// The filters of a rule as they are written; those left out hold for every device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("minProperties" = 1))]
pub struct Filters {
    /// Vendor and device id together, as `lspci -nn` shows them: "1b36:0010".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<IdPair>,
    /// Vendor id, four hex digits: "1b36" or "0x1b36".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<HexId>,
    /// Device id, four hex digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<HexId>,
    /// The class code or its beginning: base class ("01"), with subclass ("0108"), with programming
    /// interface ("010802").
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<ClassPrefix>,
    /// PCI address: "0000:01:00.0" or "01:00.0".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<HostBdf>,
    /// Serial number: of the NVMe controller, or the PCIe device serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub serial: Option<String>,
}

/// A filter that is no such thing.
#[derive(Debug, Error)]
pub enum RuleError {
    /// Not four hex digits.
    #[error("\"{0}\" is no PCI id: write four hex digits, \"8086\" or \"0x8086\"")]
    Id(String),
    /// Not two ids with a colon between.
    #[error("\"{0}\" is no pair of PCI ids: write vendor and device like \"1b36:0010\"")]
    IdPair(String),
    /// Not the beginning of a class code.
    #[error("\"{0}\" is no PCI class: write 2, 4 or 6 hex digits, like \"0108\" for NVMe")]
    Class(String),
    /// No filter at all.
    #[error(
        "a rule needs at least one filter (id, vendor, device, class, slot, serial), or it would take every device"
    )]
    Empty,
    /// A serial number without a character.
    #[error("a serial number cannot be empty: leave the filter out instead")]
    EmptySerial,
}

impl Rule {
    /// The filters.
    pub fn filters(&self) -> &Filters {
        &self.0
    }

    /// Whether all filters hold for a device.
    pub fn matches(&self, device: &HostDevice) -> bool {
        let Filters {
            id,
            vendor,
            device: device_id,
            class,
            slot,
            serial,
        } = &self.0;
        holds(id, |id| {
            (id.vendor.0, id.device.0) == (device.id.vendor, device.id.device)
        }) && holds(vendor, |vendor| vendor.0 == device.id.vendor)
            && holds(device_id, |id| id.0 == device.id.device)
            && holds(class, |class| class.covers(device.class))
            && holds(slot, |slot| *slot == device.bdf)
            && holds(serial, |serial| has_serial(device, serial))
    }
}

fn holds<T>(filter: &Option<T>, test: impl FnOnce(&T) -> bool) -> bool {
    filter.as_ref().is_none_or(test)
}

fn has_serial(device: &HostDevice, serial: &str) -> bool {
    device.serial.as_deref() == Some(serial)
        || device
            .dsn
            .as_deref()
            .is_some_and(|dsn| dsn.eq_ignore_ascii_case(serial))
}

impl TryFrom<Filters> for Rule {
    type Error = RuleError;

    fn try_from(filters: Filters) -> Result<Self, RuleError> {
        if filters == Filters::default() {
            return Err(RuleError::Empty);
        }
        if filters
            .serial
            .as_deref()
            .is_some_and(|serial| serial.trim().is_empty())
        {
            return Err(RuleError::EmptySerial);
        }
        Ok(Self(filters))
    }
}

impl From<Rule> for Filters {
    fn from(rule: Rule) -> Self {
        rule.0
    }
}

/// A vendor or device id of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^(0x)?[0-9a-fA-F]{4}$"))]
pub struct HexId(pub u16);

/// A vendor id and a device id of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^(0x)?[0-9a-fA-F]{4}:(0x)?[0-9a-fA-F]{4}$"))]
pub struct IdPair {
    /// Vendor id.
    pub vendor: HexId,
    /// Device id.
    pub device: HexId,
}

/// The first one, two or three bytes of a class code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^(0x)?([0-9a-fA-F]{2}){1,3}$"))]
pub struct ClassPrefix {
    bits: u32,
    digits: u8,
}

impl ClassPrefix {
    /// Whether a class begins with these digits.
    pub fn covers(self, class: PciClass) -> bool {
        class.code() >> (24 - 4 * u32::from(self.digits)) == self.bits
    }
}

fn digits(text: &str) -> &str {
    text.strip_prefix("0x").unwrap_or(text)
}

impl FromStr for HexId {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let id = hex(digits(text), 4..=4).and_then(|id| u16::try_from(id).ok());
        id.map(Self).ok_or_else(|| RuleError::Id(text.to_owned()))
    }
}

impl FromStr for IdPair {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let pair = text.split_once(':').and_then(|(vendor, device)| {
            Some(Self {
                vendor: vendor.parse().ok()?,
                device: device.parse().ok()?,
            })
        });
        pair.ok_or_else(|| RuleError::IdPair(text.to_owned()))
    }
}

impl FromStr for ClassPrefix {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let digits = digits(text);
        match hex(digits, 2..=6) {
            Some(bits) if digits.len() % 2 == 0 => Ok(Self {
                bits,
                digits: digits.len() as u8,
            }),
            _ => Err(RuleError::Class(text.to_owned())),
        }
    }
}

impl fmt::Display for HexId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}", self.0)
    }
}

impl fmt::Display for IdPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.vendor, self.device)
    }
}

impl fmt::Display for ClassPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:0width$x}",
            self.bits,
            width = usize::from(self.digits)
        )
    }
}

macro_rules! written_as_text {
    ($($kind:ty),*) => {$(
        impl TryFrom<String> for $kind {
            type Error = RuleError;

            fn try_from(text: String) -> Result<Self, RuleError> {
                text.parse()
            }
        }

        impl From<$kind> for String {
            fn from(value: $kind) -> Self {
                value.to_string()
            }
        }
    )*};
}

written_as_text!(HexId, IdPair, ClassPrefix);
