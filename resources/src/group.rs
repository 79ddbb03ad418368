//! Resource groups: named pools of devices, defined in JSON files.

mod edit;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

use crate::config::{self, ConfigError, nearest};
use crate::host::{HostBdf, HostPaths};
use crate::inventory::HostDevice;
use crate::rule::Rule;
pub use edit::{EditError, GroupChange, GroupFiles};

/// What kind of thing a group holds. The kind is a filter besides the rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GroupType {
    /// Any PCI function.
    #[default]
    Pci,
    /// NVMe controllers: PCI class 0108.
    Nvme,
    /// Virtual functions of network cards.
    SriovNic,
    /// Mediated devices; no PCI function is one.
    Vgpu,
    /// USB devices; no PCI function is one.
    Usb,
}

impl GroupType {
    fn admits(self, device: &HostDevice) -> bool {
        let class = device.class;
        match self {
            Self::Pci => true,
            Self::Nvme => (class.base(), class.sub()) == (0x01, 0x08),
            Self::SriovNic => class.base() == 0x02 && device.physfn.is_some(),
            Self::Vgpu | Self::Usb => false,
        }
    }
}

/// A named pool of devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResourceGroup {
    /// What VMs ask for: letters, digits, `.`, `_`, `-`; at most 64.
    #[serde(deserialize_with = "group_name")]
    #[schemars(extend("pattern" = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"))]
    pub name: String,
    /// What kind of thing the group holds.
    #[serde(rename = "type", default)]
    pub kind: GroupType,
    /// Words for people.
    #[serde(default)]
    pub description: String,
    /// What the devices are, for the icon in a picture only: "storage", "gpu", "network", ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// A device belongs to the group when one of these matches it.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// The file that defines the group.
    #[serde(skip)]
    pub file: PathBuf,
}

impl ResourceGroup {
    /// Whether the group's type and one of its rules take a device. Bridges belong to the host.
    pub fn matches(&self, device: &HostDevice) -> bool {
        !device.is_bridge()
            && self.kind.admits(device)
            && self.rules.iter().any(|rule| rule.matches(device))
    }
}

/// Whether a text can name a group or a plan.
pub(crate) fn is_name(name: &str) -> bool {
    let plain = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    plain && name.len() <= 64 && name.starts_with(|first: char| first.is_ascii_alphanumeric())
}

fn group_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    if is_name(&name) {
        return Ok(name);
    }
    Err(serde::de::Error::custom(format!(
        "\"{name}\" cannot name a group: use 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
    )))
}

/// A file of groups: `groups.json` and each `groups.d/*.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "gantry resource groups")]
struct GroupsFile {
    /// For editors; gantry does not read it.
    #[serde(rename = "$schema", skip_serializing_if = "Option::is_none")]
    schema: Option<String>,
    /// The groups, in the order in which they claim devices.
    groups: Vec<ResourceGroup>,
}

/// All groups of the host, in the order of definition.
///
/// A device that several groups match belongs to the first: so groups in `groups.json` come before
/// those of drop-ins, and drop-ins count in the order of their file names. [`Groups::overlaps`] tells
/// where that rule decides.
#[derive(Clone, Debug, Default)]
pub struct Groups {
    groups: Vec<ResourceGroup>,
}

/// A device that several groups match.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Overlap {
    /// The device.
    pub bdf: HostBdf,
    /// The group it belongs to.
    pub owner: String,
    /// The groups that match it in vain.
    pub others: Vec<String>,
}

/// A definition of groups is wrong, or cannot be read.
#[derive(Debug, Error)]
pub enum GroupError {
    /// A file is not what it should be, or cannot be used.
    #[error(transparent)]
    File(#[from] ConfigError),
    /// There is no such group.
    #[error("there is no group \"{name}\"{}", hint(.near))]
    Unknown {
        /// The name.
        name: String,
        /// The most similar name.
        near: Option<String>,
    },
    /// Two groups have one name.
    #[error(
        "{second}: there is already a group named \"{name}\" in {first}: rename or remove one of them"
    )]
    Duplicate {
        /// The name.
        name: String,
        /// The file of the first.
        first: PathBuf,
        /// The file of the second.
        second: PathBuf,
    },
}

fn hint(near: &Option<String>) -> String {
    near.as_ref().map_or_else(
        || ": `gantry group list` shows them".to_owned(),
        |near| format!(": did you mean \"{near}\"?"),
    )
}

impl Groups {
    /// Reads `groups.json`, then `groups.d/*.json` in the order of their names. None need exist.
    pub fn load(paths: &HostPaths) -> Result<Self, GroupError> {
        let mut groups = Self::default();
        for path in files(paths)? {
            if let Some(text) = config::read(&path)? {
                groups.add(parse(&path, &text)?.groups)?;
            }
        }
        Ok(groups)
    }

    fn add(&mut self, more: Vec<ResourceGroup>) -> Result<(), GroupError> {
        for group in more {
            if let Some(first) = self.get(&group.name) {
                let first = first.file.clone();
                return Err(GroupError::Duplicate {
                    name: group.name,
                    first,
                    second: group.file,
                });
            }
            self.groups.push(group);
        }
        Ok(())
    }

    /// The groups in the order of definition.
    pub fn iter(&self) -> impl Iterator<Item = &ResourceGroup> {
        self.groups.iter()
    }

    /// The group of that name.
    pub fn get(&self, name: &str) -> Option<&ResourceGroup> {
        self.groups.iter().find(|group| group.name == name)
    }

    /// The group of that name, or an error that names the most similar one.
    pub fn find(&self, name: &str) -> Result<&ResourceGroup, GroupError> {
        self.get(name).ok_or_else(|| self.unknown(name))
    }

    fn unknown(&self, name: &str) -> GroupError {
        let names = self.groups.iter().map(|group| group.name.as_str());
        GroupError::Unknown {
            name: name.to_owned(),
            near: nearest(name, names).map(str::to_owned),
        }
    }

    /// The group that a device belongs to: the first one, in the order of definition, that matches it.
    pub fn group_of(&self, device: &HostDevice) -> Option<&ResourceGroup> {
        self.groups.iter().find(|group| group.matches(device))
    }

    /// The devices that more than one group matches.
    pub fn overlaps(&self, devices: &[HostDevice]) -> Vec<Overlap> {
        let overlap = |device: &HostDevice| {
            let mut names = self
                .groups
                .iter()
                .filter(|group| group.matches(device))
                .map(|group| group.name.clone());
            let owner = names.next()?;
            let others: Vec<String> = names.collect();
            (!others.is_empty()).then_some(Overlap {
                bdf: device.bdf,
                owner,
                others,
            })
        };
        devices.iter().filter_map(overlap).collect()
    }

    /// Whether a rule asks for a serial number, which takes more to read than the rest.
    pub(crate) fn ask_for_serials(&self) -> bool {
        self.groups
            .iter()
            .flat_map(|group| &group.rules)
            .any(|rule| rule.filters().serial.is_some())
    }

    /// The JSON Schema of a group file.
    pub fn schema() -> schemars::Schema {
        schemars::schema_for!(GroupsFile)
    }
}

/// The files that define groups, in the order in which they count.
fn files(paths: &HostPaths) -> Result<Vec<PathBuf>, ConfigError> {
    let mut files = vec![paths.config.join("groups.json")];
    files.extend(config::drop_ins(&paths.config.join("groups.d"))?);
    Ok(files)
}

fn parse(path: &Path, text: &str) -> Result<GroupsFile, ConfigError> {
    let mut file: GroupsFile = config::parse(path, text)?;
    for group in &mut file.groups {
        group.file = path.to_owned();
    }
    Ok(file)
}

#[cfg(test)]
mod tests;
