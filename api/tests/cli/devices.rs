//! The inventory: lists, detaching, quarantine, the tree.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::host::{Host, first_words};

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
        row(2).ends_with(&[
            "vfio-pci", "-", "11", "-", "-", "flr", "-", "detached", "disks", "-"
        ]),
        "{table}"
    );
    assert!(
        row(3).ends_with(&[
            "nvme", "-", "2", "-", "-", "flr", "-", "attached", "disks", "-"
        ]),
        "{table}"
    );
    assert!(
        table.contains("1b36:0010") && table.contains("QEMU NVM Express"),
        "{table}"
    );
}

#[test]
fn a_device_without_a_reset_is_shown_as_such() {
    let host = Host::new();
    let disk = host.path("sys/bus/pci/devices/0000:01:00.0");
    fs::write(disk.join("reset_method"), "\n").unwrap();
    let table = host.gantry(&["device", "list"]).ok();
    let row = table.lines().nth(2).unwrap();
    assert!(row.contains(" none "), "{table}");
    let text = host.gantry(&["device", "list", "--json"]).ok();
    let all: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(all[1]["is_reset"], false);
    assert_eq!(all[2]["is_reset"], true);
    host.node(11);
    let words = "0000:01:00.0 has no reset";
    let shown = host.gantry(&["group", "show", "disks"]).ok();
    assert!(shown.contains(words), "{shown}");
    let refused = host.gantry(&["group", "fit", "disks:1"]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.err.contains(words), "{refused:?}");
    let asked = r#"{"devices": [{"group": "disks", "allow_no_reset": true}]}"#;
    host.gantry(&["group", "fit", asked]).ok();
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
fn a_dry_run_refuses_what_the_host_uses() {
    let host = Host::new();
    let nic = host.path("sys/bus/pci/devices/0000:00:03.0/net/eno2");
    let class = host.path("sys/class/net");
    fs::create_dir_all(&class).unwrap();
    fs::create_dir_all(&nic).unwrap();
    std::os::unix::fs::symlink(&nic, class.join("eno2")).unwrap();
    let detach = || host.gantry(&["device", "detach", "00:03.0", "--dry-run"]);
    detach().ok();
    // Somebody else has the default route, and a VM is beside the card in the bridge.
    for (file, text) in [
        ("eno2/upper_br0", ""),
        ("br0/lower_eno2", ""),
        ("br0/lower_tap0", ""),
        ("tap0/upper_br0", ""),
        ("tap0/tun_flags", "0x1002\n"),
    ] {
        let file = class.join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }
    let text = detach().failed(1);
    let said = "0000:00:03.0 is eno2, part of br0; tap0, connected to it, is a tap device";
    assert!(text.contains(said), "{text}");
    assert!(text.contains("--override 0000:00:03.0"), "{text}");
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
fn the_helper_gives_back_what_a_vm_had_taken_when_its_input_ends() {
    let host = Host::new();
    let record = r#"{"id": "1b36:0010", "dsn": null, "serial": null, "driver": "nvme",
        "driver_override": null, "demand": true}"#;
    fs::create_dir_all(host.path("run/restore/driver")).unwrap();
    fs::write(host.path("run/restore/driver/0000:01:00.0"), record).unwrap();
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

#[test]
fn a_class_without_a_name_is_shown_in_hex() {
    let host = Host::new();
    host.device("0000:09:00.0", ["0x1b36", "0x0001", "0xc00102"], "none", 30);
    let table = host.gantry(&["device", "list"]).ok();
    let row = table.lines().find(|line| line.starts_with("0000:09:00.0"));
    let row = row.unwrap_or_else(|| panic!("{table}"));
    assert!(row.split_whitespace().any(|cell| cell == "c00102"), "{row}");
    let text = host.gantry(&["device", "list", "--json"]).ok();
    let devices: Value = serde_json::from_str(&text).unwrap();
    let mut devices = devices.as_array().unwrap().iter();
    let device = devices.find(|device| device["bdf"] == "0000:09:00.0");
    assert_eq!(device.unwrap()["class"], "c00102");
}
