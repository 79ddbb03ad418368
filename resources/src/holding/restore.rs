//! Restore records: the state of something on the host before gantry changed it.
//!
//! A record is a JSON file, `<run>/restore/KIND/DEVICE`. A process writes it under the device's lock before it
//! changes anything, and removes it once the change is undone. A reboot undoes all changes, and empties the run
//! directory. If the process ends in between, the record stays: `making::demand` finds it, and undoes the change
//! when nobody holds the device.
//!
//! In a tenant's run directory the records are a link to the host's, which the tenant can only read.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::base::atomic;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::regular;
use crate::base::sysfs;

/// The directory of records, below the run directory.
pub(crate) const DIR: &str = "restore";

/// Larger than any record. The process of a confined VM may write most of them.
const LONGEST: u64 = 64 << 10;

/// A kind of change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// The driver of a device, and its `driver_override`.
    Driver,
    /// The settings of a virtual function that a VM has: its MAC address, VLAN, rates, trust.
    VfSettings,
    /// The settings of a virtual function that a tenant owns.
    Granted,
    /// `sriov_drivers_autoprobe` of a physical function.
    Autoprobe,
    /// A virtual GPU: a mediated device that is made, or a vendor's function that is given a type.
    Vgpu,
}

impl Change {
    /// The changes that building a VM makes.
    pub(crate) const OF_VMS: [Self; 4] =
        [Self::Driver, Self::VfSettings, Self::Autoprobe, Self::Vgpu];

    /// The directory of its records.
    pub(crate) fn dir(self, paths: &HostPaths) -> PathBuf {
        paths.run.join(DIR).join(match self {
            Self::Driver => "driver",
            Self::VfSettings => "vf-settings",
            Self::Granted => "granted",
            Self::Autoprobe => "autoprobe",
            Self::Vgpu => "vgpu",
        })
    }

    /// Whether this user sees its records: a tenant's gantry undoes nothing of the host's.
    fn is_seen(self, paths: &HostPaths) -> bool {
        paths.only.is_none() || matches!(self, Self::Driver | Self::Granted)
    }

    /// The record of a device.
    pub(crate) fn path(self, paths: &HostPaths, name: impl Into<DeviceName>) -> PathBuf {
        self.dir(paths).join(name.into().to_string())
    }

    /// Whether a device has a record. Anything but a regular file counts as none.
    pub(crate) fn is_recorded(self, paths: &HostPaths, name: impl Into<DeviceName>) -> bool {
        let found = || fs::symlink_metadata(self.path(paths, name));
        self.is_seen(paths) && found().is_ok_and(|found| found.is_file())
    }

    /// The devices that have a record.
    pub(crate) fn recorded(self, paths: &HostPaths) -> Vec<DeviceName> {
        let names = match self.is_seen(paths) {
            true => sysfs::entries(&self.dir(paths)).unwrap_or_default(),
            false => Vec::new(),
        };
        let names = names.iter().filter_map(|name| name.parse().ok());
        names
            .filter(|name: &DeviceName| self.is_recorded(paths, *name))
            .collect()
    }

    /// Removes the record of a device: the change is undone, or stays. Does nothing without a record.
    pub(crate) fn forget(self, paths: &HostPaths, name: impl Into<DeviceName>) {
        let path = self.path(paths, name);
        match atomic::remove_record(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove {}: {error}", path.display());
            }
            _ => {}
        }
    }
}

/// The state before a change.
pub(crate) trait RestoreRecord: Serialize + DeserializeOwned {
    /// The change.
    const CHANGE: Change;

    /// The record of a device; none if it is missing or cut short.
    fn load(paths: &HostPaths, name: impl Into<DeviceName>) -> Option<Self> {
        let read = |path: &Path| {
            let mut text = Vec::new();
            let file = regular::open_no_link(path)?;
            file.take(LONGEST).read_to_end(&mut text)?;
            Ok::<_, io::Error>(text)
        };
        let seen = Self::CHANGE.is_seen(paths);
        let text = seen.then(|| read(&Self::CHANGE.path(paths, name)))?.ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Writes the record, before the change. Replaces an existing record as a whole, and removes anything else
    /// at its path.
    ///
    /// # Errors
    ///
    /// The file, and why it cannot be written. Then nothing may be changed.
    fn store(
        &self,
        paths: &HostPaths,
        name: impl Into<DeviceName>,
    ) -> Result<(), (PathBuf, io::Error)> {
        let path = Self::CHANGE.path(paths, name);
        let text = serde_json::to_vec(self).map_err(io::Error::from);
        let written = text.and_then(|text| atomic::replace_record(&path, &text));
        written.map_err(|error| (path, error))
    }
}
