//! Block devices that are mounted or swapped to, and file systems on several block devices.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use super::blocks::Blocks;
use super::uses::{HostUse, OnBlock};
use crate::base::host::HostPaths;
use crate::base::sysfs;

/// Mounts of this mount namespace, swap devices, and file systems with several devices.
pub(super) struct Mounts {
    mounts: Vec<Mount>,
    swaps: BTreeSet<String>,
    multi_device: Vec<MultiDevice>,
}

struct Mount {
    /// Device number, `259:1`. btrfs and others make their own.
    number: String,
    /// The block devices that the mount names.
    blocks: BTreeSet<String>,
    at: String,
}

/// A file system that is in use and may have several block devices.
struct MultiDevice {
    /// The kind, for messages.
    name: String,
    blocks: BTreeSet<String>,
}

impl Mounts {
    pub(super) fn read(paths: &HostPaths, blocks: &Blocks) -> io::Result<Self> {
        let mountinfo = paths.proc.join("self/mountinfo");
        // Without the list no device would look mounted.
        let mountinfo = fs::read_to_string(&mountinfo).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", mountinfo.display()))
        })?;
        let swaps = sysfs::table(&paths.proc.join("swaps"))?;
        let swaps = swaps.lines().filter_map(|line| {
            let path = line.split_whitespace().next()?;
            blocks.named(path)
        });
        let multi_device = multi_device(paths)?;
        let mut mounts = mounts(&mountinfo, blocks);
        for mount in &mut mounts {
            let own = multi_device
                .iter()
                .filter(|one| !one.blocks.is_disjoint(&mount.blocks));
            let more: Vec<String> = own.flat_map(|one| one.blocks.clone()).collect();
            mount.blocks.extend(more);
        }
        Ok(Self {
            mounts,
            swaps: swaps.collect(),
            multi_device,
        })
    }

    /// The uses of a block device itself.
    pub(super) fn uses(&self, blocks: &Blocks, name: &str, on: &OnBlock) -> Vec<HostUse> {
        let number = blocks.number(name);
        let is_on = |mount: &&Mount| mount.number == number || mount.blocks.contains(name);
        let mut uses = Vec::new();
        let mut mounts = self.mounts.iter().filter(is_on);
        if let Some(first) = mounts.next() {
            uses.push(HostUse::Mounted {
                on: on.clone(),
                at: first.at.clone(),
                others: mounts.count(),
            });
        } else if let Some(multi_device) = self
            .multi_device
            .iter()
            .find(|one| one.blocks.contains(name))
        {
            // It is mounted in another mount namespace.
            uses.push(HostUse::Member {
                block: on.block.clone(),
                of: multi_device.name.clone(),
            });
        }
        if self.swaps.contains(name) {
            uses.push(HostUse::Swap { on: on.clone() });
        }
        uses
    }
}

/// Reads /proc/self/mountinfo (proc_pid_mountinfo(5)).
fn mounts(mountinfo: &str, blocks: &Blocks) -> Vec<Mount> {
    let mount = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ');
        let (number, at) = (fields.nth(2)?, fields.nth(1)?);
        let mut after = after.split(' ');
        let (kind, source) = (after.next()?, after.next()?);
        // bcachefs names all its devices, with colons between.
        let sources: Vec<&str> = match kind {
            "bcachefs" => source.split(':').collect(),
            _ => vec![source],
        };
        Some(Mount {
            number: number.to_owned(),
            blocks: sources.iter().filter_map(|one| blocks.named(one)).collect(),
            at: at.replace("\\040", " "),
        })
    };
    mountinfo.lines().filter_map(mount).collect()
}

/// The file systems of btrfs and bcachefs that are mounted, with their block devices.
fn multi_device(paths: &HostPaths) -> io::Result<Vec<MultiDevice>> {
    let fs = paths.sysfs.join("fs");
    let mut found = Vec::new();
    for id in sysfs::entries(&fs.join("btrfs"))? {
        let blocks: BTreeSet<String> = sysfs::entries(&fs.join("btrfs").join(&id).join("devices"))?
            .into_iter()
            .collect();
        let name = format!("the btrfs file system {id}");
        found.push(MultiDevice { name, blocks });
    }
    for id in sysfs::entries(&fs.join("bcachefs"))? {
        let dir = fs.join("bcachefs").join(&id);
        let blocks = sysfs::entries(&dir)?.into_iter().filter_map(|member| {
            let block = sysfs::link_name(&dir.join(member).join("block"));
            block.ok().flatten()
        });
        let blocks = blocks.collect();
        let name = format!("the bcachefs file system {id}");
        found.push(MultiDevice { name, blocks });
    }
    found.retain(|one| !one.blocks.is_empty());
    Ok(found)
}
