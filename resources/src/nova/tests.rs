//! Tests: the samples of the field, and what they mean.

use super::*;
use crate::fixture::{Fake, FakeHost, bdf};
use serde_json::json;

fn gpu() -> HostDevice {
    let host = FakeHost::new(&[Fake::nvme("0b:00.0", 1).class(0x03_00_00)]);
    HostDevice {
        id: crate::ids::PciId {
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
        id: crate::ids::PciId {
            vendor: 0x10de,
            device: 0x10f1,
        },
        ..gpu
    };
    assert!(!spec.matches(&other) && !alias.has_ids(&other));
}

#[test]
fn an_address_is_a_pattern_or_an_expression_for_each_part() {
    let gpu = gpu();
    for (address, covers) in [
        (json!("0000:0b:00.0"), true),
        (json!("0b:00.0"), true),
        (json!("*:0b:00.*"), true),
        (json!("*:0B:*"), true),
        (json!("0000:0b:"), true),
        (json!("*:0c:00.*"), false),
        (
            json!({"domain": ".*", "bus": "0b", "slot": "00", "function": "[0-2]"}),
            true,
        ),
        (json!({"bus": "0[ab]"}), true),
        (json!({"function": "[1-2]"}), false),
    ] {
        let spec: DeviceSpec = serde_json::from_value(json!({"address": address})).unwrap();
        assert_eq!(spec.matches(&gpu), covers, "{address}");
        let again = serde_json::to_value(&spec).unwrap();
        assert_eq!(serde_json::from_value::<DeviceSpec>(again).unwrap(), spec);
    }
    let spec: DeviceSpec = serde_json::from_value(json!({"address": "0a:00.0"})).unwrap();
    let vf = HostDevice {
        physfn: Some(bdf("0a:00.0")),
        ..gpu
    };
    assert!(spec.matches(&vf), "a PF's address stands for its VFs");
}

#[test]
fn types_are_those_of_sriov() {
    let plain = gpu();
    let pf = HostDevice {
        sriov: Some(crate::Sriov {
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
fn traits_and_classes_are_compared_in_their_normal_form() {
    let traits: Traits = serde_json::from_value(json!("CUSTOM_GREEN, hw-fast")).unwrap();
    assert_eq!(traits.names().collect::<Vec<_>>(), ["GREEN", "HW_FAST"]);
    let listed: Traits = serde_json::from_value(json!(["green", "HW_FAST"])).unwrap();
    assert_eq!(listed, traits);
    assert_eq!(normal("custom gpu.a40"), "GPU_A40");
    assert_eq!(class_of(&gpu()), "PCI_10DE_1C30");
}

#[test]
fn words_that_are_none_are_refused() {
    for (spec, said) in [
        (json!({"vendor_id": "nvidia"}), "four hex digits"),
        (json!({"vendr_id": "10de"}), "unknown field `vendr_id`"),
        (json!({"address": "gpu0"}), "\"gpu0\" is no PCI address"),
        (json!({"address": {"bus": "("}}), "no regular expression"),
        (json!({"one_time_use": "maybe"}), "true or false"),
        (json!({"devname": "eth0"}), "unknown field `devname`"),
    ] {
        let error = serde_json::from_value::<DeviceSpec>(spec)
            .unwrap_err()
            .to_string();
        assert!(error.contains(said), "{error}");
    }
    let alias = json!({"name": "a", "device_type": "type-GPU"});
    let error = serde_json::from_value::<Alias>(alias)
        .unwrap_err()
        .to_string();
    assert!(error.contains("type-PCI"), "{error}");
}
