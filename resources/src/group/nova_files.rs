//! The files that hold Nova's own JSON: `device_spec.json` and `alias.json`.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::edit::EditError;
use crate::config::{self, ConfigError};
use crate::host::HostPaths;
use crate::lease::{ALLOCATION_DEADLINE, AllocationLock, LeaseRecord};
use crate::nova::{self, Alias, DeviceSpec};

/// One or a list of what Nova's option of that name holds.
#[derive(Serialize, Deserialize)]
#[serde(transparent, bound = "T: Serialize + DeserializeOwned")]
struct NovaFile<T>(#[serde(deserialize_with = "nova::one_or_many")] Vec<T>);

/// What such a file holds; nothing if there is none.
pub(super) fn load<T: Serialize + DeserializeOwned>(path: &Path) -> Result<Vec<T>, ConfigError> {
    match config::read(path)? {
        Some(text) => config::parse(path, &text).map(|NovaFile(values)| values),
        None => Ok(Vec::new()),
    }
}

/// The file of device specs.
pub(super) fn specs(paths: &HostPaths) -> PathBuf {
    paths.config.join("device_spec.json")
}

/// The file of aliases.
pub(super) fn aliases(paths: &HostPaths) -> PathBuf {
    paths.config.join("alias.json")
}

/// Adds device specs to `device_spec.json`, as far as they are not there yet. Returns the file.
pub fn add_device_specs(paths: &HostPaths, new: Vec<DeviceSpec>) -> Result<PathBuf, EditError> {
    add(paths, specs(paths), new)
}

/// Adds aliases to `alias.json`, as far as they are not there yet. Returns the file.
pub fn add_aliases(paths: &HostPaths, new: Vec<Alias>) -> Result<PathBuf, EditError> {
    add(paths, aliases(paths), new)
}

fn add<T: Serialize + DeserializeOwned + PartialEq>(
    paths: &HostPaths,
    file: PathBuf,
    new: Vec<T>,
) -> Result<PathBuf, EditError> {
    let record = LeaseRecord::task("gantry group");
    let _choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
    let mut values = load(&file)?;
    for value in new {
        if !values.contains(&value) {
            values.push(value);
        }
    }
    config::write(&file, &NovaFile(values))?;
    Ok(file)
}
