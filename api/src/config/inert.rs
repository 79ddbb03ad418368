//! Cloud Hypervisor's keys that gantry does not act on: accepted where they ask for nothing.
//!
//! A file written for Cloud Hypervisor often spells out defaults. Those that mean "no such thing"
//! pass; anything else is refused by name, so that nobody believes to have what is not there.

use super::decode::join;
use super::document::{Entry, Node, Value};
use super::error::Fault;
use super::wording::{unknown_key, wrong_type};

/// What an inert key may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepts {
    /// `null` or one of these JSON values; the first is named in messages. All are scalars, `[]` or `{}`.
    Only(&'static [&'static str]),
    /// Any text: it tells nothing that gantry would act on.
    Text,
    /// `null`, or an object with inert keys, which have rows of their own.
    Members,
}

use Accepts::{Members, Only, Text};

const FALSE: Accepts = Only(&["false"]);
const TRUE: Accepts = Only(&["true"]);
const NOTHING: Accepts = Only(&["null"]);
const EMPTY: Accepts = Only(&["[]"]);
const OFF: Accepts = Only(&["\"Off\""]);
/// A port that leads nowhere.
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
    ("cpus.topology", NOTHING),
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
    ("disks", EMPTY),
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
    ("net", EMPTY),
    ("numa", EMPTY),
    ("payload.firmware", NOTHING),
    ("payload.fw_cfg_config", NOTHING),
    ("payload.host_data", NOTHING),
    ("payload.igvm", NOTHING),
    ("pci_segments", EMPTY),
    ("platform", Members),
    ("platform.chassis_asset_tag", NOTHING),
    ("platform.iommu_address_width", Only(&["64"])),
    ("platform.iommu_address_width_bits", Only(&["64"])),
    ("platform.iommu_segments", EMPTY),
    ("platform.iommufd", FALSE),
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
    ("rng", Members),
    ("rng.id", NOTHING),
    ("rng.iommu", FALSE),
    ("rng.pci_device_id", NOTHING),
    ("rng.pci_segment", ZERO),
    ("rng.src", Only(&["\"/dev/urandom\""])),
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
    ("vsock", NOTHING),
    ("watchdog", FALSE),
];

/// Names of the inert keys directly below `parent`, such as `devices[0]`.
pub fn keys_of(parent: &str) -> impl Iterator<Item = &'static str> {
    let parent = pattern(parent);
    KEYS.iter().filter_map(move |(path, _)| {
        let (above, key) = path.rsplit_once('.').unwrap_or(("", path));
        (above == parent).then_some(key)
    })
}

/// Takes the inert keys out of a tree that stands at `place` of the table, refusing those that ask for
/// something. A VM's file stands at the empty place, the body for one device at `devices[]`.
pub fn strip(root: &mut Node, place: &str) -> Result<(), Fault> {
    strip_below(root, "", place)
}

/// A path as the table writes it: `devices[0].id` becomes `devices[].id`.
fn pattern(path: &str) -> String {
    let mut inside = false;
    let outside = path.chars().filter(|&c| {
        inside = (inside || c == '[') && c != ']';
        !inside || c == '['
    });
    outside.collect()
}

/// `path` is where the node stands in the text, `place` where it stands in the table.
fn strip_below(node: &mut Node, path: &str, place: &str) -> Result<(), Fault> {
    match &mut node.value {
        Value::List(items) => {
            let place = format!("{place}[]");
            let mut items = items.iter_mut().enumerate();
            items.try_for_each(|(index, item)| {
                strip_below(item, &format!("{path}[{index}]"), &place)
            })
        }
        Value::Map(entries) => {
            let mut kept = Vec::with_capacity(entries.len());
            for mut entry in std::mem::take(entries) {
                let (path, place) = (join(path, &entry.key), join(place, &entry.key));
                if !strip_entry(&mut entry, &path, &place)? {
                    kept.push(entry);
                }
            }
            *entries = kept;
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Whether the entry was inert; what is inert below it is gone in any case.
fn strip_entry(entry: &mut Entry, path: &str, place: &str) -> Result<bool, Fault> {
    match KEYS.iter().find(|(key, _)| *key == place) {
        None => strip_below(&mut entry.node, path, place).map(|()| false),
        Some((_, Only(values))) => asks_for_nothing(entry, path, values).map(|()| true),
        Some((_, Text)) => match &entry.node.value {
            Value::Text(_) | Value::Null => Ok(true),
            other => Err(wrong_type(
                entry.node.at,
                path,
                "a string",
                &other.to_string(),
            )),
        },
        Some((_, Members)) => {
            strip_below(&mut entry.node, path, place)?;
            only_inert_members(&entry.node, path).map(|()| true)
        }
    }
}

fn asks_for_nothing(entry: &Entry, path: &str, values: &[&str]) -> Result<(), Fault> {
    let found = entry.node.value.to_string();
    if matches!(entry.node.value, Value::Null) || values.contains(&found.as_str()) {
        return Ok(());
    }
    let first = values.first().copied().unwrap_or_default();
    let what = format!("`{path}` is not supported yet; gantry accepts only {first}");
    Err(Fault::new(entry.at, what).help(format!("it is {found} here: remove the key")))
}

fn only_inert_members(node: &Node, path: &str) -> Result<(), Fault> {
    match &node.value {
        Value::Null => Ok(()),
        Value::Map(left) => match left.first() {
            None => Ok(()),
            Some(entry) => Err(unknown_key(entry.at, &join(path, &entry.key), &[])),
        },
        other => Err(wrong_type(node.at, path, "an object", &other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::document::parse;
    use super::*;

    #[test]
    fn what_every_row_accepts_is_taken_out() {
        for (path, accepts) in KEYS {
            let Only(values) = accepts else { continue };
            for value in values.iter().chain(&["null"]) {
                let mut root = parse(&nest(path, value)).unwrap();
                strip(&mut root, "").unwrap_or_else(|fault| panic!("{path}: {}", fault.what));
                let key = path.rsplit('.').next().unwrap();
                let left = format!("{root:?}");
                assert!(!left.contains(&format!("{key:?}")), "{path}: {left}");
            }
        }
    }

    #[test]
    fn every_row_refuses_what_asks_for_something() {
        for (path, accepts) in KEYS {
            let Only(values) = accepts else { continue };
            let mut root = parse(&nest(path, "\"much\"")).unwrap();
            let fault = strip(&mut root, "").unwrap_err();
            assert!(
                fault.what.contains(&path.replace("[]", "[0]")),
                "{}",
                fault.what
            );
            assert!(fault.what.contains(values[0]), "{}", fault.what);
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
