//! Whatever is written, there is an answer.

use std::path::Path;

use proptest::prelude::*;

use crate::config::{LoadOptions, SourceText, parse};

/// JSON that looks like a VM's file: its keys, and values of every kind, at any place.
fn anything() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::Value;
    let key = proptest::sample::select(vec![
        "payload",
        "kernel",
        "cmdline",
        "cpus",
        "boot_vcpus",
        "memory",
        "size",
        "devices",
        "group",
        "path",
        "count",
        "serial",
        "mode",
        "file",
        "disks",
        "net",
        "tap",
        "mac",
        "vsock",
        "cid",
        "rng",
        "platform",
        "iommufd",
        "é",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map(key.clone(), inner, 0..5).prop_map(|members| {
                members
                    .into_iter()
                    .map(|(key, value)| (key.to_owned(), value))
                    .collect()
            }),
        ]
    })
}

proptest! {
    #[test]
    fn no_json_is_too_much(json in anything(), pretty: bool) {
        let text = if pretty { format!("{json:#}") } else { json.to_string() };
        // The folder does not exist, so neither does a kernel: there is always a mistake.
        let said = refusal(&text);
        for line in said.lines() {
            let (_, place) = line.split_once("vm.json:").unwrap();
            let mut numbers = place.splitn(3, ':').map(str::parse::<usize>);
            let (row, column) = (numbers.next().unwrap().unwrap(), numbers.next().unwrap().unwrap());
            let row = text.split('\n').nth(row - 1).unwrap();
            prop_assert!(column <= row.chars().count(), "{line} in {text}");
        }
    }

    #[test]
    fn no_text_is_too_much(text in ".{0,40}") {
        prop_assert!(refusal(&text).starts_with("vm.json:"));
    }
}

fn refusal(text: &str) -> String {
    let (file, folder) = ("vm.json", Path::new("/nonexistent"));
    let written = SourceText { text, file, folder };
    let error = parse(&written, "vm", &LoadOptions::default()).unwrap_err();
    error.to_string()
}
