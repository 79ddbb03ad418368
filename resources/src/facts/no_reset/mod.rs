//! Devices that must not be reset: gantry's own list, and the host's in `no-reset.json` of its configuration
//! directory.

use std::io;
use std::path::Path;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::base::bdf::hex;
use crate::base::config::{self, ConfigError};
use crate::base::host::HostPaths;
use crate::facts::ids::PciId;

/// gantry's own list.
const KNOWN: &str = include_str!("list.json");
/// The host's list.
const FILE: &str = "no-reset.json";

/// Devices that must not be reset.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NoReset {
    devices: Vec<Entry>,
}

/// Devices of one kind. A key that is absent stands for any id.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    vendor: Id,
    device: Option<Id>,
    subsystem_vendor: Option<Id>,
    subsystem_device: Option<Id>,
    /// The damage that a reset does, for messages.
    reason: String,
    /// The source.
    source: String,
}

/// An id of four hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Id(u16);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let id = hex(text.strip_prefix("0x").unwrap_or(&text), 1..=4);
        let wrong = || D::Error::custom(format!("\"{text}\" is no id: write it like \"10de\""));
        id.map(|id| Self(id as u16)).ok_or_else(wrong)
    }
}

impl NoReset {
    /// Reads both lists. A tenant that may not read the host's list gets only gantry's.
    pub(crate) fn load(paths: &HostPaths) -> Result<Self, ConfigError> {
        let mut known: Self = config::parse(Path::new("list.json"), KNOWN)?;
        let path = paths.config_of_host().join(FILE);
        let text = match config::read(&path) {
            Err(ConfigError::Read { source, .. })
                if paths.only.is_some() && source.kind() == io::ErrorKind::PermissionDenied =>
            {
                None
            }
            read => read?,
        };
        if let Some(text) = text {
            let own: Self = config::parse(&path, &text)?;
            known.devices.extend(own.devices);
        }
        Ok(known)
    }

    /// Why a device must not be reset; none if it may be. Virtual functions of such a card may be reset.
    pub(crate) fn reason(&self, id: PciId, subsystem: Option<PciId>) -> Option<String> {
        let is = |wanted: Option<Id>, is: Option<u16>| wanted.is_none_or(|id| Some(id.0) == is);
        let matching = |entry: &&Entry| {
            is(Some(entry.vendor), Some(id.vendor))
                && is(entry.device, Some(id.device))
                && is(entry.subsystem_vendor, subsystem.map(|id| id.vendor))
                && is(entry.subsystem_device, subsystem.map(|id| id.device))
        };
        let entry = self.devices.iter().find(matching)?;
        Some(format!("{} ({})", entry.reason, entry.source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::FakeHost;

    fn id(vendor: u16, device: u16) -> PciId {
        PciId { vendor, device }
    }

    #[test]
    fn the_list_that_comes_with_gantry_names_its_sources() {
        let host = FakeHost::new(&[]);
        let list = NoReset::load(&host.paths).unwrap();
        let why = list.reason(id(0x1002, 0x74a1), None).unwrap();
        assert!(why.contains("0xff") && why.contains("issue 25"), "{why}");
        assert_eq!(list.reason(id(0x1002, 0x1638), None), None);
        for entry in &list.devices {
            assert!(!entry.source.is_empty() && entry.device.is_some());
        }
    }

    #[test]
    fn the_host_adds_devices_and_any_id_is_a_wildcard() {
        let host = FakeHost::new(&[]);
        let add = |entry: &str| {
            host.file("etc/no-reset.json", &format!(r#"{{"devices": [{entry}]}}"#));
            NoReset::load(&host.paths)
        };
        let because = r#""reason": "it hangs", "source": "us""#;
        let any = add(&format!(r#"{{"vendor": "0x10de", {because}}}"#)).unwrap();
        let why = any.reason(id(0x10de, 7), None);
        assert_eq!(why.as_deref(), Some("it hangs (us)"));
        assert!(any.reason(id(0x1002, 0x75a3), None).is_some());
        let subsystem = r#""subsystem_vendor": "1af4""#;
        let one = add(&format!(r#"{{"vendor": "10de", {subsystem}, {because}}}"#)).unwrap();
        assert!(one.reason(id(0x10de, 7), Some(id(0x1af4, 1))).is_some());
        for other in [None, Some(id(0x1af5, 1))] {
            assert_eq!(one.reason(id(0x10de, 7), other), None);
        }
        for (entry, words) in [
            (format!(r#"{{"vendor": "nvidia", {because}}}"#), "is no id"),
            (r#"{"vendor": "10de"}"#.to_owned(), "reason"),
        ] {
            let error = add(&entry).unwrap_err().to_string();
            assert!(
                error.contains("no-reset.json") && error.contains(words),
                "{error}"
            );
        }
    }
}
