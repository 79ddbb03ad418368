//! The block devices of the host, and which are built on which.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::graph;
use crate::base::host::HostPaths;
use crate::base::sysfs;

/// The block devices, disks and partitions, by the kernel's name.
pub(super) struct Blocks {
    all: BTreeMap<String, Block>,
    dev: PathBuf,
}

/// A disk or partition.
pub(super) struct Block {
    /// Its directory in the device tree.
    dir: PathBuf,
    /// Its paths; an NVMe namespace with several paths is below several controllers.
    homes: Vec<PathBuf>,
    /// Its device number, `259:0`.
    number: String,
    /// The device-mapper's name.
    mapped: Option<String>,
    /// The block devices that are built on it.
    uppers: BTreeSet<String>,
}

impl Blocks {
    pub(super) fn read(paths: &HostPaths) -> io::Result<Self> {
        let class = paths.sysfs.join("class/block");
        let mut all = BTreeMap::new();
        for name in sysfs::entries(&class)? {
            // A disk may be pulled out while it is read.
            let Ok(dir) = fs::canonicalize(class.join(&name)) else {
                continue;
            };
            let block = Block {
                homes: homes(&dir)?,
                number: sysfs::text(&dir.join("dev"))?.unwrap_or_default(),
                mapped: sysfs::text(&dir.join("dm/name"))?,
                uppers: BTreeSet::new(),
                dir,
            };
            all.insert(name, block);
        }
        let dev = paths.dev.clone();
        let mut blocks = Self { all, dev };
        for (lower, upper) in blocks.built_on()? {
            let below = blocks.all.get_mut(&lower);
            below.map(|below| below.uppers.insert(upper));
        }
        Ok(blocks)
    }

    /// Which block devices are built on which, the lower one first.
    fn built_on(&self) -> io::Result<Vec<(String, String)>> {
        let mut found = Vec::new();
        for (name, block) in &self.all {
            let upper = |lower: String| (lower, name.clone());
            let holders = sysfs::entries(&block.dir.join("holders"))?;
            found.extend(holders.into_iter().map(|holder| (name.clone(), holder)));
            found.extend(
                sysfs::entries(&block.dir.join("slaves"))?
                    .into_iter()
                    .map(upper),
            );
            // The file of a loop device, or the device that a zram writes back to: neither is in `holders`.
            for file in ["loop/backing_file", "backing_dev"] {
                let backing = sysfs::text(&block.dir.join(file)).ok().flatten();
                let backing = backing.and_then(|path| self.named(&path));
                found.extend(backing.map(upper));
            }
        }
        found.retain(|(lower, upper)| lower != upper);
        Ok(found)
    }

    /// The block device of a node, as the kernel or a configuration names it: `/dev/nvme0n1`,
    /// `/dev/mapper/vg-root`, `/dev/disk/by-id/...`.
    pub(super) fn named(&self, node: &str) -> Option<String> {
        // In a container, the path may have other components in front.
        let (_, node) = node.rsplit_once("/dev/")?;
        // A slash in a node's name is an exclamation mark in sysfs.
        let name = node.replace('/', "!");
        if self.all.contains_key(&name) {
            return Some(name);
        }
        if let Some(mapped) = node.strip_prefix("mapper/") {
            let mut all = self.all.iter();
            let found = all.find(|(_, block)| block.mapped.as_deref() == Some(mapped));
            if let Some((name, _)) = found {
                return Some(name.clone());
            }
        }
        let about = fs::metadata(self.dev.join(node)).ok()?;
        let number = about.file_type().is_block_device().then(|| about.rdev())?;
        let number = format!("{}:{}", major(number), minor(number));
        let mut all = self.all.iter();
        let (name, _) = all.find(|(_, block)| block.number == number)?;
        Some(name.clone())
    }

    /// The block devices below a device, which has this path in the device tree.
    pub(super) fn below(&self, device: &Path) -> impl Iterator<Item = &str> {
        let below = move |block: &Block| block.homes.iter().any(|home| home.starts_with(device));
        let all = self.all.iter().filter(move |(_, block)| below(block));
        all.map(|(name, _)| name.as_str())
    }

    pub(super) fn number(&self, name: &str) -> &str {
        self.all.get(name).map_or("", |block| &block.number)
    }

    /// The node's name below /dev.
    pub(super) fn node(name: &str) -> String {
        name.replace('!', "/")
    }

    /// The name for people: `dm-1 (vg-root)`.
    pub(super) fn label(&self, name: &str) -> String {
        match self.all.get(name).and_then(|block| block.mapped.as_ref()) {
            Some(mapped) => format!("{name} ({mapped})"),
            None => name.to_owned(),
        }
    }

    /// The block devices that are built on one, directly or not, nearest first. Its own partitions are not
    /// among them: they are block devices of the same device.
    pub(super) fn built_above(&self, name: &str) -> Vec<String> {
        let paths = graph::paths_from(name, |at| {
            let uppers = self.all.get(at).into_iter().flat_map(|at| &at.uppers);
            let partitions = self.partitions(at).filter(|_| at != name);
            uppers.cloned().chain(partitions).collect()
        });
        paths
            .into_iter()
            .filter_map(|mut path| path.pop())
            .collect()
    }

    fn partitions(&self, name: &str) -> impl Iterator<Item = String> {
        let disk = self.all.get(name).map(|disk| &disk.dir);
        let is_part =
            move |block: &Block| disk.is_some_and(|disk| block.dir.parent() == Some(disk));
        let parts = self.all.iter().filter(move |(_, block)| is_part(block));
        parts.map(|(name, _)| name.clone())
    }
}

/// The paths of a disk. The namespace of an NVMe subsystem is below no controller, but beside links to all of them
/// (CONFIG_NVME_MULTIPATH).
pub(super) fn homes(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let is_subsystem = |dir: &&Path| {
        dir.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("nvme-subsys"))
    };
    let Some(subsystem) = dir.ancestors().find(is_subsystem) else {
        return Ok(vec![dir.to_owned()]);
    };
    let beside = sysfs::entries(subsystem)?;
    let controllers = beside
        .iter()
        .map(|name| subsystem.join(name))
        .filter(|path| path.is_symlink());
    Ok(controllers
        .filter_map(|link| fs::canonicalize(link).ok())
        .collect())
}
