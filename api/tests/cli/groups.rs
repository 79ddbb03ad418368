//! Groups: what is in them, what is free, what a change came to.

use std::fs;

use serde_json::Value;

use crate::host::{Host, first_words};

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
fn a_card_is_counted_and_given_as_one() {
    let host = Host::new();
    let gpu = |function: u8, device, class| {
        let bdf = format!("0000:0b:00.{function}");
        host.device(&bdf, ["0x10de", device, class], "vfio-pci", 20);
    };
    gpu(0, "0x1e87", "0x030000");
    gpu(1, "0x10f8", "0x040300");
    host.node(20);
    let rule = r#"{"class": "03"}"#;
    host.gantry(&["group", "create", "gpus", "--rule", rule])
        .ok();
    let text = host.gantry(&["group", "list", "--json"]).ok();
    let group = &serde_json::from_str::<Value>(&text).unwrap()[1];
    assert_eq!((&group["total"], &group["free"]), (&1.into(), &1.into()));
    assert_eq!(group["devices"][1]["bdf"], "0000:0b:00.1");
    let fits = host.gantry(&["group", "fit", "gpus:1"]).ok();
    assert!(fits.contains("1 of 1: 0000:0b:00.0 0000:0b:00.1"), "{fits}");
    let refused = host.gantry(&["group", "fit", "gpus:2"]);
    assert_eq!(refused.code, Some(1));
    let words = "group \"gpus\" has only 1 free device (2 asked for)";
    assert!(refused.err.contains(words), "{refused:?}");
}

#[test]
fn what_cannot_be_passed_yet_is_said_at_once() {
    let host = Host::new();
    let words = "USB passthrough is not supported yet";
    let created = host
        .gantry(&["group", "create", "sticks", "--type", "usb"])
        .ok();
    assert!(created.contains(words), "{created}");
    let shown = host.gantry(&["group", "show", "sticks"]).ok();
    assert!(shown.contains(words), "{shown}");
    assert!(!shown.contains("device detach"), "{shown}");
    let refused = host.gantry(&["group", "fit", "sticks:1"]).failed(1);
    assert!(refused.contains(words), "{refused}");
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
        let error = host.gantry(&args).failed(2);
        assert!(error.contains(said), "{error}");
    }
    let error = host
        .gantry(&["group", "match", "--rule", r#"{"vendor": "1"}"#])
        .failed(2);
    assert!(error.contains("four hex digits"), "{error}");
    host.gantry(&["group", "match"]).failed(2);
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
    assert_eq!(done.out, "group \"disks\": 0 of 2: none\n");
    let told = "No valid host was found: group \"disks\" has no free device (2 asked for); of 3 devices dropped: ";
    assert!(done.err.contains(told), "{}", done.err);
    let error = host.gantry(&["group", "fit", "qat-pf:1"]).failed(2);
    assert!(error.contains("limits of its driver"), "{error}");
}

#[test]
fn a_group_is_shown_to_programs_with_its_counts() {
    let host = Host::new();
    let text = host.gantry(&["group", "show", "disks", "--json"]).ok();
    let group: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(group["name"], "disks");
    assert_eq!(
        (&group["total"], &group["used"], &group["free"]),
        (&2.into(), &0.into(), &1.into())
    );
    assert_eq!(group["devices"].as_array().unwrap().len(), 2);
}
