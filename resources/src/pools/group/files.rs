//! The files that define groups, and how they are read into one list.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GroupError, Groups, ResourceGroup, nova_files};
use crate::base::config::{self, ConfigError};
use crate::base::host::HostPaths;
use crate::base::json::{JsonError, ListItem, Place};
use crate::pools::nova::{self, Alias, DeviceSpec};

/// A file of groups: `groups.json` and each `groups.d/*.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "gantry groups")]
pub(super) struct GroupsFile {
    /// For editors; gantry does not read it.
    #[serde(rename = "$schema", skip_serializing_if = "Option::is_none")]
    pub(super) schema: Option<String>,
    /// The groups, in the order in which they claim devices.
    #[serde(default)]
    pub(super) groups: Vec<ResourceGroup>,
    /// Devices that aliases may take besides those in groups, in Nova's form: one or a list.
    #[serde(
        default,
        deserialize_with = "nova::one_or_many",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(schema_with = "nova::one_or_many_schema::<DeviceSpec>")]
    pub(super) device_spec: Vec<DeviceSpec>,
    /// Names under which VMs ask for devices, in Nova's form: one or a list.
    #[serde(
        default,
        deserialize_with = "nova::one_or_many",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(schema_with = "nova::one_or_many_schema::<Alias>")]
    pub(super) alias: Vec<Alias>,
}

impl Groups {
    /// What `groups.json` and `groups.d/*.json` say.
    pub(super) fn load_group_files(paths: &HostPaths) -> Result<Self, GroupError> {
        let mut groups = Self::default();
        for path in config::files(&paths.config, "groups")? {
            if let Some(text) = config::read(&path)? {
                let file = parse(&path, &text)?;
                groups.add(file.groups)?;
                groups.specs.extend(file.device_spec);
                groups.aliases.extend(file.alias);
                nova_files::agree(&path, &groups.aliases)?;
            }
        }
        Ok(groups)
    }

    /// Reads `groups.json`, then `groups.d/*.json` in the order of their names, then `device_spec.json`
    /// and `alias.json`, which hold what Nova's options of these names hold. None need exist.
    ///
    /// Tenants are not looked at: [`Groups::load`] leaves their devices out.
    pub(crate) fn load_own(paths: &HostPaths) -> Result<Self, GroupError> {
        let mut groups = Self::load_group_files(paths)?;
        groups
            .specs
            .extend(nova_files::load(&nova_files::specs(paths))?);
        let file = nova_files::aliases(paths);
        groups.aliases.extend(nova_files::load(&file)?);
        nova_files::agree(&file, &groups.aliases)?;
        for spec in &mut groups.specs {
            let name = spec.devname.as_deref();
            spec.found = name.and_then(|name| nova::devname::function(paths, name));
        }
        Ok(groups)
    }

    pub(super) fn add(&mut self, more: Vec<ResourceGroup>) -> Result<(), GroupError> {
        for group in more {
            if let Some(first) = self.get(&group.name) {
                let in_list = ListItem {
                    list: "groups",
                    name: &group.name,
                };
                let first = Place::first(&first.file, in_list, "name");
                let second = Place::last(&group.file, in_list, "name");
                let what = format!(
                    "`name`: there is already a group named \"{}\" at {first}: rename or remove one of them",
                    group.name
                );
                return Err(JsonError::new(Some(second), what).into());
            }
            if let Some((key, problem)) = self.problem(&group) {
                return Err(group.wrong(&key, problem));
            }
            self.groups.push(group);
        }
        Ok(())
    }

    /// The JSON Schema of a group file.
    pub fn schema() -> schemars::Schema {
        schemars::schema_for!(GroupsFile)
    }
}

pub(super) fn parse(path: &Path, text: &str) -> Result<GroupsFile, ConfigError> {
    let mut file: GroupsFile = config::parse(path, text)?;
    for group in &mut file.groups {
        group.file = path.to_owned();
    }
    Ok(file)
}
