//! Changes of groups: what is written, and what is refused as a whole.

use super::*;
use crate::fixture::{Fake, FakeHost, bdf};
use std::fs;

fn host() -> FakeHost {
    let host = FakeHost::new(&[
        Fake::nvme("01:00.0", 1),
        Fake::nvme("02:00.0", 2),
        Fake::nvme("03:00.0", 3).class(0x03_00_00),
        Fake::nvme("00:01.0", 4).class(0x06_04_00),
    ]);
    host.file(
        "etc/groups.d/10-more.json",
        r#"{"$schema": "x", "groups": [{"name": "gpu", "rules": [{"class": "03"}]}]}"#,
    );
    host
}

fn edit(host: &FakeHost, change: impl FnOnce(&mut GroupFiles) -> Result<(), EditError>) -> String {
    let mut files = GroupFiles::open(&host.paths).unwrap();
    match change(&mut files).and_then(|()| files.save()) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    }
}

fn chosen(devices: &[HostDevice]) -> Vec<Chosen<'_>> {
    devices.iter().map(Chosen::Pci).collect()
}

fn group(name: &str, rules: serde_json::Value) -> ResourceGroup {
    serde_json::from_value(serde_json::json!({"name": name, "rules": rules})).unwrap()
}

fn members(host: &FakeHost, name: &str) -> Vec<HostBdf> {
    let groups = Groups::load(&host.paths).unwrap();
    let owned = |device: &HostDevice| groups.group_of(device).is_some_and(|one| one.name == name);
    let devices = host.scan().into_iter().filter(owned);
    devices.map(|device| device.bdf).collect()
}

#[test]
fn a_group_is_made_filled_changed_renamed_emptied_and_deleted() {
    let host = host();
    let disks = [host.read("01:00.0"), host.read("02:00.0")];
    let said = edit(&host, |files| {
        files.create(group("disks", serde_json::json!([])))?;
        files.add("disks", &disks)
    });
    assert_eq!(said, "");
    assert_eq!(members(&host, "disks"), [bdf("01:00.0"), bdf("02:00.0")]);
    let text = fs::read_to_string(host.paths.config.join("groups.json")).unwrap();
    assert!(text.contains(r#""slot": "0000:01:00.0""#) && text.contains(r#""id": "1b36:0010""#));
    let change = GroupChange {
        name: Some("fast".to_owned()),
        description: Some("scratch".to_owned()),
        drop_rules: vec![2],
        ..GroupChange::default()
    };
    assert_eq!(edit(&host, |files| files.change("disks", change)), "");
    assert_eq!(members(&host, "fast"), [bdf("01:00.0")]);
    assert_eq!(
        edit(&host, |files| files.remove("fast", &chosen(&disks[..1]))),
        ""
    );
    assert_eq!(members(&host, "fast"), []);
    assert_eq!(edit(&host, |files| files.delete("fast")), "");
    assert!(Groups::load(&host.paths).unwrap().get("fast").is_none());
}

#[test]
fn a_drop_in_is_changed_where_it_is_and_keeps_what_else_it_says() {
    let host = host();
    let change = GroupChange {
        class: Some("gpu".to_owned()),
        ..GroupChange::default()
    };
    assert_eq!(edit(&host, |files| files.change("gpu", change)), "");
    assert!(!host.paths.config.join("groups.json").exists());
    let text = fs::read_to_string(host.paths.config.join("groups.d/10-more.json")).unwrap();
    assert!(
        text.contains(r#""$schema": "x""#) && text.contains(r#""class": "gpu""#),
        "{text}"
    );
}

#[test]
fn a_function_that_came_with_its_card_goes_with_it() {
    let gpu = |function: u8, class| Fake::nvme(&format!("0b:00.{function}"), 7).class(class);
    let host = FakeHost::new(&[gpu(0, 0x03_00_00), gpu(1, 0x04_03_00)]);
    let (first, audio) = ([host.read("0b:00.0")], [host.read("0b:00.1")]);
    let said = edit(&host, |files| {
        files.create(group("gpus", serde_json::json!([])))?;
        files.add("gpus", &first)
    });
    assert_eq!(said, "");
    let both = [bdf("0b:00.0"), bdf("0b:00.1")];
    assert_eq!(members(&host, "gpus"), both);
    let said = edit(&host, |files| files.remove("gpus", &chosen(&audio)));
    let way_out = "`gantry group remove gpus 0000:0b:00.0` takes out the whole card";
    assert!(said.contains(way_out), "{said}");
    assert_eq!(
        edit(&host, |files| files.remove("gpus", &chosen(&first))),
        ""
    );
    assert!(members(&host, "gpus").is_empty());
    let said = edit(&host, |files| files.remove("gpus", &chosen(&audio)));
    assert!(said.contains("is not in group"), "{said}");
}

#[test]
fn what_makes_no_sense_is_refused_and_nothing_is_written() {
    let host = host();
    let disk = [host.read("01:00.0")];
    let gpu = [host.read("03:00.0")];
    let bridge = [host.read("00:01.0")];
    let before = fs::read(host.paths.config.join("groups.d/10-more.json")).unwrap();
    let rename = |name: &str| GroupChange {
        name: Some(name.to_owned()),
        ..GroupChange::default()
    };
    let drop_rule = GroupChange {
        drop_rules: vec![2],
        ..GroupChange::default()
    };
    let empty = || group("disks", serde_json::json!([]));
    for (said, expected) in [
        (edit(&host, |f| f.delete("gpus")), "did you mean \"gpu\"?"),
        (
            edit(&host, |f| f.create(group("gpu", serde_json::json!([])))),
            "already a group named",
        ),
        (
            edit(&host, |f| f.change("gpu", drop_rule)),
            "has no rule 2: it has 1",
        ),
        (
            edit(&host, |f| f.change("gpu", rename("a b"))),
            "cannot name a group",
        ),
        (
            edit(&host, |f| f.remove("gpu", &chosen(&gpu))),
            "rule 1 of group \"gpu\" also takes other devices than 0000:03:00.0",
        ),
        (
            edit(&host, |f| f.remove("gpu", &chosen(&disk))),
            "0000:01:00.0 is not in group",
        ),
        (
            edit(&host, |f| {
                f.create(empty()).and_then(|()| f.add("disks", &gpu))
            }),
            "belongs to group \"gpu\"",
        ),
        (
            edit(&host, |f| {
                f.create(empty()).and_then(|()| f.add("disks", &bridge))
            }),
            "cannot be in a group",
        ),
    ] {
        assert!(said.contains(expected) && !said.contains('\n'), "{said}");
    }
    assert!(!host.paths.config.join("groups.json").exists());
    assert_eq!(
        fs::read(host.paths.config.join("groups.d/10-more.json")).unwrap(),
        before
    );
}
