//! VFIO's modules and back ends, and unsafe options.

use super::facts::Facts;
use super::modprobe::ModuleState;
use super::{Finding, Level};
use crate::inventory::device::NodeAccess;

/// The modules that gantry uses; they load `vfio` and the core of vfio-pci. iommufd can replace the second.
const NEEDED: [&str; 2] = ["vfio-pci", "vfio_iommu_type1"];

pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    vec![
        modules(facts),
        back_ends(facts),
        no_iommu(facts),
        unsafe_interrupts(facts),
    ]
}

fn modules(facts: &Facts) -> Finding {
    let finding = |level, reason: String| Finding::new("modules", "VFIO modules", level, reason);
    let needed = match facts.iommufd {
        NodeAccess::Ready => &NEEDED[..1],
        NodeAccess::Missing | NodeAccess::Denied => &NEEDED[..],
    };
    let in_state = |wanted: &[ModuleState]| -> Vec<&str> {
        let found = needed.iter().copied();
        found
            .filter(|name| wanted.contains(&facts.modules.state(name)))
            .collect()
    };
    let missing = in_state(&[ModuleState::Missing]);
    if !missing.is_empty() {
        let reason = format!(
            "kernel {} has no {}",
            facts.release,
            missing.join(" and no ")
        );
        return finding(Level::Fail, reason)
            .fix("boot a kernel with CONFIG_VFIO_PCI and CONFIG_VFIO_IOMMU_TYPE1, such as a distribution's");
    }
    let absent = in_state(&[ModuleState::Loadable, ModuleState::Unknown]);
    if !absent.is_empty() {
        return finding(Level::Fail, format!("{} not loaded", absent.join(" and ")))
            .lines("load now:", [format!("modprobe -a {}", absent.join(" "))])
            .lines(
                "at every boot, lines of /etc/modules-load.d/gantry.conf:",
                absent,
            );
    }
    let verb = if needed.len() > 1 { "are" } else { "is" };
    finding(Level::Ok, format!("{} {verb} loaded", needed.join(" and ")))
}

/// The back ends that VMs can use. A VM whose file names none uses the container.
fn back_ends(facts: &Facts) -> Finding {
    use NodeAccess::{Denied, Missing, Ready};
    let finding = |level, reason: &str| Finding::new("back-ends", "VFIO back ends", level, reason);
    let give = [format!("chown {} /dev/iommu", facts.user)];
    match (facts.vfio, facts.iommufd) {
        (Ready, Ready) => finding(Level::Ok, "VFIO container and iommufd"),
        (Ready, Missing) => finding(Level::Ok, "VFIO container; no iommufd with cdevs"),
        (Ready, Denied) => finding(
            Level::Ok,
            "VFIO container; there is iommufd, which this user may not open",
        )
        .lines("to use it:", give),
        (Denied | Missing, Ready) => finding(Level::Ok, "iommufd"),
        (Denied, _) => finding(
            Level::Fail,
            "this user may not open /dev/vfio/vfio, which by itself gives no device",
        )
        .lines(
            "open it to all, as udev does:",
            ["chmod 0666 /dev/vfio/vfio"],
        ),
        (Missing, Denied) => {
            let reason = "no VFIO container, and this user may not open /dev/iommu";
            finding(Level::Fail, reason).lines("give the user iommufd:", give)
        }
        (Missing, Missing) => {
            let reason =
                "no VFIO container (/dev/vfio/vfio) and no iommufd with cdevs (/dev/iommu)";
            let finding = finding(Level::Fail, reason);
            match facts.modules.state("vfio_iommu_type1") {
                ModuleState::There => finding.fix(
                    "in a container, make the one or the other visible: --device /dev/vfio or --device /dev/iommu",
                ),
                _ => finding.fix("load vfio_iommu_type1"),
            }
        }
    }
}

fn no_iommu(facts: &Facts) -> Finding {
    let finding = |level, reason: String| Finding::new("no-iommu", "No-IOMMU mode", level, reason);
    switched_off(
        facts,
        "vfio",
        "enable_unsafe_noiommu_mode",
        finding(Level::Ok, "off".into()),
        finding(
            Level::Fail,
            "on: a device that is passed through without an IOMMU can read and write all of this host's memory".into(),
        ),
    )
}

fn unsafe_interrupts(facts: &Facts) -> Finding {
    let finding =
        |level, reason: &str| Finding::new("unsafe-interrupts", "Unsafe interrupts", level, reason);
    let (level, reason) = match facts.iommu.remapped {
        Some(true) => (
            Level::Warn,
            "allowed, though this IOMMU remaps interrupts and the setting is not needed",
        ),
        _ => (
            Level::Fail,
            "allowed: a VM with a device may raise any interrupt of this host, and so take it over",
        ),
    };
    switched_off(
        facts,
        "vfio_iommu_type1",
        "allow_unsafe_interrupts",
        finding(Level::Ok, "not allowed"),
        finding(level, reason),
    )
}

/// Checks an option that must be off.
fn switched_off(facts: &Facts, module: &str, name: &str, off: Finding, on: Finding) -> Finding {
    let parameters = facts.unsafe_parameters.iter();
    let parameters: Vec<_> = parameters.filter(|path| path.ends_with(name)).collect();
    let words = facts.cmdline.switched_on(&format!("{module}.{name}"));
    let options = facts.modprobe.unsafe_options.iter();
    let files: Vec<&str> = options
        .filter(|(_, option)| option.starts_with(name))
        .map(|(file, _)| file.as_str())
        .collect();
    if parameters.is_empty() && words.is_empty() && files.is_empty() {
        return off;
    }
    let mut on = on;
    if !parameters.is_empty() {
        let lines = parameters
            .into_iter()
            .map(|path| format!("echo N > {}", path.display()));
        on = on.lines("switch it off now:", lines);
    }
    for file in files {
        on = on.fix(format!("remove {name} from {file}"));
    }
    if !words.is_empty() {
        on = on.fix(format!("remove {}, as shown below", words.join(" ")));
    }
    on.remove(words)
}
