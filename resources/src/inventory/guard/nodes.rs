//! Device nodes by which programs use a device: block devices, and character devices of disks, GPUs, RDMA
//! cards, serial ports, virtio consoles and user-space drivers; and the processes that have one open.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::stat::{major, minor};

use super::blocks::homes;
use super::uses::HostUse;
use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::facts::open_files::{User, open_nodes};

/// Classes of nodes. The use of other nodes (an input device) shows in another way, or does not matter.
const CLASSES: [&str; 10] = [
    "block",
    "nvme",
    "nvme-generic",
    "scsi_generic",
    "scsi_tape",
    "drm",
    "infiniband_verbs",
    "tty",
    "uio",
    "virtio-ports",
];

/// The kernel's directory of terminals of a hypervisor's consoles, which are below no device.
const HYPERVISOR_TERMINALS: &str = "virtual/tty/hvc";

/// The major number of NVIDIA's nodes, which have no class.
const NVIDIA: u32 = 195;

/// Two reads at a short interval tell processes that use a node from those that probe it for a moment (udev,
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
            let of_hypervisor = dir.to_string_lossy().contains(HYPERVISOR_TERMINALS);
            found.push(Node {
                name: told.map_or_else(|| name.replace('!', "/"), str::to_owned),
                number,
                is_block: class == "block",
                homes: match of_hypervisor {
                    true => virtio_consoles(paths)?,
                    false => homes(&dir)?,
                },
            });
        }
    }
    found.extend(nvidia(paths)?);
    Ok(found)
}

/// The devices whose driver makes terminals of a hypervisor. Which device has which terminal is not visible.
fn virtio_consoles(paths: &HostPaths) -> io::Result<Vec<PathBuf>> {
    let driver = paths.sysfs.join("bus/virtio/drivers/virtio_console");
    let bound = sysfs::entries(&driver)?.into_iter();
    let bound = bound.filter(|name| name.starts_with("virtio"));
    Ok(bound
        .filter_map(|name| fs::canonicalize(driver.join(name)).ok())
        .collect())
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

/// Of some nodes those that a process has open at both reads.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost, bdf};
    use crate::inventory::guard::host_uses;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_port_that_a_process_talks_over_keeps_its_device() {
        let host = FakeHost::new(&[
            Fake::nvme("01:00.0", 1)
                .class(0x07_80_00)
                .driver("virtio-pci"),
            Fake::nvme("02:00.0", 2).class(0x07_00_02).driver("serial"),
        ]);
        for dir in ["virtio-ports", "tty"] {
            fs::create_dir_all(host.paths.sysfs.join("class").join(dir)).unwrap();
        }
        let (console, serial) = (bdf("01:00.0"), bdf("02:00.0"));
        let port = "virtio3/virtio-ports/vport3p1";
        let port = host.child(console, port, "class/virtio-ports/vport3p1");
        let tty = host.child(serial, "tty/ttyS4", "class/tty/ttyS4");
        host.file("sys/devices/virtual/tty/hvc0/dev", "229:0\n");
        let hvc = host.paths.sysfs.join("devices/virtual/tty/hvc0");
        symlink(&hvc, host.paths.sysfs.join("class/tty/hvc0")).unwrap();
        let driver = host.paths.sysfs.join("bus/virtio/drivers/virtio_console");
        fs::create_dir_all(&driver).unwrap();
        symlink(host.dir(console).join("virtio3"), driver.join("virtio3")).unwrap();
        fs::write(port.join("dev"), "251:1\n").unwrap();
        fs::write(tty.join("dev"), "4:68\n").unwrap();
        let uses = || -> Vec<String> {
            let uses = host_uses(&host.paths, &host.scan()).unwrap();
            uses.iter().map(ToString::to_string).collect()
        };
        assert!(uses().is_empty(), "nobody has them open");
        host.file("proc/77/comm", "agent\n");
        host.file("proc/77/fd/0", "");
        let opens = |node: &str| {
            let link = host.paths.proc.join("77/fd/5");
            let _ = fs::remove_file(&link);
            symlink(Path::new("/dev").join(node), link).unwrap();
        };
        for (node, device) in [("vport3p1", "01"), ("hvc0", "01"), ("ttyS4", "02")] {
            opens(node);
            let said =
                format!("0000:{device}:00.0 holds {node}, which process 77 (agent) has open");
            assert_eq!(uses(), [said]);
        }
        opens("vport9p1");
        assert!(uses().is_empty(), "a port of another device");
        // In a chroot, a node has any name: this one stands for /dev/null, whose number everybody knows.
        fs::write(tty.join("dev"), "1:3\n").unwrap();
        let elsewhere = host.paths.proc.join("disk");
        symlink("/dev/null", &elsewhere).unwrap();
        let link = host.paths.proc.join("77/fd/5");
        fs::remove_file(&link).unwrap();
        symlink(&elsewhere, &link).unwrap();
        host.file("proc/77/fdinfo/5", "pos:\t0\nmnt_id:\t42\n");
        let mount = |options: &str, kind: &str| {
            let line = format!("42 1 0:5 / /srv {options} shared:1 - {kind} /dev/sda1 rw\n");
            host.file("proc/77/mountinfo", &line);
        };
        mount("rw,relatime", "ext4");
        assert_eq!(
            uses(),
            ["0000:02:00.0 holds ttyS4, which process 77 (agent) has open"]
        );
        for (options, kind) in [("rw,nodev", "ext4"), ("rw", "nfs4")] {
            mount(options, kind);
            assert!(uses().is_empty(), "{options} {kind}");
        }
    }
}
