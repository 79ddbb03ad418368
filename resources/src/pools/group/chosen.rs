//! Devices that are put into groups, or taken out of them, one by one.

use std::fmt;

use super::{GroupType, Groups, ResourceGroup};
use crate::base::bdf::HostBdf;
use crate::inventory::device::HostDevice;
use crate::inventory::usb::UsbDevice;
use crate::pools::rule::Rule;

/// A device chosen for a group. Shown as its address, or as its port.
#[derive(Clone, Copy, Debug)]
pub enum Chosen<'a> {
    /// A PCI function.
    Pci(&'a HostDevice),
    /// A USB device.
    Usb(&'a UsbDevice),
}

impl fmt::Display for Chosen<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(device) => device.bdf.fmt(f),
            Self::Usb(device) => f.write_str(&device.port),
        }
    }
}

impl Chosen<'_> {
    /// The group that it is in.
    pub(super) fn group<'g>(&self, groups: &'g Groups) -> Option<&'g ResourceGroup> {
        match self {
            Self::Pci(device) => groups.group_of(device),
            Self::Usb(device) => groups.group_of_usb(device),
        }
    }

    /// The rule that takes it and no other.
    pub(super) fn rule(&self) -> Rule {
        match self {
            Self::Pci(device) => Rule::of_device(device),
            Self::Usb(device) => Rule::of_usb(device),
        }
    }

    /// Whether a group of that type can have it.
    pub(super) fn is_of(&self, kind: GroupType) -> bool {
        match self {
            Self::Pci(device) => !device.is_bridge() && kind.admits(device),
            Self::Usb(device) => kind == GroupType::Usb && !device.is_hub(),
        }
    }

    /// What it is, in words.
    pub(super) fn class(&self) -> String {
        match self {
            Self::Pci(device) => {
                let class = device.class_name().map(str::to_owned);
                class.unwrap_or_else(|| device.class.to_string())
            }
            Self::Usb(device) if device.is_hub() => "USB hub".to_owned(),
            Self::Usb(_) => "USB device".to_owned(),
        }
    }

    /// The first function of its card, where a group has it for the sake of that.
    pub(super) fn lead_in(&self, group: &ResourceGroup) -> Option<HostBdf> {
        match self {
            Self::Pci(device) => {
                let lead = device.lead.as_deref();
                lead.filter(|lead| group.matches(lead)).map(|lead| lead.bdf)
            }
            Self::Usb(_) => None,
        }
    }

    /// Whether a rule takes it for its own sake.
    pub(super) fn is_taken_by(&self, rule: &Rule) -> bool {
        match self {
            Self::Pci(device) => rule.matches(device),
            Self::Usb(device) => rule.matches_usb(device),
        }
    }

    /// Whether a rule names this device alone.
    pub(super) fn is_named_by(&self, rule: &Rule) -> bool {
        match self {
            Self::Pci(device) => rule.only_slot() == Some(device.bdf),
            Self::Usb(device) => *rule == Rule::of_usb(device),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::usb::{scan_usb, tests};
    use crate::pools::group::GroupFiles;

    #[test]
    fn usb_devices_are_put_into_groups_and_taken_out() {
        let host = tests::host();
        let all = scan_usb(&host.paths).unwrap();
        let groups = r#"{"groups": [{"name": "sticks", "type": "usb"}, {"name": "disks"}]}"#;
        host.groups(groups);
        let sorted = |hub: bool| all.iter().filter(move |device| device.is_hub() == hub);
        let device = sorted(false).next().unwrap();
        let hub = sorted(true).next().unwrap();
        let change = |name: &str, device: &UsbDevice, out: bool| {
            let mut files = GroupFiles::open(&host.paths).unwrap();
            let chosen = [Chosen::Usb(device)];
            match out {
                false => files.add_chosen(name, &chosen)?,
                true => files.remove(name, &chosen)?,
            }
            files.save().map(drop)
        };
        change("sticks", device, false).unwrap();
        let owner = || {
            let groups = Groups::load(&host.paths).unwrap();
            groups.group_of_usb(device).map(|group| group.name.clone())
        };
        assert_eq!(owner().as_deref(), Some("sticks"));
        let others = all.iter().filter(|other| other.port != device.port);
        let groups = Groups::load(&host.paths).unwrap();
        assert!(
            others
                .clone()
                .all(|other| groups.group_of_usb(other).is_none())
        );
        let said = change("sticks", hub, false).unwrap_err().to_string();
        assert!(said.contains("it is \"USB hub\""), "{said}");
        change("sticks", device, true).unwrap();
        assert_eq!(owner(), None);
        let said = change("disks", device, false).unwrap_err().to_string();
        assert!(said.contains("cannot be in a group of type"), "{said}");
    }
}
