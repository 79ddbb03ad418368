//! The processor, /dev/kvm and the kernel: whether this host can run virtual machines.

use super::facts::Facts;
use super::modprobe::ModuleState;
use super::{Finding, Level};
use crate::inventory::device::NodeAccess;

/// The first processor in /proc/cpuinfo.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cpu {
    pub(super) vendor: Vendor,
    /// VT-x or AMD-V can be used. The kernel clears the flag if the firmware has disabled it.
    pub(super) virtualisation: bool,
    /// EPT or NPT: the processor translates guest addresses itself.
    pub(super) nested_paging: bool,
    /// This host is a virtual machine.
    pub(super) is_guest: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Vendor {
    Intel,
    /// AMD, or Hygon, whose processors are AMD's design.
    Amd,
    #[default]
    Other,
}

impl Cpu {
    pub(super) fn parse(cpuinfo: &str) -> Self {
        let field = |name: &str| {
            cpuinfo.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim())
            })
        };
        let flags = field("flags").unwrap_or_default();
        let has = |names: [&str; 2]| flags.split(' ').any(|flag| names.contains(&flag));
        let vmx_flags = field("vmx flags").unwrap_or_default();
        Self {
            vendor: match field("vendor_id") {
                Some("GenuineIntel") => Vendor::Intel,
                Some("AuthenticAMD" | "HygonGenuine") => Vendor::Amd,
                _ => Vendor::Other,
            },
            virtualisation: has(["vmx", "svm"]),
            nested_paging: has(["ept", "npt"]) || vmx_flags.split(' ').any(|flag| flag == "ept"),
            is_guest: has(["hypervisor", "hypervisor"]),
        }
    }

    fn technology(&self) -> &'static str {
        match self.vendor {
            Vendor::Intel => "Intel VT-x",
            Vendor::Amd => "AMD-V",
            Vendor::Other => "hardware virtualisation",
        }
    }

    fn kvm_module(&self) -> &'static str {
        match self.vendor {
            Vendor::Amd => "kvm_amd",
            _ => "kvm_intel",
        }
    }
}

/// Where to find the firmware's settings, in words.
pub(super) fn firmware(facts: &Facts) -> String {
    match &facts.machine {
        Some(machine) => format!("in the firmware's set-up (BIOS) of this {machine}"),
        None => "in the firmware's set-up (BIOS)".to_owned(),
    }
}

pub(super) fn virtualisation(facts: &Facts) -> Finding {
    let cpu = &facts.cpu;
    let finding = |level, reason: String| Finding::new("cpu", "CPU virtualisation", level, reason);
    if cpu.virtualisation && cpu.nested_paging {
        return finding(
            Level::Ok,
            format!("{} with nested paging", cpu.technology()),
        );
    }
    if cpu.virtualisation {
        return finding(
            Level::Warn,
            format!(
                "{} without nested paging (EPT, NPT): guests' memory is slow",
                cpu.technology()
            ),
        );
    }
    if facts.kvm == NodeAccess::Ready {
        return finding(
            Level::Warn,
            "/proc/cpuinfo shows neither vmx nor svm, but /dev/kvm exists: another kind of KVM, \
             which may not run every VM"
                .into(),
        );
    }
    let off = finding(
        Level::Fail,
        format!(
            "{} is off or absent: /proc/cpuinfo shows neither vmx nor svm",
            cpu.technology()
        ),
    );
    if cpu.is_guest {
        return off.fix(
            "this host is itself a virtual machine: on the outer host, allow nested virtualisation \
             (kvm_intel.nested=1 or kvm_amd.nested=1) and pass the processor through (QEMU: -cpu host)",
        );
    }
    let names = match cpu.vendor {
        Vendor::Intel => {
            "\"Intel Virtualization Technology\", \"Intel VT-x\", \"VMX\" or \"Virtualization Technology\""
        }
        Vendor::Amd => {
            "\"SVM Mode\", \"AMD-V\", \"AMD Virtualization\" or \"Secure Virtual Machine\""
        }
        Vendor::Other => return off.fix("gantry runs on x86-64 processors of Intel and AMD"),
    };
    off.fix(format!(
        "{} switch on {names}, then switch the machine off and on again: a warm restart may not do",
        firmware(facts)
    ))
}

pub(super) fn kvm(facts: &Facts) -> Finding {
    let finding = |level, reason: &str| Finding::new("kvm", "/dev/kvm", level, reason);
    let module = facts.cpu.kvm_module();
    if facts.config.leaves_out("CONFIG_KVM_IOAPIC") {
        let reason = format!("the KVM of kernel {} has no I/O APIC", facts.release);
        return finding(Level::Fail, &reason)
            .fix("boot a kernel with CONFIG_KVM_IOAPIC, such as a distribution's");
    }
    match (facts.kvm, facts.modules.state(module)) {
        (NodeAccess::Ready, _) => {
            let nested = match facts.nested {
                Some(true) => "; nested virtualisation is on",
                Some(false) => "; nested virtualisation is off",
                None => "",
            };
            finding(Level::Ok, &format!("this user may open it{nested}"))
        }
        (NodeAccess::Denied, _) => finding(Level::Fail, "this user may not open it").lines(
            "join the group that owns it, and log in again:",
            [format!(
                "usermod -aG \"$(stat -c %G /dev/kvm)\" {}",
                facts.user
            )],
        ),
        (NodeAccess::Missing, _) if !facts.cpu.virtualisation => {
            finding(Level::Fail, "missing, because CPU virtualisation is off")
        }
        (NodeAccess::Missing, ModuleState::There) => {
            finding(Level::Fail, "missing, though the kernel has KVM")
                .fix("in a container, make /dev/kvm visible: --device /dev/kvm")
                .fix(format!(
                    "otherwise the kernel says why: dmesg | grep -i {module}"
                ))
        }
        (NodeAccess::Missing, ModuleState::Missing) => {
            finding(Level::Fail, &format!("kernel {} has no KVM", facts.release)).fix(format!(
                "boot a kernel that has {module} (CONFIG_KVM_INTEL, CONFIG_KVM_AMD)"
            ))
        }
        (NodeAccess::Missing, ModuleState::Loadable | ModuleState::Unknown) => {
            finding(Level::Fail, &format!("missing: {module} is not loaded"))
                .lines("load it:", [format!("modprobe {module}")])
        }
    }
}

pub(super) fn kernel(facts: &Facts) -> Finding {
    let release = &facts.release;
    let finding = |level, reason: String| Finding::new("kernel", "Kernel", level, reason);
    match version(release) {
        Some(version) if version < (5, 10) => finding(
            Level::Fail,
            format!("{release}: gantry needs Linux 5.10 or later"),
        )
        .fix("boot a newer kernel of your distribution"),
        Some(version) if version < (6, 4) => finding(Level::Ok, release.clone()).fix(
            "Linux 6.4 and later add interrupt vectors to a device one by one, earlier ones by \
             switching all of them off for a moment",
        ),
        Some(_) => finding(Level::Ok, release.clone()),
        None => finding(
            Level::Warn,
            format!("the release \"{release}\" is no version of Linux"),
        ),
    }
}

/// `6.12.117+deb12-cloud-amd64` is 6.12.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|symbol: char| !symbol.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_told_apart() {
        let intel = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu vmx hypervisorx\n\
                     vmx flags\t: vnmi ept\n\nprocessor\t: 1\nvendor_id\t: AuthenticAMD\n";
        let expected = Cpu {
            vendor: Vendor::Intel,
            virtualisation: true,
            nested_paging: true,
            is_guest: false,
        };
        assert_eq!(Cpu::parse(intel), expected);
        let hygon = "vendor_id\t: HygonGenuine\nflags\t\t: fpu svm npt hypervisor";
        assert_eq!(
            (Cpu::parse(hygon).vendor, Cpu::parse(hygon).is_guest),
            (Vendor::Amd, true)
        );
        assert_eq!(Cpu::parse(""), Cpu::default());
    }

    #[test]
    fn releases_are_versions() {
        for (release, expected) in [
            ("6.12.117+deb12-cloud-amd64", Some((6, 12))),
            ("5.10", Some((5, 10))),
            ("6.1-rc1", Some((6, 1))),
            ("linux", None),
            ("", None),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
    }
}
