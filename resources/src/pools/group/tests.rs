//! Tests: files right and wrong.

use super::*;
use crate::fixture::{Fake, FakeHost};

fn host(groups: &str) -> FakeHost {
    let host = FakeHost::new(&[
        Fake::nvme("0000:01:00.0", 1),
        Fake::nvme("0000:02:00.0", 2).class(0x03_00_00),
        Fake::nvme("0000:03:00.0", 3)
            .class(0x06_04_00)
            .driver("pcieport"),
    ]);
    host.groups(groups);
    host
}

fn refusal(groups: &str) -> String {
    let host = host(groups);
    let error = Groups::load(&host.paths).unwrap_err().to_string();
    error.replace(&host.paths.config.display().to_string(), "/etc/gantry")
}

#[test]
fn a_file_is_read_as_it_is_documented() {
    let host = host(
        r#"{"$schema": "x", "groups": [{"name": "fast-disks", "type": "nvme", "description": "Scratch",
                "class": "storage", "rules": [{"vendor": "1b36", "device": "0010", "class": "0108",
                "slot": "0000:01:00.0"}]}]}"#,
    );
    let groups = Groups::load(&host.paths).unwrap();
    let group = groups.get("fast-disks").unwrap();
    assert_eq!(
        (group.kind, group.class.as_deref()),
        (GroupType::Nvme, Some("storage"))
    );
    assert_eq!(group.file, host.paths.config.join("groups.json"));
    let owners: Vec<_> = host
        .scan()
        .iter()
        .map(|device| groups.group_of(device).map(|group| group.name.clone()))
        .collect();
    assert_eq!(owners, [Some("fast-disks".to_owned()), None, None]);
}

#[test]
fn no_files_are_no_groups() {
    let host = FakeHost::new(&[]);
    assert_eq!(Groups::load(&host.paths).unwrap().iter().count(), 0);
}

#[test]
fn the_type_is_a_filter_and_bridges_are_in_no_group() {
    for (kind, matched) in [
        ("pci", 2),
        ("nvme", 1),
        ("sriov-nic", 0),
        ("vgpu", 0),
        ("usb", 0),
    ] {
        let host = host(&format!(
            r#"{{"groups": [{{"name": "g", "type": "{kind}", "rules": [{{"vendor": "1b36"}}]}}]}}"#
        ));
        let groups = Groups::load(&host.paths).unwrap();
        let count = host
            .scan()
            .iter()
            .filter(|device| groups.group_of(device).is_some())
            .count();
        assert_eq!(count, matched, "{kind}");
    }
}

#[test]
fn drop_ins_follow_in_the_order_of_their_names_and_the_first_match_owns() {
    let host = host(r#"{"groups": [{"name": "main", "rules": [{"class": "03"}]}]}"#);
    host.file(
        "etc/groups.d/20-b.json",
        r#"{"groups": [{"name": "b", "rules": [{"vendor": "1b36"}]}]}"#,
    );
    host.file(
        "etc/groups.d/10-a.json",
        r#"{"groups": [{"name": "a", "rules": [{"class": "01"}]}]}"#,
    );
    host.file("etc/groups.d/README", "not JSON");
    host.file("etc/groups.d/.hidden.json", "not JSON");
    let groups = Groups::load(&host.paths).unwrap();
    let names: Vec<_> = groups.iter().map(|group| group.name.as_str()).collect();
    assert_eq!(names, ["main", "a", "b"]);
    let overlaps: Vec<_> = groups
        .overlaps(&host.scan())
        .into_iter()
        .map(|one| (one.owner, one.others))
        .collect();
    let b = vec!["b".to_owned()];
    assert_eq!(
        overlaps,
        [("a".to_owned(), b.clone()), ("main".to_owned(), b)]
    );
}

#[test]
fn two_groups_of_one_name_are_refused_with_both_files() {
    let text = r#"{"groups": [{"name": "nvme"}]}"#;
    let host = host(text);
    host.file("etc/groups.d/a.json", text);
    let error = Groups::load(&host.paths).unwrap_err().to_string();
    assert!(
        error.contains("groups.d/a.json:1:22: `name`: ") && error.contains("etc/groups.json:1:22"),
        "{error}"
    );
    let error = refusal(r#"{"groups": [{"name": "nvme"}, {"name": "nvme"}]}"#);
    assert!(
        error.contains("already a group named \"nvme\" at /etc/gantry/groups.json"),
        "{error}"
    );
}

#[test]
fn a_wrong_file_is_refused_with_file_line_key_and_the_way_out() {
    for (text, said) in [
        (
            "{\"groups\": [\n {\"name\": \"a\", \"rules\": [{\"vendr\": \"8086\"}]}]}",
            "groups.json:2:27: unknown key `groups[0].rules[0].vendr`: did you mean `vendor`?",
        ),
        (
            r#"{"groups": [{"name": "a", "type": "nvm"}]}"#,
            "`groups[0].type`: \"nvm\" is unknown: did you mean \"nvme\"?",
        ),
        (
            r#"{"groups": [{"name": "a", "frobnicate": 1}]}"#,
            "the keys here are name, type, description, class, rules",
        ),
        (
            r#"{"groups": [{"name": "a", "rules": [{"class": "1"}]}]}"#,
            "`groups[0].rules[0].class`: \"1\" is no",
        ),
        (
            r#"{"groups": [{"name": "a", "rules": [{"class": "01"}, {}]}]}"#,
            "`groups[0].rules[1]`: a rule needs",
        ),
        (
            r#"{"groups": [{"name": "a b"}]}"#,
            "`groups[0].name`: \"a b\" cannot name a group",
        ),
        (r#"{"groups": [{"name": ""}]}"#, "cannot name a group"),
        (
            r#"{"groups": [{"type": "pci"}]}"#,
            "`groups[0].name`: this key is missing: add \"name\"",
        ),
        (
            r#"{"groups": [{"name": "a", "name": "b"}]}"#,
            "key `name` stands twice in one object: remove one",
        ),
        (
            r#"{"groups": {}}"#,
            "groups.json:1:12: `groups`: expected a list, found an object",
        ),
        (r#"{"group": []}"#, "did you mean `groups`?"),
        (
            "{\"groups\": []}\n}",
            "groups.json:2:1: not valid JSON: trailing characters",
        ),
        ("", "groups.json:1:1: not valid JSON: EOF"),
    ] {
        let error = refusal(text);
        assert!(
            error.starts_with("/etc/gantry/groups.json:") && error.contains(said),
            "{text}\n{error}"
        );
        assert!(
            !error.contains(" at line ") && !error.contains('\n'),
            "{error}"
        );
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let host = FakeHost::new(&[]);
    std::fs::create_dir_all(host.paths.config.join("groups.json")).unwrap();
    let error = Groups::load(&host.paths).unwrap_err().to_string();
    assert!(error.contains("groups.json"), "{error}");
}

#[test]
fn the_schema_says_what_the_parser_says() {
    let schema = serde_json::to_value(Groups::schema()).unwrap();
    let text = schema.to_string();
    for word in [
        "sriov-nic",
        "additionalProperties",
        "slot",
        "serial",
        "^(0x)?[0-9a-fA-F]{4}$",
        "minProperties",
    ] {
        assert!(text.contains(word), "{word} is not in {schema:#}");
    }
    assert!(!text.contains("\"file\""), "{schema:#}");
}

#[test]
fn novas_json_is_taken_as_one_as_a_list_and_as_text() {
    let one = r#"{"vendor_id": "1b36", "product_id": "0010"}"#;
    let text = serde_json::to_string(one).unwrap();
    for spec in [one.to_owned(), format!("[{one}]"), text] {
        let host = host(&format!(r#"{{"device_spec": {spec}}}"#));
        let groups = Groups::load(&host.paths).unwrap();
        assert!(groups.exposes(&host.read("0000:01:00.0")), "{spec}");
        let host = self::host(r#"{"groups": []}"#);
        host.file("etc/device_spec.json", &spec);
        let groups = Groups::load(&host.paths).unwrap();
        assert!(groups.exposes(&host.read("0000:01:00.0")), "{spec}");
    }
}

#[test]
fn a_mistake_in_novas_json_is_told_with_its_place() {
    for (file, text, said) in [
        (
            "alias.json",
            "[{\"name\": \"x\"},\n {\"name\": \"y\", \"vendr_id\": \"1\"}]",
            "alias.json:2:",
        ),
        (
            "alias.json",
            "[{\"name\": \"y\", \"vendr_id\": \"1\"}]",
            "did you mean `vendor_id`?",
        ),
        (
            "device_spec.json",
            "{\n\"vendor_id\": \"nvidia\"}",
            "device_spec.json:2:14: `vendor_id`: \"nvidia\" is not a PCI id",
        ),
        (
            "device_spec.json",
            "3",
            "expected an object, or a list of objects",
        ),
        (
            "alias.json",
            "\"gpu\"",
            "expected an object, or a list of objects",
        ),
        (
            "alias.json",
            "{\"vendor_id\": \"10de\"}",
            "`name`: this key is missing",
        ),
    ] {
        let host = host(r#"{"groups": []}"#);
        host.file(&format!("etc/{file}"), text);
        let error = Groups::load(&host.paths).unwrap_err().to_string();
        assert!(error.contains(said) && !error.contains('\n'), "{error}");
    }
}
