//! Tests: what filters hold for, what is no filter.
use super::*;
use crate::facts::ids::PciClass;
use crate::fixture::{Fake, FakeHost};
use proptest::prelude::*;
use serde_json::json;
use std::sync::LazyLock;

fn device() -> HostDevice {
    static DEVICE: LazyLock<HostDevice> = LazyLock::new(|| {
        let fake = Fake::nvme("0000:01:00.0", 1)
            .driver("nvme")
            .with("nvme/nvme0/serial", "GN-1")
            .with("numa_node", "1")
            .with("mdev_supported_types/nvidia-222/name", "A40-1Q");
        let device = FakeHost::new(&[fake]).read("0000:01:00.0");
        HostDevice {
            dsn: Some("00-1b-21-ff-ff-aa-bb-cc".to_owned()),
            ..device
        }
    });
    DEVICE.clone()
}

#[test]
fn all_filters_must_hold() {
    let device = device();
    for (rule, matches) in [
        (json!({"vendor": "1b36"}), true),
        (json!({"vendor": "0x1B36"}), true),
        (json!({"vendor": "8086"}), false),
        (json!({"id": "1b36:0010"}), true),
        (json!({"id": "0x1b36:0x0010"}), true),
        (json!({"id": "1b36:0011"}), false),
        (json!({"class": "01"}), true),
        (json!({"class": "0108"}), true),
        (json!({"class": "0x010802"}), true),
        (json!({"class": "010801"}), false),
        (json!({"class": "02"}), false),
        (json!({"slot": "01:00.0"}), true),
        (json!({"slot": "0001:01:00.0"}), false),
        (json!({"serial": "GN-1"}), true),
        (json!({"serial": "gn-1"}), false),
        (json!({"serial": "00-1B-21-FF-FF-AA-BB-CC"}), true),
        (
            json!({"vendor": "1b36", "device": "0010", "class": "0108", "slot": "01:00.0", "serial": "GN-1"}),
            true,
        ),
        (json!({"vendor": "1b36", "device": "0011"}), false),
        (json!({"vendor": "1b36", "slot": "02:00.0"}), false),
        (json!({"vendor": {"not": "1b36"}}), false),
        (json!({"vendor": {"contains": "red hat"}}), true),
        (json!({"vendor": {"begins": "1b", "ends": "36"}}), true),
        (json!({"vendor": {"begins": "1b", "ends": "37"}}), false),
        (json!({"device": {"more": "000f", "less": "0011"}}), true),
        (json!({"device": {"more": "0010"}}), false),
        (json!({"id": {"regex": "^1b36:00[01]"}}), true),
        (json!({"name": "*NVM Express*"}), true),
        (json!({"name": "red hat, inc. *"}), true),
        (json!({"name": {"contains": "nvm"}}), true),
        (json!({"name": {"regex": "nvm"}}), false),
        (json!({"name": {"regex": "(?i)nvm"}}), true),
        (json!({"name": "NVM"}), false),
        (json!({"subsystem": "1af4:1100"}), true),
        (json!({"subsystem": {"begins": "1af5"}}), false),
        (json!({"class": {"not": "0108"}}), false),
        (json!({"class": {"contains": "non-volatile"}}), true),
        (json!({"slot": "*:01:00.*"}), true),
        (json!({"slot": "01:*"}), true),
        (json!({"slot": "01:00.[0-3]"}), true),
        (json!({"slot": "01:00.[!0-3]"}), false),
        (
            json!({"slot": {"less": "02:00.0", "more": "00:1f.7"}}),
            true,
        ),
        (json!({"slot": {"begins": "01:"}}), true),
        (json!({"serial": {"begins": "GN-"}}), true),
        (json!({"serial": "GN-?"}), true),
        (json!({"driver": "nvme"}), true),
        (json!({"driver": {"not": "vfio-pci"}}), true),
        (json!({"driver": "*pci"}), false),
        (json!({"numa": 1}), true),
        (json!({"numa": {"not": 1}}), false),
        (json!({"numa": {"less": 1}}), false),
        (json!({"iommu_group": {"more": 0}}), true),
        (json!({"pf": "02:00.0"}), false),
        (json!({"pf": {"not": "02:00.0"}}), true),
        (json!({"mdev_type": "nvidia-222"}), true),
        (json!({"mdev_type": {"begins": "i915"}}), false),
    ] {
        let parsed: Rule = serde_json::from_value(rule.clone()).unwrap();
        assert_eq!(parsed.matches(&device), matches, "{rule}");
    }
}

#[test]
fn what_is_no_filter_is_refused_with_an_example() {
    for (rule, said) in [
        (json!({}), "at least one filter"),
        (json!({"vendor": "86"}), "\"86\" is not a PCI id"),
        (json!({"vendor": "+086"}), "four hex digits"),
        (json!({"device": "xyzw"}), "four hex digits"),
        (json!({"id": "1b36"}), "1b36:0010"),
        (json!({"id": "1b36:0010:"}), "1b36:0010"),
        (json!({"class": "010"}), "2, 4 or 6 hex digits"),
        (json!({"class": "01080200"}), "2, 4 or 6 hex digits"),
        (json!({"class": "nvme"}), "2, 4 or 6 hex digits"),
        (json!({"slot": "nvme0"}), "0000:01:00.0"),
        (json!({"serial": " "}), "cannot be empty"),
        (json!({"vendor": 8086}), "expected a string"),
        (json!({"numa": "0"}), "expected a number"),
        (json!({"numa": {"less": -1}}), "u32"),
        (
            json!({"numa": {"begins": "1"}}),
            "\"begins\" compares texts",
        ),
        (
            json!({"driver": {"less": "a"}}),
            "\"less\" means nothing here",
        ),
        (
            json!({"slot": {"more": "01:*"}}),
            "\"more\" means nothing here",
        ),
        (json!({"slot": "01:[0"}), "0000:01:00.0"),
        (json!({"name": {}}), "needs a comparison"),
        (json!({"name": {"equals": "x"}}), "unknown field `equals`"),
        (json!({"name": {"regex": "("}}), "\"(\" is not a pattern"),
        (json!({"name": {"contains": ""}}), "cannot be empty"),
    ] {
        let error = serde_json::from_value::<Rule>(rule.clone())
            .unwrap_err()
            .to_string();
        assert!(error.contains(said), "{rule}: {error}");
    }
}

#[test]
fn no_device_matches_a_serial_number_it_has_not() {
    let mut device = device();
    (device.serial, device.dsn) = (None, None);
    let rule: Rule = serde_json::from_value(json!({"serial": "GN-1"})).unwrap();
    assert!(!rule.matches(&device));
}

proptest! {
    #[test]
    fn a_rule_made_of_a_device_matches_it_and_reads_back(
        (vendor, id, class) in any::<(u16, u16, u32)>(),
        digits in prop::sample::select(vec![2usize, 4, 6]),
        parts in 1u8..32,
    ) {
        let mut device = device();
        device.id = crate::facts::ids::PciId { vendor, device: id };
        device.class = PciClass::new(class);
        let code = device.class.to_string();
        let on = |bit: u8| parts & (1 << bit) != 0;
        let filters = Filters {
            vendor: on(0).then_some(Filter::equal(HexId(vendor))),
            device: on(1).then_some(Filter::equal(HexId(id))),
            class: on(2).then(|| Filter::equal(code[..digits].parse().unwrap())),
            slot: on(3).then_some(Filter::equal(Slot::Exact(device.bdf))),
            serial: on(4).then(|| Filter::equal("GN-1".parse().unwrap())),
            ..Filters::default()
        };
        let rule = Rule::try_from(filters).unwrap();
        prop_assert!(rule.matches(&device));
        let text = serde_json::to_string(&rule).unwrap();
        prop_assert_eq!(serde_json::from_str::<Rule>(&text).unwrap(), rule);
    }

    #[test]
    fn a_class_prefix_covers_what_begins_like_it(prefix in "([0-9a-f]{2}){1,3}", class in any::<u32>()) {
        let class = PciClass::new(class);
        let covered = prefix.parse::<ClassPrefix>().unwrap().covers(class);
        prop_assert_eq!(covered, class.to_string().starts_with(&prefix));
    }
}
