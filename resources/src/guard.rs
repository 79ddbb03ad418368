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
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost, bdf};

    const DISK: &str = "0000:01:00.0";

    /// A disk with a partition, and a NIC.
    fn host() -> FakeHost {
        let host = FakeHost::new(&[
            Fake::nvme(DISK, 1).driver("nvme"),
            Fake::nvme("0000:02:00.0", 2)
                .class(0x02_00_00)
                .driver("igb"),
            Fake::nvme("0000:03:00.0", 3).driver("nvme"),
        ]);
        let disk = host.child(bdf(DISK), "nvme/nvme0/nvme0n1", "class/block/nvme0n1");
        fs::write(disk.join("dev"), "259:0\n").unwrap();
        let partition = host.child(
            bdf(DISK),
            "nvme/nvme0/nvme0n1/nvme0n1p1",
            "class/block/nvme0n1p1",
        );
        fs::write(partition.join("dev"), "259:1\n").unwrap();
        host.child(bdf("0000:02:00.0"), "net/eth0", "class/net/eth0");
        host
    }

    fn uses(host: &FakeHost) -> Vec<String> {
        host_uses(&host.paths, &host.scan())
            .unwrap()
            .iter()
            .map(Guarded::to_string)
            .collect()
    }

    #[test]
    fn an_idle_host_needs_nothing() {
        assert!(uses(&host()).is_empty());
    }

    #[test]
    fn a_host_that_does_not_say_what_is_mounted_is_not_taken_for_idle() {
        let host = host();
        fs::remove_file(host.paths.proc.join("self/mountinfo")).unwrap();
        let error = host_uses(&host.paths, &host.scan())
            .unwrap_err()
            .to_string();
        assert!(error.contains("proc/self/mountinfo"), "{error}");
    }

    #[test]
    fn a_mounted_partition_keeps_its_disk() {
        let host = host();
        host.file(
            "proc/self/mountinfo",
            "22 1 0:21 / /proc rw,nosuid shared:5 - proc proc rw\n\
             29 1 259:1 / /srv/my\\040data rw,relatime shared:1 - ext4 /dev/root rw\n",
        );
        assert_eq!(
            uses(&host),
            [format!(
                "{DISK} holds nvme0n1p1, which is mounted at /srv/my data"
            )]
        );
    }

    #[test]
    fn a_btrfs_is_known_by_its_source() {
        let host = host();
        host.file(
            "proc/self/mountinfo",
            "29 1 0:33 /@ / rw shared:1 - btrfs /dev/nvme0n1p1 rw,subvolid=256\n",
        );
        assert_eq!(
            uses(&host),
            [format!("{DISK} holds nvme0n1p1, which is mounted at /")]
        );
    }

    #[test]
    fn swap_and_volumes_keep_their_disk() {
        let host = host();
        host.file(
            "proc/swaps",
            "Filename\tType\tSize\n/dev/nvme0n1p1  partition\t975868\n",
        );
        fs::create_dir_all(host.dir(bdf(DISK)).join("nvme/nvme0/nvme0n1/holders/dm-0")).unwrap();
        assert_eq!(
            uses(&host),
            [
                format!("{DISK} holds nvme0n1, which is part of dm-0"),
                format!("{DISK} holds nvme0n1p1, which the host swaps to"),
            ]
        );
    }

    #[test]
    fn a_namespace_with_several_paths_keeps_all_its_controllers() {
        let host = host();
        let subsystem = host
            .paths
            .sysfs
            .join("devices/virtual/nvme-subsystem/nvme-subsys0");
        let namespace = subsystem.join("nvme9n1");
        fs::create_dir_all(&namespace).unwrap();
        fs::write(namespace.join("dev"), "259:9\n").unwrap();
        std::os::unix::fs::symlink(&namespace, host.paths.sysfs.join("class/block/nvme9n1"))
            .unwrap();
        for (device, name) in [(DISK, "nvme0"), ("0000:03:00.0", "nvme1")] {
            let controller = host.dir(bdf(device)).join("nvme").join(name);
            fs::create_dir_all(&controller).unwrap();
            std::os::unix::fs::symlink(&controller, subsystem.join(name)).unwrap();
        }
        host.file(
            "proc/self/mountinfo",
            "29 1 259:9 / / rw - ext4 /dev/nvme9n1 rw\n",
        );
        let said = ["0000:01:00.0", "0000:03:00.0"]
            .map(|bdf| format!("{bdf} holds nvme9n1, which is mounted at /"));
        assert_eq!(uses(&host), said);
    }

    #[test]
    fn the_nic_of_a_default_route_stays() {
        let route =
            "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n";
        let host = host();
        host.file(
            "proc/net/route",
            &format!("{route}eth0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"),
        );
        assert!(uses(&host).is_empty());
        host.file(
            "proc/net/route",
            &format!("{route}eth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"),
        );
        assert_eq!(
            uses(&host),
            ["0000:02:00.0 is eth0, which carries a default route"]
        );
    }

    #[test]
    fn the_nic_that_the_host_is_reached_by_stays() {
        let host = host();
        let dir = host.paths.sysfs.join("devices/virtual/net/bond0");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("lower_eth0"), "").unwrap();
        std::os::unix::fs::symlink(&dir, host.paths.sysfs.join("class/net/bond0")).unwrap();
        let said = |name: &str| -> Vec<String> {
            let address = "10.9.1.1".parse().unwrap();
            let addressed = BTreeMap::from([(name.to_owned(), address)]);
            let uses = uses_with(&host.paths, &host.scan(), &addressed).unwrap();
            uses.iter().map(Guarded::to_string).collect()
        };
        let up = "which is up with the address 10.9.1.1";
        assert_eq!(said("eth0"), [format!("0000:02:00.0 is eth0, {up}")]);
        let part = format!("0000:02:00.0 is eth0, part of bond0, {up}");
        assert_eq!(said("bond0"), [part]);
        assert!(said("eth1").is_empty());
        // What says more is said alone.
        host.file(
            "proc/net/route",
            "Iface\tDestination\neth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n",
        );
        let route = "0000:02:00.0 is eth0, which carries a default route";
        assert_eq!(said("bond0"), [route]);
    }

    #[test]
    fn the_nic_below_a_bridge_with_the_default_route_stays() {
        let host = host();
        let zeros = "0".repeat(32);
        host.file("proc/net/ipv6_route", &format!(
            "{zeros} 00 {zeros} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003   br0.7\n\
             {zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200       lo\n"
        ));
        for (upper, lower) in [("br0.7", "br0"), ("br0", "eth0")] {
            let dir = host.paths.sysfs.join("devices/virtual/net").join(upper);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(format!("lower_{lower}")), "").unwrap();
            std::os::unix::fs::symlink(&dir, host.paths.sysfs.join("class/net").join(upper))
                .unwrap();
        }
        assert_eq!(
            uses(&host),
            ["0000:02:00.0 is eth0, part of br0.7, which carries a default route"]
        );
    }

    #[test]
    fn the_nic_of_a_session_and_the_device_of_the_framebuffer_stay() {
        let host = host();
        host.file(
            "proc/net/route",
            "Iface\tDestination\n\
             eth0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0\n",
        );
        host.file(
            "proc/net/tcp",
            "  sl  local_address rem_address   st\n   0: 0100000A:0016 0200000A:D431 01 0:0\n",
        );
        host.file(
            "proc/iomem",
            "c0000000-cfffffff : 0000:03:00.0\n  c0000000-c07e8fff : BOOTFB\n",
        );
        assert_eq!(
            uses(&host),
            [
                "0000:02:00.0 is eth0, which somebody is logged in over (SSH)",
                "0000:03:00.0 holds the framebuffer that the console is drawn in (/proc/iomem)",
            ]
        );
    }

    #[test]
    fn the_console_display_stays() {
        let host = FakeHost::new(&[Fake::nvme("0000:04:00.0", 4)
            .class(0x03_00_00)
            .with("boot_vga", "1")]);
        assert_eq!(
            uses(&host),
            ["0000:04:00.0 is the display that the firmware started (boot_vga)"]
        );
    }

    #[test]
    fn only_block_devices_are_tried() {
        let host = host();
        host.file("dev/nvme0n1", "a file that happens to be there");
        assert_eq!(claim(&host.paths.dev.join("nvme0n1"), "nvme0n1"), None);
        assert_eq!(claim(Path::new("/dev/null"), "nvme0n1"), None);
        assert_eq!(claim(Path::new("/nonexistent"), "nvme0n1"), None);
    }

    #[test]
    fn this_machines_own_files_are_read() {
        let mounts = mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap());
        assert!(
            mounts
                .iter()
                .any(|mount| mount.at == "/" && mount.number.contains(':'))
        );
        assert!(host_uses(&HostPaths::default(), &[]).unwrap().is_empty());
    }

    #[test]
    fn a_claim_that_cannot_be_asked_for_keeps_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let node = folder.path().join("nvme0n1");
        assert_eq!(claim(&node, "nvme0n1"), None, "no node, nobody to claim it");
        std::os::unix::fs::symlink(&node, &node).unwrap();
        let used = claim(&node, "nvme0n1");
        assert!(matches!(used, Some(HostUse::Unsure { .. })), "{used:?}");
    }

    #[test]
    fn a_card_whose_interface_is_out_of_sight_stays() {
        let card = |address| Fake::nvme(address, 2).class(0x02_00_00);
        let host = FakeHost::new(&[card("02:00.0").driver("ixgbevf"), card("02:00.1")]);
        host.file("proc/self/mountinfo", "");
        let said = "0000:02:00.0 is a network card of ixgbevf with no interface in sight";
        let uses = uses(&host);
        assert!(uses.len() == 1 && uses[0].starts_with(said), "{uses:?}");
        let dir = host.dir(bdf("02:00.0")).join("net/eth7");
        fs::create_dir_all(dir).unwrap();
        assert!(host_uses(&host.paths, &host.scan()).unwrap().is_empty());
    }

    #[test]
    fn the_interface_of_a_virtio_card_is_in_sight() {
        let card = Fake::nvme("02:00.0", 2).class(0x02_00_00);
        let host = FakeHost::new(&[card.driver("virtio-pci")]);
        host.file("proc/self/mountinfo", "");
        let below = host.dir(bdf("02:00.0")).join("virtio0");
        fs::create_dir_all(&below).unwrap();
        assert_eq!(uses(&host).len(), 1);
        fs::create_dir_all(below.join("net/eth7")).unwrap();
        assert!(uses(&host).is_empty());
    }
}
