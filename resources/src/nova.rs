//! OpenStack Nova's words for PCI devices: `device_spec`, `alias`, and what their values mean.

mod address;

use std::fmt;
use std::marker::PhantomData;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::inventory::HostDevice;
use crate::rule::HexId;
use address::Address;

/// What a function is in the eyes of SR-IOV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeviceType {
    /// A function without SR-IOV.
    #[serde(rename = "type-PCI")]
    Pci,
    /// A physical function: it has the SR-IOV capability, whether or not that is used.
    #[serde(rename = "type-PF")]
    Pf,
    /// A virtual function.
    #[serde(rename = "type-VF")]
    Vf,
}

impl DeviceType {
    /// What a device is.
    pub fn of(device: &HostDevice) -> Self {
        match (device.physfn, device.sriov) {
            (Some(_), _) => Self::Vf,
            (None, Some(sriov)) if sriov.total > 0 => Self::Pf,
            (None, _) => Self::Pci,
        }
    }
}

impl fmt::Display for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pci => "type-PCI",
            Self::Pf => "type-PF",
            Self::Vf => "type-VF",
        })
    }
}

/// How near to a VM's processors and memory its devices must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NumaPolicy {
    /// On one of the VM's NUMA nodes.
    Required,
    /// There if possible, else anywhere.
    Preferred,
    /// There, or where the host does not say where they are.
    Legacy,
    /// In one processor socket with one of the VM's nodes.
    Socket,
}

/// Devices that may be given to VMs, in Nova's form. Several are alternatives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeviceSpec {
    /// Vendor id, or "*".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendor_id: Option<IdOrAny>,
    /// Device id, or "*".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub product_id: Option<IdOrAny>,
    /// The device's address or that of its physical function: "*:0a:00.*", or an object of regular
    /// expressions for domain, bus, slot and function.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Address>,
    /// Read and not used: gantry knows no networks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_network: Option<String>,
    /// What an alias may ask for instead of ids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_class: Option<String>,
    /// Names of traits with commas between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traits: Option<Traits>,
    /// After one use the device is not given again before it is released by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_use: Option<Flag>,
    /// Whether the device is taken from its host driver when a VM needs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub managed: Option<Flag>,
    /// Read and not used: VMs do not migrate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live_migratable: Option<Flag>,
    /// Read and not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trusted: Option<Flag>,
}

impl DeviceSpec {
    /// Whether the spec takes a device. A physical function's address stands for its virtual ones too.
    pub fn matches(&self, device: &HostDevice) -> bool {
        let address = |address: &Address| {
            address.covers(device.bdf) || device.physfn.is_some_and(|pf| address.covers(pf))
        };
        !device.is_bridge()
            && self.vendor_id.is_none_or(|id| id.is(device.id.vendor))
            && self.product_id.is_none_or(|id| id.is(device.id.device))
            && self.address.as_ref().is_none_or(address)
    }
}

/// A name under which VMs ask for devices, in Nova's form. Several of one name are alternatives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Alias {
    /// The name.
    pub name: String,
    /// Vendor id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendor_id: Option<IdOrAny>,
    /// Device id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub product_id: Option<IdOrAny>,
    /// "pci", as all are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capability_type: Option<Capability>,
    /// What the function must be. Without it, physical functions are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_type: Option<DeviceType>,
    /// How near it must be; "legacy" if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_policy: Option<NumaPolicy>,
    /// The resource class that the device must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_class: Option<String>,
    /// Traits that the device must have, with commas between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traits: Option<Traits>,
    /// Read and not used: VMs do not migrate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live_migratable: Option<Flag>,
}

impl Alias {
    /// Whether a device has the ids asked for.
    pub fn has_ids(&self, device: &HostDevice) -> bool {
        self.vendor_id.is_none_or(|id| id.is(device.id.vendor))
            && self.product_id.is_none_or(|id| id.is(device.id.device))
    }

    /// The ids asked for, such as "10de:1c30"; "*" stands for any.
    pub fn ids(&self) -> String {
        let text = |id: Option<IdOrAny>| id.map_or_else(|| "*".to_owned(), String::from);
        format!("{}:{}", text(self.vendor_id), text(self.product_id))
    }

    /// Whether a device is of the type asked for.
    pub fn has_type(&self, device: &HostDevice) -> bool {
        let is = DeviceType::of(device);
        match self.device_type {
            Some(wanted) => is == wanted,
            None => is != DeviceType::Pf,
        }
    }
}

/// Virtual functions of Intel QuickAssist cards, by the names that StarlingX gives them.
const BUILT_IN: [(&str, u16); 4] = [
    ("qat-dh895xcc-vf", 0x0443),
    ("qat-c62x-vf", 0x37c9),
    ("qat-vf", 0x0443),
    ("qat-vf", 0x37c9),
];

/// Aliases that every host has; one that is defined under the same name replaces them.
pub(crate) fn built_in() -> impl Iterator<Item = Alias> {
    BUILT_IN.into_iter().map(|(name, product)| Alias {
        name: name.to_owned(),
        vendor_id: Some(IdOrAny::Id(HexId(0x8086))),
        product_id: Some(IdOrAny::Id(HexId(product))),
        capability_type: None,
        device_type: Some(DeviceType::Vf),
        numa_policy: None,
        resource_class: None,
        traits: None,
        live_migratable: None,
    })
}

/// Why an alias that others know is not to be had here.
pub(crate) fn refused(alias: &str) -> Option<&'static str> {
    (alias == "qat-pf").then_some(
        "a QuickAssist card (AV-ICE02) cannot be passed through as a whole, for limits of its driver: use its virtual functions, \"qat-vf\"",
    )
}

/// `"pci"`, the only capability type there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Capability {
    /// A PCI device.
    Pci,
}

/// A vendor or device id, or `*` for any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^(\\*|(0x)?[0-9a-fA-F]{4})$"))]
pub enum IdOrAny {
    /// Any id.
    Any,
    /// This one.
    Id(HexId),
}

impl IdOrAny {
    fn is(self, id: u16) -> bool {
        self == Self::Any || self == Self::Id(HexId(id))
    }
}

impl TryFrom<String> for IdOrAny {
    type Error = crate::rule::RuleError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.as_str() {
            "*" => Ok(Self::Any),
            text => text.parse().map(Self::Id),
        }
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

/// Names of traits, compared as Nova does: in capitals, with `_` for what is no letter or digit, and
/// with or without `CUSTOM_` in front.
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
        Self(names.map(normal).filter(|name| !name.is_empty()).collect())
    }
}

/// A resource class or trait in its normal form.
pub(crate) fn normal(name: &str) -> String {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() {
            c.to_ascii_uppercase()
        } else {
            '_'
        }
    };
    let name: String = name.trim().chars().map(plain).collect();
    name.strip_prefix("CUSTOM_")
        .map_or(name.clone(), str::to_owned)
}

/// The resource class of a device that is given none: that of its ids.
pub(crate) fn class_of(device: &HostDevice) -> String {
    format!("PCI_{:04X}_{:04X}", device.id.vendor, device.id.device)
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
    Text(String),
}

impl<'de> Deserialize<'de> for Flag {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wrong = || serde::de::Error::custom("expected true or false, \"yes\" or \"no\"");
        match FlagText::deserialize(deserializer).map_err(|_| wrong())? {
            FlagText::Bool(value) => Ok(Self(value)),
            FlagText::Text(text) => match text.to_ascii_lowercase().as_str() {
                "true" | "yes" | "on" | "1" | "t" | "y" => Ok(Self(true)),
                "false" | "no" | "off" | "0" | "f" | "n" => Ok(Self(false)),
                _ => Err(wrong()),
            },
        }
    }
}

/// One thing, a list of them, or either of these as a text of JSON, which is how Nova's own
/// configuration file holds them.
#[derive(JsonSchema)]
#[schemars(untagged)]
#[allow(dead_code)] // only its schema is used
enum OneOrMany<T> {
    Many(Vec<T>),
    One(T),
    Text(String),
}

/// Reads one or many, so that an error is placed at the one that is wrong.
pub(crate) fn one_or_many<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: serde::de::DeserializeOwned,
{
    deserializer.deserialize_any(Things(PhantomData))
}

/// One thing or several.
struct Things<T>(PhantomData<T>);

impl<'de, T: serde::de::DeserializeOwned> Visitor<'de> for Things<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object, or a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut things = Vec::new();
        while let Some(thing) = list.next_element()? {
            things.push(thing);
        }
        Ok(things)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Vec<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(|thing| vec![thing])
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Vec<T>, E> {
        if !text.trim_start().starts_with(['{', '[']) {
            return Err(E::invalid_type(serde::de::Unexpected::Str(text), &self));
        }
        let mut json = serde_json::Deserializer::from_str(text);
        json.deserialize_any(self).map_err(E::custom)
    }
}

/// The schema of what [`one_or_many`] reads.
pub(crate) fn one_or_many_schema<T: JsonSchema>(
    generator: &mut schemars::SchemaGenerator,
) -> schemars::Schema {
    <OneOrMany<T>>::json_schema(generator)
}

#[cfg(test)]
mod tests;
