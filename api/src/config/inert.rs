//! Cloud Hypervisor's keys that gantry does not support: accepted only with a value that asks for nothing.
//!
//! A file written for Cloud Hypervisor often spells out defaults. Values that ask for nothing pass; all others
//! are refused by name, so that no VM runs without what its file asks for.

use gantry_resources::base::json::{Document, Entry, Node, Value, join, unknown_key};

/// The values that an inert key may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepts {
    /// `null` or one of these JSON values; the first is named in messages. All are scalars, `[]` or `{}`.
    Only(&'static [&'static str]),
    /// Any text: gantry ignores it.
    Text,
    /// `null`, or an object with inert keys, which have rows of their own.
    Members,
}

use Accepts::{Members, Only, Text};

const FALSE: Accepts = Only(&["false"]);
const TRUE: Accepts = Only(&["true"]);
/// The key asks for another way to do the same.
const EITHER: Accepts = Only(&["false", "true"]);
const NOTHING: Accepts = Only(&["null"]);
const EMPTY: Accepts = Only(&["[]"]);
const OFF: Accepts = Only(&["\"Off\""]);
/// A port without a connection.
const NOWHERE: Accepts = Only(&["\"Off\"", "\"Null\""]);
const ZERO: Accepts = Only(&["0"]);
const NO_BYTES: Accepts = Only(&["0"]);

/// Every inert key by its path, `[]` standing for any element of a list: all keys that Cloud Hypervisor's
/// API document has, or once had, and gantry does not act on.
pub const KEYS: &[(&str, Accepts)] = &[
    ("$schema", Text),
    ("balloon", NOTHING),
    ("console", Members),
    ("console.file", NOTHING),
    ("console.id", NOTHING),
    ("console.iommu", FALSE),
    ("console.mode", NOWHERE),
    ("console.pci_device_id", NOTHING),
    ("console.pci_segment", ZERO),
    ("console.socket", NOTHING),
    ("cpus.core_scheduling", OFF),
    ("cpus.features", Members),
    ("cpus.features.amx", FALSE),
    ("cpus.kvm_hyperv", FALSE),
    ("cpus.profile", Only(&["\"Host\"", "\"host\""])),
    ("debug_console", Members),
    ("debug_console.file", NOTHING),
    ("debug_console.iobase", Only(&["233"])),
    ("debug_console.mode", NOWHERE),
    ("devices[].fd", NOTHING),
    ("devices[].iommu", FALSE),
    ("devices[].pci_device_id", NOTHING),
    ("devices[].pci_segment", ZERO),
    ("devices[].x_exclude_mmap_bars", EMPTY),
    ("devices[].x_nv_gpudirect_clique", NOTHING),
    ("disks[].backing_files", FALSE),
    ("disks[].disable_aio", EITHER),
    ("disks[].image_type", Only(&["\"Raw\""])),
    ("disks[].iommu", FALSE),
    ("disks[].lock_granularity", NOTHING),
    ("disks[].pci_device_id", NOTHING),
    ("disks[].pci_segment", ZERO),
    ("disks[].queue_affinity", EMPTY),
    ("disks[].rate_limit_group", NOTHING),
    ("disks[].rate_limiter_config", NOTHING),
    ("disks[].sparse", TRUE),
    ("disks[].vhost_socket", NOTHING),
    ("disks[].vhost_user", FALSE),
    ("fs", EMPTY),
    ("gdb", FALSE),
    ("generic-vhost-user", EMPTY),
    ("generic_vhost_user", EMPTY),
    ("iommu", FALSE),
    ("ivshmem", NOTHING),
    ("landlock_enable", FALSE),
    ("landlock_rules", EMPTY),
    ("memory.balloon", FALSE),
    ("memory.balloon_size", NO_BYTES),
    ("memory.file", NOTHING),
    ("memory.hotplug_method", Only(&["\"Acpi\""])),
    ("memory.hotplug_size", NO_BYTES),
    ("memory.hotplugged_size", NO_BYTES),
    ("memory.hugepage_size", NOTHING),
    ("memory.hugepages", FALSE),
    ("memory.mergeable", FALSE),
    ("memory.prefault", FALSE),
    ("memory.reserve", FALSE),
    ("memory.shared", FALSE),
    ("memory.thp", TRUE),
    ("memory.zones", EMPTY),
    ("net[].fds", NOTHING),
    ("net[].host_mac", NOTHING),
    ("net[].iommu", FALSE),
    ("net[].pci_device_id", NOTHING),
    ("net[].pci_segment", ZERO),
    ("net[].rate_limit_group", NOTHING),
    ("net[].rate_limiter_config", NOTHING),
    ("net[].vhost_mode", Only(&["\"Client\""])),
    ("net[].vhost_socket", NOTHING),
    ("net[].vhost_user", FALSE),
    ("numa", EMPTY),
    ("payload.fw_cfg_config", NOTHING),
    ("payload.host_data", NOTHING),
    ("payload.igvm", NOTHING),
    ("pci_segments", EMPTY),
    ("platform.chassis_asset_tag", NOTHING),
    ("platform.iommu_address_width", Only(&["64"])),
    ("platform.iommu_address_width_bits", Only(&["64"])),
    ("platform.iommu_segments", EMPTY),
    ("platform.iommufd_fd", NOTHING),
    ("platform.num_pci_segments", Only(&["1"])),
    ("platform.oem_strings", EMPTY),
    ("platform.serial_number", NOTHING),
    ("platform.sev_snp", FALSE),
    ("platform.system_family", NOTHING),
    ("platform.system_manufacturer", NOTHING),
    ("platform.system_product_name", NOTHING),
    ("platform.system_serial_number", NOTHING),
    ("platform.system_sku_number", NOTHING),
    ("platform.system_uuid", NOTHING),
    ("platform.system_version", NOTHING),
    ("platform.tdx", FALSE),
    ("platform.uuid", NOTHING),
    ("platform.vfio_p2p_dma", FALSE),
    ("pmem", EMPTY),
    ("preserved_fds", EMPTY),
    ("pvmemcontrol", NOTHING),
    ("rate_limit_groups", EMPTY),
    ("rng.iommu", FALSE),
    ("rng.pci_device_id", NOTHING),
    ("rng.pci_segment", ZERO),
    ("rtc", NOTHING),
    ("serial.id", NOTHING),
    ("serial.iommu", FALSE),
    ("serial.pci_device_id", NOTHING),
    ("serial.pci_segment", ZERO),
    ("serial.socket", NOTHING),
    ("sgx_epc", EMPTY),
    ("tdx", NOTHING),
    ("tpm", NOTHING),
    ("user_devices", EMPTY),
    ("vdpa", EMPTY),
    ("vhost_user_blk", EMPTY),
    ("vhost_user_net", EMPTY),
    ("vsock.iommu", FALSE),
    ("vsock.pci_device_id", NOTHING),
    ("vsock.pci_segment", ZERO),
    ("watchdog", FALSE),
];

/// Names of the inert keys of the object at `path` of a text whose root is at `place` of the table.
pub fn keys_of(place: &str, path: &str) -> Vec<&'static str> {
    let object = join(place, &pattern(path));
    let keys = KEYS.iter().filter_map(move |(path, _)| {
        let (above, key) = path.rsplit_once('.').unwrap_or(("", path));
        (above == object).then_some(key)
    });
    keys.collect()
}

/// Removes the inert keys from a text whose root is at `place` of the table. Those that ask for something are
/// mistakes. A VM's file is at the empty place, the body for one device at `devices[]`.
pub fn strip(document: &mut Document, place: &str) {
    let mut refusals = Vec::new();
    strip_below(&mut document.root, "", place, &mut refusals);
    for (at, what) in refusals {
        document.mistake_at(at, what);
    }
}

/// Inert keys that ask for something: where they are, and the words.
type Refusals = Vec<(usize, String)>;

/// A path as the table writes it: `devices[0].id` becomes `devices[].id`.
fn pattern(path: &str) -> String {
    let mut inside = false;
    let outside = path.chars().filter(|&c| {
        inside = (inside || c == '[') && c != ']';
        !inside || c == '['
    });
    outside.collect()
}

/// `path` is the node's path in the text, `place` its path in the table.
fn strip_below(node: &mut Node, path: &str, place: &str, refusals: &mut Refusals) {
    match &mut node.value {
        Value::List(items) => {
            let place = format!("{place}[]");
            for (index, item) in items.iter_mut().enumerate() {
                strip_below(item, &format!("{path}[{index}]"), &place, refusals);
            }
        }
        Value::Map(entries) => entries.retain_mut(|entry| {
            let (path, place) = (join(path, &entry.key), join(place, &entry.key));
            match KEYS.iter().find(|(key, _)| *key == place) {
                None => {
                    strip_below(&mut entry.node, &path, &place, refusals);
                    true
                }
                Some((_, accepts)) => {
                    refusals.extend(refusal(entry, &path, &place, *accepts));
                    false
                }
            }
        }),
        _ => {}
    }
}

/// The mistakes in the values of an inert key and of the keys below it.
fn refusal(entry: &mut Entry, path: &str, place: &str, accepts: Accepts) -> Refusals {
    let wrong_type = |expected: &str| {
        let found = entry.node.value.describe();
        let what = format!("`{path}`: expected {expected}, found {found}");
        vec![(entry.node.at, what)]
    };
    match (accepts, &entry.node.value) {
        (_, Value::Null) | (Text, Value::Text(_)) => Vec::new(),
        (Text, _) => wrong_type("a string"),
        (Only(values), value) => {
            let found = value.to_string();
            if values.contains(&found.as_str()) {
                return Vec::new();
            }
            let first = values.first().copied().unwrap_or_default();
            let what =
                format!("`{path}`: {found} is not supported yet: remove the key, or write {first}");
            vec![(entry.at, what)]
        }
        (Members, Value::Map(_)) => {
            let mut refusals = Vec::new();
            strip_below(&mut entry.node, path, place, &mut refusals);
            if let Value::Map(left) = &entry.node.value {
                refusals.extend(left.iter().map(|entry| {
                    let path = join(path, &entry.key);
                    (entry.at, unknown_key(&path, &[], &keys_of("", place)))
                }));
            }
            refusals
        }
        (Members, _) => wrong_type("an object"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The text without inert keys, or its mistakes.
    fn stripped(text: &str) -> Result<String, String> {
        let mut document = Document::parse(Path::new("vm.json"), text).unwrap();
        strip(&mut document, "");
        let left = format!("{:?}", document.root);
        document
            .finish(Some(left))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn what_every_row_accepts_is_taken_out() {
        for (path, accepts) in KEYS {
            let Only(values) = accepts else { continue };
            for value in values.iter().chain(&["null"]) {
                let left = stripped(&nest(path, value)).unwrap_or_else(|said| panic!("{said}"));
                let key = path.rsplit('.').next().unwrap();
                assert!(!left.contains(&format!("{key:?}")), "{path}: {left}");
            }
        }
    }

    #[test]
    fn every_row_refuses_what_asks_for_something() {
        for (path, accepts) in KEYS {
            let Only(values) = accepts else { continue };
            let said = stripped(&nest(path, "\"much\"")).unwrap_err();
            assert!(said.contains(&path.replace("[]", "[0]")), "{said}");
            assert!(said.contains(values[0]), "{said}");
        }
    }

    #[test]
    fn every_object_of_inert_keys_has_a_row_for_each_level() {
        for (path, _) in KEYS {
            if let Some((parent, _)) = path.rsplit_once('.')
                && let Some((_, accepts)) = KEYS.iter().find(|(key, _)| *key == parent)
            {
                assert_eq!(*accepts, Members, "{path}");
            }
        }
        assert!(
            KEYS.is_sorted_by_key(|(path, _)| *path),
            "the table is not in order"
        );
    }

    /// `{"a": [{"b": value}]}` for `a[].b`.
    fn nest(path: &str, value: &str) -> String {
        path.rsplit('.').fold(value.to_owned(), |inner, key| {
            match key.strip_suffix("[]") {
                Some(key) => format!("{{\"{key}\": [{inner}]}}"),
                None => format!("{{\"{key}\": {inner}}}"),
            }
        })
    }
}
