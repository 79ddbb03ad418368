//! What a VM asks for, and the forms in which that is written.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::base::bdf::{BdfError, HostBdf};
use crate::base::name::DeviceName;
use crate::base::uuid::Uuid;
use crate::inventory::card::Allow;
use crate::pools::nova::{NumaPolicy, Traits};

/// Something a VM asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// So many free devices of some kind.
    Any(Wish),
    /// This device and no other.
    Device {
        /// Its address.
        bdf: HostBdf,
        /// Take it even if it is in no group.
        allow_ungrouped: bool,
        /// What it may lack.
        allow: Allow,
    },
    /// This mediated device, which is there already, and stays.
    Mdev {
        /// Its identifier.
        uuid: Uuid,
        /// Take it even if it is in no group.
        allow_ungrouped: bool,
        /// What it may lack.
        allow: Allow,
    },
}

/// Where devices come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// From a resource group.
    Group(String),
    /// By an alias; a group of that name if there is no such alias.
    Alias(String),
}

/// So many free devices, with conditions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// Where from.
    pub from: Source,
    /// How many.
    pub count: u32,
    /// How near to the VM; an alias has its own answer where this is none.
    pub numa_policy: Option<NumaPolicy>,
    /// Traits that each must have.
    pub traits: Traits,
    /// The resource class that each must have.
    pub resource_class: Option<String>,
    /// No two of them may share a physical function.
    pub isolate: bool,
    /// What each may lack.
    pub allow: Allow,
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

impl Wish {
    /// Devices without conditions.
    pub fn new(from: Source, count: u32) -> Self {
        Self {
            from,
            count,
            numa_policy: None,
            traits: Traits::default(),
            resource_class: None,
            isolate: false,
            allow: Allow::default(),
        }
    }
}

impl Request {
    /// The device at a path of sysfs, or with an address or identifier.
    pub fn exact(path: &Path, allow_ungrouped: bool) -> Result<Self, BdfError> {
        let allow = Allow::default();
        Ok(match DeviceName::from_sysfs_path(path)? {
            DeviceName::Pci(bdf) => Self::Device {
                bdf,
                allow_ungrouped,
                allow,
            },
            DeviceName::Mdev(uuid) => Self::Mdev {
                uuid,
                allow_ungrouped,
                allow,
            },
        })
    }

    /// The same, where devices in no group are allowed or not.
    pub fn with_ungrouped(mut self, allowed: bool) -> Self {
        match &mut self {
            Self::Device {
                allow_ungrouped, ..
            }
            | Self::Mdev {
                allow_ungrouped, ..
            } => *allow_ungrouped = allowed,
            Self::Any(_) => {}
        }
        self
    }

    /// The same for devices that may lack something.
    pub fn allowing(mut self, what: Allow) -> Self {
        let (Self::Any(Wish { allow, .. }) | Self::Device { allow, .. } | Self::Mdev { allow, .. }) =
            &mut self;
        *allow = what;
        self
    }

    /// How many devices it asks for: a card is one.
    pub fn count(&self) -> u32 {
        match self {
            Self::Any(wish) => wish.count,
            Self::Device { .. } | Self::Mdev { .. } => 1,
        }
    }

    /// What each of its devices may lack.
    pub fn allow(&self) -> Allow {
        match self {
            Self::Any(Wish { allow, .. })
            | Self::Device { allow, .. }
            | Self::Mdev { allow, .. } => *allow,
        }
    }

    /// So many devices of a group.
    pub fn group(name: impl Into<String>, count: u32) -> Self {
        Self::Any(Wish::new(Source::Group(name.into()), count))
    }

    /// So many devices of an alias.
    pub fn alias(name: impl Into<String>, count: u32) -> Self {
        Self::Any(Wish::new(Source::Alias(name.into()), count))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Group(name) => write!(f, "group \"{name}\""),
            Self::Alias(name) => write!(f, "alias \"{name}\""),
        }
    }
}

/// A request that asks for nothing that could be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RequestError {
    /// A part of a list of aliases is none.
    #[error("\"{0}\" is not an alias with a count: write \"gpu:1\", several with commas between")]
    Alias(String),
    /// A count of zero, or one that is too large.
    #[error("{0} asks for no devices: ask for 1 or more, or leave it out")]
    Count(String),
    /// An entry does not say where its devices come from.
    #[error("devices[{0}] needs exactly one of group, alias and path")]
    Source(usize),
    /// A path that is no PCI device's.
    #[error(
        "devices[{index}]: \"{path}\" is not a PCI device: write \"/sys/bus/pci/devices/0000:01:00.0\" or its address"
    )]
    Path {
        /// Which entry.
        index: usize,
        /// What it says.
        path: String,
    },
    /// A condition that a device named by its path cannot have.
    #[error("devices[{0}]: a path names exactly one device: remove the other keys")]
    PathAlone(usize),
}

/// Nova's `pci_passthrough:alias`: names with counts, such as `gpu:1, qat-c62x-vf:2`. A name without a
/// count asks for one device.
pub fn aliases(text: &str) -> Result<Vec<Request>, RequestError> {
    let one = |part: &str| {
        let part = part.trim();
        let (name, count) = part.split_once(':').unwrap_or((part, "1"));
        let (name, count) = (name.trim(), count.trim());
        let digits = !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit());
        match count.parse::<u32>() {
            _ if name.is_empty() || !digits => Err(RequestError::Alias(part.to_owned())),
            Ok(count) if count > 0 => Ok(Request::alias(name, count)),
            _ => Err(RequestError::Count(format!("\"{part}\""))),
        }
    };
    text.split(',').map(one).collect()
}

impl RequestError {
    /// Which key is wrong.
    pub fn key(&self) -> String {
        match self {
            Self::Count(what) if what.starts_with("devices[") => what.clone(),
            Self::Alias(_) | Self::Count(_) => "pci_passthrough:alias".to_owned(),
            Self::Source(index) | Self::PathAlone(index) => format!("devices[{index}]"),
            Self::Path { index, .. } => format!("devices[{index}].path"),
        }
    }
}

/// The interrupts that a device needs in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InterruptNeed {
    /// MSI-X or MSI, as without the key: a device with neither is refused.
    Msix,
    /// None: a device with neither MSI-X nor MSI is passed too, and has no interrupts.
    None,
}

impl Allow {
    /// What an entry's keys `interrupts` and `allow_no_reset` allow.
    pub fn of(interrupts: Option<InterruptNeed>, no_reset: Option<bool>) -> Self {
        Self {
            no_interrupts: interrupts == Some(InterruptNeed::None),
            no_reset: no_reset == Some(true),
        }
    }
}

/// Devices of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeviceEntry {
    /// Name of the group to take devices from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Alias to take devices by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// One device, by its sysfs path or its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// How many; 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub count: Option<u32>,
    /// How near to the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_policy: Option<NumaPolicy>,
    /// Traits that each must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traits: Option<Traits>,
    /// The resource class that each must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_class: Option<String>,
    /// No two of them may share a physical function.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolate: Option<bool>,
    /// "none": devices with neither MSI-X nor MSI are taken too, and have no interrupts in the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interrupts: Option<InterruptNeed>,
    /// Devices that nothing resets between two VMs are taken too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_no_reset: Option<bool>,
}

impl DeviceEntry {
    /// The entry as a request; `index` is its place, for errors.
    pub fn request(&self, index: usize, allow_ungrouped: bool) -> Result<Request, RequestError> {
        let from = match (&self.group, &self.alias, &self.path) {
            (Some(name), None, None) => Source::Group(name.clone()),
            (None, Some(name), None) => Source::Alias(name.clone()),
            (None, None, Some(path)) => return self.exact(path, index, allow_ungrouped),
            _ => return Err(RequestError::Source(index)),
        };
        match self.count.unwrap_or(1) {
            0 => Err(RequestError::Count(format!("devices[{index}].count"))),
            count => Ok(Request::Any(Wish {
                from,
                count,
                numa_policy: self.numa_policy,
                traits: self.traits.clone().unwrap_or_default(),
                resource_class: self.resource_class.clone(),
                isolate: self.isolate.unwrap_or(false),
                allow: Allow::of(self.interrupts, self.allow_no_reset),
            })),
        }
    }

    fn exact(
        &self,
        path: &str,
        index: usize,
        allow_ungrouped: bool,
    ) -> Result<Request, RequestError> {
        let alone = Self {
            path: self.path.clone(),
            interrupts: self.interrupts,
            allow_no_reset: self.allow_no_reset,
            ..Self::default()
        };
        let allow = Allow::of(self.interrupts, self.allow_no_reset);
        if *self != alone {
            return Err(RequestError::PathAlone(index));
        }
        let request = Request::exact(path.as_ref(), allow_ungrouped);
        let request = request.map(|request| request.allowing(allow));
        request.map_err(|_| RequestError::Path {
            index,
            path: path.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn aliases_are_read_verbatim() {
        assert_eq!(
            aliases("gpu:1, qat-c62x-vf:2"),
            Ok(vec![
                Request::alias("gpu", 1),
                Request::alias("qat-c62x-vf", 2)
            ])
        );
        assert_eq!(
            aliases("qat-dh895xcc-vf:2"),
            Ok(vec![Request::alias("qat-dh895xcc-vf", 2)])
        );
        assert_eq!(aliases("p2000"), Ok(vec![Request::alias("p2000", 1)]));
        for text in ["", ",", "gpu:", "gpu:x", ":1", "gpu:1:2", "gpu:+1"] {
            assert!(
                matches!(aliases(text), Err(RequestError::Alias(_))),
                "{text}"
            );
        }
        for text in ["gpu:0", "gpu:99999999999"] {
            assert!(
                matches!(aliases(text), Err(RequestError::Count(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn entries_say_exactly_where_devices_come_from() {
        let read = |value| {
            let entry: DeviceEntry = serde_json::from_value(value).unwrap();
            entry.request(3, false)
        };
        let wish = read(
            json!({"group": "g", "count": 2, "numa_policy": "socket", "traits": "A", "isolate": true}),
        );
        let Ok(Request::Any(wish)) = wish else {
            panic!()
        };
        assert_eq!(
            (wish.count, wish.isolate, wish.numa_policy),
            (2, true, Some(NumaPolicy::Socket))
        );
        for path in ["01:00.0", "/sys/bus/pci/devices/0000:01:00.0"] {
            let allows = json!({"path": path, "interrupts": "none", "allow_no_reset": true});
            let allow = Allow {
                no_interrupts: true,
                no_reset: true,
            };
            for (value, allowed) in [(json!({"path": path}), Allow::default()), (allows, allow)] {
                let request = read(value).unwrap();
                assert!(matches!(request, Request::Device { .. }));
                assert_eq!(request.allow(), allowed);
            }
        }
        for (value, said) in [
            (json!({}), "devices[3] needs exactly one"),
            (json!({"group": "g", "alias": "a"}), "exactly one"),
            (
                json!({"group": "g", "count": 0}),
                "devices[3].count asks for no devices",
            ),
            (json!({"path": "01:00.0", "count": 1}), "exactly one device"),
            (json!({"path": "eth0"}), "\"eth0\" is not a PCI device"),
        ] {
            let error = read(value).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
