//! What the host itself needs: disks in use, the network of the default route, the console display.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use serde::Serialize;

use crate::host::{HostBdf, HostPaths};
use crate::inventory::HostDevice;
use crate::sysfs;

/// What the host uses a device for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "use")]
pub enum HostUse {
    /// A file system is mounted from it.
    Mounted {
        /// The block device.
        block: String,
        /// Where it is mounted.
        at: String,
    },
    /// The host swaps to it.
    Swap {
        /// The block device.
        block: String,
    },
    /// It is part of a volume: LVM, md, dm-crypt.
    Member {
        /// The block device.
        block: String,
        /// The volume.
        of: String,
    },
    /// Something else has claimed it for itself (a ZFS pool, a program).
    Claimed {
        /// The block device.
        block: String,
    },
    /// A default route goes through it.
    DefaultRoute {
        /// The network interface.
        interface: String,
    },
    /// It is the display that the firmware started.
    ConsoleDisplay,
}

/// A device and what the host uses it for. Shown as a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Guarded {
    /// The device.
    pub bdf: HostBdf,
    /// What for.
    #[serde(flatten)]
    pub host_use: HostUse,
}

impl fmt::Display for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bdf = self.bdf;
        match &self.host_use {
            HostUse::Mounted { block, at } => {
                write!(f, "{bdf} holds {block}, which is mounted at {at}")
            }
            HostUse::Swap { block } => write!(f, "{bdf} holds {block}, which the host swaps to"),
            HostUse::Member { block, of } => {
                write!(f, "{bdf} holds {block}, which is part of {of}")
            }
            HostUse::Claimed { block } => write!(
                f,
                "{bdf} holds {block}, which something on the host has claimed"
            ),
            HostUse::DefaultRoute { interface } => {
                write!(f, "{bdf} is {interface}, which carries a default route")
            }
            HostUse::ConsoleDisplay => write!(
                f,
                "{bdf} is the display that the firmware started (boot_vga)"
            ),
        }
    }
}

/// What the host uses these devices for, one line for each use; empty if they can go.
pub fn host_uses(paths: &HostPaths, devices: &[HostDevice]) -> io::Result<Vec<Guarded>> {
    let storage = Storage::read(paths)?;
    let routes = routed_interfaces(paths)?;
    let mut uses = Vec::new();
    for device in devices {
        let dir = fs::canonicalize(paths.pci_device(device.bdf))?;
        let mut add = |host_use| {
            uses.push(Guarded {
                bdf: device.bdf,
                host_use,
            })
        };
        if device.boot_vga {
            add(HostUse::ConsoleDisplay);
        }
        for block in storage.below(&dir) {
            storage.uses(paths, block)?.into_iter().for_each(&mut add);
        }
        for (interface, _) in routes.iter().filter(|(_, path)| path.starts_with(&dir)) {
            add(HostUse::DefaultRoute {
                interface: interface.clone(),
            });
        }
    }
    Ok(uses)
}

/// A disk or partition.
struct Block {
    name: String,
    /// Its directory in the device tree.
    dir: PathBuf,
    /// What it hangs below; an NVMe namespace with several paths hangs below several controllers.
    homes: Vec<PathBuf>,
}

/// The block devices of the host and what is known of their use.
struct Storage {
    blocks: Vec<Block>,
    mounts: Vec<Mount>,
    swaps: BTreeSet<String>,
}

impl Storage {
    fn read(paths: &HostPaths) -> io::Result<Self> {
        let class = paths.sysfs.join("class/block");
        let mut blocks = Vec::new();
        for name in sysfs::entries(&class)? {
            // A disk may be pulled out while we look.
            if let Ok(dir) = fs::canonicalize(class.join(&name)) {
                blocks.push(Block {
                    name,
                    homes: homes(&dir)?,
                    dir,
                });
            }
        }
        let mounts = mounts(&sysfs::text(&paths.proc.join("self/mountinfo"))?.unwrap_or_default());
        let swaps = swaps(&sysfs::text(&paths.proc.join("swaps"))?.unwrap_or_default());
        Ok(Self {
            blocks,
            mounts,
            swaps,
        })
    }

    fn below(&self, device: &Path) -> impl Iterator<Item = &Block> {
        self.blocks
            .iter()
            .filter(move |block| block.homes.iter().any(|home| home.starts_with(device)))
    }

    fn uses(&self, paths: &HostPaths, block: &Block) -> io::Result<Vec<HostUse>> {
        let name = &block.name;
        let number = sysfs::text(&block.dir.join("dev"))?.unwrap_or_default();
        let mut uses = Vec::new();
        for mount in self
            .mounts
            .iter()
            .filter(|mount| mount.number == number || mount.source == *name)
        {
            uses.push(HostUse::Mounted {
                block: name.clone(),
                at: mount.at.clone(),
            });
        }
        if self.swaps.contains(name) {
            uses.push(HostUse::Swap {
                block: name.clone(),
            });
        }
        for of in sysfs::entries(&block.dir.join("holders"))? {
            uses.push(HostUse::Member {
                block: name.clone(),
                of,
            });
        }
        if uses.is_empty() && is_claimed(&paths.dev.join(name)) {
            uses.push(HostUse::Claimed {
                block: name.clone(),
            });
        }
        Ok(uses)
    }
}

/// Where a block device hangs. The namespace of an NVMe subsystem hangs below no controller but beside
/// links to all of them (CONFIG_NVME_MULTIPATH).
fn homes(dir: &Path) -> io::Result<Vec<PathBuf>> {
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

/// Whether the kernel refuses an exclusive claim: it does for whatever is mounted, swapped to, part of a
/// volume or a pool, whoever did that and in whichever mount namespace.
fn is_claimed(node: &Path) -> bool {
    let is_block = fs::metadata(node).is_ok_and(|meta| meta.file_type().is_block_device());
    if !is_block {
        return false;
    }
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
        .open(node);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

struct Mount {
    /// Device number, `259:1`.
    number: String,
    /// Last part of the source: for btrfs, whose device number is made up.
    source: String,
    at: String,
}

/// Reads /proc/self/mountinfo (proc_pid_mountinfo(5)).
fn mounts(mountinfo: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ');
        let (number, at) = (fields.nth(2)?, fields.nth(1)?);
        let source = after.split(' ').nth(1)?;
        let source = source.strip_prefix("/dev/").unwrap_or_default();
        Some(Mount {
            number: number.to_owned(),
            source: source.to_owned(),
            at: at.replace("\\040", " "),
        })
    };
    mountinfo.lines().filter_map(mount).collect()
}

/// The block devices of /proc/swaps.
fn swaps(swaps: &str) -> BTreeSet<String> {
    let first = swaps
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    first
        .filter_map(|path| path.strip_prefix("/dev/"))
        .map(str::to_owned)
        .collect()
}

/// The interfaces with a default route and those that they are made of (bridge, bond, VLAN), with their
/// places in the device tree.
fn routed_interfaces(paths: &HostPaths) -> io::Result<Vec<(String, PathBuf)>> {
    let ipv4 = sysfs::text(&paths.proc.join("net/route"))?.unwrap_or_default();
    let ipv6 = sysfs::text(&paths.proc.join("net/ipv6_route"))?.unwrap_or_default();
    let mut waiting: Vec<String> = default_routes_v4(&ipv4)
        .chain(default_routes_v6(&ipv6))
        .collect();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    while let Some(name) = waiting.pop() {
        let link = paths.sysfs.join("class/net").join(&name);
        if !seen.insert(name.clone()) {
            continue;
        }
        let below = sysfs::entries(&link)?;
        waiting.extend(
            below
                .iter()
                .filter_map(|entry| entry.strip_prefix("lower_"))
                .map(str::to_owned),
        );
        if let Ok(path) = fs::canonicalize(&link) {
            found.push((name, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Interfaces of /proc/net/route whose destination and mask are zero.
fn default_routes_v4(table: &str) -> impl Iterator<Item = String> {
    table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let default = fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000");
        default.then(|| fields.first().map(|name| (*name).to_owned()))?
    })
}

/// Interfaces of /proc/net/ipv6_route with a destination of no bits; `lo` has one that rejects.
fn default_routes_v6(table: &str) -> impl Iterator<Item = String> {
    table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [destination, bits, .., name] = fields.as_slice() else {
            return None;
        };
        let default =
            destination.bytes().all(|digit| digit == b'0') && *bits == "00" && *name != "lo";
        default.then(|| (*name).to_owned())
    })
}
