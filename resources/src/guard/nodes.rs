//! Device nodes by which programs use a device: block devices, and character devices of disks, GPUs, RDMA
//! cards and user-space drivers; and the processes that have one open.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::stat::{major, minor};

use super::blocks::homes;
use super::uses::HostUse;
use crate::host::HostPaths;
use crate::sysfs;
use crate::writer::{User, open_nodes};

/// Classes of nodes. Who has another kind open (an input device, a terminal) is told otherwise, or does not
/// matter.
const CLASSES: [&str; 8] = [
    "block",
    "nvme",
    "nvme-generic",
    "scsi_generic",
    "scsi_tape",
    "drm",
    "infiniband_verbs",
    "uio",
];

/// The major number of NVIDIA's nodes, which have no class.
const NVIDIA: u32 = 195;

/// A look at short intervals tells processes that use a node from those that probe it for a moment (udev,
/// smartd, another gantry).
const LOOKS: u32 = 5;
const INTERVAL: Duration = Duration::from_millis(50);

/// A device node.
pub(super) struct Node {
    /// Its name below /dev.
    pub(super) name: String,
    /// Its device number, `259:0`.
    number: String,
    pub(super) is_block: bool,
    homes: Vec<PathBuf>,
}

impl Node {
    pub(super) fn is_below(&self, device: &Path) -> bool {
        self.homes.iter().any(|home| home.starts_with(device))
    }

    /// Whether a process's descriptor, with its target, is of this node.
    fn is(&self, descriptor: &Path, target: &Path) -> bool {
        let named = target.strip_prefix("/dev");
        if named.is_ok_and(|name| name == Path::new(&self.name)) {
            return true;
        }
        // A container may have the node under another name.
        let about = fs::metadata(descriptor);
        about.is_ok_and(|about| {
            let kind = about.file_type();
            let same =
                kind.is_block_device() == self.is_block && kind.is_char_device() != self.is_block;
            let number = about.rdev();
            same && format!("{}:{}", major(number), minor(number)) == self.number
        })
    }
}

/// All nodes of these classes.
pub(super) fn read(paths: &HostPaths) -> io::Result<Vec<Node>> {
    let mut found = Vec::new();
    for class in CLASSES {
        let dir = paths.sysfs.join("class").join(class);
        for name in sysfs::entries(&dir)? {
            let Ok(dir) = fs::canonicalize(dir.join(&name)) else {
                continue;
            };
            let Some(number) = sysfs::text(&dir.join("dev")).ok().flatten() else {
                continue;
            };
            let event = sysfs::text(&dir.join("uevent")).ok().flatten();
            let event = event.unwrap_or_default();
            let told = event.lines().find_map(|line| line.strip_prefix("DEVNAME="));
            found.push(Node {
                name: told.map_or_else(|| name.replace('!', "/"), str::to_owned),
                number,
                is_block: class == "block",
                homes: homes(&dir)?,
            });
        }
    }
    found.extend(nvidia(paths)?);
    Ok(found)
}

/// The nodes of NVIDIA's own driver: `Device Minor: 0` of /proc/driver/nvidia/gpus/BDF/information.
fn nvidia(paths: &HostPaths) -> io::Result<Vec<Node>> {
    let gpus = paths.proc.join("driver/nvidia/gpus");
    let mut found = Vec::new();
    for address in sysfs::entries(&gpus)? {
        let text = sysfs::table(&gpus.join(&address).join("information")).unwrap_or_default();
        let minor = text
            .lines()
            .find_map(|line| line.strip_prefix("Device Minor:"));
        let home = fs::canonicalize(paths.sysfs.join("bus/pci/devices").join(&address));
        if let (Some(minor), Ok(home)) = (minor.map(str::trim), home) {
            found.push(Node {
                name: format!("nvidia{minor}"),
                number: format!("{NVIDIA}:{minor}"),
                is_block: false,
                homes: vec![home],
            });
        }
    }
    Ok(found)
}

/// Those of some nodes that a process has open and keeps open.
pub(super) fn kept_open<'a>(paths: &HostPaths, nodes: &[&'a Node]) -> Vec<(&'a Node, HostUse)> {
    let look = || -> Vec<(&'a Node, User)> {
        if nodes.is_empty() {
            return Vec::new();
        }
        let which = |descriptor: &Path, target: &Path| {
            nodes.iter().position(|node| node.is(descriptor, target))
        };
        let open = open_nodes(&paths.proc, which).into_iter();
        open.map(|(index, user)| (nodes[index], user)).collect()
    };
    let mut open = look();
    for _ in 1..LOOKS {
        if open.is_empty() {
            break;
        }
        std::thread::sleep(INTERVAL);
        let now = look();
        let stays = |(node, user): &(&Node, User)| {
            now.iter()
                .any(|(other, one)| other.name == node.name && one.pid == user.pid)
        };
        open.retain(stays);
    }
    let used = |(node, user): (&'a Node, User)| {
        let host_use = HostUse::Open {
            node: node.name.clone(),
            pid: user.pid,
            process: user.name,
        };
        (node, host_use)
    };
    open.into_iter().map(used).collect()
}
