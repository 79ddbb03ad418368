//! `gantry check` over hosts made of files: the exit status, the table, the JSON.

// The workspace allows these in tests; clippy does not take a test's helper functions for tests.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

/// A host on which all is well.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        for (path, text) in [
            ("proc/cmdline", "quiet intel_iommu=on"),
            (
                "proc/cpuinfo",
                "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx ept",
            ),
            ("proc/interrupts", "  0:  41  IR-IO-APIC  2-edge  timer"),
            ("proc/sys/kernel/osrelease", "6.12.41-amd64"),
            ("proc/sys/kernel/random/boot_id", "one"),
            ("proc/self/mountinfo", ""),
            ("dev/kvm", ""),
            ("dev/vfio/vfio", ""),
            ("sys/firmware/acpi/tables/DMAR", ""),
            ("sys/class/iommu/dmar0/intel-iommu/ecap", "f020df"),
            ("sys/kernel/iommu_groups/1/type", "DMA-FQ"),
            (
                "sys/kernel/mm/transparent_hugepage/enabled",
                "always [madvise] never",
            ),
            ("sys/module/vfio_pci/refcnt", "0"),
            ("sys/module/vfio_iommu_type1/refcnt", "0"),
            (
                "sys/bus/pci/devices/0000:01:00.0/modalias",
                "pci:v00001B36d00000010sv00000000sd00000000bc01sc08i02",
            ),
            ("sys/bus/pci/devices/0000:01:00.0/reset_method", "flr"),
        ] {
            host.put(path, text);
        }
        host
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    fn check(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_gantry"))
            .arg("--host-root")
            .arg(self.0.path())
            .arg("check")
            .args(args)
            .env_remove("GANTRY_RUN_DIR")
            .env_remove("GANTRY_CONFIG_DIR")
            .output()
            .unwrap()
    }
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn the_exit_status_is_that_of_the_worst_finding() {
    let host = Host::new();
    let fine = host.check(&[]);
    assert_eq!(fine.status.code(), Some(0), "{}", text(&fine));
    assert!(text(&fine).contains("0 warn, 0 fail"), "{}", text(&fine));
    let unbound = host.check(&["01:00.0"]);
    assert_eq!(unbound.status.code(), Some(5), "{}", text(&unbound));
    assert!(
        text(&unbound).contains("add     vfio-pci.ids=1b36:0010"),
        "{}",
        text(&unbound)
    );
    host.put("proc/sys/kernel/osrelease", "5.4.0");
    assert_eq!(host.check(&["01:00.0"]).status.code(), Some(6));
}

#[test]
fn a_check_that_cannot_be_done_is_no_finding() {
    let host = Host::new();
    let output = host.check(&["09:00.0"]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("no PCI device 0000:09:00.0"), "{error}");
    assert_eq!(host.check(&["nvme"]).status.code(), Some(2));
}

#[test]
fn json_has_the_findings_and_the_change() {
    let host = Host::new();
    let output = host.check(&["--json", "01:00.0"]);
    assert_eq!(output.status.code(), Some(5));
    let report: Value = serde_json::from_str(&text(&output)).unwrap();
    assert_eq!(report["level"], "warn");
    let findings = report["findings"].as_array().unwrap();
    let binding = findings
        .iter()
        .find(|finding| finding["check"] == "binding");
    assert_eq!(binding.unwrap()["level"], "warn");
    assert_eq!(report["command_line"]["add"][0], "vfio-pci.ids=1b36:0010");
}

#[test]
fn a_noted_reboot_is_waited_for() {
    let host = Host::new();
    assert_eq!(host.check(&["--note-reboot"]).status.code(), Some(5));
    assert!(text(&host.check(&[])).contains("has not been restarted"));
    host.put("proc/sys/kernel/random/boot_id", "two");
    assert_eq!(host.check(&[]).status.code(), Some(0));
}
