//! The files that hold Nova's own JSON: `device_spec.json` and `alias.json`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Groups;
use super::edit::EditError;
use crate::base::config::{self, ConfigError};
use crate::base::host::HostPaths;
use crate::base::json::{JsonError, Place};
use crate::holding::host_lock::{ALLOCATION_DEADLINE, AllocationLock};
use crate::holding::record::LeaseRecord;
use crate::pools::nova::{self, Alias, DeviceSpec, Entry};

/// One entry or a list of entries, as in Nova's option.
#[derive(Serialize, Deserialize)]
#[serde(transparent, bound = "T: Serialize + Entry")]
struct NovaFile<T>(#[serde(deserialize_with = "nova::one_or_many")] Vec<T>);

/// The entries of a file; none if there is no file.
pub(super) fn load<T: Serialize + Entry>(path: &Path) -> Result<Vec<T>, ConfigError> {
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

/// Refuses aliases of one name that contradict each other. The file is for the error alone.
pub(super) fn agree(file: &Path, aliases: &[Alias]) -> Result<(), ConfigError> {
    for (index, alias) in aliases.iter().enumerate() {
        let others = aliases.iter().take(index);
        if let Some(key) = others.filter_map(|other| alias.contradicts(other)).next() {
            let place = Place {
                file: file.into(),
                position: None,
            };
            let what = format!(
                "alias \"{}\": its definitions name different values of `{key}`: give all the same",
                alias.name
            );
            return Err(JsonError::new(Some(place), what).into());
        }
    }
    Ok(())
}

/// Adds new device specs to `device_spec.json` and removes others: all or none. Returns the file.
pub fn change_device_specs(
    paths: &HostPaths,
    new: Vec<DeviceSpec>,
    gone: &[DeviceSpec],
) -> Result<PathBuf, EditError> {
    let is_fit = |_: &[DeviceSpec]| Ok(());
    change(paths, specs(paths), new, is_fit, |specs| {
        for spec in gone {
            let before = specs.len();
            specs.retain(|one| one != spec);
            if specs.len() == before {
                let what = serde_json::to_string(spec).unwrap_or_default();
                return Err(format!("no device_spec that says {what}"));
            }
        }
        Ok(())
    })
}

/// Adds new aliases to `alias.json` and removes all alternatives of some names: all or none. Returns the file.
pub fn change_aliases(
    paths: &HostPaths,
    new: Vec<Alias>,
    gone: &[String],
) -> Result<PathBuf, EditError> {
    let file = aliases(paths);
    let of_groups = Groups::load_group_files(paths)?.aliases;
    let is_fit = |aliases: &[Alias]| {
        let all: Vec<Alias> = of_groups.iter().chain(aliases).cloned().collect();
        agree(&file, &all)
    };
    change(paths, file.clone(), new, is_fit, |aliases| {
        for name in gone {
            let before = aliases.len();
            aliases.retain(|alias| alias.name != name.trim());
            if aliases.len() == before {
                return Err(format!("no alias \"{name}\""));
            }
        }
        Ok(())
    })
}

fn change<T: Serialize + Entry + PartialEq>(
    paths: &HostPaths,
    file: PathBuf,
    new: Vec<T>,
    is_fit: impl FnOnce(&[T]) -> Result<(), ConfigError>,
    remove: impl FnOnce(&mut Vec<T>) -> Result<(), String>,
) -> Result<PathBuf, EditError> {
    let record = LeaseRecord::task("gantry group");
    let _choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
    let mut values = load(&file)?;
    remove(&mut values).map_err(|what| EditError::NotDefined {
        file: file.clone(),
        what,
    })?;
    for value in new {
        if !values.contains(&value) {
            values.push(value);
        }
    }
    is_fit(&values)?;
    config::write(&file, &NovaFile(values))?;
    Ok(file)
}
