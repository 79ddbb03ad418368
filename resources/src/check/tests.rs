mod boot;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::facts::Facts;
use super::{Level, Report, check, judge, note_reboot};
use crate::base::host::HostPaths;
use crate::fixture::{Fake, FakeHost, bdf, modalias};
use crate::holding::maintenance::begin_maintenance;
use crate::inventory::device::NodeAccess;

/// Where the recorded hosts are; `README.md` there tells the format.
fn hosts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts")
}

struct Host(TempDir);

impl Host {
    fn unpack(name: &str) -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        host.play(name);
        host
    }

    fn paths(&self) -> HostPaths {
        HostPaths::under(self.0.path())
    }

    fn facts(&self) -> Facts {
        Facts::read(&self.paths(), &[]).unwrap()
    }

    fn play(&self, name: &str) {
        let text = fs::read_to_string(hosts().join(format!("{name}.host"))).unwrap();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some(other) = line.strip_prefix("like ") {
                self.play(other);
            } else if let Some(path) = line.strip_prefix("- ") {
                self.remove(path);
            } else if let Some(device) = line.strip_prefix("pci ") {
                self.pci(device);
            } else if let Some((path, target)) = line.split_once(" -> ") {
                self.link(path, Path::new(target));
            } else {
                let (path, text) = line.split_once(": ").unwrap();
                self.line(path, &text.replace("\\t", "\t"));
            }
        }
    }

    fn path(&self, path: &str) -> PathBuf {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn line(&self, path: &str, text: &str) {
        let path = self.path(path);
        let before = fs::read_to_string(&path).unwrap_or_default();
        fs::write(path, before + text + "\n").unwrap();
    }

    fn link(&self, path: &str, target: &Path) {
        let path = self.path(path);
        let _ = fs::remove_file(&path);
        symlink(target, path).unwrap();
    }

    fn remove(&self, path: &str) {
        let path = self.0.path().join(path);
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }

    /// `0000:0b:00.0 10de:1c30 030000 group=32 driver=nouveau`
    fn pci(&self, device: &str) {
        let mut words = device.split(' ');
        let mut next = || words.next().unwrap();
        let (address, id, class) = (next(), next(), next());
        let (vendor, device) = id.split_once(':').unwrap();
        let dir = format!("sys/devices/pci0000:00/{address}");
        let link = format!("sys/bus/pci/devices/{address}");
        self.link(&link, &Path::new("../../../../").join(&dir));
        for attribute in ["driver", "iommu_group", "modalias", "reset_method"] {
            let _ = fs::remove_file(self.path(&format!("{dir}/{attribute}")));
        }
        let number = |text| u32::from_str_radix(text, 16).unwrap();
        let id = (number(vendor) as u16, number(device) as u16);
        let said = modalias(id, (0, 0), number(class));
        self.line(&format!("{dir}/modalias"), &said);
        if !words.clone().any(|word| word.starts_with("reset_method=")) {
            self.line(&format!("{dir}/reset_method"), "flr");
        }
        for (key, value) in words.map(|word| word.split_once('=').unwrap()) {
            match key {
                "driver" => {
                    let driver = format!("sys/bus/pci/drivers/{value}");
                    fs::create_dir_all(self.path(&driver)).unwrap();
                    let module = format!("sys/module/{}", value.replace('-', "_"));
                    fs::write(self.path(&format!("{module}/initstate")), "live\n").unwrap();
                    self.link(&format!("{driver}/module"), &self.path(&module));
                    self.link(&format!("{dir}/driver"), &self.path(&driver));
                }
                "group" => {
                    let group = format!("sys/kernel/iommu_groups/{value}");
                    if !self.path(&format!("{group}/type")).exists() {
                        self.line(&format!("{group}/type"), "DMA-FQ");
                    }
                    self.link(&format!("{dir}/iommu_group"), &self.path(&group));
                    self.line(&format!("dev/vfio/{value}"), "");
                }
                _ => self.line(&format!("{dir}/{key}"), value),
            }
        }
    }
}

/// All of a report as text, with the paths that the host itself would have.
fn told_by(host: &Host, report: &Report) -> String {
    told(report).replace(&format!("{}/", host.0.path().display()), "/")
}

/// All of a report as text.
fn told(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let level = format!("{:?}", finding.level).to_lowercase();
        text += &format!("{level:4}  {}: {}\n", finding.title, finding.reason);
        for advice in &finding.fix {
            text += &format!("        - {}\n", advice.text);
            for line in &advice.lines {
                text += &format!("            {line}\n");
            }
        }
    }
    if let Some(change) = &report.command_line {
        text += &format!(
            "\nKernel command line\n  add     {}\n  remove  {}\n  {}\n",
            change.add.join(" "),
            change.remove.join(" "),
            change.how.text
        );
        for line in &change.how.lines {
            text += &format!("      {line}\n");
        }
    }
    text
}

/// The level of one check, and all of its words.
fn answer(report: &Report, check: &str) -> (Level, String) {
    let findings: Vec<_> = report
        .findings
        .iter()
        .filter(|finding| finding.check == check)
        .cloned()
        .collect();
    let level = findings.iter().map(|finding| finding.level).max().unwrap();
    let text = told(&Report {
        level,
        findings,
        command_line: None,
    });
    (level, text)
}

#[test]
fn recorded_hosts_are_judged_as_expected() {
    let mut names = Vec::new();
    for entry in fs::read_dir(hosts()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        names.extend(name.strip_suffix(".host").map(str::to_owned));
    }
    assert!(names.len() >= 14, "{names:?}");
    let mut wrong = Vec::new();
    for name in names {
        let host = Host::unpack(&name);
        let told = told_by(&host, &check(&host.paths(), &[]).unwrap());
        let path = hosts().join(format!("{name}.expected"));
        if std::env::var_os("BLESS").is_some() {
            fs::write(&path, &told).unwrap();
        }
        if fs::read_to_string(&path).unwrap_or_default() != told {
            wrong.push(format!("{name}:\n{told}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_unsafe_is_never_proposed() {
    for entry in fs::read_dir(hosts()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Some(name) = name.strip_suffix(".host") else {
            continue;
        };
        let report = check(&Host::unpack(name).paths(), &[]).unwrap();
        let mut lines: Vec<String> = Vec::new();
        if let Some(change) = &report.command_line {
            lines.extend(change.add.clone());
            lines.extend(change.how.lines.clone());
        }
        for finding in &report.findings {
            lines.extend(finding.fix.iter().flat_map(|advice| advice.lines.clone()));
        }
        let undoes =
            |line: &&String| line.starts_with("echo N > ") || line.contains("--remove-args");
        for line in lines.iter().filter(|line| !undoes(line)) {
            for word in [
                "unsafe",
                "acs_override",
                "noiommu",
                "mitigations",
                "ignore_msrs",
            ] {
                assert!(!line.contains(word), "{name}: {line}");
            }
        }
    }
}

/// Fails where a fix speaks of what is shown above or below, and nothing is.
fn nothing_is_missing(report: &Report) {
    for finding in &report.findings {
        for (index, advice) in finding.fix.iter().enumerate() {
            let mut before = finding.fix[..index].iter();
            let above = before.any(|advice| !advice.lines.is_empty());
            let said = &advice.text;
            assert!(above || !said.contains("above"), "nothing is above: {said}");
            let below = report.command_line.is_some();
            assert!(below || !said.contains("below"), "nothing is below: {said}");
        }
    }
}

#[test]
fn what_is_shown_above_or_below_is_there() {
    for entry in fs::read_dir(hosts()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if let Some(name) = name.strip_suffix(".host") {
            nothing_is_missing(&check(&Host::unpack(name).paths(), &[]).unwrap());
        }
    }
    // Twins, and no IOMMU groups by which they could be detached.
    let mut facts = Host::unpack("acs-override").facts();
    facts
        .devices
        .all
        .iter_mut()
        .for_each(|device| device.iommu_group = None);
    let report = judge(&facts);
    assert!(
        answer(&report, "binding")
            .1
            .contains("cannot tell these devices from")
    );
    nothing_is_missing(&report);
    // The command line asks for huge pages, and something has switched them off since.
    let mut facts = Host::unpack("amd-ok").facts();
    facts.memory.transparent = Some("never".to_owned());
    facts.cmdline = super::cmdline::CommandLine::parse("transparent_hugepage=madvise");
    let report = judge(&facts);
    assert!(answer(&report, "huge-pages").1.contains("since the boot"));
    nothing_is_missing(&report);
}

#[test]
fn a_driver_that_is_held_back_already_is_not_to_wait() {
    let host = Host::unpack("command-line-off");
    host.line("proc/self/root/etc/modprobe.d/no.conf", "blacklist nouv*");
    let (_, text) = answer(&check(&host.paths(), &[]).unwrap(), "binding");
    assert!(!text.contains("softdep nouveau"), "{text}");
    assert!(
        text.contains("/etc/modprobe.d/no.conf holds nouveau back"),
        "{text}"
    );
}

#[test]
fn devices_that_need_an_entrys_leave_are_listed() {
    let host = FakeHost::new(&[
        Fake::nvme("00:15.0", 1)
            .without_interrupts()
            .with("reset_method", ""),
        Fake::nvme("01:00.0", 2),
    ]);
    let report = check(&host.paths, &[bdf("00:15.0"), bdf("01:00.0")]).unwrap();
    let (level, text) = answer(&report, "interrupts");
    assert_eq!(level, Level::Warn);
    assert!(text.contains("0000:00:15.0"), "{text}");
    assert!(text.contains("\"interrupts\": \"none\""), "{text}");
    let (level, text) = answer(&report, "resets");
    assert_eq!(level, Level::Warn);
    assert!(
        text.contains("0000:00:15.0") && !text.contains("01:00.0"),
        "{text}"
    );
    assert!(text.contains("\"allow_no_reset\": true"), "{text}");
    let report = check(&host.paths, &[bdf("01:00.0")]).unwrap();
    let names: Vec<&str> = report.findings.iter().map(|one| one.check).collect();
    assert!(!names.contains(&"interrupts") && !names.contains(&"resets"));
}

#[test]
fn a_device_is_looked_at_by_name() {
    let host = Host::unpack("lab");
    let report = check(&host.paths(), &[bdf("0000:01:00.0")]).unwrap();
    let (level, text) = answer(&report, "binding");
    assert_eq!(level, Level::Warn);
    assert!(text.contains("gantry device detach 0000:01:00.0"), "{text}");
    assert!(
        text.contains("gantry device persist 0000:01:00.0 --output "),
        "{text}"
    );
    for finding in &report.findings {
        for advice in &finding.fix {
            let empty = advice.text.ends_with(':') && advice.lines.is_empty();
            assert!(!empty, "nothing follows: {}", advice.text);
        }
    }
    assert_eq!(report.command_line.unwrap().add, ["vfio-pci.ids=1b36:0010"]);
    let error = check(&host.paths(), &[bdf("0000:09:00.0")]).unwrap_err();
    assert!(error.to_string().contains("0000:09:00.0"), "{error}");
}

#[test]
fn ids_that_the_hosts_own_device_has_as_well_are_a_danger() {
    let mut facts = Host::unpack("acs-override").facts();
    facts.modprobe.vfio_ids.push("144d:a80a".into());
    let (level, text) = answer(&judge(&facts), "binding");
    assert_eq!(level, Level::Warn);
    assert!(text.contains("take these ids away from vfio-pci"), "{text}");
    assert!(text.contains("0000:42:00.0 (nvme)"), "{text}");
}

#[test]
fn devices_that_are_bound_on_demand_are_in_their_place() {
    let host = Host::unpack("vfio-late");
    host.remove("etc/groups.json");
    host.line(
        "etc/groups.json",
        r#"{"groups": [{"name": "gpu", "bind": "demand", "rules": [{"vendor": "10de"}]}]}"#,
    );
    let (level, text) = answer(&check(&host.paths(), &[]).unwrap(), "binding");
    assert_eq!(level, Level::Ok);
    assert!(
        text.contains("2 to be bound when a VM takes them"),
        "{text}"
    );
    let named = check(&host.paths(), &[bdf("0000:0b:00.0")]).unwrap();
    assert_eq!(answer(&named, "binding").0, Level::Warn);
}

/// Two disks of one make with the host, in groups as told.
fn twins(groups: &str) -> Host {
    let host = Host::unpack("lab");
    host.pci("0000:02:00.0 1b36:0010 010802 group=11 driver=nvme");
    host.line("etc/groups.json", groups);
    host
}

#[test]
fn ids_are_for_what_is_vfio_pcis_at_all_times() {
    let host = twins(
        r#"{"groups": [{"name": "a", "rules": [{"slot": "01:00.0"}]},
            {"name": "b", "bind": "demand", "rules": [{"slot": "02:00.0"}]}]}"#,
    );
    for driver in ["nvme", "vfio-pci"] {
        // A VM has it for now, or not.
        host.pci(&format!(
            "0000:02:00.0 1b36:0010 010802 group=11 driver={driver}"
        ));
        let report = check(&host.paths(), &[]).unwrap();
        let (_, text) = answer(&report, "binding");
        assert!(
            text.contains("gantry device detach 0000:01:00.0\n"),
            "{text}"
        );
        let said = format!("cannot tell these devices from 0000:02:00.0 ({driver})");
        assert!(text.contains(&said), "{text}");
        assert!(!text.contains("vfio-pci.ids="), "{text}");
        assert_eq!(report.command_line, None);
    }
    let host = twins(r#"{"groups": [{"name": "a", "rules": [{"class": "0108"}]}]}"#);
    let report = check(&host.paths(), &[]).unwrap();
    assert_eq!(report.command_line.unwrap().add, ["vfio-pci.ids=1b36:0010"]);
    // The host has one of them mounted.
    let mut facts = host.facts();
    facts.devices.uses = Ok(vec![crate::inventory::guard::Guarded {
        bdf: bdf("02:00.0"),
        host_use: crate::inventory::guard::HostUse::Claimed {
            block: "nvme1n1".into(),
        },
    }]);
    let (_, text) = answer(&judge(&facts), "binding");
    assert!(text.contains("from 0000:02:00.0 (nvme)"), "{text}");
}

#[test]
fn no_driver_is_held_back_that_devices_on_demand_need() {
    let host = Host::unpack("vfio-later");
    let held_back = |host: &Host| {
        let report = check(&host.paths(), &[]).unwrap();
        let mut words = report
            .command_line
            .into_iter()
            .flat_map(|change| change.add);
        words.any(|word| word.starts_with("modprobe.blacklist=") && word.contains("nouveau"))
    };
    assert!(held_back(&host));
    host.pci("0000:0c:00.0 10de:2204 030000 group=40 driver=nouveau");
    host.remove("etc/groups.json");
    host.line(
        "etc/groups.json",
        r#"{"groups": [{"name": "rest", "bind": "demand", "rules": [{"slot": "0c:00.0"}]},
            {"name": "gpu", "rules": [{"vendor": "10de"}]}]}"#,
    );
    assert!(!held_back(&host));
}

#[test]
fn a_card_stays_with_its_driver_for_its_functions() {
    let host = twins(
        r#"{"groups": [{"name": "a", "rules": [{"class": "0108"}]},
            {"name": "vfs", "type": "sriov-nic", "sriov": {"pf": "02:00.0", "count": 2}}]}"#,
    );
    let report = check(&host.paths(), &[]).unwrap();
    let (_, text) = answer(&report, "binding");
    assert!(
        text.contains("gantry device detach 0000:01:00.0\n"),
        "{text}"
    );
    assert!(text.contains("from 0000:02:00.0 (nvme)"), "{text}");
    assert_eq!(report.command_line, None);
}

#[test]
fn what_a_built_in_driver_has_is_for_the_boot_to_detach() {
    let host = twins(r#"{"groups": [{"name": "a", "rules": [{"class": "0108"}]}]}"#);
    host.remove("sys/module/nvme/initstate");
    let report = check(&host.paths(), &[]).unwrap();
    let (_, text) = answer(&report, "binding");
    assert!(
        text.contains("nvme is part of the kernel's image"),
        "{text}"
    );
    assert!(!text.contains("softdep"), "{text}");
    assert_eq!(report.command_line, None);
}

#[test]
fn maintenance_is_told() {
    let host = Host::unpack("lab");
    let told = |report: &Report| told(report).contains("Maintenance");
    assert!(!told(&check(&host.paths(), &[]).unwrap()));
    begin_maintenance(&host.paths(), Some("new disks")).unwrap();
    let report = check(&host.paths(), &[]).unwrap();
    let (level, text) = answer(&report, "maintenance");
    assert_eq!(level, Level::Fail);
    assert!(text.contains("no VM starts: new disks"), "{text}");
}

#[test]
fn devices_of_a_device_spec_are_looked_at() {
    let host = Host::unpack("vfio-late");
    host.remove("etc/groups.json");
    host.line(
        "etc/groups.json",
        r#"{"device_spec": {"vendor_id": "10de", "product_id": "1c30"}}"#,
    );
    let (_, text) = answer(&check(&host.paths(), &[]).unwrap(), "binding");
    assert!(text.contains("0000:0b:00.0 (nouveau)"), "{text}");
}

#[test]
fn one_back_end_of_vfio_is_enough() {
    use NodeAccess::{Denied, Missing, Ready};
    let mut facts = Host::unpack("memlock-low").facts();
    let mut told = |container, iommufd| {
        (facts.vfio, facts.iommufd) = (container, iommufd);
        answer(&judge(&facts), "back-ends")
    };
    for (container, iommufd, level, words) in [
        (Ready, Ready, Level::Ok, "VFIO container and iommufd"),
        (Missing, Ready, Level::Ok, "iommufd"),
        (Ready, Denied, Level::Ok, "chown ada /dev/iommu"),
        (Denied, Missing, Level::Fail, "chmod 0666 /dev/vfio/vfio"),
        (Missing, Denied, Level::Fail, "chown ada /dev/iommu"),
        (Missing, Missing, Level::Fail, "--device /dev/iommu"),
    ] {
        let (found, text) = told(container, iommufd);
        assert_eq!(found, level, "{text}");
        assert!(text.contains(words), "{text}");
    }
    // What the container needs is not missed where there is iommufd.
    let mut facts = Host::unpack("no-iommu").facts();
    facts.iommufd = Ready;
    let (_, text) = answer(&judge(&facts), "modules");
    assert!(text.contains("modprobe -a vfio-pci\n"), "{text}");
}

#[test]
fn kvm_that_may_not_be_opened_is_told_from_kvm_that_is_not_there() {
    let mut facts = Host::unpack("memlock-low").facts();
    facts.kvm = NodeAccess::Denied;
    let (level, text) = answer(&judge(&facts), "kvm");
    assert_eq!(level, Level::Fail);
    assert!(
        text.contains("usermod -aG \"$(stat -c %G /dev/kvm)\" ada"),
        "{text}"
    );
    facts.kvm = NodeAccess::Missing;
    let (_, text) = answer(&judge(&facts), "kvm");
    assert!(text.contains("make /dev/kvm visible"), "{text}");
}

/// Linux 6.17 made the option one that can be left out.
#[test]
fn kvm_without_an_interrupt_controller_fails() {
    for (config, expected) in [
        (
            "CONFIG_KVM=m\n# CONFIG_KVM_IOAPIC is not set\n",
            Level::Fail,
        ),
        ("CONFIG_KVM=m\nCONFIG_KVM_IOAPIC=y\n", Level::Ok),
        ("CONFIG_KVM=m\n", Level::Ok),
    ] {
        let mut facts = Host::unpack("intel-ok").facts();
        facts.config.0 = Some(config.into());
        let (level, text) = answer(&judge(&facts), "kvm");
        assert_eq!(level, expected, "{text}");
        assert_eq!(text.contains("CONFIG_KVM_IOAPIC"), level == Level::Fail);
    }
}

#[test]
fn virtualisation_that_is_off_is_named_as_the_vendor_does() {
    for (host, name) in [
        ("intel-ok", "Intel VT-x"),
        ("amd-ok", "SVM Mode"),
        ("lab", "nested"),
    ] {
        let mut facts = Host::unpack(host).facts();
        facts.cpu.virtualisation = false;
        assert_eq!(answer(&judge(&facts), "cpu").0, Level::Warn);
        facts.kvm = NodeAccess::Missing;
        let (level, text) = answer(&judge(&facts), "cpu");
        assert_eq!(level, Level::Fail);
        assert!(text.contains(name), "{text}");
    }
}

#[test]
fn an_iommu_that_is_off_in_the_firmware_is_named_as_the_vendor_does() {
    let mut facts = Host::unpack("amd-ok").facts();
    facts.iommu.groups.clear();
    facts.iommu.units.clear();
    facts.iommu.tables.retain(|table| table != "IVRS");
    let (level, text) = answer(&judge(&facts), "iommu");
    assert_eq!(level, Level::Fail);
    assert!(text.contains("this Supermicro AS-1114S-WN10RT"), "{text}");
    assert!(text.contains("AMD-Vi") && !text.contains("VT-d"), "{text}");
}

#[test]
fn an_iommu_that_stays_off_for_no_visible_reason_is_a_case_for_the_kernels_log() {
    let mut facts = Host::unpack("reboot-waiting").facts();
    facts.cmdline = super::cmdline::CommandLine::parse("intel_iommu=on");
    let (_, text) = answer(&judge(&facts), "iommu");
    assert!(text.contains("dmesg"), "{text}");
    let config = "CONFIG_AMD_IOMMU=y\n# CONFIG_INTEL_IOMMU is not set\n";
    facts.config.0 = Some(config.into());
    let (_, text) = answer(&judge(&facts), "iommu");
    assert!(text.contains("without CONFIG_INTEL_IOMMU"), "{text}");
}

#[test]
fn an_iommu_that_cannot_remap_interrupts_fails() {
    let mut facts = Host::unpack("lab").facts();
    facts.iommu.remapped = Some(false);
    let (level, text) = answer(&judge(&facts), "interrupt-remapping");
    assert_eq!(level, Level::Fail);
    assert!(text.contains("dmesg"), "{text}");
    facts.iommu.units[0].ecap = Some(0xf00f42);
    let (_, text) = answer(&judge(&facts), "interrupt-remapping");
    assert!(text.contains("intremap=on"), "{text}");
    facts.cpu.is_guest = false;
    let (_, text) = answer(&judge(&facts), "interrupt-remapping");
    assert!(text.contains("use other hardware"), "{text}");
}

#[test]
fn a_reboot_is_waited_for_from_its_note_to_the_next_boot() {
    let host = Host::unpack("command-line-off");
    let paths = host.paths();
    let reboot = || answer(&check(&paths, &[]).unwrap(), "reboot");
    assert_eq!(reboot().0, Level::Ok);
    let path = note_reboot(&paths, &check(&paths, &[]).unwrap()).unwrap();
    assert!(fs::read_to_string(path).unwrap().contains("intel_iommu=on"));
    let (level, text) = reboot();
    assert_eq!(level, Level::Warn);
    assert!(text.contains("has not been restarted since"), "{text}");
    host.remove("proc/sys/kernel/random/boot_id");
    host.line("proc/sys/kernel/random/boot_id", "another");
    let (level, text) = reboot();
    assert_eq!(level, Level::Warn);
    assert!(
        text.contains("the command line still lacks intel_iommu=on"),
        "{text}"
    );
    host.remove("proc/cmdline");
    host.line(
        "proc/cmdline",
        "intel_iommu=on vfio-pci.ids=10de:10f1,10de:1c30",
    );
    assert_eq!(reboot().0, Level::Ok);
}

#[test]
fn a_note_that_cannot_be_written_is_told_with_its_file() {
    let host = Host::unpack("lab");
    let mut paths = host.paths();
    let report = check(&paths, &[]).unwrap();
    paths.config = host.path("proc/cmdline");
    let error = note_reboot(&paths, &report).unwrap_err();
    assert!(
        error.to_string().contains("proc/cmdline/reboot.json"),
        "{error}"
    );
}

#[test]
fn nonsense_in_every_file_is_no_crash() {
    fn fill(dir: &Path, text: &str) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            // Devices with nonsense for ids are refused by the inventory.
            if path.is_symlink() || path.ends_with("sys/devices") {
                continue;
            } else if path.is_dir() {
                fill(&path, text);
            } else {
                fs::write(path, text).unwrap();
            }
        }
    }
    let host = Host::unpack("intel-ok");
    for text in [
        "",
        "\"",
        "=",
        ":\n: :\n",
        "options vfio-pci ids=,:,\nsoftdep\nsoftdep x pre:\n",
        "GRUB_CMDLINE_LINUX_DEFAULT=\"\nGRUB_CMDLINE_LINUX='",
        "linux \noptions \nlinux\t",
        "0x \u{fffd} [ ] [] Max locked memory MemTotal: kB",
    ] {
        fill(host.0.path(), text);
        assert_eq!(
            check(&host.paths(), &[]).unwrap().level,
            Level::Fail,
            "{text}"
        );
    }
}

#[test]
fn this_machine_is_judged() {
    let report = check(&HostPaths::default(), &[]);
    assert_eq!(report.is_ok(), Path::new("/sys/bus/pci/devices").exists());
}
