//! The name of a device, in VFIO, locks, records and messages.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

use crate::base::bdf::{BdfError, HostBdf};
use crate::base::uuid::Uuid;

/// The name of a device that a VM can have.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(untagged)]
pub enum DeviceName {
    /// A PCI function: its address.
    Pci(HostBdf),
    /// A mediated device: its identifier.
    Mdev(Uuid),
}

impl DeviceName {
    /// The address of a PCI function.
    pub fn pci(self) -> Option<HostBdf> {
        match self {
            Self::Pci(bdf) => Some(bdf),
            Self::Mdev(_) => None,
        }
    }

    /// The identifier of a mediated device.
    pub fn mdev(self) -> Option<Uuid> {
        match self {
            Self::Pci(_) => None,
            Self::Mdev(uuid) => Some(uuid),
        }
    }

    /// The name that a path such as `/sys/bus/pci/devices/0000:01:00.0` ends with.
    pub(crate) fn from_sysfs_path(path: &Path) -> Result<Self, BdfError> {
        match path.file_name().and_then(|name| name.to_str()) {
            Some(name) => name.parse(),
            None => Err(BdfError(path.display().to_string())),
        }
    }

    /// Its path in sysfs.
    pub fn sysfs_path(self) -> String {
        match self {
            Self::Pci(bdf) => format!("/sys/bus/pci/devices/{bdf}"),
            Self::Mdev(uuid) => format!("/sys/bus/mdev/devices/{uuid}"),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(bdf) => bdf.fmt(f),
            Self::Mdev(uuid) => uuid.fmt(f),
        }
    }
}

impl FromStr for DeviceName {
    type Err = BdfError;

    fn from_str(text: &str) -> Result<Self, BdfError> {
        match text.parse() {
            Ok(uuid) => Ok(Self::Mdev(uuid)),
            Err(_) => text.parse().map(Self::Pci),
        }
    }
}

impl From<HostBdf> for DeviceName {
    fn from(bdf: HostBdf) -> Self {
        Self::Pci(bdf)
    }
}

impl From<Uuid> for DeviceName {
    fn from(uuid: Uuid) -> Self {
        Self::Mdev(uuid)
    }
}

impl PartialEq<HostBdf> for DeviceName {
    fn eq(&self, bdf: &HostBdf) -> bool {
        self.pci() == Some(*bdf)
    }
}

/// The rule for names of groups, plans and tenants.
pub(crate) const NAME_RULE: &str =
    "use 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first";

/// Whether a text can name a group, a plan or a tenant.
pub(crate) fn is_name(name: &str) -> bool {
    let plain = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    plain && name.len() <= 64 && name.starts_with(|first: char| first.is_ascii_alphanumeric())
}

/// Reads a name of `what` from JSON.
pub(crate) fn read_name<'de, D: Deserializer<'de>>(
    what: &str,
    deserializer: D,
) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    match is_name(&name) {
        true => Ok(name),
        false => Err(serde::de::Error::custom(format!(
            "\"{name}\" cannot name {what}: {NAME_RULE}"
        ))),
    }
}

/// Why a text cannot name a VM or a device in it; none if it can. Such names appear in lock files, logs and tables.
pub fn label_flaw(text: &str) -> Option<&'static str> {
    Some(match text {
        "" => "it is empty",
        text if text.len() > 64 => "it is longer than 64 bytes",
        text if text.chars().any(|c| c.is_control() || c == '/') => {
            "it holds a slash or a control character"
        }
        _ => return None,
    })
}
