//! Groups: named sets of devices, defined in JSON files.

mod chosen;
mod edit;
mod error;
mod files;
mod in_use;
mod made;
mod nova_files;
mod possible;

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use crate::base::bdf::HostBdf;
use crate::base::json::{JsonError, ListItem, Place, nearest};
use crate::base::name::{DeviceName, read_name};
use crate::inventory::device::HostDevice;
use crate::inventory::scan::Detail;
use crate::inventory::usb::UsbDevice;
use crate::pools::nova::{self, Alias, DeviceSpec, Traits};
use crate::pools::rule::Rule;
use crate::pools::sriov::SriovSpec;
use crate::pools::vgpu::VgpuSpec;
pub use chosen::Chosen;
pub use edit::{EditError, GroupChange, GroupFiles};
pub use error::GroupError;
use files::{GroupsFile, parse};
pub use nova_files::{change_aliases, change_device_specs};

/// The type of a group's devices: a filter in addition to the rules.
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
    /// The word that group files use.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pci => "pci",
            Self::Nvme => "nvme",
            Self::SriovNic => "sriov-nic",
            Self::Vgpu => "vgpu",
            Self::Usb => "usb",
        }
    }

    fn admits(self, device: &HostDevice) -> bool {
        match self {
            Self::Pci => true,
            Self::Nvme => device.is_nvme(),
            Self::SriovNic => device.class.base() == 0x02 && device.physfn.is_some(),
            Self::Vgpu => device.vgpu.is_some(),
            Self::Usb => false,
        }
    }
}

/// Why no VM is given a device of a group of type "usb".
pub const NO_USB: &str = "USB passthrough is not supported yet: no VM can be given devices of a group of type \"usb\". \
    A whole USB controller, which is a PCI device, can be passed: `gantry device list --type usb` shows which \
    device is behind which";

/// When a group's devices leave their host drivers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Bind {
    /// With `gantry device detach`.
    #[default]
    Manual,
    /// When the host boots: `gantry device persist` writes the udev rules for it.
    Boot,
    /// When a VM takes them; they go back when it ends.
    Demand,
}

/// A named set of devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResourceGroup {
    /// What VMs ask for: letters, digits, `.`, `_`, `-`; at most 64.
    #[serde(deserialize_with = "group_name")]
    #[schemars(extend("pattern" = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"))]
    pub name: String,
    /// What the group holds.
    #[serde(rename = "type", default)]
    pub kind: GroupType,
    /// A description.
    #[serde(default)]
    pub description: String,
    /// What the devices are, for the icon in a picture only: "storage", "gpu", "network", ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// A device belongs to the group when one of these matches it.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// Virtual functions that `gantry group activate` makes; they belong to the group without a rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sriov: Option<SriovSpec>,
    /// Of a group of type "vgpu": the virtual GPUs, or other mediated devices, that VMs get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vgpu: Option<VgpuSpec>,
    /// When the devices leave their host drivers.
    #[serde(default, skip_serializing_if = "is_default")]
    pub bind: Bind,
    /// Traits that a request may ask for, with commas between or as a list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traits: Option<Traits>,
    /// The resource class that an alias may ask for; derived from a device's ids if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_class: Option<String>,
    /// After a VM has used it, a device is not given again until `gantry device release-quarantine`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub one_time_use: bool,
    /// The file that defines the group.
    #[serde(skip)]
    pub file: PathBuf,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl ResourceGroup {
    /// A group without rules, of any PCI functions.
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::default()
        }
    }

    /// What is wrong with a key of the group, with the place in its file.
    pub(crate) fn wrong(&self, key: &str, problem: String) -> GroupError {
        let list = ListItem {
            list: "groups",
            name: &self.name,
        };
        let place = Place::last(&self.file, list, key);
        let what = format!("group \"{}\": `{key}`: {problem}", self.name);
        JsonError::new(Some(place), what).into()
    }

    /// Whether the group's type and one of its rules take a device, or the first function of its card: a card
    /// comes as a whole. Bridges belong to the host.
    pub fn matches(&self, device: &HostDevice) -> bool {
        let lead = device.lead.as_deref();
        self.takes(device) || lead.is_some_and(|lead| self.takes(lead))
    }

    /// Whether the group's type and one of its rules take this function itself.
    fn takes(&self, device: &HostDevice) -> bool {
        !device.is_bridge()
            && self.kind.admits(device)
            && (self.makes(device) || self.rules.iter().any(|rule| rule.matches(device)))
    }

    /// Whether a device is one of the virtual functions that the group asks for.
    fn makes(&self, device: &HostDevice) -> bool {
        let (sriov, vgpu) = (self.sriov.as_ref(), self.vgpu.as_ref());
        sriov.is_some_and(|spec| device.physfn == Some(spec.pf))
            || vgpu.is_some_and(|spec| spec.takes(device))
    }

    /// Whether the group's type and one of its rules take a USB device. Hubs belong to the host.
    pub fn matches_usb(&self, device: &UsbDevice) -> bool {
        self.kind == GroupType::Usb
            && !device.is_hub()
            && self.rules.iter().any(|rule| rule.matches_usb(device))
    }

    /// Whether a rule names exactly the address of a device, but not the hardware that is there now.
    pub(crate) fn misses_former(&self, device: &HostDevice) -> bool {
        self.rules.iter().any(|rule| rule.means_former(device))
    }
}

fn group_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    read_name("a group", deserializer)
}

/// All groups of the host, in the order of definition.
///
/// A device that several groups match belongs to the first: groups in `groups.json` come before those of drop-ins,
/// and drop-ins in the order of their file names. [`Groups::overlaps`] lists such devices.
#[derive(Clone, Debug, Default)]
pub struct Groups {
    groups: Vec<ResourceGroup>,
    specs: Vec<DeviceSpec>,
    aliases: Vec<Alias>,
    /// Devices of tenants, with their tenants: no host group holds them.
    owners: BTreeMap<DeviceName, String>,
}

/// Properties of a device, from its group and device spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tags {
    /// In their normal form.
    pub(crate) traits: Vec<String>,
    /// In its normal form.
    pub(crate) resource_class: String,
    pub(crate) live_migratable: bool,
    pub(crate) one_time_use: bool,
    pub(crate) on_demand: bool,
}

/// A device that several groups match.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Overlap {
    /// The device.
    pub bdf: HostBdf,
    /// The group it belongs to.
    pub owner: String,
    /// The groups that match it too, without effect.
    pub others: Vec<String>,
}

impl Groups {
    /// These groups without the devices of tenants.
    pub(super) fn without(self, owners: BTreeMap<DeviceName, String>) -> Self {
        Self { owners, ..self }
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

    /// The group that a device belongs to: the first one, in the order of definition, that matches the first
    /// function of its card, so that all functions go together; if there is none, the first that matches it.
    pub fn group_of(&self, device: &HostDevice) -> Option<&ResourceGroup> {
        let first = |wanted: &HostDevice| self.groups.iter().find(|group| group.takes(wanted));
        let owner = first(device.first_function()).or_else(|| first(device));
        owner.filter(|_| self.tenant_of(device).is_none())
    }

    /// The group that a USB device belongs to: the first one of their type that matches it.
    pub fn group_of_usb(&self, device: &UsbDevice) -> Option<&ResourceGroup> {
        self.groups.iter().find(|group| group.matches_usb(device))
    }

    /// The tenant that a device belongs to.
    pub fn tenant_of(&self, device: &HostDevice) -> Option<&str> {
        self.owner(device.bdf)
    }

    /// The tenant that a PCI function or a mediated device belongs to.
    pub(crate) fn owner(&self, name: impl Into<DeviceName>) -> Option<&str> {
        self.owners.get(&name.into()).map(String::as_str)
    }

    /// The alternatives of an alias: those defined, or else those built in; empty if there is none.
    pub fn alias(&self, name: &str) -> Vec<Alias> {
        let named = |alias: &Alias| alias.name == name.trim();
        let defined: Vec<Alias> = self
            .aliases
            .iter()
            .filter(|one| named(one))
            .cloned()
            .collect();
        if defined.is_empty() {
            nova::built_in().filter(named).collect()
        } else {
            defined
        }
    }

    /// Names of all aliases, those built in last.
    pub fn alias_names(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        let built_in: Vec<Alias> = nova::built_in().collect();
        for alias in self.aliases.iter().chain(&built_in) {
            if !names.contains(&alias.name) {
                names.push(alias.name.clone());
            }
        }
        names
    }

    /// Whether VMs may get a device: a group or a device spec matches it.
    pub(crate) fn exposes(&self, device: &HostDevice) -> bool {
        let taken = self.group_of(device).is_some() || self.spec_of(device).is_some();
        taken && self.tenant_of(device).is_none()
    }

    /// Whether VMs take devices from the host's drivers.
    pub fn take_on_demand(&self) -> bool {
        let managed = |spec: &DeviceSpec| spec.managed.is_some_and(|nova::Flag(on)| on);
        self.groups.iter().any(|group| group.bind == Bind::Demand) || self.specs.iter().any(managed)
    }

    /// Whether a device spec takes a device.
    pub fn has_spec(&self, device: &HostDevice) -> bool {
        self.spec_of(device).is_some()
    }

    fn spec_of(&self, device: &HostDevice) -> Option<&DeviceSpec> {
        let first = |wanted: &HostDevice| self.specs.iter().find(|spec| spec.matches(wanted));
        first(device.first_function()).or_else(|| first(device))
    }

    /// The properties of a device, from its group and the first device spec that matches it.
    pub(crate) fn tags(&self, device: &HostDevice) -> Tags {
        let (group, spec) = (self.group_of(device), self.spec_of(device));
        let traits = [
            group.and_then(|group| group.traits.as_ref()),
            spec.and_then(|spec| spec.traits.as_ref()),
        ];
        let flag = |flag: Option<nova::Flag>| flag.is_some_and(|nova::Flag(on)| on);
        let class = group
            .and_then(|group| group.resource_class.as_deref())
            .or(spec.and_then(|spec| spec.resource_class.as_deref()));
        let traits = traits.into_iter().flatten().flat_map(Traits::names);
        Tags {
            traits: traits.map(str::to_owned).collect(),
            live_migratable: flag(spec.and_then(|spec| spec.live_migratable)),
            resource_class: class.map_or_else(|| nova::class_of(device), nova::resource_class),
            one_time_use: group.is_some_and(|group| group.one_time_use)
                || flag(spec.and_then(|spec| spec.one_time_use)),
            on_demand: match group {
                Some(group) => group.bind == Bind::Demand,
                None => flag(spec.and_then(|spec| spec.managed)),
            },
        }
    }

    /// The devices that more than one group matches.
    pub fn overlaps(&self, devices: &[HostDevice]) -> Vec<Overlap> {
        let overlap = |device: &HostDevice| {
            let owner = self.group_of(device)?.name.clone();
            let matching = self.groups.iter().filter(|group| group.takes(device));
            let names = matching.map(|group| group.name.clone());
            let others: Vec<String> = names.filter(|name| *name != owner).collect();
            (!others.is_empty()).then_some(Overlap {
                bdf: device.bdf,
                owner,
                others,
            })
        };
        devices.iter().filter_map(overlap).collect()
    }

    /// How much to read of each device to find its group: all if a rule asks for a serial number or another fact
    /// that only a driver knows.
    pub(crate) fn detail(&self) -> Detail {
        let mut rules = self.groups.iter().flat_map(|group| &group.rules);
        let asks = rules.any(|rule| {
            let filters = rule.filters();
            filters.serial.is_some()
                || filters.model.is_some()
                || filters.firmware.is_some()
                || filters.size.is_some()
        });
        match asks {
            true => Detail::Full,
            false => Detail::ForChoice,
        }
    }
}

#[cfg(test)]
mod tests;
