//! Virtual functions, mediated devices, and what is asked for ahead.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::Value;

use crate::host::Host;

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
        (r#"{"pf": "00:03.0"}"#, 2, "`count`: this key is missing"),
        (
            r#"{"pf": "00:03.0", "count": 2, "vlan": 5000}"#,
            2,
            "`sriov.vlan`: 5000 is no VLAN: use 1 to 4094",
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
    let hint = "A VM's vGPU is created when the VM starts";
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
        .failed(2);
    assert!(error.contains("only groups of type \"vgpu\""), "{error}");
}
