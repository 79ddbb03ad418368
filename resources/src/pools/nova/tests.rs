//! Tests: the samples of the field, and what they mean.

use super::*;
use crate::fixture::{Fake, FakeHost, bdf};
use serde_json::json;

fn gpu() -> HostDevice {
    let host = FakeHost::new(&[Fake::nvme("0b:00.0", 1).class(0x03_00_00)]);
    HostDevice {
        id: crate::facts::ids::PciId {
            vendor: 0x10de,
            device: 0x1c30,
        },
        ..host.read("0b:00.0")
    }
}

#[test]
fn the_samples_are_understood() {
    let spec: DeviceSpec =
        serde_json::from_str(r#"{"vendor_id": "10de", "product_id": "1c30"}"#).unwrap();
    let alias: Alias = serde_json::from_str(
        r#"{"vendor_id": "10de", "product_id": "1c30", "device_type": "type-PCI", "name": "p2000"}"#,
    )
    .unwrap();
    let gpu = gpu();
    assert!(spec.matches(&gpu) && alias.has_ids(&gpu) && alias.has_type(&gpu));
    assert_eq!(alias.name, "p2000");
    let other = HostDevice {
        id: crate::facts::ids::PciId {
            vendor: 0x10de,
            device: 0x10f1,
        },
        ..gpu
    };
    assert!(!spec.matches(&other) && !alias.has_ids(&other));
}

/// Whether a spec of this address takes a device at `at`, a function of the physical one at `pf` if given.
fn takes(address: &serde_json::Value, at: &str, pf: Option<&str>) -> bool {
    let spec: DeviceSpec = serde_json::from_value(json!({"address": address})).unwrap();
    let again = serde_json::to_value(&spec).unwrap();
    assert_eq!(serde_json::from_value::<DeviceSpec>(again).unwrap(), spec);
    spec.matches(&HostDevice {
        bdf: bdf(at),
        physfn: pf.map(bdf),
        ..gpu()
    })
}

#[test]
fn parts_of_an_address_are_left_out_on_the_left_and_are_hex_numbers() {
    for (address, covers) in [
        ("0000:0b:00.0", true),
        ("0b:00.0", true),
        ("b:0.0", true),
        ("0: 0b : 00 . 0 ", true),
        ("0x0B:00.0", true),
        ("*:0b:00.*", true),
        ("*:0B:*", true),
        (":0b:00.", true),
        ("0000:0b:", true),
        ("0000::.", true),
        (":00.", true),
        ("00.0", true),
        ("00", true),
        (".0", true),
        ("*", true),
        ("", true),
        ("*:0c:00.*", false),
        (":0a:00.", false),
        // A slot, not a bus.
        ("0b", false),
        ("*:0b", false),
        (".1", false),
        ("0001:0b:00.0", false),
    ] {
        assert_eq!(takes(&json!(address), "0b:00.0", None), covers, "{address}");
    }
    for (address, said) in [
        ("gpu0", "its slot \"gpu0\" is not a hex number up to 1F"),
        ("0b:20.0", "its slot \"20\" is not a hex number up to 1F"),
        ("0b:00.8", "its function \"8\" is not a hex number up to 7"),
        ("100:00.0", "its bus \"100\" is not a hex number up to FF"),
        (
            "10000:0b:00.0",
            "its domain \"10000\" is not a hex number up to FFFF",
        ),
        ("0:0:0b:00.0", "write it like"),
        ("-1:00.0", "its bus \"-1\""),
        ("0b:0?.0", "its slot \"0?\""),
    ] {
        let spec = serde_json::from_value::<DeviceSpec>(json!({"address": address}));
        let error = spec.unwrap_err().to_string();
        assert!(
            error.contains("is not a PCI address") && error.contains(said),
            "{error}"
        );
    }
}

#[test]
fn an_address_in_parts_has_an_expression_for_each() {
    for (address, covers) in [
        (
            json!({"domain": ".*", "bus": "0b", "slot": "00", "function": "[0-2]"}),
            true,
        ),
        (json!({"bus": "0[ab]"}), true),
        (json!({"bus": "0"}), true),
        (json!({"bus": "b"}), false),
        (json!({"bus": "0B"}), false),
        (json!({"function": "[1-2]"}), false),
        (json!({}), true),
    ] {
        assert_eq!(takes(&address, "0b:00.0", None), covers, "{address}");
    }
}

#[test]
fn only_the_whole_address_of_a_physical_function_stands_for_its_virtual_ones() {
    for (address, covers) in [
        (json!("0000:0a:00.0"), true),
        (json!("0:a:0.0"), true),
        (
            json!({"domain": "0000", "bus": "0a", "slot": "00", "function": "0"}),
            true,
        ),
        (json!("*:0a:00.*"), false),
        (json!(":0a:00."), false),
        (json!("0a:00.0"), false),
        (json!("0000:0a:00.*"), false),
        (json!({"bus": "0a", "slot": "00"}), false),
        (json!("0000:0a:00.1"), false),
        (json!("*:0a:*.*"), true),
        (json!("0a:10.0"), true),
    ] {
        assert_eq!(
            takes(&address, "0a:10.0", Some("0a:00.0")),
            covers,
            "{address}"
        );
    }
}

#[test]
fn an_interface_names_its_device_also_while_that_is_with_vfio() {
    let host = FakeHost::new(&[
        Fake::nvme("03:00.0", 1).class(0x02_00_00).driver("igb"),
        Fake::nvme("04:00.0", 2)
            .class(0x02_00_00)
            .driver("virtio-pci"),
        Fake::nvme("05:00.0", 3)
            .class(0x0c_03_30)
            .driver("xhci_hcd"),
    ]);
    host.child(bdf("03:00.0"), "net/eth0", "class/net/eth0");
    host.child(bdf("04:00.0"), "virtio3/net/eth1", "class/net/eth1");
    host.child(
        bdf("05:00.0"),
        "usb1/1-1/1-1:1.0/net/enx1",
        "class/net/enx1",
    );
    let taken = || {
        let text = r#"[{"devname": "eth0"}, {"devname": "eth1"}, {"devname": "enx1"}, {"devname": "eth9"}]"#;
        host.file("etc/device_spec.json", text);
        let groups = crate::pools::group::Groups::load(&host.paths).unwrap();
        let devices = host.scan().into_iter();
        let mut taken: Vec<String> = devices
            .filter(|device| groups.exposes(device))
            .map(|device| device.bdf.to_string())
            .collect();
        let vf = HostDevice {
            bdf: bdf("03:10.0"),
            physfn: Some(bdf("03:00.0")),
            ..host.read("03:00.0")
        };
        taken.extend(groups.exposes(&vf).then(|| "its function".to_owned()));
        taken
    };
    let all = ["0000:03:00.0", "0000:04:00.0", "its function"];
    assert_eq!(taken(), all);
    let device = [bdf("03:00.0")];
    let kernel = crate::fixture::FakeKernel::new(&host);
    crate::moving::bind::detach(
        &host.paths,
        &kernel,
        &crate::moving::bind::BindRequest::of(&device),
    )
    .unwrap();
    std::fs::remove_file(host.paths.sysfs.join("class/net/eth0")).unwrap();
    assert_eq!(taken(), all);
}

#[test]
fn types_are_those_of_sriov() {
    let plain = gpu();
    let pf = HostDevice {
        sriov: Some(crate::inventory::device::Sriov {
            total: 8,
            active: 0,
        }),
        ..plain.clone()
    };
    let vf = HostDevice {
        physfn: Some(bdf("0a:00.0")),
        ..plain.clone()
    };
    let types = [&plain, &pf, &vf].map(DeviceType::of);
    assert_eq!(types, [DeviceType::Pci, DeviceType::Pf, DeviceType::Vf]);
    let alias: Alias = serde_json::from_value(json!({"name": "any"})).unwrap();
    let taken = [&plain, &pf, &vf].map(|device| alias.has_type(device));
    assert_eq!(taken, [true, false, true], "a PF must be asked for");
}

#[test]
fn traits_and_classes_have_novas_form() {
    let traits: Traits =
        serde_json::from_value(json!("CUSTOM_GREEN, hw-fast,,my-awesome-gpu")).unwrap();
    let names: Vec<&str> = traits.names().collect();
    assert_eq!(names, ["CUSTOM_GREEN", "HW_FAST", "CUSTOM_MY_AWESOME_GPU"]);
    let listed: Traits =
        serde_json::from_value(json!(["green", "HW_FAST", "My awesome  gpu"])).unwrap();
    assert_eq!(listed, traits);
    for (name, class) in [
        ("my - fast GPU", "CUSTOM_MY_FAST_GPU"),
        (" PGPU ", "PGPU"),
        ("pgpu", "PGPU"),
        ("GPU_VF", "CUSTOM_GPU_VF"),
        ("gpu.a40", "CUSTOM_GPU_A40"),
        ("custom_a40", "CUSTOM_A40"),
        ("custom gpu", "CUSTOM_CUSTOM_GPU"),
    ] {
        assert_eq!(resource_class(name), class);
    }
    assert_eq!(class_of(&gpu()), "CUSTOM_PCI_10DE_1C30");
}

#[test]
fn ids_are_hex_numbers_in_any_form() {
    for id in ["10de", "10DE", "0x10de", " 10de ", "*"] {
        let spec: DeviceSpec = serde_json::from_value(json!({"vendor_id": id})).unwrap();
        assert!(spec.matches(&gpu()), "{id}");
    }
    let spec: DeviceSpec = serde_json::from_value(json!({"product_id": "de"})).unwrap();
    assert!(!spec.matches(&gpu()));
}

#[test]
fn truth_has_the_words_of_oslo() {
    for (word, on) in [
        (json!("Yes"), true),
        (json!(" true "), true),
        (json!("T"), true),
        (json!("on"), true),
        (json!(1), true),
        (json!("N"), false),
        (json!("Off"), false),
        (json!("0"), false),
        (json!(false), false),
    ] {
        let spec: DeviceSpec = serde_json::from_value(json!({"managed": word})).unwrap();
        assert_eq!(spec.managed, Some(Flag(on)), "{word}");
    }
    for word in [json!("maybe"), json!(""), json!(2), json!([])] {
        let spec = serde_json::from_value::<DeviceSpec>(json!({"managed": word}));
        assert!(spec.is_err(), "{word}");
    }
    for word in [json!("false"), json!("no"), json!(false), json!(null)] {
        let spec = json!({"remote_managed": word, "physical_network": null, "trusted": "true"});
        assert!(serde_json::from_value::<DeviceSpec>(spec).is_ok(), "{word}");
    }
}

#[test]
fn words_that_are_none_are_refused() {
    for (spec, said) in [
        (json!({"vendor_id": "nvidia"}), "four hex digits"),
        (json!({"vendr_id": "10de"}), "unknown field `vendr_id`"),
        (json!({"address": "gpu0"}), "\"gpu0\" is not a PCI address"),
        (json!({"address": {"bus": "("}}), "not a regular expression"),
        (json!({"one_time_use": "maybe"}), "true or false"),
        (
            json!({"remote_managed": "true"}),
            "a network service on the card itself",
        ),
    ] {
        let error = serde_json::from_value::<DeviceSpec>(spec)
            .unwrap_err()
            .to_string();
        assert!(error.contains(said), "{error}");
    }
    let both = json!({"devname": "eth0", "address": "03:00.0"});
    for (spec, said) in [
        (both, "devname and address name a device each"),
        (json!({"devname": "../eth0"}), "name of a network interface"),
        (json!([[]]), "expected an object"),
        (json!([{"vendor_id": "8086"}, ["10de"]]), "[1]"),
    ] {
        let host = FakeHost::new(&[]);
        host.file("etc/device_spec.json", &spec.to_string());
        let error = crate::pools::group::Groups::load(&host.paths)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("device_spec.json:1:") && error.contains(said),
            "{error}"
        );
    }
    let alias = json!({"name": "a", "device_type": "type-GPU"});
    let error = serde_json::from_value::<Alias>(alias)
        .unwrap_err()
        .to_string();
    assert!(error.contains("type-PCI"), "{error}");
}

#[test]
fn an_alias_has_one_policy_and_one_device_type_in_all_files() {
    let load = |groups: &str, aliases: &str| {
        let host = FakeHost::new(&[]);
        host.groups(&format!(r#"{{"alias": [{groups}]}}"#));
        host.file("etc/alias.json", &format!("[{aliases}]"));
        crate::pools::group::Groups::load(&host.paths).map_err(|error| error.to_string())
    };
    let plain = r#"{"name": "gpu", "vendor_id": "10de", "product_id": "1c30"}"#;
    let more = |more: &str| plain.replace("1c30\"", &format!("1c31\", {more}"));
    for (other, key) in [
        (more(r#""numa_policy": "required""#), "numa_policy"),
        (more(r#""device_type": "type-VF""#), "device_type"),
    ] {
        let both = format!("{plain}, {other}");
        for (groups, aliases, file) in [
            (both.as_str(), "", "groups.json"),
            ("", both.as_str(), "alias.json"),
            (plain, other.as_str(), "alias.json"),
        ] {
            let error = load(groups, aliases).unwrap_err();
            let said =
                format!("{file}: alias \"gpu\": its definitions name different values of `{key}`");
            assert!(error.contains(&said), "{error}");
        }
    }
    // "legacy" is what is meant without a policy, and blanks around a name are none of it.
    let same = more(r#""numa_policy": "legacy""#).replace("\"gpu\"", "\" gpu \"");
    let groups = load(plain, &same).unwrap();
    assert_eq!(groups.alias("gpu").len(), 2);
    assert!(
        load("", r#"{"name": " "}"#)
            .unwrap_err()
            .contains("1 to 256 characters")
    );
    let host = FakeHost::new(&[]);
    let alias = |text: &str| serde_json::from_str::<Alias>(text).unwrap();
    let add = |text: &str| crate::pools::group::change_aliases(&host.paths, vec![alias(text)], &[]);
    add(plain).unwrap();
    let error = add(&more(r#""device_type": "type-PF""#))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("different values of `device_type`"),
        "{error}"
    );
    // Nor one that a file of groups contradicts: all commands would refuse to read them.
    let host = FakeHost::new(&[]);
    host.groups(&format!(r#"{{"alias": [{plain}]}}"#));
    let other = alias(&more(r#""numa_policy": "socket""#));
    let error = crate::pools::group::change_aliases(&host.paths, vec![other], &[]).unwrap_err();
    assert!(
        error.to_string().contains("values of `numa_policy`"),
        "{error}"
    );
    crate::pools::group::Groups::load(&host.paths).unwrap();
}

#[test]
fn an_alias_may_ask_for_what_a_spec_says_of_live_migration() {
    let host = FakeHost::new(&[Fake::nvme("01:00.0", 1).driver("vfio-pci")]);
    host.file(
        "etc/alias.json",
        r#"[{"name": "yes", "vendor_id": "1b36", "live_migratable": "yes"},
            {"name": "no", "vendor_id": "1b36", "live_migratable": "no"}]"#,
    );
    for (spec, free) in [
        (r#"{"vendor_id": "*", "live_migratable": "yes"}"#, [1, 0]),
        (r#"{"vendor_id": "*"}"#, [0, 1]),
    ] {
        host.file("etc/device_spec.json", spec);
        let requests =
            ["yes", "no"].map(|name| crate::pools::request::DeviceRequest::alias(name, 1));
        let each = requests.map(|request| {
            let fit = crate::allocation::fit(
                &host.paths,
                &[request],
                &crate::pools::request::Placement::default(),
            )
            .unwrap();
            fit.requests[0].free
        });
        assert_eq!(each, free, "{spec}");
    }
}
