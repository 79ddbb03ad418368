//! OpenStack Nova's definitions of PCI devices: `device_spec` and `alias`.

mod address;
pub(crate) mod devname;
mod words;

use std::fmt;
use std::marker::PhantomData;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::base::bdf::HostBdf;
use crate::base::json::without_position;
use crate::inventory::device::{DeviceType, HostDevice};
use crate::pools::rule::HexId;
use address::Address;
pub use words::Traits;
pub(crate) use words::{Flag, IdOrAny, LocallyManaged};
pub(crate) use words::{class_of, resource_class};

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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeviceSpec {
    /// Vendor id, or "*".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendor_id: Option<IdOrAny>,
    /// Device id, or "*".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub product_id: Option<IdOrAny>,
    /// The device's address: "0000:0a:00.0", "*:0a:00.*", or an object of regular expressions for domain,
    /// bus, slot and function. The full address of a physical function stands for its virtual ones too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Address>,
    /// Instead of an address: the host's network interface on the device, or on its physical function.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devname: Option<String>,
    /// The function of that interface, as far as there is one.
    #[serde(skip)]
    pub(crate) found: Option<HostBdf>,
    /// Read and not used: gantry knows no networks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_network: Option<String>,
    /// What an alias may ask for instead of ids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_class: Option<String>,
    /// Names of traits with commas between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traits: Option<Traits>,
    /// After one use, no VM gets the device until it is released by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_use: Option<Flag>,
    /// Whether the device is taken from its host driver when a VM needs it. Left out it means no, unlike
    /// in Nova: `gantry device detach` takes it then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub managed: Option<Flag>,
    /// What an alias may ask for; VMs do not migrate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live_migratable: Option<Flag>,
    /// Read and not used: in Nova, ports ask for it, and gantry knows no networks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trusted: Option<Flag>,
    /// False: nothing here manages functions on a card's own processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_managed: Option<LocallyManaged>,
}

impl DeviceSpec {
    /// Whether the spec takes a device. One physical function named by its full address or its interface
    /// stands for its virtual ones too; a pattern does not.
    pub fn matches(&self, device: &HostDevice) -> bool {
        let parent = |is_meant: &dyn Fn(HostBdf) -> bool| device.physfn.is_some_and(is_meant);
        let place = match (&self.devname, &self.address) {
            (Some(_), _) => self
                .found
                .is_some_and(|at| at == device.bdf || parent(&|pf| pf == at)),
            (None, Some(address)) => {
                address.covers(device.bdf) || parent(&|pf| address.is_exactly(pf))
            }
            (None, None) => true,
        };
        !device.is_bridge()
            && self.vendor_id.is_none_or(|id| id.is(device.id.vendor))
            && self.product_id.is_none_or(|id| id.is(device.id.device))
            && place
    }
}

impl Entry for DeviceSpec {
    fn problem(&self) -> Option<&'static str> {
        let name = self.devname.as_deref();
        if name.is_some() && self.address.is_some() {
            return Some("devname and address name a device each: leave one of them out");
        }
        let wrong =
            |name: &str| name.is_empty() || name.contains(['/', ' ']) || name.starts_with('.');
        name.is_some_and(wrong)
            .then_some("devname: write the name of a network interface, such as \"eth0\"")
    }
}

/// A name under which VMs ask for devices, in Nova's form. Several of one name are alternatives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Alias {
    /// The name.
    #[serde(deserialize_with = "trimmed")]
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
    /// What the device's `device_spec` must say of itself; VMs do not migrate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live_migratable: Option<Flag>,
}

impl Entry for Alias {
    fn problem(&self) -> Option<&'static str> {
        let length = self.name.chars().count();
        (!(1..=256).contains(&length)).then_some("name: an alias has a name of 1 to 256 characters")
    }
}

fn trimmed<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    String::deserialize(deserializer).map(|text| text.trim().to_owned())
}

impl Alias {
    /// The key in which this definition contradicts another one of the same name, if there is one.
    pub(crate) fn contradicts(&self, other: &Self) -> Option<&'static str> {
        let policy = |alias: &Self| alias.numa_policy.unwrap_or(NumaPolicy::Legacy);
        match self.name == other.name {
            true if policy(self) != policy(other) => Some("numa_policy"),
            true if self.device_type != other.device_type => Some("device_type"),
            _ => None,
        }
    }

    /// The function that has the alias's ids: the first one of the device's card, or the device itself.
    pub(crate) fn meant<'d>(&self, device: &'d HostDevice) -> Option<&'d HostDevice> {
        let mut functions = [device.first_function(), device].into_iter();
        functions.find(|function| self.has_ids(function))
    }

    /// Whether a device has the ids asked for.
    pub(crate) fn has_ids(&self, device: &HostDevice) -> bool {
        self.vendor_id.is_none_or(|id| id.is(device.id.vendor))
            && self.product_id.is_none_or(|id| id.is(device.id.device))
    }

    /// The ids asked for, such as "10de:1c30"; "*" stands for any.
    pub fn ids(&self) -> String {
        let text = |id: Option<IdOrAny>| id.map_or_else(|| "*".to_owned(), String::from);
        format!("{}:{}", text(self.vendor_id), text(self.product_id))
    }

    /// Whether a device is of the type asked for.
    pub(crate) fn has_type(&self, device: &HostDevice) -> bool {
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

/// Built-in aliases. A defined alias of the same name replaces them.
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

/// Why gantry refuses a known alias.
pub(crate) fn refused(alias: &str) -> Option<&'static str> {
    (alias == "qat-pf").then_some(
        "a QuickAssist card (AV-ICE02) cannot be passed through as a whole, because of limits of its driver: use its virtual functions, \"qat-vf\"",
    )
}

/// `"pci"`, the only capability type there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Capability {
    /// A PCI device.
    Pci,
}

/// One entry, a list of entries, or either as a text of JSON, as in Nova's own configuration file.
#[derive(JsonSchema)]
#[schemars(untagged)]
#[allow(dead_code)] // only its schema is used
enum OneOrMany<T> {
    Many(Vec<T>),
    One(T),
    Text(String),
}

/// Reads one entry or a list, with the position of an entry that is wrong.
pub(crate) fn one_or_many<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Entry,
{
    deserializer.deserialize_any(ListVisitor(PhantomData))
}

/// An entry of one of Nova's options: an object.
pub(crate) trait Entry: serde::de::DeserializeOwned {
    /// The mistake in the entry as a whole, if there is one.
    fn problem(&self) -> Option<&'static str>;
}

fn checked<T: Entry, E: serde::de::Error>(thing: T) -> Result<T, E> {
    match thing.problem() {
        Some(problem) => Err(E::custom(problem)),
        None => Ok(thing),
    }
}

/// One thing or several.
struct ListVisitor<T>(PhantomData<T>);

impl<'de, T: Entry> Visitor<'de> for ListVisitor<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object, or a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut things = Vec::new();
        while let Some(ListElement(thing)) = list.next_element()? {
            things.push(checked(thing)?);
        }
        Ok(things)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Vec<T>, A::Error> {
        let thing = T::deserialize(MapAccessDeserializer::new(map))?;
        Ok(vec![checked(thing)?])
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Vec<T>, E> {
        if !text.trim_start().starts_with(['{', '[']) {
            return Err(E::invalid_type(serde::de::Unexpected::Str(text), &self));
        }
        let mut json = serde_json::Deserializer::from_str(text);
        json.deserialize_any(self)
            .map_err(|error| E::custom(without_position(&error)))
    }
}

/// An entry of a list. serde would also read a list as an object without keys, and a device spec without keys
/// matches every device.
struct ListElement<T>(T);

impl<'de, T: Entry> Deserialize<'de> for ListElement<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object<T>(PhantomData<T>);
        impl<'de, T: Entry> Visitor<'de> for Object<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }
        let thing = deserializer.deserialize_any(Object(PhantomData));
        thing.map(Self)
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
