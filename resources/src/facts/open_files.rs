//! Processes that have a device open through VFIO, as procfs shows them: they can block a write.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;

use crate::base::bdf::HostBdf;
use crate::base::sysfs;
use crate::base::text::short;
use crate::facts::process::is_ending;

/// A process that has a device open.
pub(crate) struct User {
    pub(crate) pid: u32,
    pub(crate) name: String,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.name)
    }
}

/// The processes that have a device or a virtual function of it open; `attribute` is one of the device's. A process
/// that is ending is not visible, as it closes its files last.
pub(crate) fn users(proc: &Path, attribute: &Path) -> Vec<User> {
    with_open(proc, &nodes(attribute))
}

/// Those of them that are not ending.
pub(crate) fn staying(proc: &Path, attribute: &Path) -> Vec<u32> {
    let pids = users(proc, attribute).into_iter().map(|user| user.pid);
    pids.filter(|pid| is_ending(proc, *pid) == Some(false))
        .collect()
}

/// Whether a process has an IOMMU group. The kernel lets only one process open its node, and a process that has a
/// device of the group open, or mapped, keeps the node open too.
pub(crate) fn is_open(node: &Path) -> bool {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK);
    let opened = options.open(node);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

/// An attribute of the device that a write concerns: a value written to the device's bus names it.
pub(crate) fn about(attribute: &Path, value: &str) -> PathBuf {
    let device = attribute.with_file_name("devices").join(value);
    match value.parse::<HostBdf>().is_ok() && device.exists() {
        true => device.join("driver"),
        false => attribute.to_owned(),
    }
}

/// The end of a sentence that names the process.
pub(crate) fn words(proc: &Path, attribute: &Path) -> String {
    let found: Vec<String> = users(proc, attribute).iter().map(User::to_string).collect();
    match found.is_empty() {
        true => String::new(),
        false => format!(": {} has it open", found.join(" and ")),
    }
}

/// The ends of the paths of the VFIO nodes of a device and its functions.
fn nodes(attribute: &Path) -> Vec<PathBuf> {
    let is_device = |dir: &&Path| dir.join("iommu_group").is_symlink();
    let Some(device) = attribute.ancestors().skip(1).find(is_device) else {
        return Vec::new();
    };
    let functions = (0..).map(|index| device.join(format!("virtfn{index}")));
    let functions = functions.take_while(|function| function.exists());
    let vfio = Path::new("vfio");
    let mut nodes = Vec::new();
    for dir in [device.to_owned()].into_iter().chain(functions) {
        let group = sysfs::link_name(&dir.join("iommu_group")).ok().flatten();
        nodes.extend(group.map(|group| vfio.join(group)));
        let own = sysfs::entries(&dir.join("vfio-dev")).unwrap_or_default();
        nodes.extend(own.iter().map(|name| vfio.join("devices").join(name)));
    }
    nodes
}

fn with_open(proc: &Path, nodes: &[PathBuf]) -> Vec<User> {
    if nodes.is_empty() {
        return Vec::new();
    }
    let is_one = |target: &Path| nodes.iter().any(|node| target.ends_with(node));
    let open = open_nodes(proc, |_, target| is_one(target).then_some(()));
    open.into_iter().map(|((), user)| user).collect()
}

/// The number of descriptors that are read. The processes of a user may have any number of them: this hides none of
/// other users, and all of root's are read.
struct Most {
    of_process: usize,
    of_user: usize,
}

const MOST: Most = Most {
    of_process: 1 << 14,
    of_user: 1 << 18,
};

/// The processes that have device nodes open. `which` gets each descriptor and its target, and returns its node;
/// each process is reported once for each node. A process of another user is visible only with the rights for it.
pub(crate) fn open_nodes<T: PartialEq>(
    proc: &Path,
    which: impl Fn(&Path, &Path) -> Option<T>,
) -> Vec<(T, User)> {
    open_among(proc, which, &MOST)
}

fn open_among<T: PartialEq>(
    proc: &Path,
    which: impl Fn(&Path, &Path) -> Option<T>,
    most: &Most,
) -> Vec<(T, User)> {
    let mut found: Vec<(T, User)> = Vec::new();
    let mut seen: BTreeMap<Option<u32>, usize> = BTreeMap::new();
    for name in sysfs::entries(proc).unwrap_or_default() {
        let Ok(pid) = name.parse() else {
            continue;
        };
        let process = proc.join(&name);
        let mut mounts = None;
        let files = fs::read_dir(process.join("fd")).into_iter().flatten();
        let owner = owner(&process);
        let seen = seen.entry(owner).or_default();
        let most = match owner {
            Some(0) => usize::MAX,
            _ => most.of_process.min(most.of_user.saturating_sub(*seen)),
        };
        for file in files.flatten().take(most) {
            *seen += 1;
            let descriptor = file.path();
            let Ok(target) = fs::read_link(&descriptor) else {
                continue;
            };
            // In a chroot or a container the path of a node may differ.
            let mut is_elsewhere = || {
                let mounts = mounts.get_or_insert_with(|| mounts_with_nodes(&process));
                let mount = mount_of(&process, &file.file_name());
                mount.is_some_and(|mount| mounts.contains(&mount))
            };
            if !(target.starts_with("/dev") || target.is_absolute() && is_elsewhere()) {
                continue;
            }
            let node = which(&descriptor, &target);
            let Some(node) = node.filter(|node| {
                let known = |(other, user): &(T, User)| other == node && user.pid == pid;
                !found.iter().any(known)
            }) else {
                continue;
            };
            let name = sysfs::text(&process.join("comm")).ok().flatten();
            // A process chooses its name.
            let name = short(&name.unwrap_or_default());
            found.push((node, User { pid, name }));
        }
    }
    found
}

/// The user of a process. Its directory in procfs may still belong to root (proc_pid(5)).
fn owner(process: &Path) -> Option<u32> {
    let status = sysfs::text(&process.join("status")).ok().flatten()?;
    let mut lines = status.lines();
    let users = lines.find_map(|line| line.strip_prefix("Uid:"))?;
    users.split_whitespace().next()?.parse().ok()
}

/// File systems whose server may never answer.
const LOCAL: [&str; 12] = [
    "btrfs", "devtmpfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "rootfs", "tmpfs",
    "xfs", "zfs",
];

/// The numbers of a process's mounts on which a device node can be opened and examined (`mountinfo`,
/// proc_pid_mountinfo(5)).
fn mounts_with_nodes(process: &Path) -> BTreeSet<String> {
    let table = beginning(&process.join("mountinfo"), 1 << 20);
    let number = |line: &str| {
        let (mount, made_of) = line.split_once(" - ")?;
        let kind = made_of.split(' ').next()?;
        let mut fields = mount.split(' ');
        let number = fields.next()?;
        let forbids = fields.nth(4)?.split(',').any(|option| option == "nodev");
        (LOCAL.contains(&kind) && !forbids).then(|| number.to_owned())
    };
    table.lines().filter_map(number).collect()
}

/// The number of the mount of an open file.
fn mount_of(process: &Path, descriptor: &OsStr) -> Option<String> {
    let about = beginning(&process.join("fdinfo").join(descriptor), 512);
    let number = about
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:"))?;
    Some(number.trim().to_owned())
}

/// The first bytes of a file: a user can make a process's file as long as the kernel has memory.
fn beginning(path: &Path, most: u64) -> String {
    let mut bytes = Vec::new();
    // A file that cannot be read counts as empty.
    let _ = File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost, FakeKernel, bdf};
    use std::os::unix::fs::symlink;

    #[test]
    fn who_has_a_device_or_a_function_of_it_open_is_named() {
        let host = FakeHost::new(&[
            Fake::nvme("01:00.0", 7),
            Fake::nvme("03:00.0", 9)
                .with("sriov_numvfs", "0")
                .with("sriov_offset", "128")
                .with("sriov_stride", "2"),
        ]);
        let kernel = FakeKernel::new(&host);
        let numvfs = host.paths.pci_device(bdf("03:00.0")).join("sriov_numvfs");
        crate::moving::writer::SysfsWriter::write(&kernel, &numvfs, "1").unwrap();
        host.file("proc/77/comm", "qemu\n");
        host.file("proc/77/fd/0", "");
        let opens = |node: &str, fd: &str| {
            symlink(node, host.paths.proc.join("77/fd").join(fd)).unwrap();
        };
        let disk = host.paths.pci_device(bdf("01:00.0"));
        let said = |attribute: &Path| words(&host.paths.proc, attribute);
        opens("/dev/vfio/17", "5");
        assert_eq!(said(&disk.join("driver/unbind")), "");
        opens("/dev/vfio/7", "6");
        let held = ": process 77 (qemu) has it open";
        assert_eq!(said(&disk.join("driver/unbind")), held);
        assert_eq!(said(&disk.join("nvidia/current_vgpu_type")), held);
        assert_eq!(said(&numvfs), "");
        opens("/dev/vfio/100", "8");
        assert_eq!(said(&numvfs), held);
        let probe = host.paths.sysfs.join("bus/pci/drivers_probe");
        assert_eq!(said(&probe), "");
        assert_eq!(said(&about(&probe, "0000:01:00.0")), held);
        assert_eq!(said(&about(&probe, "0000:02:00.0")), "");
    }

    #[test]
    fn many_descriptors_of_one_user_hide_none_of_others() {
        let dir = tempfile::tempdir().unwrap();
        let process = |pid: u32, user: u32| {
            let fd = dir.path().join(format!("{pid}/fd"));
            fs::create_dir_all(&fd).unwrap();
            for number in 0..3 {
                symlink("/dev/null", fd.join(number.to_string())).unwrap();
            }
            symlink("/dev/nvme0n1", fd.join("3")).unwrap();
            let status = format!("Name:\tx\nUid:\t{user}\t0\t0\t0\n");
            fs::write(dir.path().join(format!("{pid}/status")), status).unwrap();
        };
        for (pid, user) in [(10, 1000), (11, 1000), (20, 1001), (30, 0), (31, 0)] {
            process(pid, user);
        }
        let disk = |_: &Path, target: &Path| target.ends_with("nvme0n1").then_some(());
        let found = |of_process, of_user| -> Vec<u32> {
            let most = Most {
                of_process,
                of_user,
            };
            let open = open_among(dir.path(), disk, &most).into_iter();
            open.map(|((), user)| user.pid).collect()
        };
        assert_eq!(found(4, 100), [10, 11, 20, 30, 31]);
        assert_eq!(found(100, 4), [10, 20, 30, 31]);
        assert_eq!(found(0, 100), [30, 31]);
    }
}
