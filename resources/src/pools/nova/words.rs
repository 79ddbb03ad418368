//! The values in Nova's JSON: ids, numbers in hex, truth values, names of traits and resource classes.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use crate::inventory::device::HostDevice;
use crate::pools::rule::{HexId, RuleError};

/// A hexadecimal number up to `max`, with or without leading zeros, `0x` and blanks around it.
pub(super) fn hex(text: &str, max: u32) -> Option<u32> {
    let text = text.trim();
    let digits = text.strip_prefix("0x").or(text.strip_prefix("0X"));
    let digits = digits.unwrap_or(text);
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = plain.then(|| u32::from_str_radix(digits, 16).ok())?;
    number.filter(|number| *number <= max)
}

/// A vendor or device id, or `*` for any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^\\s*(\\*|(0[xX])?[0-9a-fA-F]+)\\s*$"))]
pub enum IdOrAny {
    /// Any id.
    Any,
    /// This one.
    Id(HexId),
}

impl IdOrAny {
    pub(super) fn is(self, id: u16) -> bool {
        self == Self::Any || self == Self::Id(HexId(id))
    }
}

impl TryFrom<String> for IdOrAny {
    type Error = RuleError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text.trim() == "*" {
            return Ok(Self::Any);
        }
        let id = hex(&text, u16::MAX.into()).and_then(|id| u16::try_from(id).ok());
        id.map(|id| Self::Id(HexId(id))).ok_or(RuleError::Id(text))
    }
}

impl From<IdOrAny> for String {
    fn from(id: IdOrAny) -> Self {
        match id {
            IdOrAny::Any => "*".to_owned(),
            IdOrAny::Id(id) => id.to_string(),
        }
    }
}

/// Names of traits in the form that Nova gives them: `HW_GPU_API_VULKAN`, `CUSTOM_MY_FAST_GPU`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(with = "TraitsText")]
#[serde(into = "String")]
pub struct Traits(Vec<String>);

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
#[allow(dead_code)] // the schema's form, and what is read
enum TraitsText {
    One(String),
    List(Vec<String>),
}

impl Traits {
    /// The names in their normal form.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl From<Traits> for String {
    fn from(traits: Traits) -> Self {
        traits.0.join(",")
    }
}

impl<'de> Deserialize<'de> for Traits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let texts = match TraitsText::deserialize(deserializer) {
            Ok(TraitsText::One(text)) => vec![text],
            Ok(TraitsText::List(texts)) => texts,
            Err(_) => {
                return Err(serde::de::Error::custom(
                    "expected names of traits: a string with commas, or a list",
                ));
            }
        };
        Ok(texts.iter().map(String::as_str).collect())
    }
}

impl<'a> FromIterator<&'a str> for Traits {
    fn from_iter<I: IntoIterator<Item = &'a str>>(texts: I) -> Self {
        let names = texts.into_iter().flat_map(|text| text.split(','));
        let names = names.filter(|name| !name.trim().is_empty());
        Self(names.map(trait_name).collect())
    }
}

/// The namespaces of the traits that every OpenStack knows. gantry has no list of the traits themselves, so
/// a name in one of these keeps its form.
const TRAIT_SPACES: [&str; 5] = ["COMPUTE_", "HW_", "MISC_", "OWNER_", "STORAGE_"];

/// The resource classes that every OpenStack knows.
const CLASSES: [&str; 21] = [
    "DISK_GB",
    "FPGA",
    "IPV4_ADDRESS",
    "MEMORY_MB",
    "MEM_ENCRYPTION_CONTEXT",
    "NET_BW_EGR_KILOBIT_PER_SEC",
    "NET_BW_IGR_KILOBIT_PER_SEC",
    "NET_PACKET_RATE_EGR_KILOPACKET_PER_SEC",
    "NET_PACKET_RATE_IGR_KILOPACKET_PER_SEC",
    "NET_PACKET_RATE_KILOPACKET_PER_SEC",
    "NUMA_CORE",
    "NUMA_MEMORY_MB",
    "NUMA_SOCKET",
    "NUMA_THREAD",
    "PCI_DEVICE",
    "PCPU",
    "PGPU",
    "SRIOV_NET_VF",
    "VCPU",
    "VGPU",
    "VGPU_DISPLAY_HEAD",
];

fn trait_name(name: &str) -> String {
    normal(name, |name| {
        TRAIT_SPACES.iter().any(|space| name.starts_with(space))
    })
}

/// A resource class in its normal form.
pub(crate) fn resource_class(name: &str) -> String {
    normal(name, |name| CLASSES.contains(&name))
}

/// The default resource class of a device, from its ids.
pub(crate) fn class_of(device: &HostDevice) -> String {
    format!(
        "CUSTOM_PCI_{:04X}_{:04X}",
        device.id.vendor, device.id.device
    )
}

/// A name in capitals, with one `_` for all characters in a row that are no letter or digit, and
/// `CUSTOM_` in front unless it is a standard one or has that already.
fn normal(name: &str, is_standard: impl Fn(&str) -> bool) -> String {
    let upper = name.trim().to_uppercase();
    if upper.starts_with("CUSTOM_") {
        return upper;
    }
    let mut plain = String::with_capacity(upper.len());
    for c in upper.chars() {
        match c.is_ascii_alphanumeric() {
            true => plain.push(c),
            false if plain.ends_with('_') => {}
            false => plain.push('_'),
        }
    }
    match is_standard(&plain) {
        true => plain,
        false => format!("CUSTOM_{plain}"),
    }
}

/// True or false, also in the words that Nova's files use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(with = "FlagText")]
pub struct Flag(pub bool);

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
#[allow(dead_code)] // the schema's form, and what is read
enum FlagText {
    Bool(bool),
    Number(u64),
    Text(String),
}

impl<'de> Deserialize<'de> for Flag {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wrong = || serde::de::Error::custom("expected true or false, \"yes\" or \"no\"");
        let text = match FlagText::deserialize(deserializer).map_err(|_| wrong())? {
            FlagText::Bool(value) => return Ok(Self(value)),
            FlagText::Number(number) => number.to_string(),
            FlagText::Text(text) => text.trim().to_lowercase(),
        };
        match text.as_str() {
            "true" | "yes" | "on" | "1" | "t" | "y" => Ok(Self(true)),
            "false" | "no" | "off" | "0" | "f" | "n" => Ok(Self(false)),
            _ => Err(wrong()),
        }
    }
}

/// `remote_managed`, which can only be false here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(into = "bool")]
#[schemars(with = "FlagText")]
pub struct LocallyManaged;

impl From<LocallyManaged> for bool {
    fn from(_: LocallyManaged) -> Self {
        false
    }
}

impl<'de> Deserialize<'de> for LocallyManaged {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Flag::deserialize(deserializer)? {
            Flag(false) => Ok(Self),
            Flag(true) => Err(serde::de::Error::custom(
                "a remote-managed function is set up by a network service on the card itself (a DPU or SmartNIC), \
                 which gantry does not talk to: leave the key out, or say \"false\"",
            )),
        }
    }
}
