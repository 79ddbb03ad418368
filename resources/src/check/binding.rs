//! The wanted devices that are not bound to vfio-pci yet, and the words and lines that bind them at every boot.

use std::collections::BTreeSet;

use super::devices::{count, list};
use super::facts::Facts;
use super::modprobe::pairs;
use super::{Finding, Level};
use crate::inventory::device::HostDevice;

pub(super) fn judge(facts: &Facts) -> Finding {
    let devices = &facts.devices;
    let finding =
        |level, reason: String| Finding::new("binding", "Bound to vfio-pci", level, reason);
    let unbound = devices.wanted().filter(|device| {
        let stays = devices.is_needed(device) || devices.makes_functions(device);
        !device.on_vfio() && !device.is_bridge() && !stays
    });
    let (on_demand, astray): (Vec<_>, Vec<_>) =
        unbound.partition(|device| devices.on_demand.contains(&device.bdf));
    if astray.is_empty() {
        let bound = devices.wanted().filter(|device| device.on_vfio()).count();
        let mut reason = format!("{} bound to vfio-pci", count(bound, "device"));
        if !on_demand.is_empty() {
            reason += &format!(", {} to be bound when a VM takes them", on_demand.len());
        }
        return finding(Level::Ok, reason);
    }
    let plan = Plan::new(facts, &astray);
    let late = plan.late(facts);
    let reason = if late.is_empty() {
        format!("not bound to vfio-pci: {}", list(astray.iter().copied()))
    } else {
        format!(
            "vfio-pci was loaded too late: it has the ids of {}, but another driver was first",
            list(late)
        )
    };
    let addresses: Vec<String> = astray.iter().map(|device| device.bdf.to_string()).collect();
    let addresses = addresses.join(" ");
    let mut warning = finding(Level::Warn, reason);
    if astray.iter().all(|device| device.iommu_group.is_some()) {
        warning = warning.lines("detach now:", [format!("gantry device detach {addresses}")]);
        warning = warning.lines(
            "at each boot, by their addresses:",
            [format!(
                "gantry device persist {addresses} --output /etc/udev/rules.d/10-gantry.rules"
            )],
        );
    }
    plan.advise(facts, warning)
}

/// How vfio-pci can bind devices before the host's drivers do.
struct Plan<'a> {
    /// The devices to bind, with the other devices of their IOMMU groups.
    bring: Vec<&'a HostDevice>,
    /// Other devices with the same ids that are not meant for vfio-pci: it would bind them as well.
    twins: Vec<&'a HostDevice>,
    /// Ids to give to vfio-pci, in the order of the devices.
    ids: Vec<String>,
    /// Ids that vfio-pci has already.
    given: BTreeSet<String>,
}

impl<'a> Plan<'a> {
    fn new(facts: &'a Facts, astray: &[&'a HostDevice]) -> Self {
        let devices = &facts.devices;
        let groups: BTreeSet<u32> = astray
            .iter()
            .filter_map(|device| device.iommu_group)
            .collect();
        let is_brought = |device: &HostDevice| {
            let neighbour = device
                .iommu_group
                .is_some_and(|group| groups.contains(&group));
            let ours = neighbour || astray.iter().any(|one| one.bdf == device.bdf);
            let stays = devices.is_needed(device) || devices.makes_functions(device);
            ours && !device.is_bridge() && !stays && !device.on_vfio()
        };
        let bring: Vec<&HostDevice> = devices
            .all
            .iter()
            .filter(|device| is_brought(device))
            .collect();
        let of = |device: &HostDevice| device.id.to_string();
        let mut ids: Vec<String> = Vec::new();
        for id in bring.iter().map(|device| of(device)) {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        let is_twin = |device: &&HostDevice| {
            let demanded = devices.on_demand.contains(&device.bdf);
            ids.contains(&of(device)) && !is_brought(device) && (demanded || !device.on_vfio())
        };
        let twins: Vec<&HostDevice> = devices.all.iter().filter(is_twin).collect();
        // A driver in the kernel's image binds before every module is loaded.
        let taken = bring.iter().filter(|device| has_builtin(facts, device));
        let not_by_id: Vec<&&HostDevice> = twins.iter().chain(taken).collect();
        ids.retain(|id| !not_by_id.iter().any(|device| of(device) == *id));
        let words = facts.cmdline.named("vfio-pci.ids");
        let mut given: BTreeSet<String> = words.flat_map(|(_, value)| pairs(value)).collect();
        given.extend(facts.modprobe.vfio_ids.iter().cloned());
        Self {
            bring,
            twins,
            ids,
            given,
        }
    }

    /// Devices that vfio-pci would have if it had been loaded first.
    fn late(&self, facts: &Facts) -> Vec<&'a HostDevice> {
        let late = self.bring.iter().copied();
        late.filter(|device| self.given.contains(&device.id.to_string()))
            .filter(|device| device.driver.is_some() && facts.devices.is_wanted(device))
            .collect()
    }

    fn advise(&self, facts: &Facts, mut finding: Finding) -> Finding {
        if !self.twins.is_empty() {
            let twins = list(self.twins.iter().copied());
            let by_address = match self.bring.iter().all(|one| one.iommu_group.is_some()) {
                true => "by their addresses with `gantry device persist`, as shown above",
                false => "by their addresses with `gantry device persist`, once the IOMMU is on",
            };
            let told = |twin: &&HostDevice| self.given.contains(&twin.id.to_string());
            finding = finding.fix(if self.twins.iter().any(told) {
                format!(
                    "vfio-pci is told to take ids that {twins} has as well, and may take that device at any boot: \
                     take these ids away from vfio-pci, and name the devices {by_address}"
                )
            } else {
                format!(
                    "vfio-pci.ids cannot tell these devices from {twins}, which vfio-pci does not always have: name \
                     the devices {by_address}"
                )
            });
        }
        let drivers = Drivers::new(facts, self);
        if !drivers.builtin.is_empty() {
            finding = finding.fix(format!(
                "{} is part of the kernel's image and always first: let `gantry boot` detach its devices after each \
                 boot (`gantry device persist --by systemd`)",
                drivers.builtin.join(" and ")
            ));
        }
        if self.ids.is_empty() {
            return finding;
        }
        finding = self.words(facts, finding);
        if !drivers.wait.is_empty() {
            let line = |module: &String| format!("softdep {module} pre: vfio-pci");
            let what = "to bind by ids, vfio-pci must be loaded first at each boot, by these lines in /etc/modprobe.d/gantry.conf:";
            finding = finding.lines(what, drivers.wait.iter().map(line));
            finding = match facts.boot.initramfs.command() {
                Some(command) => finding.lines("then rebuild the initramfs:", [command]),
                None => finding.fix("then rebuild the initramfs, where there is one"),
            };
        }
        finding = held_back(facts, &drivers, finding);
        if !drivers.hold_back.is_empty() {
            let words = format!("modprobe.blacklist={}", drivers.hold_back.join(","));
            finding = finding
                .fix(format!(
                    "{} binds first although it is configured to wait, and no other device needs it: hold it back with \
                     {words} on the kernel's command line",
                    drivers.hold_back.join(" and ")
                ))
                .lines(
                    "a module that is held back no longer loads vfio-pci: add a line to /etc/modules-load.d/gantry.conf:",
                    ["vfio-pci"],
                )
                .add([words]);
        }
        finding
    }

    /// One `vfio-pci.ids` with the old ids and the new, in place of the existing ones.
    fn words(&self, facts: &Facts, finding: Finding) -> Finding {
        let new = self.ids.iter().filter(|id| !self.given.contains(*id));
        let new: Vec<&str> = new.map(String::as_str).collect();
        if new.is_empty() {
            return finding;
        }
        let old: Vec<(&str, &str)> = facts.cmdline.named("vfio-pci.ids").collect();
        let ids: Vec<&str> = old.iter().map(|(_, value)| *value).chain(new).collect();
        let word = format!("vfio-pci.ids={}", ids.join(","));
        let grouped = self.bring.iter().all(|one| one.iommu_group.is_some());
        let or = if grouped { "or " } else { "" };
        finding
            .fix(format!(
                "{or}at each boot, by their ids: {word} on the kernel's command line, as shown below"
            ))
            .add([word])
            .remove(old.iter().map(|(word, _)| *word))
    }
}

/// The host's drivers that bind the devices first, by their modules.
#[derive(Default)]
struct Drivers {
    /// Drivers that cannot be made to wait.
    builtin: Vec<String>,
    /// Drivers that should wait for vfio-pci.
    wait: Vec<String>,
    /// Drivers that a file holds back already.
    held_back: Vec<(String, String)>,
    /// Drivers that are configured to wait and do not, and that only devices to be detached use.
    hold_back: Vec<String>,
}

impl Drivers {
    fn new(facts: &Facts, plan: &Plan<'_>) -> Self {
        let mut drivers = Self::default();
        if facts.modules.is_builtin("vfio-pci") {
            // vfio-pci in the image binds before every module, unless the devices' present driver is in the
            // image too.
            return drivers;
        }
        let taken = plan.bring.iter().filter(|one| has_builtin(facts, one));
        let taken: BTreeSet<&String> = taken.filter_map(|one| one.driver.as_ref()).collect();
        drivers.builtin = taken.into_iter().cloned().collect();
        let led = plan
            .bring
            .iter()
            .filter(|device| plan.ids.contains(&device.id.to_string()));
        let names: BTreeSet<&String> = led.filter_map(|device| device.driver.as_ref()).collect();
        for name in names {
            let Some(module) = facts.devices.driver_modules.get(name) else {
                continue;
            };
            let module = module.clone();
            if let Some(file) = facts.modprobe.held_back_by(&module) {
                let held_back = (module.clone(), file.to_owned());
                drivers.held_back.push(held_back);
            } else if !facts.modprobe.waits(&module) {
                drivers.wait.push(module);
            } else if !plan.late(facts).is_empty() && !used_elsewhere(facts, plan, name) {
                drivers.hold_back.push(module);
            }
        }
        drivers
    }
}

/// Whether a device's driver is part of the kernel's image, and vfio-pci is not.
fn has_builtin(facts: &Facts, device: &HostDevice) -> bool {
    let modules = &facts.devices.driver_modules;
    let builtin = |driver: &String| !modules.contains_key(driver);
    !facts.modules.is_builtin("vfio-pci") && device.driver.as_ref().is_some_and(builtin)
}

fn used_elsewhere(facts: &Facts, plan: &Plan<'_>, driver: &str) -> bool {
    let mut others = facts
        .devices
        .all
        .iter()
        .filter(|device| !plan.bring.iter().any(|one| one.bdf == device.bdf));
    others.any(|device| device.driver.as_deref() == Some(driver))
}

/// Drivers that a file holds back, but that are loaded all the same.
fn held_back(facts: &Facts, drivers: &Drivers, mut finding: Finding) -> Finding {
    for (module, file) in &drivers.held_back {
        let rebuild = facts.boot.initramfs.command();
        let rebuild = rebuild.map_or_else(
            || "rebuild the initramfs".to_owned(),
            |command| format!("`{command}`"),
        );
        finding = finding.fix(format!(
            "{file} holds {module} back, and it is loaded: {rebuild}, in case the initramfs lacks that file, and \
             restart the host"
        ));
    }
    finding
}
