//! A VM's request for devices.

mod aliases;
mod keys;

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::name::{DeviceName, label_flaw};
use crate::inventory::card::Allow;
use crate::pools::nova::{NumaPolicy, Traits};
pub use aliases::Aliases;
use keys::DeviceKeys;
pub use keys::SentRequest;

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
