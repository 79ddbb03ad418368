//! The IOMMU: on, or off by the firmware or the kernel's command line; interrupt remapping; and its cost for the
//! host's own devices.

use std::path::Path;

use super::cpu::{Vendor, firmware};
use super::facts::{Facts, text};
use super::{Finding, Level};
use crate::base::host::HostPaths;
use crate::base::sysfs;

/// The IOMMUs that the kernel and the firmware show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Iommu {
    /// ACPI tables by their signatures; none if the directory is hidden, as in containers.
    pub(super) tables: Vec<String>,
    /// The units that the kernel uses: `/sys/class/iommu`.
    pub(super) units: Vec<Unit>,
    /// Default domain types of the IOMMU groups, such as `DMA-FQ` or `identity`, without the groups that VFIO
    /// creates on a host without IOMMU.
    pub(super) groups: Vec<String>,
    /// Whether interrupts are remapped; none if /proc/interrupts does not show it.
    pub(super) remapped: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) name: String,
    /// Extended capability register of an Intel unit (VT-d specification 11.4.3).
    pub(super) ecap: Option<u64>,
}

/// Bit 3 of the extended capabilities: interrupt remapping support.
const ECAP_IR: u64 = 1 << 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Intel,
    Amd,
    Other,
}

/// Why there are IOMMU groups, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    On,
    /// These words of the command line switch it off.
    Words(Vec<String>),
    /// The kernel was built without support for it.
    NotBuilt(&'static str),
    /// This kernel uses Intel's only if the command line asks for it.
    NotAsked,
    /// The firmware shows one, and the kernel does not use it although nothing forbids that.
    Refused,
    /// The firmware shows none.
    Firmware,
    /// This host is a virtual machine without one.
    Guest,
    /// The firmware's tables are not visible.
    Hidden,
}

impl Iommu {
    pub(super) fn read(paths: &HostPaths) -> Self {
        let tables = paths.sysfs.join("firmware/acpi/tables");
        let class = paths.sysfs.join("class/iommu");
        let groups = paths.sysfs.join("kernel/iommu_groups");
        let names = |dir: &Path| sysfs::entries(dir).unwrap_or_default();
        let unit = |name: String| {
            let ecap = text(&class.join(&name).join("intel-iommu/ecap"));
            Unit {
                ecap: u64::from_str_radix(&ecap, 16).ok(),
                name,
            }
        };
        let group = |name: &String| {
            let dir = groups.join(name);
            (text(&dir.join("name")) != "vfio-noiommu").then(|| text(&dir.join("type")))
        };
        let interrupts = sysfs::table(&paths.proc.join("interrupts")).unwrap_or_default();
        Self {
            tables: names(&tables),
            units: names(&class).into_iter().map(unit).collect(),
            groups: names(&groups).iter().filter_map(group).collect(),
            remapped: remapped(&interrupts),
        }
    }

    fn has_table(&self, signature: &str) -> bool {
        self.tables.iter().any(|table| table == signature)
    }

    fn kind(&self, cpu: Vendor) -> Kind {
        let unit = |prefix: &str| self.units.iter().any(|unit| unit.name.starts_with(prefix));
        if unit("dmar") || self.has_table("DMAR") {
            Kind::Intel
        } else if unit("ivhd") || self.has_table("IVRS") {
            Kind::Amd
        } else {
            match (self.units.is_empty(), cpu) {
                (true, Vendor::Intel) => Kind::Intel,
                (true, Vendor::Amd) => Kind::Amd,
                _ => Kind::Other,
            }
        }
    }
}

/// The kernel names the chips of remapped interrupts `IR-...`.
fn remapped(interrupts: &str) -> Option<bool> {
    let chips = |prefixes: &[&str]| {
        let mut words = interrupts.split_whitespace();
        words.any(|word| prefixes.iter().any(|prefix| word.starts_with(prefix)))
    };
    if chips(&["IR-IO-APIC", "IR-PCI-MSI", "IR-HPET"]) {
        Some(true)
    } else {
        chips(&["IO-APIC", "PCI-MSI"]).then_some(false)
    }
}

pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    let kind = facts.iommu.kind(facts.cpu.vendor);
    let state = state(facts, kind);
    let on = state == State::On;
    let mut findings = vec![translation(facts, kind, state)];
    if on {
        findings.push(remapping(facts, kind));
        findings.push(host_devices(facts));
    }
    findings.push(acs(facts));
    findings
}

fn state(facts: &Facts, kind: Kind) -> State {
    let iommu = &facts.iommu;
    if !iommu.groups.is_empty() {
        return State::On;
    }
    let (table, option) = match kind {
        Kind::Intel => (iommu.has_table("DMAR"), "CONFIG_INTEL_IOMMU"),
        Kind::Amd => (iommu.has_table("IVRS"), "CONFIG_AMD_IOMMU"),
        Kind::Other => (!iommu.units.is_empty(), "CONFIG_IOMMU_SUPPORT"),
    };
    if !table && facts.cpu.is_guest {
        return State::Guest;
    }
    if !table && !iommu.tables.is_empty() {
        return State::Firmware;
    }
    let off = off_words(facts, kind);
    if !off.is_empty() {
        State::Words(off)
    } else if facts.config.builds(option) == Some(false) {
        State::NotBuilt(option)
    } else if kind == Kind::Intel && facts.cmdline.switch("intel_iommu", "on", "off").is_none() {
        State::NotAsked
    } else if table {
        State::Refused
    } else {
        State::Hidden
    }
}

/// The words that keep the kernel from using the IOMMU.
fn off_words(facts: &Facts, kind: Kind) -> Vec<String> {
    let line = &facts.cmdline;
    let mut words: Vec<String> = line
        .with_option("iommu", "off")
        .map(str::to_owned)
        .collect();
    let own = match kind {
        Kind::Intel if line.switch("intel_iommu", "on", "off") == Some(false) => "intel_iommu",
        Kind::Amd => "amd_iommu",
        _ => return words,
    };
    words.extend(line.with_option(own, "off").map(str::to_owned));
    words
}

fn translation(facts: &Facts, kind: Kind, state: State) -> Finding {
    let (name, table) = match kind {
        Kind::Intel => ("Intel VT-d", "DMAR"),
        Kind::Amd => ("AMD-Vi", "IVRS"),
        Kind::Other => ("the IOMMU", "DMAR or IVRS"),
    };
    let finding = |level, reason: String| Finding::new("iommu", "IOMMU", level, reason);
    let groups = facts.iommu.groups.len();
    match state {
        State::On => {
            let on = finding(Level::Ok, format!("{name} is on, with {groups} IOMMU groups"));
            if kind == Kind::Amd && facts.cmdline.with_option("amd_iommu", "on").next().is_some() {
                return on.fix("amd_iommu=on does nothing: AMD-Vi is on by default");
            }
            on
        }
        State::Words(words) => finding(
            Level::Fail,
            format!("{name} is present, but {} on the kernel's command line switches it off", words.join(" ")),
        )
        .fix("remove that, as shown below")
        .add(asked(kind))
        .remove(words),
        State::NotAsked if facts.iommu.has_table("DMAR") => finding(
            Level::Fail,
            "the firmware shows Intel VT-d (ACPI DMAR), but this kernel uses it only if its command line says so".into(),
        )
        .fix("add intel_iommu=on, as shown below")
        .add(asked(kind)),
        State::NotBuilt(option) => finding(
            Level::Fail,
            format!("kernel {} was built without {option}", facts.release),
        )
        .fix(format!("boot a kernel with {option}=y, such as a distribution's")),
        State::Refused => finding(
            Level::Fail,
            format!("the firmware shows {name} (ACPI {table}) and nothing forbids it, yet the kernel did not switch it on"),
        )
        .lines("the kernel says why; a newer firmware often helps:", ["dmesg | grep -i -e DMAR -e IOMMU -e AMD-Vi"]),
        State::Firmware => in_firmware(facts, kind, finding(
            Level::Fail,
            format!("the firmware shows no IOMMU (no ACPI {table} table): it is switched off there, or this hardware has none"),
        ))
        .add(asked(kind)),
        State::Guest => finding(
            Level::Fail,
            "this host is a virtual machine without an IOMMU of its own".into(),
        )
        .fix("on the outer host, give this virtual machine a virtual IOMMU; QEMU: -machine q35,kernel-irqchip=split \
              -device intel-iommu,intremap=on,caching-mode=on")
        .add(asked_in_guest(facts)),
        State::NotAsked | State::Hidden => in_firmware(facts, kind, finding(
            Level::Fail,
            format!("there are no IOMMU groups, and the firmware's tables are not visible (in a container?): the reason why {name} is off is unknown"),
        ))
        .add(asked(kind)),
    }
}

/// The word that switches the IOMMU on; AMD's needs none.
fn asked(kind: Kind) -> Option<&'static str> {
    (kind == Kind::Intel).then_some("intel_iommu=on")
}

/// QEMU's guests get a virtual IOMMU of Intel's kind, whatever their processor.
fn asked_in_guest(facts: &Facts) -> Option<&'static str> {
    (facts.cpu.vendor != Vendor::Other).then_some("intel_iommu=on")
}

fn in_firmware(facts: &Facts, kind: Kind, finding: Finding) -> Finding {
    let names = match kind {
        Kind::Intel => {
            "\"Intel VT for Directed I/O (VT-d)\", also called \"VT-d\", \"Intel VT-d\" or, on machines with one \
             switch for all, \"Virtualization Technology\""
        }
        Kind::Amd => {
            "\"IOMMU\", also called \"AMD-Vi\", \"AMD I/O Virtualization\" or \"IOMMU Support\"; choose Enabled, not Auto"
        }
        Kind::Other => "the IOMMU (\"VT-d\", \"AMD-Vi\", \"SMMU\")",
    };
    finding.fix(format!("{} switch on {names}", firmware(facts)))
}

fn remapping(facts: &Facts, kind: Kind) -> Finding {
    let finding = |level, reason: &str| {
        Finding::new("interrupt-remapping", "Interrupt remapping", level, reason)
    };
    match facts.iommu.remapped {
        Some(true) => {
            return finding(Level::Ok, "on: a device can raise only its own interrupts");
        }
        None if kind == Kind::Other => return finding(Level::Ok, "not told by this kind of IOMMU"),
        None => {
            return finding(
                Level::Warn,
                "/proc/interrupts does not tell whether it is on",
            );
        }
        Some(false) => {}
    }
    let line = &facts.cmdline;
    let mut words: Vec<String> = line
        .with_option("intremap", "off")
        .map(str::to_owned)
        .collect();
    words.extend(line.named("nointremap").map(|(word, _)| word.to_owned()));
    if !words.is_empty() {
        let reason = format!(
            "{} on the kernel's command line switches it off, and VFIO then passes no device through",
            words.join(" ")
        );
        return finding(Level::Fail, &reason)
            .fix("remove that, as shown below")
            .remove(words);
    }
    let incapable = |unit: &&Unit| unit.ecap.is_some_and(|ecap| ecap & ECAP_IR == 0);
    if let Some(unit) = facts.iommu.units.iter().find(incapable) {
        let reason = format!(
            "{} cannot remap interrupts: VFIO passes no device through, since a device could raise any interrupt of the host",
            unit.name
        );
        return finding(Level::Fail, &reason).fix(if facts.cpu.is_guest {
            "on the outer host, give this virtual machine an IOMMU that supports it (QEMU: -device intel-iommu,intremap=on)"
        } else {
            "use other hardware; VFIO's switch for unsafe interrupts would let a guest take over the host"
        });
    }
    finding(Level::Fail, "the IOMMU supports it, but it is off: VFIO passes no device through")
        .fix(format!(
            "{} switch on \"Interrupt Remapping\" or \"x2APIC\", and off \"x2APIC opt-out\", where it has these",
            firmware(facts)
        ))
        .lines("the kernel says why:", ["dmesg | grep -i -e remap -e x2apic"])
}

/// The cost of translation for the host's own devices. It does not affect VMs.
fn host_devices(facts: &Facts) -> Finding {
    let finding =
        |reason: &str| Finding::new("host-devices", "Host's own devices", Level::Ok, reason);
    // Single groups are direct on any host: some devices need it.
    let direct = facts.iommu.groups.iter().filter(|kind| *kind == "identity");
    if direct.count() * 2 > facts.iommu.groups.len() {
        return finding("bypass the IOMMU (iommu=pt)");
    }
    finding("use the IOMMU, which costs some performance").fix(
        "iommu=pt on the kernel's command line lets the host's own network cards and disks bypass it; devices of \
         VMs are translated in any case",
    )
}

/// Some kernels have a patch that makes IOMMU groups smaller than the hardware isolates.
fn acs(facts: &Facts) -> Finding {
    let finding = |level, reason: &str| Finding::new("acs-override", "ACS override", level, reason);
    let words: Vec<String> = facts
        .cmdline
        .named("pcie_acs_override")
        .map(|(word, _)| word.to_owned())
        .collect();
    if words.is_empty() {
        return finding(
            Level::Ok,
            "not used: IOMMU groups match the hardware's isolation",
        );
    }
    let reason = format!(
        "{} makes IOMMU groups smaller than the hardware's isolation: devices of different VMs may reach one another",
        words.join(" ")
    );
    finding(Level::Warn, &reason)
        .fix("remove that, as shown below, and give whole IOMMU groups away; or put the card into a slot of its own root port")
        .remove(words)
}

#[cfg(test)]
mod tests {
    use super::remapped;

    #[test]
    fn the_names_of_interrupt_chips_tell_remapping() {
        for (interrupts, expected) in [
            (
                "  0: 147 0 IR-IO-APIC 2-edge timer\n 24: 0 0 DMAR-MSI 0-edge dmar0",
                Some(true),
            ),
            (
                " 31: 12 0 IR-PCI-MSIX-0000:02:00.0 0-edge nvme0q0",
                Some(true),
            ),
            ("  0: 147 0 IO-APIC 2-edge timer", Some(false)),
            (" 30: 1 PCI-MSI 1048576-edge eth0", Some(false)),
            ("NMI: 0 Non-maskable interrupts", None),
            ("", None),
        ] {
            assert_eq!(remapped(interrupts), expected, "{interrupts}");
        }
    }
}
