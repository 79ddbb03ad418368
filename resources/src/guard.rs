//! What the host itself needs: disks in use, the network of the default route, the console display.

mod addresses;
mod console;
mod framebuffer;
mod network;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use serde::Serialize;

use crate::host::{HostBdf, HostPaths};
use crate::inventory::HostDevice;
use crate::sysfs;
use network::Network;

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
    /// It cannot be told whether something has claimed it.
    Unsure {
        /// The block device.
        block: String,
        /// Why not.
        why: String,
    },
    /// A driver of the host's has the network card, and none of its interfaces can be seen from here.
    OutOfSight {
        /// The driver.
        driver: String,
    },
    /// A default route goes through it.
    DefaultRoute {
        /// The network interface.
        interface: String,
        /// The one that has the route, where this one is only a part of it (bond, bridge, VLAN).
        #[serde(skip_serializing_if = "Option::is_none")]
        of: Option<String>,
    },
    /// Somebody is logged in over it (SSH).
    Session {
        /// The network interface.
        interface: String,
        /// As of a default route.
        #[serde(skip_serializing_if = "Option::is_none")]
        of: Option<String>,
    },
    /// The host has an address on it.
    Address {
        /// The network interface.
        interface: String,
        /// As of a default route.
        #[serde(skip_serializing_if = "Option::is_none")]
        of: Option<String>,
        /// The address.
        address: IpAddr,
    },
    /// It is the display that the firmware started.
    ConsoleDisplay,
    /// The console is drawn in its memory.
    Framebuffer,
    /// A console of the host is behind it.
    Console {
        /// The terminal.
        terminal: String,
    },
    /// The host has no other keyboard.
    Keyboard {
        /// What it calls itself.
        name: String,
    },
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
            HostUse::Unsure { block, why } => write!(
                f,
                "{bdf} holds {block}, and it cannot be told whether the host uses that: {why}"
            ),
            HostUse::OutOfSight { driver } => write!(
                f,
                "{bdf} is a network card of {driver} with no interface in sight, as where a container's network namespace has it"
            ),
            HostUse::DefaultRoute { interface, of } => write!(
                f,
                "{bdf} is {interface}{}, which carries a default route",
                part(of)
            ),
            HostUse::Session { interface, of } => write!(
                f,
                "{bdf} is {interface}{}, which somebody is logged in over (SSH)",
                part(of)
            ),
            HostUse::Address {
                interface,
                of,
                address,
            } => write!(
                f,
                "{bdf} is {interface}{}, which is up with the address {address}",
                part(of)
            ),
            HostUse::Framebuffer => write!(
                f,
                "{bdf} holds the framebuffer that the console is drawn in (/proc/iomem)"
            ),
            HostUse::Console { terminal } => write!(
                f,
                "{bdf} is behind {terminal}, a console of the host (/sys/class/tty/console/active)"
            ),
            HostUse::Keyboard { name } => {
                write!(f, "{bdf} has the host's last keyboard, {name}")
            }
            HostUse::ConsoleDisplay => write!(
                f,
                "{bdf} is the display that the firmware started (boot_vga)"
            ),
        }
    }
}

fn part(of: &Option<String>) -> String {
    of.as_ref()
        .map_or_else(String::new, |of| format!(", part of {of}"))
}

/// What the host uses these devices for, one line for each use; empty if they can go.
pub fn host_uses(paths: &HostPaths, devices: &[HostDevice]) -> io::Result<Vec<Guarded>> {
    uses_with(paths, devices, &addresses::addressed(paths)?)
}

/// [`host_uses`], with the interfaces that have an address.
fn uses_with(
    paths: &HostPaths,
    devices: &[HostDevice],
    addressed: &BTreeMap<String, IpAddr>,
) -> io::Result<Vec<Guarded>> {
    let storage = Storage::read(paths)?;
    let network = Network::read(paths, addressed)?;
    let framebuffers = framebuffer::owners(&sysfs::table(&paths.proc.join("iomem"))?);
    let seats = console::Seats::read(paths)?;
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
        if framebuffers.contains(&device.bdf) && !device.boot_vga {
            add(HostUse::Framebuffer);
        }
        seats.uses(&dir)?.into_iter().for_each(&mut add);
        if let Some(driver) = network::out_of_sight(&dir, device)? {
            add(HostUse::OutOfSight { driver });
        }
        for block in storage.below(&dir) {
            storage.uses(paths, block)?.into_iter().for_each(&mut add);
        }
        network.below(&dir).for_each(&mut add);
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
        let mountinfo = paths.proc.join("self/mountinfo");
        // Without it nothing would look mounted.
        let mountinfo = fs::read_to_string(&mountinfo).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", mountinfo.display()))
        })?;
        let mounts = mounts(&mountinfo);
        let swaps = swaps(&sysfs::table(&paths.proc.join("swaps"))?);
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
        if uses.is_empty() {
            // A slash in a node's name is an exclamation mark in sysfs.
            uses.extend(claim(&paths.dev.join(name.replace('!', "/")), name));
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

/// How often a claim is asked for: another command that asks has it for a moment.
const CLAIMS: u32 = 5;

/// Whether the kernel refuses an exclusive claim: it does for whatever is mounted, swapped to, part of a
/// volume or a pool, whoever did that and in whichever mount namespace. Where it cannot be asked, the
/// device counts as used.
fn claim(node: &Path, name: &str) -> Option<HostUse> {
    let block = || name.to_owned();
    let unsure = |why: io::Error| HostUse::Unsure {
        block: block(),
        why: why.to_string(),
    };
    match fs::metadata(node) {
        Ok(meta) if meta.file_type().is_block_device() => {}
        Ok(_) => return None,
        Err(error) => return (!sysfs::is_gone(&error)).then(|| unsure(error)),
    }
    for _ in 0..CLAIMS {
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
            .open(node);
        match opened {
            Ok(_) => return None,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            // No card in the reader, or the disk has just gone.
            Err(error)
                if sysfs::is_gone(&error) || error.raw_os_error() == Some(libc::ENOMEDIUM) =>
            {
                return None;
            }
            Err(error) => return Some(unsure(error)),
        }
    }
    Some(HostUse::Claimed { block: block() })
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

#[cfg(test)]
mod tests;
