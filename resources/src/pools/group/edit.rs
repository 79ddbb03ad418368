//! Changing group files: under the allocation lock, checked first, each file replaced as a whole.

use std::path::PathBuf;

use thiserror::Error;

use super::chosen::Chosen;
use super::{Bind, GroupError, GroupType, Groups, GroupsFile, ResourceGroup, parse};
use crate::base::bdf::HostBdf;
use crate::base::config::{self, ConfigError};
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::uuid::Uuid;
use crate::holding::host_lock::{ALLOCATION_DEADLINE, AllocationLock, LeaseError};
use crate::holding::record::LeaseRecord;
use crate::inventory::device::HostDevice;
use crate::inventory::error::InventoryError;
use crate::pools::nova::Traits;
use crate::pools::rule::Rule;
use crate::pools::sriov::{PfError, SriovSpec};
use crate::pools::vgpu::VgpuSpec;

/// The group files of the host, open for changes. No device is allocated meanwhile; [`GroupFiles::save`] writes
/// them.
#[derive(Debug)]
pub struct GroupFiles {
    files: Vec<OpenFile>,
    main: PathBuf,
    _choosing: AllocationLock,
}

#[derive(Debug)]
struct OpenFile {
    path: PathBuf,
    content: GroupsFile,
    changed: bool,
}

/// The changes of a group. A field that is none stays as it is.
#[derive(Clone, Debug, Default)]
pub struct GroupChange {
    /// The name.
    pub name: Option<String>,
    /// The type.
    pub kind: Option<GroupType>,
    /// The description.
    pub description: Option<String>,
    /// The class; an empty one takes it away.
    pub class: Option<String>,
    /// When devices leave their host drivers.
    pub bind: Option<Bind>,
    /// Whether a device is for one use.
    pub one_time_use: Option<bool>,
    /// The traits; none of them takes them all away.
    pub traits: Option<Traits>,
    /// The resource class; an empty one takes it away.
    pub resource_class: Option<String>,
    /// The virtual functions; none of them takes them away.
    pub sriov: Option<Option<SriovSpec>>,
    /// The virtual GPUs; none of them takes them away.
    pub vgpu: Option<Option<VgpuSpec>>,
    /// Rules that go, by their numbers from 1.
    pub drop_rules: Vec<usize>,
    /// Rules that come, at the end.
    pub add_rules: Vec<Rule>,
}

/// A change of groups was refused; nothing was written.
#[derive(Debug, Error)]
pub enum EditError {
    /// The groups as they are, or as they would be, are wrong.
    #[error(transparent)]
    Groups(#[from] GroupError),
    /// The lock cannot be had.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The host's devices cannot be read.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// A group of that name exists already.
    #[error(
        "there is already a group named \"{name}\" (in {file}): `gantry group edit {name}` changes it",
        file = .file.display()
    )]
    Exists {
        /// The group.
        name: String,
        /// The file that defines it.
        file: PathBuf,
    },
    /// A group has no rule of that number.
    #[error("group \"{group}\" has no rule {number}: it has {count} (`gantry group show {group}`)")]
    NoRule {
        /// The group.
        group: String,
        /// The number, from 1.
        number: usize,
        /// How many rules it has.
        count: usize,
    },
    /// A device is in another group, which comes first.
    #[error(
        "{device} belongs to group \"{owner}\": take it out first (`gantry group remove {owner} {device}`)"
    )]
    Owned {
        /// The device: its address, or its port.
        device: String,
        /// The group.
        owner: String,
    },
    /// A device can be in no group of that type.
    #[error("{device} cannot be in a group of type {}: it is \"{class}\"", .kind.word())]
    NotOfType {
        /// The device: its address, or its port.
        device: String,
        /// The type.
        kind: GroupType,
        /// What it is.
        class: String,
    },
    /// A device is in the group as a part of a card, which no rule names.
    #[error(
        "{device} is in group \"{group}\" because {first}, the first function of its card, is: \
         `gantry group remove {group} {first}` takes out the whole card"
    )]
    PartOfCard {
        /// The device.
        device: String,
        /// The group.
        group: String,
        /// The first function of the card.
        first: HostBdf,
    },
    /// A device is not in the group.
    #[error("{device} is not in group \"{group}\"")]
    NotThere {
        /// The device: its address, or its port.
        device: String,
        /// The group.
        group: String,
    },
    /// A rule takes a device together with others.
    #[error(
        "rule {number} of group \"{group}\" also takes other devices than {device}: change it (`gantry group edit {group} --drop-rule {number} --rule ...`)"
    )]
    WiderRule {
        /// The device: its address, or its port.
        device: String,
        /// The group.
        group: String,
        /// The rule's number, from 1.
        number: usize,
    },
    /// An entry to remove is not in the file.
    #[error("{}: there is {what}", .file.display())]
    NotDefined {
        /// The file.
        file: PathBuf,
        /// What is missing, with a "no" before it.
        what: String,
    },
    /// A VM has a device of the group.
    #[error(
        "group \"{group}\" is in use: {device} is held by {holder}: end it first, or give --force, which leaves it the device"
    )]
    InUse {
        /// The group.
        group: String,
        /// The device.
        device: DeviceName,
        /// Who, in words.
        holder: String,
    },
    /// A card cannot have the functions that are asked for.
    #[error(transparent)]
    Functions(#[from] PfError),
    /// A group of vGPUs, of none.
    #[error(
        "group \"{0}\" is of type vgpu and does not say which: give it a type, as in --vgpu '{{\"type\": \"nvidia-222\"}}' (`gantry device mdev` lists them)"
    )]
    NoVgpu(String),
    /// Something was made for the group.
    #[error(
        "group \"{group}\" has {made} now: `gantry group deactivate {group}` first, or give --force"
    )]
    HasMade {
        /// The group.
        group: String,
        /// What, in words.
        made: String,
    },
}

impl From<ConfigError> for EditError {
    fn from(error: ConfigError) -> Self {
        Self::Groups(error.into())
    }
}

impl GroupFiles {
    /// Reads all files, under the lock.
    pub fn open(paths: &HostPaths) -> Result<Self, EditError> {
        let record = LeaseRecord::task("gantry group");
        let choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
        let mut open = Vec::new();
        for path in config::files(&paths.config, "groups")? {
            let content = match config::read(&path)? {
                Some(text) => parse(&path, &text)?,
                None => GroupsFile::default(),
            };
            open.push(OpenFile {
                path,
                content,
                changed: false,
            });
        }
        let files = Self {
            files: open,
            main: paths.config.join("groups.json"),
            _choosing: choosing,
        };
        files.groups()?;
        Ok(files)
    }

    /// The groups as they would be.
    pub fn groups(&self) -> Result<Groups, EditError> {
        let mut groups = Groups::default();
        for file in &self.files {
            groups.add(file.content.groups.clone())?;
        }
        Ok(groups)
    }

    /// Adds a group after all others of `groups.json`.
    pub fn create(&mut self, group: ResourceGroup) -> Result<(), EditError> {
        let path = self.main.clone();
        if let Some(first) = self.groups()?.get(&group.name) {
            return Err(EditError::Exists {
                file: first.file.clone(),
                name: group.name,
            });
        }
        let group = ResourceGroup {
            file: path.clone(),
            ..group
        };
        if let Some(file) = self.files.iter_mut().find(|file| file.path == path) {
            file.content.groups.push(group);
            file.changed = true;
        }
        self.groups().map(drop)
    }

    /// Changes a group.
    pub fn change(&mut self, name: &str, change: GroupChange) -> Result<(), EditError> {
        let group = self.group_mut(name)?;
        let count = group.rules.len();
        let wrong = |number: &&usize| **number == 0 || **number > count;
        if let Some(&number) = change.drop_rules.iter().find(wrong) {
            let group = name.to_owned();
            return Err(EditError::NoRule {
                group,
                number,
                count,
            });
        }
        let mut number = 0;
        group.rules.retain(|_| {
            number += 1;
            !change.drop_rules.contains(&number)
        });
        for rule in change.add_rules {
            if !group.rules.contains(&rule) {
                group.rules.push(rule);
            }
        }
        group.kind = change.kind.unwrap_or(group.kind);
        if let Some(class) = change.class {
            group.class = Some(class).filter(|class| !class.is_empty());
        }
        group.bind = change.bind.unwrap_or(group.bind);
        group.one_time_use = change.one_time_use.unwrap_or(group.one_time_use);
        if let Some(traits) = change.traits {
            group.traits = Some(traits).filter(|traits| traits.names().next().is_some());
        }
        if let Some(class) = change.resource_class {
            group.resource_class = Some(class).filter(|class| !class.is_empty());
        }
        if let Some(sriov) = change.sriov {
            group.sriov = sriov;
        }
        if let Some(vgpu) = change.vgpu {
            group.vgpu = vgpu;
        }
        if let Some(description) = change.description {
            group.description = description;
        }
        if let Some(name) = change.name {
            group.name = name;
        }
        self.groups().map(drop)
    }

    /// Removes a group. [`GroupFiles::is_idle`] checks whether a VM has a device of it.
    pub fn delete(&mut self, name: &str) -> Result<(), EditError> {
        self.group_mut(name)?;
        for file in &mut self.files {
            file.content.groups.retain(|group| group.name != name);
        }
        Ok(())
    }

    /// Gives devices to a group, with a rule for each that it does not match yet.
    pub fn add(&mut self, name: &str, devices: &[HostDevice]) -> Result<(), EditError> {
        let devices = devices.iter().map(Chosen::Pci);
        self.add_chosen(name, &devices.collect::<Vec<_>>())
    }

    /// The same for PCI functions and USB devices.
    pub fn add_chosen(&mut self, name: &str, devices: &[Chosen<'_>]) -> Result<(), EditError> {
        self.group_mut(name)?;
        let groups = self.groups()?;
        let kind = groups.get(name).map(|group| group.kind).unwrap_or_default();
        let mut add_rules = Vec::new();
        for device in devices {
            match device.group(&groups) {
                Some(owner) if owner.name == name => continue,
                Some(owner) => {
                    return Err(EditError::Owned {
                        device: device.to_string(),
                        owner: owner.name.clone(),
                    });
                }
                None => add_rules.push(device.rule()),
            }
            if !device.is_of(kind) {
                return Err(EditError::NotOfType {
                    device: device.to_string(),
                    kind,
                    class: device.class(),
                });
            }
        }
        self.change(
            name,
            GroupChange {
                add_rules,
                ..GroupChange::default()
            },
        )
    }

    /// Takes devices out of a group by removing the rules that name exactly them.
    pub fn remove(&mut self, name: &str, devices: &[Chosen<'_>]) -> Result<(), EditError> {
        let group = self.group_mut(name)?;
        for device in devices {
            if !group.rules.iter().any(|rule| device.is_taken_by(rule)) {
                let (device, first) = (device.to_string(), device.lead_in(group));
                let group = name.to_owned();
                return Err(match first {
                    Some(first) => EditError::PartOfCard {
                        device,
                        group,
                        first,
                    },
                    None => EditError::NotThere { device, group },
                });
            }
            let wider = |rule: &Rule| device.is_taken_by(rule) && !device.is_named_by(rule);
            if let Some(index) = group.rules.iter().position(wider) {
                return Err(EditError::WiderRule {
                    device: device.to_string(),
                    group: name.to_owned(),
                    number: index + 1,
                });
            }
        }
        group
            .rules
            .retain(|rule| !devices.iter().any(|device| device.is_taken_by(rule)));
        Ok(())
    }

    /// Removes every rule that names one of these addresses, whatever is there now, and groups that had
    /// no other.
    pub(crate) fn forget(&mut self, addresses: &[HostBdf]) {
        for file in &mut self.files {
            for group in &mut file.content.groups {
                group
                    .rules
                    .retain(|rule| !rule.only_slot().is_some_and(|bdf| addresses.contains(&bdf)));
            }
            file.content
                .groups
                .retain(|group| !group.rules.is_empty() || group.vgpu.is_some());
            file.changed = true;
        }
    }

    /// The same for mediated devices.
    pub(crate) fn forget_mdevs(&mut self, uuids: &[Uuid]) {
        for file in &mut self.files {
            for spec in file
                .content
                .groups
                .iter_mut()
                .filter_map(|group| group.vgpu.as_mut())
            {
                spec.uuids.retain(|uuid| !uuids.contains(uuid));
            }
            file.content.groups.retain(|group| {
                let spec = group.vgpu.as_ref();
                spec.is_none_or(|spec| !spec.uuids.is_empty())
            });
            file.changed = true;
        }
    }

    /// Writes the files that changed and names them.
    pub fn save(self) -> Result<Vec<PathBuf>, EditError> {
        self.groups()?;
        let changed = self.files.iter().filter(|file| file.changed);
        let write = |file: &OpenFile| -> Result<PathBuf, EditError> {
            config::write(&file.path, &file.content)?;
            Ok(file.path.clone())
        };
        changed.map(write).collect()
    }

    fn group_mut(&mut self, name: &str) -> Result<&mut ResourceGroup, EditError> {
        let groups = self.groups()?;
        for file in &mut self.files {
            let own = &mut file.content.groups;
            if let Some(group) = own.iter_mut().find(|group| group.name == name) {
                file.changed = true;
                return Ok(group);
            }
        }
        Err(groups.unknown(name).into())
    }
}

#[cfg(test)]
mod tests;
