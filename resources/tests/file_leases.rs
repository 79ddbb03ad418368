//! File leases (fcntl(2), "Leases"): the owner of a file can hold up whoever opens it, root included.
#![allow(unsafe_code)] // fcntl(2) with F_SETLEASE, which no crate of ours wraps.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use gantry_resources::base::HostPaths;
use gantry_resources::holding::{Holder, LeaseStatus, announce, holder, running_vms};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// `F_SETSIG` of `include/uapi/asm-generic/fcntl.h`, which libc lacks.
const F_SETSIG: libc::c_int = 10;

fn open(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

fn file_lease(file: &File) {
    // The holder is told by a signal when somebody opens the file: by one that does nothing.
    // SAFETY: it changes a setting of an open descriptor, and touches no memory.
    let signal = unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGWINCH) };
    // SAFETY: as above.
    let lease = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
    let error = std::io::Error::last_os_error();
    assert_eq!((signal, lease), (0, 0), "{error}");
}

fn lock(file: &File) {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole)).unwrap();
}

fn host() -> (tempfile::TempDir, HostPaths) {
    let root = tempfile::tempdir().unwrap();
    let paths = HostPaths {
        proc: "/proc".into(),
        ..HostPaths::under(root.path())
    };
    (root, paths)
}

#[test]
fn a_device_counts_as_held_and_the_file_is_named() {
    let (_root, paths) = host();
    let device: gantry_resources::base::HostBdf = "01:00.0".parse().unwrap();
    let path = paths.run.join("leases/0000:01:00.0.lock");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let owners = open(&path);
    assert_eq!(holder(&paths, device), LeaseStatus::Free);
    file_lease(&owners);
    let status = holder(&paths, device);
    let LeaseStatus::Unreadable { file, .. } = &status else {
        panic!("{status:?}")
    };
    assert!(status.is_held());
    assert_eq!(*file, path);
}

#[test]
fn a_file_that_nobody_has_locked_is_replaced_and_no_other() {
    let (_root, paths) = host();
    let vm = Holder {
        vm: "a".to_owned(),
        pid: 7,
    };
    let path = paths.run.join("vms/7.lock");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let owners = open(&path);
    lock(&owners);
    file_lease(&owners);
    let before = inode(&path);
    assert!(announce(&paths, &vm).is_none());
    assert_eq!(inode(&path), before);
    drop(owners);

    let owners = open(&path);
    file_lease(&owners);
    assert_eq!(running_vms(&paths).unwrap(), []);
    let announced = announce(&paths, &vm);
    assert!(announced.is_some());
    assert_ne!(inode(&path), owners.metadata().unwrap().ino());
    let running = running_vms(&paths).unwrap();
    assert_eq!((running.len(), running[0].record.name.as_str()), (1, "a"));
    let left = fs::read_dir(path.parent().unwrap()).unwrap().count();
    assert_eq!(left, 1, "nothing is left behind");
}
