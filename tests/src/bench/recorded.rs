//! A host of 4,096 PCI functions as sysfs shows it, written into a folder: what `gantry` is to look at.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::json;

/// PCI functions of the host.
pub const FUNCTIONS: usize = 4096;
/// Virtual functions of a network card, which is as many as a common one has.
const VFS: usize = 127;

/// One function, before it is written.
struct Function {
    bdf: String,
    ids: [u16; 4],
    class: u32,
    driver: Option<&'static str>,
    node: usize,
    /// Of a card: how many functions it has besides.
    vfs: Option<usize>,
    /// Of a virtual function: its card.
    card: Option<String>,
    /// What its device serial number ends with, if it has one.
    serial: Option<u8>,
}

/// Writes the host below `root`, with groups of its devices: `sys`, `dev`, `proc`, `run`, `etc`, `var`.
pub fn write(root: &Path) -> io::Result<()> {
    for (index, function) in functions().iter().enumerate() {
        function.write(root, index)?;
    }
    for folder in [
        "sys/class/block",
        "sys/class/net",
        "proc/self",
        "run/leases",
        "etc",
        "var",
    ] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::write(root.join("proc/self/mountinfo"), "")?;
    let groups = json!({"groups": [
        {"name": "gpus", "class": "gpu", "rules": [{"vendor": "10de", "class": "03"}]},
        {"name": "vfs", "type": "sriov-nic", "rules": [{"vendor": "15b3", "numa": 1}]},
        {"name": "disks", "type": "nvme", "rules": [{"name": {"contains": "PM173X"}}]},
    ]});
    fs::write(root.join("etc/groups.json"), groups.to_string())
}

/// A card with its virtual functions on every bus; on every other one a GPU is the card's neighbour, and
/// on the rest a disk.
fn functions() -> Vec<Function> {
    let mut all = Vec::new();
    let buses = 0..FUNCTIONS.div_ceil(VFS + 2);
    for bus in buses {
        let (domain, number) = (bus / 200, bus % 200 + 1);
        let at = |slot: usize, function: usize| {
            format!("{domain:04x}:{number:02x}:{slot:02x}.{function}")
        };
        let one = |bdf, ids, class, driver| Function {
            bdf,
            ids,
            class,
            driver: Some(driver),
            node: bus % 2,
            vfs: None,
            card: None,
            serial: None,
        };
        let card = at(0, 0);
        all.push(Function {
            vfs: Some(VFS),
            serial: Some(number as u8),
            ..one(
                card.clone(),
                [0x15b3, 0x101d, 0x15b3, 0x0043],
                0x02_00_00,
                "mlx5_core",
            )
        });
        all.push(match bus % 2 {
            0 => one(
                at(31, 7),
                [0x10de, 0x2330, 0x10de, 0x16c1],
                0x03_02_00,
                "vfio-pci",
            ),
            _ => one(
                at(31, 7),
                [0x144d, 0xa824, 0x144d, 0xa801],
                0x01_08_02,
                "nvme",
            ),
        });
        all.extend((1..=VFS).map(|vf| Function {
            card: Some(card.clone()),
            ..one(
                at(vf / 8, vf % 8),
                [0x15b3, 0x101e, 0x15b3, 0x0043],
                0x02_00_00,
                "vfio-pci",
            )
        }));
    }
    all.truncate(FUNCTIONS);
    all
}

impl Function {
    fn write(&self, root: &Path, group: usize) -> io::Result<()> {
        let domain = self.bdf.split(':').next().unwrap_or_default();
        let place = format!("devices/pci{domain}:00/{}", self.bdf);
        let sysfs = root.join("sys");
        let folder = sysfs.join(&place);
        fs::create_dir_all(&folder)?;
        for (name, text) in self.attributes() {
            fs::write(folder.join(name), text + "\n")?;
        }
        fs::write(folder.join("config"), self.config())?;
        link(&folder, &sysfs.join("bus/pci/devices").join(&self.bdf))?;
        let iommu = sysfs.join(format!("kernel/iommu_groups/{group}"));
        link(&folder, &iommu.join("devices").join(&self.bdf))?;
        symlink(&iommu, folder.join("iommu_group"))?;
        if let Some(driver) = self.driver {
            let driver = sysfs.join("bus/pci/drivers").join(driver);
            fs::create_dir_all(&driver)?;
            symlink(&driver, folder.join("driver"))?;
        }
        if let Some(card) = &self.card {
            symlink(folder.with_file_name(card), folder.join("physfn"))?;
        }
        let node = root.join("dev/vfio");
        fs::create_dir_all(&node)?;
        match self.driver {
            Some("vfio-pci") => fs::write(node.join(group.to_string()), ""),
            _ => Ok(()),
        }
    }

    fn attributes(&self) -> Vec<(&'static str, String)> {
        let [vendor, device, subvendor, subdevice] = self.ids;
        let (base, sub, interface) = (self.class >> 16, self.class >> 8 & 0xff, self.class & 0xff);
        let modalias = format!(
            "pci:v{vendor:08X}d{device:08X}sv{subvendor:08X}sd{subdevice:08X}bc{base:02X}sc{sub:02X}i{interface:02X}"
        );
        let own = match self.driver {
            Some("vfio-pci") => "vfio-pci",
            _ => "(null)",
        };
        let mut all = vec![
            ("vendor", format!("{vendor:#06x}")),
            ("device", format!("{device:#06x}")),
            ("subsystem_vendor", format!("{subvendor:#06x}")),
            ("subsystem_device", format!("{subdevice:#06x}")),
            ("class", format!("{:#08x}", self.class)),
            ("revision", "0x00".to_owned()),
            ("modalias", modalias),
            ("reset_method", "flr".to_owned()),
            ("numa_node", self.node.to_string()),
            ("driver_override", own.to_owned()),
        ];
        if let Some(count) = self.vfs {
            all.push(("sriov_totalvfs", count.to_string()));
            all.push(("sriov_numvfs", count.to_string()));
        }
        all
    }

    /// Configuration space with an extended capability, and the device serial number behind it.
    fn config(&self) -> Vec<u8> {
        let mut space = vec![0; 4096];
        let mut put = |at: usize, word: u32| space[at..at + 4].copy_from_slice(&word.to_le_bytes());
        // A list of capabilities that has MSI-X alone.
        put(0x04, 1 << 20);
        put(0x34, 0x40);
        put(0x40, 0x11);
        // ARI, whose list goes on where there is a serial number.
        put(
            0x100,
            if self.serial.is_some() {
                0x1401_000e
            } else {
                0x0001_000e
            },
        );
        if let Some(serial) = self.serial {
            put(0x140, 0x0001_0003);
            put(0x144, u32::from(serial));
            put(0x148, 0x0c42_a103);
        }
        space
    }
}

/// A link to a folder, with the folders above the link.
fn link(to: &Path, at: &PathBuf) -> io::Result<()> {
    fs::create_dir_all(at.parent().unwrap_or(at))?;
    symlink(to, at)
}
