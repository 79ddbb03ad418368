//! Whatever is written, there is an answer.

use gantry_resources::HostPaths;
use std::path::Path;

use proptest::prelude::*;

use crate::config::compile;
use crate::config::validate::Context;

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
        let folder = Path::new("/nonexistent");
        let context = Context { name: "vm", folder, allow_ungrouped: false, host: &HostPaths::default(), slots: 0, folders: None };
        // The folder does not exist, so neither does a kernel: there is always a fault.
        let fault = compile(&text, &context).unwrap_err();
        prop_assert!(fault.at < text.len(), "{} in {text}", fault.at);
        prop_assert!(text.is_char_boundary(fault.at));
        prop_assert!(!fault.what.contains('\n'), "{}", fault.what);
    }

    #[test]
    fn no_text_is_too_much(text in ".{0,40}") {
        let context = Context { name: "vm", folder: Path::new("/"), allow_ungrouped: false, host: &HostPaths::default(), slots: 0, folders: None };
        let fault = compile(&text, &context).unwrap_err();
        prop_assert!(fault.at <= text.len() && !fault.what.is_empty());
    }
}
