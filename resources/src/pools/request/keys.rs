//! A request for devices in JSON.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DeviceRequest, DeviceSource, OnError, RomSource, check_device_id};
use crate::base::bdf::BdfError;
use crate::base::name::DeviceName;
use crate::inventory::card::Allow;
use crate::pools::nova::{NumaPolicy, Traits};

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
pub(super) struct DeviceKeys {
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
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected the name of a file, true or false")]
enum RomKey {
    /// Whether the guest gets the device's own.
    Own(bool),
    /// A file; a relative path starts at the folder of the JSON file.
    File(PathBuf),
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
        DeviceRequest::from_keys(keys, from).map(Self)
    }
}

impl TryFrom<DeviceKeys> for DeviceRequest {
    type Error = String;

    fn try_from(keys: DeviceKeys) -> Result<Self, String> {
        let from = keys.source()?;
        Self::from_keys(keys, from)
    }
}

impl DeviceRequest {
    fn from_keys(keys: DeviceKeys, from: DeviceSource) -> Result<Self, String> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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
