//! The result of a change to a group, as text or as JSON.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use gantry_resources::base::HostPaths;
use gantry_resources::inventory::{
    Allow, DeviceState, HostDevice, UsbDevice, lacks, scan, scan_usb,
};
use gantry_resources::pools::{Bind, GroupFiles, GroupType, Groups, NO_USB, ResourceGroup};
use serde::Serialize;
use serde_json::Value;

use crate::output::OutputArgs;
use crate::report::Failure;

/// The devices that groups can have.
pub struct Hardware {
    pci: Vec<HostDevice>,
    usb: Vec<UsbDevice>,
}

impl Hardware {
    pub fn read(paths: &HostPaths) -> Result<Self, Failure> {
        Ok(Self {
            pci: scan(paths)?,
            usb: scan_usb(paths)?,
        })
    }

    /// Addresses and USB ports of the devices of a group.
    fn of(&self, groups: &Groups, name: &str) -> BTreeSet<String> {
        let is = |owner: Option<&ResourceGroup>| owner.is_some_and(|owner| owner.name == name);
        let pci = self.pci.iter();
        let pci = pci.filter(|device| is(groups.group_of(device)));
        let usb = self.usb.iter();
        let usb = usb.filter(|device| is(groups.group_of_usb(device)));
        pci.map(|device| device.bdf.to_string())
            .chain(usb.map(|device| device.port.clone()))
            .collect()
    }

    /// Those of `names` that are bound to a host driver.
    fn attached<'n>(&self, names: &'n [String]) -> Vec<&'n str> {
        let attached = |name: &&String| {
            let mut pci = self.pci.iter();
            let device = pci.find(|device| device.bdf.to_string() == **name);
            device.is_some_and(|device| device.state() == DeviceState::Attached)
        };
        let attached = names.iter().filter(attached);
        attached.map(String::as_str).collect()
    }
}

/// A group as it was before a change.
pub struct GroupSnapshot {
    group: Option<ResourceGroup>,
    devices: BTreeSet<String>,
}

impl GroupSnapshot {
    /// The group of that name as it is now.
    pub fn of(name: &str, files: &GroupFiles, hardware: &Hardware) -> Result<Self, Failure> {
        let groups = files.groups()?;
        Ok(Self {
            group: groups.get(name).cloned(),
            devices: hardware.of(&groups, name),
        })
    }

    /// The difference to the group in `files`, which has the name `now`.
    pub fn changed(
        self,
        now: &str,
        files: &GroupFiles,
        hardware: &Hardware,
    ) -> Result<ChangeReport, Failure> {
        let groups = files.groups()?;
        let group = groups.get(now);
        let devices = hardware.of(&groups, now);
        let list = |names: &mut dyn Iterator<Item = &String>| names.cloned().collect();
        let added: Vec<String> = list(&mut devices.difference(&self.devices));
        let keys = differing(self.group.as_ref(), group);
        let done = match (&self.group, group) {
            (None, _) => Action::Created,
            (Some(_), None) => Action::Deleted,
            (Some(_), Some(_)) if keys.is_empty() => Action::Nothing,
            (Some(_), Some(_)) => Action::Changed,
        };
        let was = self.group.map(|group| group.name);
        Ok(ChangeReport {
            advice: group.and_then(|group| {
                let elsewhere = || elsewhere(group, &groups, hardware);
                let taken = devices.is_empty().then(elsewhere).flatten();
                taken.or_else(|| advice(group, &devices, &added, hardware))
            }),
            warnings: group.map_or_else(Vec::new, |group| lacking(group, &groups, &hardware.pci)),
            group: now.to_owned(),
            was: was.filter(|was| was != now),
            done,
            keys,
            removed: list(&mut self.devices.difference(&devices)),
            added,
            devices: devices.into_iter().collect(),
            files: Vec::new(),
        })
    }
}

/// The keys in which two definitions of a group differ.
fn differing(one: Option<&ResourceGroup>, other: Option<&ResourceGroup>) -> Vec<String> {
    let (Some(one), Some(other)) = (one, other) else {
        return Vec::new();
    };
    let value = |group| serde_json::to_value(group).unwrap_or_default();
    let (one, other) = (value(one), value(other));
    let keys = |value: &Value| -> Vec<String> {
        let keys = value.as_object().into_iter().flatten();
        keys.map(|(key, _)| key.clone()).collect()
    };
    let all: BTreeSet<String> = keys(&one).into_iter().chain(keys(&other)).collect();
    let differs = |key: &String| one.get(key) != other.get(key);
    all.into_iter().filter(differs).collect()
}

/// How many devices of other groups a message names at most.
const NAMED: usize = 4;

/// Devices that the group's rules match and other groups own.
fn elsewhere(group: &ResourceGroup, groups: &Groups, hardware: &Hardware) -> Option<String> {
    let mut overlaps = groups.overlaps(&hardware.pci);
    overlaps.retain(|overlap| overlap.others.contains(&group.name));
    let named = overlaps.iter().take(NAMED);
    let named = named.map(|overlap| format!("{} of {}", overlap.bdf, overlap.owner));
    let named: Vec<String> = named.collect();
    let more = match overlaps.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    (!named.is_empty()).then(|| {
        format!(
            "its rules match devices that belong to groups defined before it: {}{more}",
            named.join(", ")
        )
    })
}

/// The next step before VMs get devices of the group.
fn advice(
    group: &ResourceGroup,
    devices: &BTreeSet<String>,
    added: &[String],
    hardware: &Hardware,
) -> Option<String> {
    let name = &group.name;
    if group.vgpu.is_some() || group.bind == Bind::Demand {
        return None;
    }
    if group.sriov.is_some() {
        return Some(format!(
            "`gantry group activate {name}` makes its virtual functions"
        ));
    }
    if devices.is_empty() && group.kind == GroupType::Usb {
        return None;
    }
    if devices.is_empty() {
        return Some(format!(
            "`gantry group add {name} BDF` gives it a device, `gantry group edit {name} --rule JSON` a rule"
        ));
    }
    match hardware.attached(added).as_slice() {
        [] => None,
        attached => Some(format!(
            "`gantry device detach {}` makes {} free for VMs",
            attached.join(" "),
            if attached.len() == 1 { "it" } else { "them" }
        )),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Action {
    Created,
    Changed,
    Deleted,
    Nothing,
}

/// A change of a group.
#[derive(Debug, Serialize)]
pub struct ChangeReport {
    group: String,
    done: Action,
    /// The name that it had.
    #[serde(skip_serializing_if = "Option::is_none")]
    was: Option<String>,
    /// The keys of its definition that are different.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    keys: Vec<String>,
    /// Its devices now: addresses, and ports of USB devices.
    devices: Vec<String>,
    added: Vec<String>,
    removed: Vec<String>,
    /// The files that were written.
    files: Vec<PathBuf>,
    /// Why VMs cannot be given some of its devices, or only if their entries allow it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
    #[serde(skip)]
    advice: Option<String>,
}

impl ChangeReport {
    /// The report, with the files that were written.
    pub fn saved(self, files: Vec<PathBuf>) -> Self {
        Self { files, ..self }
    }

    /// Prints the change, once `files` are written.
    pub fn print(self, files: Vec<PathBuf>, args: OutputArgs) -> Result<(), Failure> {
        let changed = self.saved(files);
        args.print(&changed, |out| writeln!(out, "{changed}"))
    }

    fn changes(&self) -> String {
        let mut parts = Vec::new();
        if let Some(was) = &self.was {
            parts.push(format!("was {was}"));
        }
        let keys: Vec<&str> = self.keys.iter().map(String::as_str).collect();
        let keys: Vec<&str> = keys.into_iter().filter(|key| *key != "name").collect();
        let moved = !self.added.is_empty() || !self.removed.is_empty();
        // Adding or removing devices changes the rules anyway.
        let told = moved && keys == ["rules"];
        if !keys.is_empty() && !told {
            parts.push(format!("changed {}", keys.join(", ")));
        }
        for (what, devices) in [("added", &self.added), ("removed", &self.removed)] {
            if !devices.is_empty() {
                parts.push(format!("{what} {}", devices.join(" ")));
            }
        }
        parts.push(format!("it has {} now", counted(self.devices.len())));
        parts.join("; ")
    }
}

impl fmt::Display for ChangeReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let listed = |devices: &[String]| match devices {
            [] => "no device".to_owned(),
            devices => format!("{}: {}", counted(devices.len()), devices.join(" ")),
        };
        write!(f, "group {}: ", self.group)?;
        match self.done {
            Action::Created => write!(f, "created with {}", listed(&self.devices))?,
            Action::Deleted => write!(f, "deleted; it had {}", listed(&self.removed))?,
            Action::Nothing => write!(f, "as it was, with {}", listed(&self.devices))?,
            Action::Changed => f.write_str(&self.changes())?,
        }
        let advice = self.advice.iter().chain(&self.warnings);
        advice
            .into_iter()
            .try_for_each(|line| write!(f, "\n  {line}"))
    }
}

/// A number of devices in words.
fn counted(count: usize) -> String {
    match count {
        0 => "no device".to_owned(),
        1 => "1 device".to_owned(),
        count => format!("{count} devices"),
    }
}

/// Why VMs cannot be given devices of a group, or only if the devices' entries allow it: a line each.
pub fn lacking(group: &ResourceGroup, groups: &Groups, devices: &[HostDevice]) -> Vec<String> {
    if group.kind == GroupType::Usb {
        return vec![NO_USB.to_owned()];
    }
    let owned = |device: &&HostDevice| {
        let owner = groups.group_of(device);
        owner.is_some_and(|owner| owner.name == group.name)
    };
    let owned = devices.iter().filter(owned);
    let lacks = owned.filter_map(|device| lacks(device, devices, Allow::default()));
    lacks.map(|lack| lack.to_string()).collect()
}
