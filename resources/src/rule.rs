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
            Some(bits) if digits.len().is_multiple_of(2) => Ok(Self {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost};
    use proptest::prelude::*;
    use serde_json::json;
    use std::sync::LazyLock;

    fn device() -> HostDevice {
        static DEVICE: LazyLock<HostDevice> = LazyLock::new(|| {
            let fake = Fake::nvme("0000:01:00.0", 1)
                .driver("nvme")
                .with("nvme/nvme0/serial", "GN-1");
            let device = FakeHost::new(&[fake]).read("0000:01:00.0");
            HostDevice {
                dsn: Some("00-1b-21-ff-ff-aa-bb-cc".to_owned()),
                ..device
            }
        });
        DEVICE.clone()
    }

    #[test]
    fn all_filters_must_hold() {
        let device = device();
        for (rule, matches) in [
            (json!({"vendor": "1b36"}), true),
            (json!({"vendor": "0x1B36"}), true),
            (json!({"vendor": "8086"}), false),
            (json!({"id": "1b36:0010"}), true),
            (json!({"id": "0x1b36:0x0010"}), true),
            (json!({"id": "1b36:0011"}), false),
            (json!({"class": "01"}), true),
            (json!({"class": "0108"}), true),
            (json!({"class": "0x010802"}), true),
            (json!({"class": "010801"}), false),
            (json!({"class": "02"}), false),
            (json!({"slot": "01:00.0"}), true),
            (json!({"slot": "0001:01:00.0"}), false),
            (json!({"serial": "GN-1"}), true),
            (json!({"serial": "gn-1"}), false),
            (json!({"serial": "00-1B-21-FF-FF-AA-BB-CC"}), true),
            (
                json!({"vendor": "1b36", "device": "0010", "class": "0108", "slot": "01:00.0", "serial": "GN-1"}),
                true,
            ),
            (json!({"vendor": "1b36", "device": "0011"}), false),
            (json!({"vendor": "1b36", "slot": "02:00.0"}), false),
        ] {
            let parsed: Rule = serde_json::from_value(rule.clone()).unwrap();
            assert_eq!(parsed.matches(&device), matches, "{rule}");
        }
    }

    #[test]
    fn what_is_no_filter_is_refused_with_an_example() {
        for (rule, said) in [
            (json!({}), "at least one filter"),
            (json!({"vendor": "86"}), "\"86\" is no PCI id"),
            (json!({"vendor": "+086"}), "four hex digits"),
            (json!({"device": "xyzw"}), "four hex digits"),
            (json!({"id": "1b36"}), "1b36:0010"),
            (json!({"id": "1b36:0010:"}), "1b36:0010"),
            (json!({"class": "010"}), "2, 4 or 6 hex digits"),
            (json!({"class": "01080200"}), "2, 4 or 6 hex digits"),
            (json!({"class": "nvme"}), "2, 4 or 6 hex digits"),
            (json!({"slot": "nvme0"}), "0000:01:00.0"),
            (json!({"serial": " "}), "cannot be empty"),
            (json!({"vendor": 8086}), "expected a string"),
        ] {
            let error = serde_json::from_value::<Rule>(rule.clone())
                .unwrap_err()
                .to_string();
            assert!(error.contains(said), "{rule}: {error}");
        }
    }

    #[test]
    fn no_device_matches_a_serial_number_it_has_not() {
        let mut device = device();
        (device.serial, device.dsn) = (None, None);
        let rule: Rule = serde_json::from_value(json!({"serial": "GN-1"})).unwrap();
        assert!(!rule.matches(&device));
    }

    proptest! {
        #[test]
        fn a_rule_made_of_a_device_matches_it_and_reads_back(
            (vendor, id, class) in any::<(u16, u16, u32)>(),
            digits in prop::sample::select(vec![2usize, 4, 6]),
            parts in 1u8..32,
        ) {
            let mut device = device();
            device.id = crate::ids::PciId { vendor, device: id };
            device.class = PciClass::new(class);
            let code = device.class.to_string();
            let on = |bit: u8| parts & (1 << bit) != 0;
            let filters = Filters {
                id: None,
                vendor: on(0).then_some(HexId(vendor)),
                device: on(1).then_some(HexId(id)),
                class: on(2).then(|| code[..digits].parse().unwrap()),
                slot: on(3).then_some(device.bdf),
                serial: on(4).then(|| "GN-1".to_owned()),
            };
            let rule = Rule::try_from(filters).unwrap();
            prop_assert!(rule.matches(&device));
            let text = serde_json::to_string(&rule).unwrap();
            prop_assert_eq!(serde_json::from_str::<Rule>(&text).unwrap(), rule);
        }

        #[test]
        fn a_class_prefix_covers_what_begins_like_it(prefix in "([0-9a-f]{2}){1,3}", class in any::<u32>()) {
            let class = PciClass::new(class);
            let covered = prefix.parse::<ClassPrefix>().unwrap().covers(class);
            prop_assert_eq!(covered, class.to_string().starts_with(&prefix));
        }
    }
}
