//! A VM's request for devices, and its form in JSON.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::de::{Deserializer, Visitor};
use serde::{Deserialize, Serialize};

use crate::base::bdf::BdfError;
use crate::base::name::{DeviceName, label_flaw};
use crate::inventory::card::Allow;
use crate::pools::nova::{NumaPolicy, Traits};

// The schema has the name that Cloud Hypervisor's API gives it.
/// Host devices for the guest: `count` of a `group` or of an `alias`, or the one at `path`. A device of a group or
/// an alias is a whole card: a GPU comes with its audio function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "DeviceKeys", into = "DeviceKeys")]
#[schemars(rename = "DeviceConfig", with = "DeviceKeys")]
pub struct DeviceRequest {
    /// Name of the first device in the VM; its address on the host if absent. Further devices get `-1`, `-2`, ...
    /// behind it.
    pub id: Option<String>,
    /// Where the devices come from.
    pub from: DeviceSource,
    /// How many: a card is one.
    pub count: u32,
    /// How near to the VM; an alias has its own policy where this is none.
    pub numa_policy: Option<NumaPolicy>,
    /// Traits that each must have.
    pub traits: Traits,
    /// The resource class that each must have.
    pub resource_class: Option<String>,
    /// No two of them may share a physical function.
    pub isolate: bool,
    /// What each may lack.
    pub allow: Allow,
    /// What happens when one reports an error.
    pub on_error: OnError,
    /// The expansion ROM of each.
    pub rom: RomSource,
    /// A device that is named by its path may be in no group. No key of JSON says so.
    pub allow_ungrouped: bool,
}

/// Where devices come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceSource {
    /// From a resource group.
    Group(String),
    /// By an alias; from the group of that name if there is no such alias.
    Alias(String),
    /// This device and no other. A mediated device is there already, and stays.
    Device(DeviceName),
}

/// Where the expansion ROM of a device comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RomSource {
    /// From the device, if it has one.
    #[default]
    Device,
    /// From this file. Of a card with several functions the first has it, the others have their own.
    File(PathBuf),
    /// The guest gets none.
    None,
}

impl RomSource {
    /// The file, if it is one.
    pub fn file(&self) -> Option<&PathBuf> {
        match self {
            Self::File(path) => Some(path),
            Self::Device | Self::None => None,
        }
    }
}

/// On which of the host's NUMA nodes a VM's processors and memory are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Placement {
    /// On whichever its devices are.
    #[default]
    Anywhere,
    /// On these, since its first devices are there.
    Near(BTreeSet<u32>),
    /// On these, since that was asked for.
    Bound(BTreeSet<u32>),
}

impl Placement {
    /// A VM that is bound to some nodes, or to none.
    pub fn bound(nodes: BTreeSet<u32>) -> Self {
        match nodes.is_empty() {
            true => Self::Anywhere,
            false => Self::Bound(nodes),
        }
    }

    /// The nodes, if they are known.
    pub(crate) fn nodes(&self) -> Option<&BTreeSet<u32>> {
        match self {
            Self::Anywhere => None,
            Self::Near(nodes) | Self::Bound(nodes) => Some(nodes),
        }
    }
}

impl DeviceRequest {
    /// Devices without conditions.
    pub fn new(from: DeviceSource, count: u32) -> Self {
        Self {
            id: None,
            from,
            count,
            numa_policy: None,
            traits: Traits::default(),
            resource_class: None,
            isolate: false,
            allow: Allow::default(),
            on_error: OnError::default(),
            rom: RomSource::Device,
            allow_ungrouped: false,
        }
    }

    /// `count` devices of a group.
    pub fn group(name: impl Into<String>, count: u32) -> Self {
        Self::new(DeviceSource::Group(name.into()), count)
    }

    /// `count` devices of an alias.
    pub fn alias(name: impl Into<String>, count: u32) -> Self {
        Self::new(DeviceSource::Alias(name.into()), count)
    }

    /// This device and no other.
    pub fn device(name: impl Into<DeviceName>) -> Self {
        Self::new(DeviceSource::Device(name.into()), 1)
    }

    /// The names of the devices in the VM, as far as they are known before the devices are leased.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let first = match (&self.id, &self.from) {
            (Some(id), _) => Some(id.clone()),
            (None, DeviceSource::Device(name)) => Some(name.to_string()),
            (None, _) => None,
        };
        let nth = |first: String| (0..self.count).map(move |index| nth_id(&first, index as usize));
        first.into_iter().flat_map(nth)
    }
}

impl DeviceSource {
    /// The device, if the source is exactly one.
    pub fn device(&self) -> Option<DeviceName> {
        match self {
            Self::Device(name) => Some(*name),
            Self::Group(_) | Self::Alias(_) => None,
        }
    }

    /// The group or alias.
    pub fn pool(&self) -> Option<&str> {
        match self {
            Self::Group(name) | Self::Alias(name) => Some(name),
            Self::Device(_) => None,
        }
    }
}

impl fmt::Display for DeviceSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Group(name) => write!(f, "group \"{name}\""),
            Self::Alias(name) => write!(f, "alias \"{name}\""),
            Self::Device(name) => name.fmt(f),
        }
    }
}

/// The name of the device with this index of several that are named at once.
pub fn nth_id(id: &str, index: usize) -> String {
    match index {
        0 => id.to_owned(),
        index => format!("{id}-{index}"),
    }
}

/// What happens when a device reports an error that the hardware could not correct.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// An event and a warning, no more: many such errors do no harm, as the guest's driver or the host's kernel
    /// recovers, and a guest can make its device report them.
    #[default]
    Report,
    /// Also, the guest is asked to release the device, and loses it after 10 seconds if it does not; at once in a
    /// VM without hot-plug slots.
    Unplug,
    /// Also, the VM ends at once, so that it computes nothing with wrong data.
    Stop,
}

/// The interrupts that a device needs in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum InterruptNeed {
    /// MSI-X, MSI or INTx, as without the key: a device that has none is refused.
    Msix,
    /// None: a device without interrupts is passed too.
    None,
}

/// A request in JSON, with the keys of Cloud Hypervisor's API where it has the thing.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline, extend("oneOf" = [
    {"required": ["group"]}, {"required": ["alias"]}, {"required": ["path"]}
]))]
struct DeviceKeys {
    /// Name that the device gets in the VM; its address on the host if absent. Of several devices the
    /// first has it, the others get `-1`, `-2` and so on behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    /// Name of the group to take devices from; `gantry group list` shows them.
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    /// Alias to take devices by, as OpenStack Nova defines them; `gantry group alias` shows them.
    #[serde(skip_serializing_if = "Option::is_none")]
    alias: Option<String>,
    /// How many devices of the group or alias; 1 if absent.
    #[schemars(range(min = 1))]
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
    /// One device, by its sysfs path, such as `/sys/bus/pci/devices/0000:01:00.0`, or its address alone. It
    /// must be in a group unless gantry runs with `--allow-ungrouped`.
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    /// How near to the VM's processors and memory the devices must be.
    #[serde(skip_serializing_if = "Option::is_none")]
    numa_policy: Option<NumaPolicy>,
    /// Traits that each device must have, with commas between or as a list.
    #[serde(skip_serializing_if = "Option::is_none")]
    traits: Option<Traits>,
    /// The resource class that each device must have.
    #[serde(skip_serializing_if = "Option::is_none")]
    resource_class: Option<String>,
    /// Whether no two of these devices may share a physical function.
    #[serde(skip_serializing_if = "Option::is_none")]
    isolate: Option<bool>,
    /// `"none"` takes devices without interrupts too. Without this key they are refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    interrupts: Option<InterruptNeed>,
    /// Whether to take devices too that nothing resets between two VMs (`reset_method` in sysfs is empty): one
    /// VM may read what the other left in it. Without this key they are refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    allow_no_reset: Option<bool>,
    /// What happens when a device reports an error that the hardware could not correct, or answers nothing;
    /// `"report"` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    on_error: Option<OnError>,
    /// The expansion ROM in the guest: `false` for none, or the name of a file that has it. Without this key the
    /// guest gets the device's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    rom: Option<RomKey>,
}

/// An expansion ROM in JSON.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
enum RomKey {
    /// Whether the guest gets the device's own.
    Own(bool),
    /// A file; a relative path starts at the folder of the JSON file.
    File(PathBuf),
}

impl<'de> Deserialize<'de> for RomKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RomVisitor)
    }
}

struct RomVisitor;

impl Visitor<'_> for RomVisitor {
    type Value = RomKey;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a file, true or false")
    }

    fn visit_bool<E>(self, own: bool) -> Result<RomKey, E> {
        Ok(RomKey::Own(own))
    }

    fn visit_str<E>(self, file: &str) -> Result<RomKey, E> {
        Ok(RomKey::File(file.into()))
    }
}

/// A request for the one device that a client has opened and sends: it names no source.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "DeviceKeys")]
pub struct SentRequest(DeviceRequest);

impl SentRequest {
    /// The name of the device in the VM; its address on the host if absent.
    pub fn id(&self) -> Option<&str> {
        self.0.id.as_deref()
    }

    /// The request, once it is known which device it is.
    pub fn of(&self, device: DeviceName) -> DeviceRequest {
        DeviceRequest {
            from: DeviceSource::Device(device),
            ..self.0.clone()
        }
    }
}

impl TryFrom<DeviceKeys> for SentRequest {
    type Error = String;

    fn try_from(keys: DeviceKeys) -> Result<Self, String> {
        let sources = [&keys.group, &keys.alias, &keys.path];
        if sources.into_iter().any(Option::is_some) {
            return Err(
                "the device came as a descriptor: remove `group`, `alias` and `path`".to_owned(),
            );
        }
        keys.only_one("a descriptor is exactly one device")?;
        // Until it is known which.
        let from = DeviceSource::Group(String::new());
        DeviceRequest::of(keys, from).map(Self)
    }
}

impl TryFrom<DeviceKeys> for DeviceRequest {
    type Error = String;

    fn try_from(keys: DeviceKeys) -> Result<Self, String> {
        let from = keys.source()?;
        Self::of(keys, from)
    }
}

impl DeviceRequest {
    fn of(keys: DeviceKeys, from: DeviceSource) -> Result<Self, String> {
        if let Some(id) = &keys.id {
            check_device_id(id, from.device()).map_err(|what| format!("`id`: {what}"))?;
        }
        let count = u32::try_from(keys.count.unwrap_or(1)).unwrap_or(u32::MAX);
        if count == 0 {
            return Err("`count`: 0 is too few: use 1 or more, or remove the entry".to_owned());
        }
        Ok(Self {
            id: keys.id,
            from,
            count,
            numa_policy: keys.numa_policy,
            traits: keys.traits.unwrap_or_default(),
            resource_class: keys.resource_class,
            isolate: keys.isolate == Some(true),
            allow: Allow {
                no_interrupts: keys.interrupts == Some(InterruptNeed::None),
                no_reset: keys.allow_no_reset == Some(true),
            },
            on_error: keys.on_error.unwrap_or_default(),
            rom: match keys.rom {
                None | Some(RomKey::Own(true)) => RomSource::Device,
                Some(RomKey::Own(false)) => RomSource::None,
                Some(RomKey::File(path)) => RomSource::File(path),
            },
            allow_ungrouped: false,
        })
    }
}

impl DeviceKeys {
    fn source(&self) -> Result<DeviceSource, String> {
        match (&self.group, &self.alias, &self.path) {
            (Some(name), None, None) => Ok(DeviceSource::Group(name.clone())),
            (None, Some(name), None) => Ok(DeviceSource::Alias(name.clone())),
            (None, None, Some(path)) => self.exactly(path).map(DeviceSource::Device),
            (None, None, None) => Err("it has neither `group` nor `alias` nor `path`: add \"group\": \"NAME\" \
                (`gantry group list` shows them), or \"path\": \"/sys/bus/pci/devices/0000:01:00.0\""
                .to_owned()),
            _ => Err("it has more than one of `group`, `alias` and `path`: keep one".to_owned()),
        }
    }

    fn exactly(&self, path: &str) -> Result<DeviceName, String> {
        self.only_one("a path names exactly one device")?;
        DeviceName::from_sysfs_path(path.as_ref()).map_err(|_: BdfError| {
            format!(
                "`path`: \"{}\" is no PCI device's sysfs path or address: write it like \
                 \"/sys/bus/pci/devices/0000:01:00.0\"; `gantry device list` shows the addresses",
                path.escape_debug()
            )
        })
    }

    /// Refuses the keys that choose among several devices, since there is `one`.
    fn only_one(&self, one: &str) -> Result<(), String> {
        let conditions = [
            ("count", self.count.is_some()),
            ("numa_policy", self.numa_policy.is_some()),
            ("traits", self.traits.is_some()),
            ("resource_class", self.resource_class.is_some()),
            ("isolate", self.isolate.is_some()),
        ];
        match conditions.into_iter().find(|(_, given)| *given) {
            Some((key, _)) => Err(format!("`{key}`: {one}: remove `{key}`")),
            None => Ok(()),
        }
    }
}

impl From<DeviceRequest> for DeviceKeys {
    fn from(request: DeviceRequest) -> Self {
        let Allow {
            no_interrupts,
            no_reset,
        } = request.allow;
        let several = request.from.device().is_none();
        let keys = Self {
            id: request.id,
            count: several.then_some(request.count.into()),
            numa_policy: request.numa_policy,
            traits: Some(request.traits).filter(|traits| *traits != Traits::default()),
            resource_class: request.resource_class,
            isolate: request.isolate.then_some(true),
            interrupts: no_interrupts.then_some(InterruptNeed::None),
            allow_no_reset: no_reset.then_some(true),
            on_error: Some(request.on_error).filter(|then| *then != OnError::default()),
            rom: match request.rom {
                RomSource::Device => None,
                RomSource::None => Some(RomKey::Own(false)),
                RomSource::File(path) => Some(RomKey::File(path)),
            },
            ..Self::default()
        };
        match request.from {
            DeviceSource::Group(name) => Self {
                group: Some(name),
                ..keys
            },
            DeviceSource::Alias(name) => Self {
                alias: Some(name),
                ..keys
            },
            DeviceSource::Device(name) => Self {
                path: Some(name.sysfs_path()),
                ..keys
            },
        }
    }
}

/// Refuses a name that logs and tables would mix up with an address: it may be the device's `own`, and no other.
///
/// # Errors
/// The reason and the remedy.
pub fn check_device_id(id: &str, own: Option<DeviceName>) -> Result<(), String> {
    let why = match id.parse::<DeviceName>() {
        Ok(name) if Some(name) != own => "it is the address of a device",
        _ => match label_flaw(id) {
            Some(flaw) => flaw,
            None => return Ok(()),
        },
    };
    let id = id.escape_debug();
    Err(format!(
        "\"{id}\" cannot name a device: {why}: choose another id, or leave it out"
    ))
}

/// Nova's `pci_passthrough:alias`: aliases with counts, such as `gpu:1, qat-c62x-vf:2`. An alias without a count
/// asks for one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Aliases(pub Vec<DeviceRequest>);

impl FromStr for Aliases {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let one = |part: &str| {
            let part = part.trim();
            let (name, count) = part.split_once(':').unwrap_or((part, "1"));
            let (name, count) = (name.trim(), count.trim());
            let digits = !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit());
            match count.parse::<u32>() {
                _ if name.is_empty() || !digits => Err(format!(
                    "\"{part}\" is not an alias with a count: write \"gpu:1\", several with commas between"
                )),
                Ok(count) if count > 0 => Ok(DeviceRequest::alias(name, count)),
                _ => Err(format!(
                    "\"{part}\" asks for no devices: ask for 1 or more, or leave it out"
                )),
            }
        };
        text.split(',').map(one).collect::<Result<_, _>>().map(Self)
    }
}

impl TryFrom<String> for Aliases {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Aliases> for String {
    fn from(aliases: Aliases) -> Self {
        aliases.to_string()
    }
}

impl fmt::Display for Aliases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, request) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            let name = request.from.pool().unwrap_or_default();
            write!(f, "{comma}{name}:{}", request.count)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn aliases_are_read_verbatim() {
        let aliases = |text: &str| text.parse().map(|Aliases(requests)| requests);
        assert_eq!(
            aliases("gpu:1, qat-c62x-vf:2"),
            Ok(vec![
                DeviceRequest::alias("gpu", 1),
                DeviceRequest::alias("qat-c62x-vf", 2)
            ])
        );
        assert_eq!(
            aliases("qat-dh895xcc-vf:2"),
            Ok(vec![DeviceRequest::alias("qat-dh895xcc-vf", 2)])
        );
        assert_eq!(aliases("p2000"), Ok(vec![DeviceRequest::alias("p2000", 1)]));
        for (text, said) in [
            ("", "is not an alias"),
            (",", "is not an alias"),
            ("gpu:", "is not an alias"),
            ("gpu:x", "is not an alias"),
            (":1", "is not an alias"),
            ("gpu:1:2", "is not an alias"),
            ("gpu:+1", "is not an alias"),
            ("gpu:0", "asks for no devices"),
            ("gpu:99999999999", "asks for no devices"),
        ] {
            let error = aliases(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
        let text = Aliases(aliases("gpu, x:2").unwrap()).to_string();
        assert_eq!(text, "gpu:1, x:2");
    }

    #[test]
    fn entries_say_exactly_where_devices_come_from() {
        let read = |value| serde_json::from_value::<DeviceRequest>(value);
        let request = read(
            json!({"group": "g", "count": 2, "numa_policy": "socket", "traits": "A", "isolate": true}),
        );
        let request = request.unwrap();
        assert_eq!(
            (request.count, request.isolate, request.numa_policy),
            (2, true, Some(NumaPolicy::Socket))
        );
        let allow = Allow {
            no_interrupts: true,
            no_reset: true,
        };
        for path in ["01:00.0", "/sys/bus/pci/devices/0000:01:00.0"] {
            let allows = json!({"path": path, "interrupts": "none", "allow_no_reset": true});
            for (value, allowed) in [(json!({"path": path}), Allow::default()), (allows, allow)] {
                let request = read(value).unwrap();
                assert!(matches!(
                    request.from,
                    DeviceSource::Device(DeviceName::Pci(_))
                ));
                assert_eq!(request.allow, allowed);
            }
        }
        for (value, said) in [
            (json!({}), "neither `group` nor `alias` nor `path`"),
            (json!({"group": "g", "alias": "a"}), "more than one of"),
            (json!({"group": "g", "count": 0}), "`count`: 0 is too few"),
            (json!({"path": "01:00.0", "count": 1}), "exactly one device"),
            (json!({"path": "eth0"}), "\"eth0\" is no PCI device"),
            (
                json!({"group": "g", "rom": 1}),
                "the name of a file, true or false",
            ),
            (
                json!({"group": "g", "on_error": "panic"}),
                "unknown variant `panic`",
            ),
        ] {
            let error = read(value).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn a_rom_is_the_devices_own_unless_the_entry_says_otherwise() {
        for (value, rom) in [
            (json!({"group": "g"}), RomSource::Device),
            (json!({"group": "g", "rom": true}), RomSource::Device),
            (json!({"group": "g", "rom": false}), RomSource::None),
            (
                json!({"group": "g", "rom": "a.rom"}),
                RomSource::File("a.rom".into()),
            ),
        ] {
            let request: DeviceRequest = serde_json::from_value(value).unwrap();
            assert_eq!(request.rom, rom);
        }
    }

    #[test]
    fn a_request_is_written_as_it_is_read() {
        for value in [
            json!({"id": "disk", "group": "g", "count": 2, "traits": "HW_A", "isolate": true}),
            json!({"alias": "a", "count": 1, "resource_class": "GPU", "numa_policy": "required"}),
            json!({"path": "/sys/bus/pci/devices/0000:01:00.0", "interrupts": "none", "allow_no_reset": true}),
            json!({"group": "g", "count": 1, "on_error": "unplug"}),
            json!({"group": "g", "count": 1, "on_error": "stop"}),
            json!({"path": "/sys/bus/pci/devices/0000:01:00.0", "rom": false}),
            json!({"group": "gpu", "count": 1, "rom": "/lib/gpu.rom"}),
        ] {
            let request: DeviceRequest = serde_json::from_value(value.clone()).unwrap();
            assert_eq!(serde_json::to_value(&request).unwrap(), value);
        }
    }
}
