//! The built binary over a fake host: what it prints, and the exit codes it ends with.

// The workspace allows these in tests; clippy does not take a test's helper functions for tests.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use gantry_resources::{Holder, HostPaths, announce};
use serde_json::Value;

/// A host of files: two NVMe disks and a NIC, and a group for the disks.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        for dir in [
            "sys/bus/pci/devices",
            "sys/bus/pci/drivers",
            "dev",
            "proc/self",
            "run",
            "etc",
        ] {
            fs::create_dir_all(host.path(dir)).unwrap();
        }
        fs::write(host.path("proc/self/mountinfo"), "").unwrap();
        host.device("0000:00:03.0", ["0x8086", "0x1572", "0x020000"], "i40e", 3);
        host.device(
            "0000:01:00.0",
            ["0x1b36", "0x0010", "0x010802"],
            "vfio-pci",
            11,
        );
        host.device("0000:02:00.0", ["0x1b36", "0x0010", "0x010802"], "nvme", 2);
        let groups = r#"{"groups": [{"name": "disks", "type": "nvme", "class": "storage",
            "description": "local disks", "rules": [{"class": "0108"}]}]}"#;
        fs::write(host.path("etc/groups.json"), groups).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn device(&self, bdf: &str, ids: [&str; 3], driver: &str, group: u32) {
        let dir = self.path("sys/bus/pci/devices").join(bdf);
        fs::create_dir_all(&dir).unwrap();
        let [vendor, device, class] =
            ids.map(|id| u32::from_str_radix(id.trim_start_matches("0x"), 16).unwrap());
        let modalias = format!(
            "pci:v{vendor:08X}d{device:08X}sv00000000sd00000000bc{:02X}sc{:02X}i{:02X}\n",
            class >> 16,
            class >> 8 & 0xff,
            class & 0xff
        );
        fs::write(dir.join("modalias"), modalias).unwrap();
        for (name, text) in [("numa_node", "-1\n"), ("driver_override", "(null)\n")] {
            fs::write(dir.join(name), text).unwrap();
        }
        let driver_dir = self.path("sys/bus/pci/drivers").join(driver);
        let group_dir = self.path(&format!("sys/kernel/iommu_groups/{group}"));
        fs::create_dir_all(&driver_dir).unwrap();
        fs::create_dir_all(group_dir.join("devices")).unwrap();
        symlink(&dir, group_dir.join("devices").join(bdf)).unwrap();
        symlink(driver_dir, dir.join("driver")).unwrap();
        symlink(group_dir, dir.join("iommu_group")).unwrap();
    }

    /// The VFIO node of an IOMMU group.
    fn node(&self, group: u32) {
        fs::create_dir_all(self.path("dev/vfio")).unwrap();
        fs::write(self.path(&format!("dev/vfio/{group}")), "").unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gantry"));
        command
            .arg("--host-root")
            .arg(self.0.path())
            .args(args)
            .stdin(Stdio::null());
        for name in [
            "GANTRY_RUN_DIR",
            "GANTRY_CONFIG_DIR",
            "NO_COLOR",
            "CLICOLOR_FORCE",
        ] {
            command.env_remove(name);
        }
        command
    }

    fn gantry(&self, args: &[&str]) -> Done {
        Done::from(self.command(args).output().unwrap())
    }
}

/// How a command ended.
#[derive(Debug)]
struct Done {
    code: Option<i32>,
    out: String,
    err: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Done {
    /// Output of a command that must have gone well, and quietly.
    fn ok(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""));
        self.out
    }

    /// Error text of a command that must have failed with `code`, and printed nothing else.
    fn failed(self, code: i32) -> String {
        assert_eq!(
            (self.code, self.out.as_str()),
            (Some(code), ""),
            "{}",
            self.err
        );
        self.err
    }
}

/// First words of each line after the header.
fn first_words(table: &str) -> Vec<&str> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect()
}

#[test]
fn version_and_help_are_there() {
    let host = Host::new();
    assert_eq!(
        host.gantry(&["--version"]).ok(),
        format!("gantry {}\n", env!("CARGO_PKG_VERSION"))
    );
    let help = host.gantry(&["run", "--help"]).ok();
    for words in [
        "Exit status:",
        "128+n",
        "Examples:",
        "--allow-ungrouped",
        "--seccomp",
    ] {
        assert!(help.contains(words), "{words}: {help}");
    }
    assert!(!host.gantry(&["--help"]).ok().contains("sysfs-write"));
}

#[test]
fn devices_are_listed_with_state_and_group() {
    let host = Host::new();
    let table = host.gantry(&["device", "list"]).ok();
    assert_eq!(
        first_words(&table),
        ["0000:00:03.0", "0000:01:00.0", "0000:02:00.0"]
    );
    let row = |index| {
        table
            .lines()
            .nth(index)
            .unwrap()
            .split_whitespace()
            .collect::<Vec<_>>()
    };
    assert!(
        row(2).ends_with(&["vfio-pci", "-", "11", "-", "-", "detached", "disks", "-"]),
        "{table}"
    );
    assert!(
        row(3).ends_with(&["nvme", "-", "2", "-", "-", "attached", "disks", "-"]),
        "{table}"
    );
    assert!(
        table.contains("1b36:0010") && table.contains("QEMU NVM Express"),
        "{table}"
    );
}

#[test]
fn virtual_functions_are_asked_for_shown_and_planned() {
    let host = Host::new();
    let card = host.path("sys/bus/pci/devices/0000:00:03.0");
    for (name, text) in [
        ("sriov_totalvfs", "8\n"),
        ("sriov_numvfs", "0\n"),
        ("sriov_drivers_autoprobe", "1\n"),
        ("sriov_offset", "16\n"),
        ("sriov_stride", "1\n"),
    ] {
        fs::write(card.join(name), text).unwrap();
    }
    fs::create_dir_all(card.join("net/eth9")).unwrap();
    fs::write(card.join("net/eth9/ifindex"), "1\n").unwrap();
    let sriov = r#"{"pf": "00:03.0", "count": 2, "mac": "52:54:00:00:00:08", "vlan": 5}"#;
    let args = ["group", "create", "vfs", "--type", "sriov-nic"];
    host.gantry(&[&args[..], &["--sriov", sriov]].concat()).ok();
    let shown = host.gantry(&["group", "show", "vfs"]).ok();
    for line in [
        "functions    2 of 0000:00:03.0, 0 of 8 there",
        "  vf 1        mac 52:54:00:00:00:09, vlan 5 qos 0",
        "Its virtual functions are not there: `gantry group activate vfs` makes them.",
    ] {
        assert!(shown.contains(line), "{shown}");
    }
    let list = host.gantry(&["device", "list"]).ok();
    assert!(list.contains(" 0/8 "), "{list}");
    let plan = host.gantry(&["group", "activate", "vfs", "--dry-run"]).ok();
    for line in [
        "vfs: 0000:00:03.0 (eth9) would have 2 virtual functions instead of 0",
        "/sys/bus/pci/devices/0000:00:03.0/sriov_numvfs",
        "  ip link set eth9 vf 1 mac 52:54:00:00:00:09",
        "/sys/bus/pci/devices/0000:00:05.1/driver_override",
    ] {
        assert!(plan.contains(line), "no {line} in {plan}");
    }
    let fit = host.gantry(&["group", "fit", "vfs:1"]);
    assert!(fit.err.contains("`gantry group activate vfs`"), "{fit:?}");
    let wrong = [
        (r#"{"pf": "00:03.0"}"#, 2, "missing field `count`"),
        (
            r#"{"pf": "00:03.0", "count": 2, "vlan": 5000}"#,
            1,
            "sriov.vlan: is 1 to 4094",
        ),
        (
            r#"{"pf": "00:03.0", "count": 2, "mac": "x"}"#,
            2,
            "expected a MAC address",
        ),
    ];
    for (sriov, code, words) in wrong {
        let error = host
            .gantry(&["group", "edit", "vfs", "--sriov", sriov])
            .failed(code);
        assert!(error.contains(words), "{error}");
    }
    let error = host.gantry(&["group", "activate", "disks"]).failed(1);
    assert!(error.contains("makes no virtual functions"), "{error}");
    host.gantry(&["group", "edit", "vfs", "--sriov", ""]).ok();
    assert!(
        !host
            .gantry(&["group", "show", "vfs"])
            .ok()
            .contains("functions")
    );
}

#[test]
fn a_group_asks_for_its_functions_until_they_are_gone() {
    let host = Host::new();
    let card = host.path("sys/bus/pci/devices/0000:00:03.0");
    fs::write(card.join("sriov_totalvfs"), "8\n").unwrap();
    let sriov = r#"{"pf": "00:03.0", "count": 2, "vlan": 5}"#;
    let args = ["group", "create", "vfs", "--type", "sriov-nic"];
    host.gantry(&[&args[..], &["--sriov", sriov]].concat()).ok();
    host.device(
        "0000:00:05.0",
        ["0x8086", "0x154c", "0x020000"],
        "vfio-pci",
        50,
    );
    let function = host.path("sys/bus/pci/devices/0000:00:05.0");
    symlink(&card, function.join("physfn")).unwrap();
    symlink(&function, card.join("virtfn0")).unwrap();
    let edit = |sriov: &str| host.gantry(&["group", "edit", "vfs", "--sriov", sriov]);
    edit(&sriov.replace("\"vlan\": 5", "\"vlan\": 6")).ok();
    for other in [
        "",
        &sriov.replace("2,", "3,"),
        &sriov.replace("00:03.0", "01:00.0"),
    ] {
        let error = edit(other).failed(1);
        let way = "has 1 virtual functions now: `gantry group deactivate vfs` first";
        assert!(error.contains(way), "{error}");
    }
    host.gantry(&["group", "edit", "vfs", "--sriov", "", "--force"])
        .ok();
}

#[test]
fn what_would_only_fail_later_is_told_at_once() {
    let host = Host::new();
    let create =
        |name: &str, more: &[&str]| host.gantry(&[&["group", "create", name][..], more].concat());
    let functions = |count: u32| format!(r#"{{"pf": "00:03.0", "count": {count}}}"#);
    let none = create("vfs", &["--sriov", &functions(2)]).failed(1);
    assert!(none.contains("has no SR-IOV"), "{none}");
    let card = host.path("sys/bus/pci/devices/0000:00:03.0");
    fs::write(card.join("sriov_totalvfs"), "8\n").unwrap();
    create("vfs", &["--sriov", &functions(2)]).ok();
    let edit = ["group", "edit", "vfs", "--sriov", &functions(9)];
    let many = host.gantry(&edit).failed(1);
    assert!(many.contains("8 virtual functions at most"), "{many}");
    let typeless = create("vgpus", &["--type", "vgpu"]).failed(1);
    assert!(typeless.contains("give it a type"), "{typeless}");
    let foreign = create(
        "vgpus",
        &["--type", "vgpu", "--vgpu", r#"{"type": "nvidia-1"}"#],
    );
    let said = "nothing on this host makes a vGPU of type \"nvidia-1\"";
    assert!(
        foreign.code == Some(0) && foreign.err.contains(said),
        "{foreign:?}"
    );

    let plan = host.gantry(&[
        "plan", "create", "p", "--device", "disk:1", "--device", "vfs:1",
    ]);
    let said = "plan p: there is no group \"disk\": did you mean \"disks\"?";
    assert!(plan.code == Some(0) && plan.err.contains(said), "{plan:?}");
    assert!(!plan.err.contains("vfs"), "{plan:?}");
    let gone = host.gantry(&["group", "delete", "vfs"]);
    let said = "plan p asks for group vfs: `gantry plan edit p` changes that";
    assert!(gone.code == Some(0) && gone.err.contains(said), "{gone:?}");

    let nothing = host.gantry(&["group", "fit", "{}"]).ok();
    assert_eq!(nothing, "The request asks for no devices.\n");
    let unknown = host.gantry(&["group", "fit", r#"{"x": 1}"#]).failed(2);
    assert!(unknown.contains("\"x\" is no key"), "{unknown}");

    fs::write(host.path("kernel"), "").unwrap();
    let vm = r#"{"payload": {"kernel": "kernel"}, "hotplug": {"groups": ["disk", "disks"]}}"#;
    fs::write(host.path("vm.json"), vm).unwrap();
    let run = host.gantry(&["run", host.path("vm.json").to_str().unwrap()]);
    let said = "hotplug.groups: there is no group \"disk\"";
    assert!(
        run.err.matches("hotplug.groups").count() == 1 && run.err.contains(said),
        "{run:?}"
    );
}

#[test]
fn a_card_without_a_driver_needs_its_module() {
    let host = Host::new();
    let card = host.path("sys/bus/pci/devices/0000:00:03.0");
    fs::write(card.join("sriov_totalvfs"), "8\n").unwrap();
    fs::write(host.path("sys/bus/pci/drivers_probe"), "").unwrap();
    fs::remove_file(card.join("driver")).unwrap();
    let args = ["group", "create", "vfs", "--type", "sriov-nic"];
    let sriov = r#"{"pf": "00:03.0", "count": 2}"#;
    host.gantry(&[&args[..], &["--sriov", sriov]].concat()).ok();
    let said = || {
        let activated = host.gantry(&["group", "activate", "vfs"]).failed(1);
        (
            activated,
            host.gantry(&["device", "reattach", "00:03.0"]).ok(),
        )
    };
    let (activated, reattached) = said();
    assert!(activated.contains("load its module first"), "{activated}");
    let nothing = "still with no driver (IOMMU group 3)\n  no driver that is loaded takes it\n";
    assert!(reattached.contains(nothing), "{reattached}");
    let modules = host.path("proc/self/root/lib/modules/6.1");
    fs::create_dir_all(host.path("proc/sys/kernel")).unwrap();
    fs::write(host.path("proc/sys/kernel/osrelease"), "6.1\n").unwrap();
    fs::create_dir_all(&modules).unwrap();
    let alias = "alias pci:v00008086d*sv*sd*bc*sc*i* i40e\n";
    fs::write(modules.join("modules.alias"), alias).unwrap();
    let (activated, reattached) = said();
    assert!(
        activated.contains("`modprobe i40e` loads it"),
        "{activated}"
    );
    assert!(
        reattached.contains("`modprobe i40e` loads one"),
        "{reattached}"
    );
    fs::create_dir_all(host.path("sys/module/i40e")).unwrap();
    let (activated, reattached) = said();
    assert!(
        activated.contains("`gantry device reattach 0000:00:03.0`"),
        "{activated}"
    );
    assert!(reattached.contains("see dmesg"), "{reattached}");
}

#[test]
fn a_tenants_vm_is_named_with_its_tenant() {
    let host = Host::new();
    let definition = host.path("etc/tenants/lab/tenant.json");
    fs::create_dir_all(definition.parent().unwrap()).unwrap();
    fs::write(&definition, r#"{"user": "nobody"}"#).unwrap();
    let mut paths = HostPaths::under(host.0.path());
    paths.run = host.path("run/tenants/lab");
    let holder = Holder {
        vm: "al".to_owned(),
        pid: 7,
    };
    let running = announce(&paths, &holder).unwrap();
    let list = host.gantry(&["vm", "list"]).ok();
    assert!(list.contains("al    7    tenant lab"), "{list}");
    let json: Value = serde_json::from_str(&host.gantry(&["vm", "list", "--json"]).ok()).unwrap();
    assert_eq!(json[0]["tenant"], "lab");
    let error = host.gantry(&["vm", "info", "al"]).failed(1);
    let said = "VM 'al' (pid 7) of tenant lab is not yours";
    assert!(error.contains(said), "{error}");
    assert!(
        error.contains("sudo -u nobody gantry vm info al"),
        "{error}"
    );
    let error = host.gantry(&["tenant", "delete", "lab"]).failed(1);
    // The tenant names the process, which is not the tenant's.
    let said = "tenant \"lab\" says that its VM 'al' runs, but not as which process";
    assert!(error.contains(said), "{error}");
    drop(running);
    paths.run = host.path("run");
    let _running = announce(&paths, &holder).unwrap();
    let error = host.gantry(&["vm", "info", "al"]).failed(1);
    assert!(error.contains("VM 'al' (pid 7) has no socket"), "{error}");
    let error = host.gantry(&["vm", "info", "el"]).failed(1);
    assert!(error.contains("no VM \"el\" runs"), "{error}");
}

#[test]
fn a_group_whose_devices_others_have_says_so() {
    let host = Host::new();
    let rule = r#"{"class": "0108"}"#;
    let created = host
        .gantry(&["group", "create", "all", "--rule", rule])
        .ok();
    assert_eq!(
        created,
        "group all: created with no device\n  its rules match devices that belong to groups \
         defined before it: 0000:01:00.0 of disks, 0000:02:00.0 of disks\n"
    );
}

#[test]
fn mediated_devices_are_listed_asked_for_and_planned() {
    let host = Host::new();
    let none = host.gantry(&["device", "mdev"]).ok();
    assert!(none.contains("Nothing on this host makes"), "{none}");
    let parent = host.path("sys/class/mdev_bus/0000:00:03.0");
    let kind = parent.join("mdev_supported_types/i915-4");
    fs::create_dir_all(&kind).unwrap();
    fs::write(kind.join("available_instances"), "2\n").unwrap();
    fs::write(kind.join("name"), "GVTg V5 4\n").unwrap();
    let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    let made = parent.join(uuid);
    fs::create_dir_all(host.path("sys/bus/mdev/devices")).unwrap();
    fs::create_dir_all(&made).unwrap();
    symlink(&kind, made.join("mdev_type")).unwrap();
    symlink(&made, host.path("sys/bus/mdev/devices").join(uuid)).unwrap();

    let args = ["group", "create", "vgpus", "--type", "vgpu", "--vgpu"];
    let new = r#"{"type": "GVTg V5 4"}"#;
    host.gantry(&[&args[..], &[new]].concat()).ok();
    let shown = host.gantry(&["group", "show", "vgpus"]).ok();
    let hint = "A VM's vGPU is made when the VM starts";
    assert!(shown.contains(hint), "{shown}");
    let list = host.gantry(&["device", "mdev"]).ok();
    for words in ["i915-4", "GVTg V5 4", uuid, "detached", "vgpus"] {
        assert!(list.contains(words), "no {words} in {list}");
    }
    assert!(host.gantry(&["device", "list"]).ok().contains(uuid));
    let all: Value =
        serde_json::from_str(&host.gantry(&["device", "list", "--json"]).ok()).unwrap();
    assert_eq!(all[3]["uuid"], uuid);
    let tree = host.gantry(&["device", "tree"]).ok();
    assert!(tree.contains("1 mediated device "), "{tree}");
    let fit = host.gantry(&["group", "fit", "vgpus:2"]).ok();
    assert!(fit.contains("2 new i915-4 of 0000:00:03.0"), "{fit}");
    let fit = host.gantry(&["group", "fit", "vgpus:3"]);
    assert_eq!(fit.code, Some(1), "{fit:?}");

    let more = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";
    let ahead = format!(r#"{{"type": "i915-4", "uuids": ["{uuid}", "{more}"]}}"#);
    host.gantry(&["group", "edit", "vgpus", "--vgpu", &ahead])
        .ok();
    let plan = host
        .gantry(&["group", "activate", "vgpus", "--dry-run"])
        .ok();
    assert!(plan.contains("would have 2 mediated devices"), "{plan}");
    assert!(plan.contains(&format!("write \"{more}\" to ")), "{plan}");
    let shown = host.gantry(&["group", "show", "vgpus"]).ok();
    assert!(
        shown.contains(more) && shown.contains("vgpu type    i915-4"),
        "{shown}"
    );
    let hint = "Its vGPUs are not all there: `gantry group activate vgpus` makes them.";
    assert!(shown.contains(hint), "{shown}");
    let mixed = ["tenant", "grant", "a", "01:00.0", more];
    let error = host.gantry(&mixed).failed(2);
    assert!(error.contains("do not go into one group"), "{error}");
    let error = host
        .gantry(&["group", "edit", "disks", "--vgpu", new])
        .failed(1);
    assert!(error.contains("only groups of type \"vgpu\""), "{error}");
}

#[test]
fn devices_are_sorted_by_any_column() {
    let host = Host::new();
    for (column, order) in [
        ("iommu", ["0000:02:00.0", "0000:00:03.0", "0000:01:00.0"]),
        ("driver", ["0000:00:03.0", "0000:02:00.0", "0000:01:00.0"]),
        ("group", ["0000:01:00.0", "0000:02:00.0", "0000:00:03.0"]),
        ("id", ["0000:01:00.0", "0000:02:00.0", "0000:00:03.0"]),
    ] {
        let table = host.gantry(&["device", "list", "--sort", column]).ok();
        assert_eq!(first_words(&table), order, "{column}");
    }
    let error = host.gantry(&["device", "list", "--sort", "iomu"]).failed(2);
    assert!(error.contains("a similar value exists: 'iommu'"), "{error}");
}

#[test]
fn nvme_disks_are_listed_with_their_own_fields() {
    let host = Host::new();
    let disk = host.path("sys/bus/pci/devices/0000:02:00.0/nvme/nvme0");
    fs::create_dir_all(disk.join("nvme0n1")).unwrap();
    for (name, text) in [
        ("model", "SAMSUNG MZQL2"),
        ("serial", "S64"),
        ("firmware_rev", "GDC5"),
        ("nvme0n1/size", "7501476528"),
    ] {
        fs::write(disk.join(name), text).unwrap();
    }
    let text = host.gantry(&["device", "list", "--type", "nvme"]).ok();
    let words: Vec<&str> = text.lines().nth(2).unwrap().split_whitespace().collect();
    let expected = "0000:02:00.0 SAMSUNG MZQL2 S64 GDC5 3840 nvme0n1 attached disks -";
    assert_eq!(words.join(" "), expected);
    assert_eq!(first_words(&text), ["0000:01:00.0", "0000:02:00.0"]);
    let json = host
        .gantry(&["device", "list", "--type", "nvme", "--json"])
        .ok();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        json[1]["nvme"]["namespaces"][0]["bytes"],
        3_840_755_982_336_u64
    );
}

#[test]
fn usb_devices_are_listed_and_grouped() {
    let host = Host::new();
    let none = host.gantry(&["device", "list", "--type", "usb"]).ok();
    assert_eq!(none, "This host has none.\n");
    for (port, id, speed, product) in [
        ("1-2", "1666", "5000", "Stick"),
        ("1-10", "c31c", "1.5", "Keys"),
    ] {
        let dir = host.path("sys/bus/usb/devices").join(port);
        fs::create_dir_all(&dir).unwrap();
        for (name, text) in [
            ("idVendor", "0951"),
            ("idProduct", id),
            ("speed", speed),
            ("product", product),
            ("busnum", "1"),
            ("devnum", "3"),
            ("bDeviceClass", "00"),
        ] {
            fs::write(dir.join(name), text).unwrap();
        }
    }
    let ports = |args: &[&str]| {
        let text = host
            .gantry(&[&["device", "list", "--type", "usb"], args].concat())
            .ok();
        let words: Vec<String> = first_words(&text).into_iter().map(str::to_owned).collect();
        words.join(" ")
    };
    assert_eq!(ports(&[]), "1-2 1-10");
    assert_eq!(ports(&["--sort", "speed"]), "1-10 1-2");
    let wrong = host
        .gantry(&["device", "list", "--sort", "speed"])
        .failed(2);
    assert!(wrong.contains("no column speed"), "{wrong}");
    let rule = r#"{"name": {"contains": "sti"}}"#;
    let found = host
        .gantry(&["group", "match", "--usb", "--rule", rule])
        .ok();
    assert_eq!(first_words(&found), ["1-2"]);
    host.gantry(&["group", "create", "sticks", "--type", "usb", "--rule", rule])
        .ok();
    let shown = host.gantry(&["group", "show", "sticks"]).ok();
    assert!(
        shown.contains("Stick") && !shown.contains("Keys"),
        "{shown}"
    );
    let groups = host.gantry(&["group", "list", "--sort", "total"]).ok();
    let sticks = groups
        .lines()
        .find(|line| line.starts_with("sticks"))
        .unwrap();
    assert!(sticks.ends_with("1-2"), "{sticks}");
}

#[test]
fn json_tells_all_there_is() {
    let host = Host::new();
    let text = host.gantry(&["device", "list", "--json"]).ok();
    let devices: Value = serde_json::from_str(&text).unwrap();
    let disk = &devices[1];
    for (key, value) in [
        ("bdf", "0000:01:00.0"),
        ("id", "1b36:0010"),
        ("class", "010802"),
        ("driver", "vfio-pci"),
        ("state", "detached"),
        ("group", "disks"),
        ("vendor_name", "Red Hat, Inc."),
    ] {
        assert_eq!(disk[key], value, "{key}: {disk}");
    }
    assert_eq!(disk["iommu_group"], 11);
    assert_eq!(disk["numa_node"], Value::Null);
    assert_eq!(devices[0]["group"], Value::Null);
}

#[test]
fn groups_are_listed_with_what_is_free() {
    let host = Host::new();
    let table = host.gantry(&["group", "list"]).ok();
    let row = table.lines().nth(1).unwrap();
    let end = "2      0     1     0000:01:00.0 0000:02:00.0";
    assert!(
        row.starts_with("disks  nvme  storage  local disks"),
        "{table}"
    );
    assert!(row.ends_with(end), "{table}");
    let text = host.gantry(&["group", "list", "--json"]).ok();
    let group = &serde_json::from_str::<Value>(&text).unwrap()[0];
    assert_eq!(
        (&group["name"], &group["type"]),
        (&"disks".into(), &"nvme".into())
    );
    assert_eq!(
        (&group["total"], &group["used"], &group["free"]),
        (&2.into(), &0.into(), &1.into())
    );
    assert_eq!(group["devices"][1]["state"], "attached");
}

#[test]
fn a_host_without_groups_says_where_to_define_them() {
    let host = Host::new();
    fs::remove_file(host.path("etc/groups.json")).unwrap();
    let text = host.gantry(&["group", "list"]).ok();
    assert!(text.contains("etc/groups.json"), "{text}");
    assert_eq!(host.gantry(&["group", "list", "--json"]).ok(), "[]\n");
}

#[test]
fn directories_are_taken_from_flags_and_environment() {
    let host = Host::new();
    fs::create_dir(host.path("other")).unwrap();
    let other = host.path("other").display().to_string();
    let by_flag = host.gantry(&["group", "list", "--config-dir", &other]).ok();
    assert!(by_flag.contains("other/groups.json"), "{by_flag}");
    let output = host
        .command(&["group", "list"])
        .env("GANTRY_CONFIG_DIR", &other)
        .output();
    assert!(
        Done::from(output.unwrap())
            .ok()
            .contains("other/groups.json")
    );
}

#[test]
fn a_dry_run_shows_the_writes_and_does_none() {
    let host = Host::new();
    let text = host
        .gantry(&["device", "detach", "02:00.0", "--dry-run"])
        .ok();
    assert!(
        text.starts_with("0000:02:00.0: would leave nvme (IOMMU group 2)\n"),
        "{text}"
    );
    assert!(text.contains("driver_override"), "{text}");
    let marker = host.path("sys/bus/pci/devices/0000:02:00.0/driver_override");
    assert_eq!(fs::read_to_string(marker).unwrap(), "(null)\n");
    let text = host
        .gantry(&["device", "detach", "02:00.0", "--dry-run", "--json"])
        .ok();
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["dry_run"], true);
    assert_eq!(report["devices"][0]["from"], "nvme");
    assert!(report["writes"][0]["path"].is_string());
}

#[test]
fn a_device_that_is_there_already_is_left_alone() {
    let host = Host::new();
    let text = host.gantry(&["device", "detach", "01:00.0"]).ok();
    assert_eq!(
        text,
        "0000:01:00.0: already with vfio-pci (IOMMU group 11)\n"
    );
    let detach = ["device", "detach", "01:00.0", "--group", "disks"];
    let text = host.gantry(&detach).ok();
    let (moved, group) = text.split_once('\n').unwrap();
    assert!(moved.contains("already with vfio-pci"), "{moved}");
    assert!(group.starts_with("group disks: "), "{group}");
    let text = host.gantry(&[&detach[..], &["--json"]].concat()).ok();
    let told: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(told["devices"][0]["moved"], false);
    assert_eq!(told["group"]["group"], "disks");
}

#[test]
fn what_is_no_device_is_refused() {
    let host = Host::new();
    let error = host.gantry(&["device", "detach", "nvme0"]).failed(2);
    assert!(error.contains("write it like 0000:01:00.0"), "{error}");
    let error = host.gantry(&["device", "detach", "09:00.0"]).failed(1);
    assert!(
        error.starts_with("error: ") && error.contains("0000:09:00.0"),
        "{error}"
    );
}

#[test]
fn a_wrong_file_is_told_on_one_screen() {
    let host = Host::new();
    let file = host.path("vm.json");
    fs::write(&file, "{\n  \"cpus\": {\n    \"boot_vcpu\": 1}}").unwrap();
    let name = file.display().to_string();
    let error = host.gantry(&["run", &name]).failed(2);
    let expected =
        format!("error: {name}:3:5: unknown key `cpus.boot_vcpu`\n  did you mean `boot_vcpus`?\n");
    assert_eq!(error, expected);
    let error = host.gantry(&["run", "none.json"]).failed(2);
    assert!(
        error.starts_with("error: cannot read none.json\n  because: No such file"),
        "{error}"
    );
}

#[test]
fn a_vm_that_cannot_be_built_is_told_on_one_screen() {
    let host = Host::new();
    fs::write(host.path("vmlinux"), "no kernel").unwrap();
    fs::write(
        host.path("vm.json"),
        r#"{"payload": {"kernel": "vmlinux"}, "serial": {"mode": "Null"}}"#,
    )
    .unwrap();
    let file = host.path("vm.json").display().to_string();
    let error = host.gantry(&["run", &file]).failed(1);
    // Where this runs, KVM may be missing or not permitted; that is told before.
    let named = error.contains("vmlinux is not a kernel") || error.contains("/dev/kvm");
    assert!(error.starts_with("error: ") && named, "{error}");
    assert!(error.lines().count() < 10, "{error}");
}

#[test]
fn standard_input_is_named_so() {
    let host = Host::new();
    let mut child = host
        .command(&["run", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"{}").unwrap();
    let error = Done::from(child.wait_with_output().unwrap()).failed(2);
    assert!(
        error.starts_with("error: <stdin>:1:1: key `payload` is missing\n"),
        "{error}"
    );
}

#[test]
fn errors_are_coloured_only_where_that_is_wanted() {
    let host = Host::new();
    let plain = host.gantry(&["run", "none.json"]).failed(2);
    assert!(!plain.contains('\x1b'), "{plain:?}");
    let forced = host
        .command(&["run", "none.json"])
        .env("CLICOLOR_FORCE", "1")
        .output()
        .unwrap();
    assert!(Done::from(forced).failed(2).starts_with("\x1b["));
}

#[test]
fn a_reader_that_has_gone_is_no_failure() {
    let host = Host::new();
    for args in [&["device", "list"][..], &["schema"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = host.command(args).stdout(writer).output().unwrap();
        assert_eq!(Done::from(output).ok(), "");
    }
}

#[test]
fn a_full_disk_is_a_failure() {
    let host = Host::new();
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = host
        .command(&["device", "list"])
        .stdout(full)
        .output()
        .unwrap();
    let error = Done::from(output).failed(1);
    assert!(
        error.starts_with("error: cannot write to standard output: No space left"),
        "{error}"
    );
}

#[test]
fn schemas_are_json() {
    let host = Host::new();
    for (file, key) in [("vm", "payload"), ("groups", "groups")] {
        let schema: Value = serde_json::from_str(&host.gantry(&["schema", file]).ok()).unwrap();
        assert!(schema["properties"][key].is_object(), "{file}");
    }
}

#[test]
fn groups_are_made_of_devices_and_rules_and_changed() {
    let host = Host::new();
    host.gantry(&["group", "create", "nics", "--device", "00:03.0"])
        .ok();
    let text = host.gantry(&["group", "show", "nics"]).ok();
    assert!(
        text.contains(r#"rule 1       {"id":"8086:1572","slot":"0000:00:03.0"}"#),
        "{text}"
    );
    host.gantry(&["group", "rename", "nics", "net"]).ok();
    let rule = r#"{"class": {"begins": "02"}, "driver": {"not": "nvme"}}"#;
    host.gantry(&["group", "edit", "net", "--rule", rule, "--drop-rule", "1"])
        .ok();
    let found = host.gantry(&["group", "match", "net"]).ok();
    assert_eq!(first_words(&found), ["0000:00:03.0"]);
    let json = host
        .gantry(&[
            "group",
            "match",
            "--rule",
            r#"{"slot": "0[12]:*"}"#,
            "--json",
        ])
        .ok();
    let found: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(found.as_array().unwrap().len(), 2);
    assert_eq!(found[0]["group"], "disks");
    host.gantry(&["group", "delete", "net"]).ok();
    let error = host.gantry(&["group", "add", "disks", "00:03.0"]).failed(1);
    assert!(error.contains("in a group of type nvme: "), "{error}");
    let error = host.gantry(&["group", "activate"]).failed(2);
    assert!(error.contains("no group has virtual functions"), "{error}");
    let error = host
        .gantry(&["plan", "create", "x", "--memory", "2GB"])
        .failed(2);
    assert!(error.contains("did you mean 2G?"), "{error}");
    for (args, said) in [
        (["group", "show", "nets"], "no group \"nets\""),
        (["group", "delete", "disk"], "did you mean \"disks\"?"),
    ] {
        let error = host.gantry(&args).failed(1);
        assert!(error.contains(said), "{error}");
    }
    let error = host
        .gantry(&["group", "match", "--rule", r#"{"vendor": "1"}"#])
        .failed(2);
    assert!(error.contains("four hex digits"), "{error}");
    host.gantry(&["group", "match"]).failed(2);
}

#[test]
fn tables_are_sorted_by_each_of_their_columns() {
    let host = Host::new();
    let tables: [(&[&str], &str); 11] = [
        (&["device", "list"], "address"),
        (&["device", "list", "--type", "nvme"], "address"),
        (&["device", "mdev"], "uuid"),
        (&["group", "list"], "name"),
        (&["group", "show", "disks"], "address"),
        (&["group", "match", "disks"], "address"),
        (&["group", "alias"], "alias"),
        (&["group", "device-spec"], "address"),
        (&["plan", "list"], "name"),
        (&["tenant", "list"], "name"),
        (&["vm", "list"], "name"),
    ];
    for (args, column) in tables {
        host.gantry(&[args, &["--sort", column]].concat()).ok();
        let wrong = host.gantry(&[args, &["--sort", "colour"]].concat());
        assert!(wrong.failed(2).to_lowercase().contains(column), "{args:?}");
    }
    // The titles that a table shows are the words that --sort takes.
    for table in [
        &["device", "list"][..],
        &["group", "list"],
        &["group", "show", "disks"],
    ] {
        let shown = host.gantry(table).ok();
        let heads = shown
            .lines()
            .find(|line| line.starts_with("ADDRESS") || line.starts_with("NAME"));
        for head in heads.unwrap().split_whitespace() {
            host.gantry(&[table, &["--sort", head.to_lowercase().as_str()]].concat())
                .ok();
        }
    }
    let by_state = host
        .gantry(&["group", "match", "disks", "--sort", "STATE"])
        .ok();
    assert_eq!(first_words(&by_state), ["0000:02:00.0", "0000:01:00.0"]);
}

#[test]
fn what_is_piped_is_never_cut_to_a_width() {
    let host = Host::new();
    let wide = host.gantry(&["device", "list"]).ok();
    let mut narrow = host.command(&["device", "list"]);
    let narrow = Done::from(narrow.env("COLUMNS", "40").output().unwrap());
    assert_eq!(narrow.ok(), wide);
    let head = wide.lines().next().unwrap();
    for title in ["ADDRESS", "ID", "CLASS", "MODULES", "NUMA", "VFS", "VM"] {
        assert!(head.contains(title), "{head}");
    }
    assert!(!wide.contains('…') && !wide.contains("Not shown"), "{wide}");
}

#[test]
fn a_change_of_a_group_tells_what_it_came_to() {
    let host = Host::new();
    let said = |args: &[&str]| host.gantry(args).ok();
    for (args, told) in [
        (
            &["group", "create", "nics", "--device", "00:03.0"][..],
            "group nics: created with 1 device: 0000:00:03.0\n  \
             `gantry device detach 0000:00:03.0` makes it free for VMs\n",
        ),
        (
            &["group", "add", "nics", "00:03.0"],
            "group nics: as it was, with 1 device: 0000:00:03.0\n",
        ),
        (
            &[
                "group",
                "edit",
                "nics",
                "--description",
                "fast",
                "--bind",
                "demand",
            ],
            "group nics: changed bind, description; it has 1 device now\n",
        ),
        (
            &["group", "remove", "nics", "00:03.0"],
            "group nics: removed 0000:00:03.0; it has no device now\n",
        ),
        (
            &["group", "add", "nics", "00:03.0"],
            "group nics: added 0000:00:03.0; it has 1 device now\n",
        ),
        (
            &["group", "rename", "nics", "net"],
            "group net: was nics; it has 1 device now\n",
        ),
        (
            &["group", "delete", "net"],
            "group net: deleted; it had 1 device: 0000:00:03.0\n",
        ),
        (
            &["group", "create", "none"],
            "group none: created with no device\n  `gantry group add none BDF` gives it a \
             device, `gantry group edit none --rule JSON` a rule\n",
        ),
    ] {
        assert_eq!(said(args), told, "{args:?}");
    }
    let json = said(&["group", "delete", "disks", "--json"]);
    let told: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(told["group"], "disks");
    assert_eq!(told["done"], "deleted");
    assert_eq!(told["removed"][1], "0000:02:00.0");
    assert!(
        told["files"][0]
            .as_str()
            .unwrap()
            .ends_with("etc/groups.json")
    );
}

#[test]
fn novas_words_are_taken_verbatim() {
    let host = Host::new();
    let spec = r#"{"vendor_id": "1b36", "product_id": "0010"}"#;
    let said = host.gantry(&["group", "device-spec", spec]).ok();
    assert!(said.starts_with("device_spec: 1 added (in "), "{said}");
    let alias =
        r#"{"vendor_id": "1b36", "product_id": "0010", "device_type": "type-PCI", "name": "gpu"}"#;
    let said = host.gantry(&["group", "alias", alias]).ok();
    assert!(said.starts_with("alias gpu: added (in "), "{said}");
    let table = host.gantry(&["group", "alias"]).ok();
    assert_eq!(
        first_words(&table),
        ["gpu", "qat-dh895xcc-vf", "qat-c62x-vf", "qat-vf"]
    );
    let listed = host.gantry(&["group", "device-spec"]).ok();
    assert_eq!(first_words(&listed), ["0000:01:00.0", "0000:02:00.0"]);
    let json = host
        .gantry(&[
            "group",
            "fit",
            "--json",
            r#"{"pci_passthrough:alias": "gpu:1"}"#,
        ])
        .out;
    let fit: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(fit["requests"][0]["dropped"]["host-driver"], 1);
    let done = host.gantry(&["group", "fit", "gpu:1, qat-c62x-vf:2"]);
    assert_eq!(done.code, Some(1));
    assert!(
        done.err.contains("No valid host was found: ")
            && done.err.contains("of 3 devices dropped:"),
        "{}",
        done.err
    );
    // A word for a group is no alias, and what is dropped is told once.
    let done = host.gantry(&["group", "fit", "disks:2"]);
    assert_eq!(done.out, "2 of group \"disks\": nothing\n");
    let told =
        "No valid host was found: 2 of group \"disks\" asked for, 0 free; of 3 devices dropped: ";
    assert!(done.err.contains(told), "{}", done.err);
    let error = host.gantry(&["group", "fit", "qat-pf:1"]).failed(1);
    assert!(error.contains("limits of its driver"), "{error}");
}

#[test]
fn devices_are_kept_for_vms_over_reboots_and_let_out_of_quarantine() {
    let host = Host::new();
    host.node(11);
    host.gantry(&["device", "persist"]).failed(2);
    host.gantry(&[
        "group", "edit", "disks", "--bind", "boot", "--traits", "fast",
    ])
    .ok();
    let rule = host.gantry(&["device", "persist"]).ok();
    assert!(
        rule.contains("KERNEL==\"0000:02:00.0\"") && rule.contains("/etc/udev/rules.d/"),
        "{rule}"
    );
    let file = host.path("snippet");
    let name = file.to_str().unwrap();
    let module = host.path("sys/module/nvme");
    fs::create_dir_all(&module).unwrap();
    fs::write(module.join("initstate"), "live\n").unwrap();
    std::os::unix::fs::symlink(module, host.path("sys/bus/pci/drivers/nvme/module")).unwrap();
    host.gantry(&[
        "device", "persist", "02:00.0", "--by", "modprobe", "--output", name,
    ]);
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains("softdep nvme pre: vfio-pci"), "{text}");
    let unit = host.gantry(&["device", "persist", "--by", "systemd"]).ok();
    assert!(unit.contains("/gantry boot\n"), "{unit}");
    host.gantry(&["device", "persist", "02:00.0", "--by", "systemd"])
        .failed(2);
    fs::create_dir_all(host.path("var/quarantine")).unwrap();
    let record = r#"{"id": "1b36:0010", "reason": "it hung", "until": "released", "boot": null}"#;
    fs::write(host.path("var/quarantine/0000:01:00.0.json"), record).unwrap();
    let list = host.gantry(&["device", "list"]).ok();
    assert!(list.contains("quarantined"), "{list}");
    let error = host.gantry(&["group", "fit", "disks:1"]).err;
    assert!(error.contains("1 in quarantine"), "{error}");
    let release = ["device", "release-quarantine", "01:00.0"];
    assert_eq!(host.gantry(&release).ok(), "0000:01:00.0: released\n");
    host.gantry(&["group", "fit", "disks:1"]).ok();
    fs::write(host.path("var/quarantine/0000:01:00.0.json"), record).unwrap();
    // The second is not in quarantine; the first is free nevertheless, and told of.
    let some = host.gantry(&[&release[..], &["02:00.0", "--json"]].concat());
    let told: Value = serde_json::from_str(&some.out).unwrap();
    assert_eq!(
        told,
        serde_json::json!({"done": "released", "devices": ["0000:01:00.0"]})
    );
    assert_eq!(some.code, Some(1), "{}", some.err);
    assert!(
        some.err.contains("02:00.0 is not in quarantine"),
        "{}",
        some.err
    );
    let error = host
        .gantry(&["device", "release-quarantine", "01:00.0"])
        .failed(1);
    assert!(error.contains("not in quarantine"), "{error}");
}

#[test]
fn plans_are_made_used_and_deleted() {
    let host = Host::new();
    host.node(11);
    host.gantry(&["plan", "list"]).ok();
    let args = ["plan", "create", "fast", "--vcpus", "2", "--memory", "1GiB"];
    host.gantry(&[&args[..], &["--device", "disks:1"]].concat())
        .ok();
    assert_eq!(first_words(&host.gantry(&["plan", "list"]).ok()), ["fast"]);
    let fit = host.gantry(&["group", "fit", r#"{"plan": "fast"}"#]).ok();
    assert!(fit.contains("1 of group \"disks\": 0000:01:00.0"), "{fit}");
    host.gantry(&[&args[..]].concat()).failed(1);
    host.gantry(&["plan", "create", "odd", "--memory", "big"])
        .failed(2);
    let shown = host.gantry(&["plan", "show", "fast"]).ok();
    assert!(shown.contains("\"vcpus\": 2"), "{shown}");
    host.gantry(&["plan", "delete", "fast"]).ok();
    let error = host.gantry(&["plan", "show", "fast"]).failed(1);
    assert!(error.contains("no plan \"fast\""), "{error}");
}

#[test]
fn a_change_of_a_tenant_or_plan_is_told_to_programs() {
    let host = Host::new();
    let told = |args: &[&str]| -> Value {
        let args = [args, &["--json"]].concat();
        serde_json::from_str(&host.gantry(&args).ok()).unwrap()
    };
    let file = host.path("etc/tenants/lab/tenant.json");
    let created = told(&["tenant", "create", "lab", "--user", "root"]);
    assert_eq!(
        created,
        serde_json::json!({
            "tenant": "lab", "done": "created", "user": "root", "description": "", "files": [file],
        })
    );
    let changed = told(&["tenant", "edit", "lab", "--description", "upstairs"]);
    assert_eq!(changed["done"], "changed");
    assert_eq!(changed["description"], "upstairs");
    let deleted = told(&["tenant", "delete", "lab"]);
    assert_eq!(
        deleted,
        serde_json::json!({"tenant": "lab", "done": "deleted"})
    );
    told(&["plan", "create", "fast", "--vcpus", "2"]);
    let deleted = told(&["plan", "delete", "fast"]);
    let file = host.path("etc/plans.json");
    assert_eq!(
        deleted,
        serde_json::json!({"plan": "fast", "done": "deleted", "files": [file]})
    );
}

#[test]
fn no_vm_starts_in_maintenance() {
    let host = Host::new();
    fs::write(host.path("kernel"), "no kernel").unwrap();
    fs::write(host.path("vm.json"), r#"{"payload": {"kernel": "kernel"}}"#).unwrap();
    let vm = host.path("vm.json");
    let vm = vm.to_str().unwrap();
    let on = host
        .gantry(&["maintenance", "on", "--reason", "new disks"])
        .ok();
    assert_eq!(on, "maintenance is on: new disks\nno VM runs\n");
    assert_eq!(host.gantry(&["maintenance", "on"]).ok(), on);
    let error = host.gantry(&["run", vm]).failed(1);
    assert!(
        error.contains("in maintenance") && error.contains("new disks"),
        "{error}"
    );
    let off = host.gantry(&["maintenance", "off"]).ok();
    assert_eq!(off, "maintenance is off\nno VM runs\n");
    let off = host.gantry(&["maintenance", "off", "--json"]).ok();
    let off: Value = serde_json::from_str(&off).unwrap();
    assert_eq!(off, serde_json::json!({"maintenance": null, "running": []}));
    let error = host.gantry(&["run", vm]).failed(1);
    assert!(!error.contains("in maintenance"), "{error}");
}

#[test]
fn the_tree_is_shown_and_drawn() {
    let host = Host::new();
    let text = host.gantry(&["device", "tree"]).ok();
    assert_eq!(text.lines().count(), 3);
    assert!(text.contains("iommu 11 · disks · detached"), "{text}");
    let file = host.path("host.svg");
    host.gantry(&["device", "tree", "--svg", file.to_str().unwrap()])
        .ok();
    let svg = fs::read_to_string(&file).unwrap();
    assert!(svg.contains("0000:01:00.0") && svg.ends_with("</svg>\n"));
    let json: Value =
        serde_json::from_str(&host.gantry(&["device", "tree", "--json"]).ok()).unwrap();
    assert_eq!(json[1]["group"], "disks");
}

#[test]
fn completions_and_man_pages_come_from_the_grammar() {
    let host = Host::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = host.gantry(&["completions", shell]).ok();
        assert!(script.contains("release-quarantine"), "{shell}");
        assert!(
            !script.contains("sysfs-write"),
            "{shell} offers what is hidden"
        );
        assert!(!script.contains("No such"), "{shell}");
    }
    let dir = host.path("man1");
    host.gantry(&["man", dir.to_str().unwrap()]).ok();
    let page = fs::read_to_string(dir.join("gantry-group-create.1")).unwrap();
    assert!(
        page.contains("--rule") || page.contains("\\-\\-rule"),
        "{page}"
    );
    assert!(!dir.join("gantry-__restore.1").exists());
}

#[test]
fn the_helper_gives_back_what_a_vm_had_taken_when_its_input_ends() {
    let host = Host::new();
    let record = r#"{"id": "1b36:0010", "dsn": null, "serial": null, "driver": "nvme",
        "driver_override": null, "demand": true}"#;
    fs::create_dir_all(host.path("run/former")).unwrap();
    fs::write(host.path("run/former/0000:01:00.0"), record).unwrap();
    let device = host.path("sys/bus/pci/devices/0000:01:00.0");
    fs::write(device.join("driver_override"), "vfio-pci\n").unwrap();
    for file in ["drivers/vfio-pci/unbind", "drivers_probe"] {
        fs::write(host.path("sys/bus/pci").join(file), "").unwrap();
    }
    let mut args = vec!["__restore".to_owned()];
    args.extend(["sys", "dev", "proc", "run", "etc", "var"].map(|dir| {
        let path = host.path(dir);
        path.to_str().unwrap().to_owned()
    }));
    args.push("all".to_owned());
    args.push("0000:01:00.0".to_owned());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut helper = host.command(&args).spawn().unwrap();
    // No kernel is there to obey: the write to the driver is what can be seen.
    let unbind = host.path("sys/bus/pci/drivers/vfio-pci/unbind");
    let started = Instant::now();
    while fs::read_to_string(&unbind).unwrap() != "0000:01:00.0" {
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(10));
    }
    helper.kill().unwrap();
    helper.wait().unwrap();
}
