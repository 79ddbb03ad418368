//! Checks the devices to pass: the host's use of them, their IOMMU groups, and the IOMMU's translation.

use std::collections::{BTreeMap, BTreeSet};

use super::facts::{Devices, Facts};
use super::{Finding, Level, binding, lacking};
use crate::base::bdf::HostBdf;
use crate::facts::reserved::ReservedKind;
use crate::inventory::card::cards;
use crate::inventory::device::HostDevice;
use crate::pools::group::Groups;

pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    let devices = &facts.devices;
    let mut findings = vec![groups(devices)];
    if !devices.wanted.is_empty() {
        findings.push(host_needs(devices));
        findings.push(binding::judge(facts));
        findings.extend(iommu_groups(devices));
        findings.extend(reserved(devices));
        findings.extend(lacking::judge(devices));
    }
    findings
}

impl Devices {
    pub(super) fn is_wanted(&self, device: &HostDevice) -> bool {
        self.wanted.contains(&device.bdf)
    }

    pub(super) fn wanted(&self) -> impl Iterator<Item = &HostDevice> {
        self.all.iter().filter(|device| self.is_wanted(device))
    }

    /// Whether the host uses a device; also if that is unknown.
    pub(super) fn is_needed(&self, device: &HostDevice) -> bool {
        match &self.uses {
            Ok(uses) => uses.iter().any(|guarded| guarded.bdf == device.bdf),
            Err(_) => true,
        }
    }

    /// Whether a group creates virtual functions of a device, which needs its driver.
    pub(super) fn makes_functions(&self, device: &HostDevice) -> bool {
        let mut groups = self.groups.iter().flat_map(Groups::iter);
        groups.any(|group| {
            group
                .sriov
                .as_ref()
                .is_some_and(|spec| spec.pf == device.bdf)
        })
    }

    /// The IOMMU groups of the wanted devices, with all their members.
    fn iommu_groups(&self) -> BTreeMap<u32, Vec<&HostDevice>> {
        let numbers: BTreeSet<u32> = self
            .wanted()
            .filter_map(|device| device.iommu_group)
            .collect();
        let members = |number| {
            let group = Some(number);
            let members = self
                .all
                .iter()
                .filter(move |device| device.iommu_group == group);
            (number, members.collect())
        };
        numbers.into_iter().map(members).collect()
    }

    fn owner(&self, device: &HostDevice) -> Option<&str> {
        let groups = self.groups.as_ref().ok()?;
        groups.group_of(device).map(|group| group.name.as_str())
    }
}

/// `0000:01:00.0 (nouveau)`.
pub(super) fn named(device: &HostDevice) -> String {
    let driver = device.driver.as_deref().unwrap_or("no driver");
    format!("{} ({driver})", device.bdf)
}

pub(super) fn list<'a>(devices: impl IntoIterator<Item = &'a HostDevice>) -> String {
    let names: Vec<String> = devices.into_iter().map(named).collect();
    names.join(", ")
}

fn groups(devices: &Devices) -> Finding {
    let finding = |level, reason: String| Finding::new("groups", "Groups", level, reason);
    match &devices.groups {
        Err(problem) => finding(Level::Fail, problem.clone())
            .fix("correct that file: until then no group can be used"),
        Ok(groups) if groups.iter().next().is_none() => {
            finding(Level::Ok, "none are defined".into())
                .fix("`gantry check 01:00.0` looks at a device as if it were in one")
        }
        Ok(groups) => {
            let owned = devices
                .all
                .iter()
                .filter(|device| groups.group_of(device).is_some());
            finding(
                Level::Ok,
                format!(
                    "{} with {}",
                    count(groups.iter().count(), "group"),
                    count(cards(owned).len(), "device")
                ),
            )
        }
    }
}

pub(super) fn count(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

/// `gantry device detach` refuses devices that the host uses.
fn host_needs(devices: &Devices) -> Finding {
    let finding =
        |level, reason: String| Finding::new("host-guard", "Used by the host", level, reason);
    let uses = match &devices.uses {
        Ok(uses) => uses,
        Err(problem) => {
            return finding(
                Level::Warn,
                format!("cannot tell whether the host uses a device itself: {problem}"),
            );
        }
    };
    let wanted = uses
        .iter()
        .filter(|guarded| devices.wanted.contains(&guarded.bdf));
    let wanted: Vec<String> = wanted.map(ToString::to_string).collect();
    if wanted.is_empty() {
        return finding(Level::Ok, "the host uses none of the devices".into());
    }
    finding(Level::Warn, wanted.join("; ")).fix(
        "gantry detaches no such device: exclude it from its group's rules, or end the host's use of it first",
    )
}

/// An IOMMU group is given to one VM as a whole.
fn iommu_groups(devices: &Devices) -> Vec<Finding> {
    let groups = devices.iommu_groups();
    if groups.is_empty() {
        return Vec::new();
    }
    let finding =
        |level, reason: String| Finding::new("iommu-groups", "IOMMU groups", level, reason);
    let problems: Vec<Finding> = groups
        .iter()
        .flat_map(|(number, members)| shared(devices, *number, members))
        .map(|(level, reason, fix)| finding(level, reason).fix(fix))
        .collect();
    if problems.is_empty() {
        let number = count(groups.len(), "IOMMU group");
        return vec![finding(
            Level::Ok,
            format!("{number} without other devices"),
        )];
    }
    problems
}

/// Problems with the members of an IOMMU group.
fn shared(devices: &Devices, number: u32, members: &[&HostDevice]) -> Vec<(Level, String, String)> {
    let mut problems = Vec::new();
    let pick = |wanted: &dyn Fn(&HostDevice) -> bool| -> Vec<&HostDevice> {
        members
            .iter()
            .copied()
            .filter(|device| wanted(device))
            .collect()
    };
    let bridges = pick(&|device| device.is_bridge() && !device.leaves_group_viable());
    if !bridges.is_empty() {
        problems.push((
            Level::Fail,
            format!(
                "IOMMU group {number} contains the host's bridge {}: no device of it can be passed through",
                list(bridges)
            ),
            "put the card into another slot".to_owned(),
        ));
    }
    let others = |device: &HostDevice| !device.is_bridge() && !devices.is_wanted(device);
    let known = devices.uses.is_ok();
    let needed = pick(&|device| others(device) && known && devices.is_needed(device));
    if !needed.is_empty() {
        problems.push((
            Level::Fail,
            format!("IOMMU group {number} also contains {}, which the host uses: no device of it can be passed through", list(needed)),
            "put one of the two cards into another slot".to_owned(),
        ));
    }
    let unowned = pick(&|device| others(device) && !(known && devices.is_needed(device)));
    if !unowned.is_empty() {
        problems.push((
            Level::Warn,
            format!(
                "IOMMU group {number} also contains {}, which is in no group: it is \
                 detached together with the others",
                list(unowned)
            ),
            "widen a rule of the group, so that the IOMMU group is in it as a whole".to_owned(),
        ));
    }
    let owners: BTreeSet<&str> = members
        .iter()
        .filter_map(|device| devices.owner(device))
        .collect();
    if owners.len() > 1 {
        let owners: Vec<String> = owners.iter().map(|owner| format!("\"{owner}\"")).collect();
        problems.push((
            Level::Warn,
            format!(
                "IOMMU group {number} is spread over the groups {}: a VM that gets one of \
                 its devices keeps the others from all other VMs",
                owners.join(" and ")
            ),
            "write the rules so that one group has all of it".to_owned(),
        ));
    }
    problems
}

/// The kernel gives no device to a VM that the firmware needs mapped one to one (RMRR).
fn reserved(devices: &Devices) -> Option<Finding> {
    let groups = devices.iommu_groups();
    let finding =
        |level, reason: String| Finding::new("reserved-regions", "Reserved memory", level, reason);
    let has = |number: &u32, kind| {
        let regions = devices.reserved.get(number);
        regions.is_some_and(|regions| regions.iter().any(|region| region.kind == kind))
    };
    let of = |kind| -> Vec<HostBdf> {
        let groups = groups.iter().filter(|(number, _)| has(number, kind));
        let members = groups.flat_map(|(_, members)| members);
        members
            .filter(|device| devices.is_wanted(device))
            .map(|device| device.bdf)
            .collect()
    };
    let join = |devices: &[HostBdf]| {
        let names: Vec<String> = devices.iter().map(HostBdf::to_string).collect();
        names.join(", ")
    };
    if groups.is_empty() {
        return None;
    }
    let fixed = of(ReservedKind::Direct);
    if !fixed.is_empty() {
        return Some(
            finding(
                Level::Fail,
                format!(
                    "the firmware reserves memory that {} must always reach (ACPI RMRR): the \
                     kernel passes no such device through",
                    join(&fixed)
                ),
            )
            .fix(
                "ask the machine's vendor how to switch that off for the slot (HPE: \
                 \"shared memory\" of the slot's option card); a newer firmware may help",
            ),
        );
    }
    let passing = of(ReservedKind::DirectRelaxable);
    Some(if passing.is_empty() {
        finding(
            Level::Ok,
            "the firmware reserves no memory for these devices".into(),
        )
    } else {
        finding(
            Level::Ok,
            format!(
                "the firmware's reservation for {} ends when the device is passed through (USB, display)",
                join(&passing)
            ),
        )
    })
}
