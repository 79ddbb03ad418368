//! An NVMe controller and its disks, as the host's nvme driver shows them.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::base::sysfs;

/// An NVMe controller, as it describes itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nvme {
    /// Model.
    pub model: String,
    /// Firmware revision.
    pub firmware: String,
    /// Its disks.
    pub namespaces: Vec<Namespace>,
}

/// A disk of an NVMe controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// The block device's name while the host has it, such as `nvme0n1`.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
}

impl Nvme {
    /// Size of all disks together in GB (10^9 bytes), rounded down.
    pub fn gigabytes(&self) -> u32 {
        let bytes: u64 = self.namespaces.iter().map(|one| one.bytes).sum();
        u32::try_from(bytes / 1_000_000_000).unwrap_or(u32::MAX)
    }
}

/// The serial number and the description in a PCI function's directory; neither for a device without the nvme
/// driver.
pub(crate) fn read(dir: &Path) -> (Option<String>, Option<Nvme>) {
    let dir = dir.join("nvme");
    let controllers = sysfs::entries(&dir).unwrap_or_default();
    let Some(controller) = controllers.first().map(|name| dir.join(name)) else {
        return (None, None);
    };
    let text = |name: &str| {
        let text = sysfs::text(&controller.join(name)).ok().flatten();
        text.filter(|text| !text.is_empty())
    };
    let nvme = text("model").map(|model| Nvme {
        model,
        firmware: text("firmware_rev").unwrap_or_default(),
        namespaces: namespaces(&controller),
    });
    (text("serial"), nvme)
}

fn namespaces(controller: &Path) -> Vec<Namespace> {
    let entries = sysfs::entries(controller).unwrap_or_default();
    let namespace = |entry: String| {
        let path = controller.join(&entry);
        let sectors: u64 = sysfs::decimal(&path.join("size")).ok()??;
        Some(Namespace {
            name: of_all_paths(&entry),
            // In sectors of 512 bytes, whatever the disk's own are (Documentation/ABI/stable/sysfs-block).
            bytes: sectors.saturating_mul(512),
        })
    };
    entries.into_iter().filter_map(namespace).collect()
}

/// The disk `nvme0n1` of several paths has a hidden part `nvme0c1n1` below each controller.
fn of_all_paths(name: &str) -> String {
    let parts = name
        .split_once('c')
        .and_then(|(subsystem, rest)| Some((subsystem, rest.split_once('n')?.1)));
    match parts {
        Some((subsystem, number)) => format!("{subsystem}n{number}"),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use crate::fixture::{Fake, FakeHost};
    use crate::holding::restore::RestoreRecord;
    use crate::inventory::driver_record::DriverRecord;
    use crate::pools::rule::Rule;

    fn disk() -> Fake {
        Fake::nvme("01:00.0", 1)
            .driver("nvme")
            .with("nvme/nvme0/serial", "S64 ")
            .with(
                "nvme/nvme0/model",
                "SAMSUNG MZQL23T8HCLS-00A07              ",
            )
            .with("nvme/nvme0/firmware_rev", "GDC5602Q")
            .with("nvme/nvme0/nvme0c3n1/size", "7501476528")
            .with("nvme/nvme0/hwmon1/name", "nvme")
    }

    #[test]
    fn a_disk_tells_its_model_firmware_and_size_and_is_remembered() {
        let host = FakeHost::new(&[disk()]);
        let attached = host.read("01:00.0");
        let nvme = attached.nvme.clone().unwrap();
        assert_eq!(nvme.model, "SAMSUNG MZQL23T8HCLS-00A07");
        assert_eq!(
            (nvme.firmware.as_str(), nvme.gigabytes()),
            ("GDC5602Q", 3840)
        );
        assert_eq!(nvme.namespaces[0].name, "nvme0n1");
        DriverRecord::of(&attached)
            .store(&host.paths, attached.bdf)
            .unwrap();
        std::fs::remove_dir_all(host.dir(attached.bdf).join("nvme")).unwrap();
        assert_eq!(host.read("01:00.0").nvme, None, "it was not detached");
        let place = host.dir(attached.bdf).join("driver_override");
        std::fs::write(place, "vfio-pci\n").unwrap();
        assert_eq!(host.read("01:00.0").nvme, Some(nvme));
    }

    #[test]
    fn rules_select_disks_by_what_they_say() {
        let host = FakeHost::new(&[disk()]);
        let device = host.read("01:00.0");
        for (rule, matches) in [
            (r#"{"model": "samsung mzql2*"}"#, true),
            (
                r#"{"model": {"contains": "MZQL2"}, "size": {"more": 3000}}"#,
                true,
            ),
            (r#"{"firmware": {"not": "GDC5602Q"}}"#, false),
            (r#"{"size": {"less": 3840}}"#, false),
            (r#"{"port": "1-1"}"#, false),
            (r#"{"speed": {"more": 0}}"#, false),
        ] {
            let rule: Rule = serde_json::from_str(rule).unwrap();
            assert_eq!(rule.matches(&device), matches, "{rule:?}");
        }
    }
}
