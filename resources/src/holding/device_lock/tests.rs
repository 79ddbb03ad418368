//! Tests: one holder at a time, however it ends.

use super::*;
use crate::base::atomic::make_dir;
use crate::fixture::bdf;
use crate::holding::host_lock::AllocationLock;
use crate::holding::lock_file::{credible, holder, listed_as_locked, lists, open};
use crate::holding::record::{Holder, LeaseKind, LeaseStatus};
use std::fs;
use std::io;
use std::num::NonZeroU32;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

fn paths() -> (tempfile::TempDir, HostPaths) {
    let root = tempfile::tempdir().unwrap();
    let paths = HostPaths {
        proc: "/proc".into(),
        ..HostPaths::under(root.path())
    };
    (root, paths)
}

fn record(vm: &str) -> LeaseRecord {
    LeaseRecord::vm(&Holder {
        vm: vm.to_owned(),
        pid: 123,
    })
}

#[test]
fn a_lock_is_held_by_one_until_it_is_dropped() {
    let (_root, paths) = paths();
    let device = bdf("01:00.0");
    assert_eq!(holder(&paths, device), LeaseStatus::Free);
    let lock = DeviceLock::take(&paths, device, &record("a"))
        .unwrap()
        .unwrap();
    assert!(
        DeviceLock::take(&paths, device, &record("b"))
            .unwrap()
            .is_none()
    );
    let LeaseStatus::Held(held) = holder(&paths, device) else {
        panic!()
    };
    assert_eq!(
        (held.kind, held.name.as_str(), held.pid),
        (LeaseKind::Vm, "a", NonZeroU32::new(123))
    );
    assert_eq!(held.to_string(), "VM \"a\" (pid 123)");
    drop(lock);
    assert_eq!(holder(&paths, device), LeaseStatus::Free);
    assert!(lock_path(&paths, device).exists(), "the file stays");
    assert!(
        DeviceLock::take(&paths, device, &record("b"))
            .unwrap()
            .is_some()
    );
}

#[test]
fn files_are_for_their_owner_and_directories_for_all() {
    let (_root, paths) = paths();
    let _lock = DeviceLock::take(&paths, bdf("01:00.0"), &record("a")).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&lock_path(&paths, bdf("01:00.0"))), 0o600);
    assert_eq!(mode(&paths.run) & 0o700, 0o700);
    assert_eq!(mode(&paths.run.join("leases")) & 0o022, 0);
}

#[test]
fn asking_takes_nothing() {
    let (_root, paths) = paths();
    let device = bdf("01:00.0");
    drop(DeviceLock::take(&paths, device, &record("a")).unwrap());
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| (0..2000).for_each(|_| drop(holder(&paths, device))));
        while !asking.is_finished() {
            assert!(
                DeviceLock::take(&paths, device, &record("b"))
                    .unwrap()
                    .is_some()
            );
        }
    });
}

#[test]
fn a_lock_without_a_record_still_counts() {
    let (_root, paths) = paths();
    let device = bdf("01:00.0");
    let _lock = DeviceLock::take(&paths, device, &record("a")).unwrap();
    for content in ["", "{\"kind\": \"vm\""] {
        fs::write(lock_path(&paths, device), content).unwrap();
        assert_eq!(holder(&paths, device), LeaseStatus::Unrecorded);
    }
}

#[test]
fn a_record_without_a_lock_does_not_count() {
    let (_root, paths) = paths();
    let device = bdf("01:00.0");
    make_dir(&paths.run.join("leases")).unwrap();
    fs::write(
        lock_path(&paths, device),
        serde_json::to_vec(&record("killed")).unwrap(),
    )
    .unwrap();
    assert_eq!(holder(&paths, device), LeaseStatus::Free);
}

#[test]
fn those_who_may_not_open_the_file_are_told_by_the_kernels_list() {
    let (_root, paths) = paths();
    let device = bdf("01:00.0");
    let lock = DeviceLock::take(&paths, device, &record("a")).unwrap();
    let path = lock_path(&paths, device);
    assert_eq!(
        listed_as_locked(&paths, &path).unwrap(),
        LeaseStatus::Unrecorded
    );
    drop(lock);
    assert_eq!(listed_as_locked(&paths, &path).unwrap(), LeaseStatus::Free);
}

#[test]
fn the_list_of_locks_is_read_line_by_line_and_no_further_than_needed() {
    /// What must not be read.
    struct Beyond;
    impl std::io::Read for Beyond {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            panic!("it is read to its end")
        }
    }
    let line = |kind, id| format!("7: {kind}  ADVISORY  WRITE 12 {id} 0 EOF\n");
    let of = |text: &str| lists(text.as_bytes(), "fe:00:12").unwrap();
    assert!(of(&line("OFDLCK", "fe:00:12")));
    assert!(!of(&line("FLOCK", "fe:00:12")) && !of(&line("OFDLCK", "fe:00:123")));
    let others = line("OFDLCK", "fe:00:13").repeat(10_000);
    assert!(!of(&others));
    let found = others + &line("OFDLCK", "fe:00:12");
    let list = std::io::Read::chain(found.as_bytes(), io::BufReader::new(Beyond));
    assert!(lists(list, "fe:00:12").unwrap());
    // A line without an end is no line of the kernel's; it ends the search at the end of the list.
    let endless = std::io::Read::take(io::repeat(b'x'), 1 << 20);
    assert!(!lists(io::BufReader::new(endless), "fe:00:12").unwrap());
}

#[test]
fn a_lock_on_a_removed_file_binds_nobody_and_is_not_taken() {
    let (_root, paths) = paths();
    let device = bdf("01:00.0");
    drop(DeviceLock::take(&paths, device, &record("a")).unwrap());
    let file = open(&lock_path(&paths, device)).unwrap();
    fs::remove_dir_all(paths.run.join("leases")).unwrap();
    let leave = OnceLock::new();
    let lock = LockFile { file, leave };
    assert!(!lock.is_at(&lock_path(&paths, device)).unwrap());
    assert!(
        DeviceLock::take(&paths, device, &record("b"))
            .unwrap()
            .is_some()
    );
}

#[test]
fn what_is_no_regular_file_counts_as_held_and_is_replaced() {
    let (root, paths) = paths();
    let device = bdf("01:00.0");
    let path = lock_path(&paths, device);
    make_dir(&paths.run.join("leases")).unwrap();
    let target = root.path().join("precious");
    fs::write(&target, "text").unwrap();
    let puts: [&dyn Fn(); 4] = [
        &|| std::os::unix::fs::symlink(&target, &path).unwrap(),
        &|| nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
        &|| drop(std::os::unix::net::UnixListener::bind(&path).unwrap()),
        &|| fs::create_dir(&path).unwrap(),
    ];
    for put in puts {
        let _ = fs::remove_file(&path);
        put();
        let status = holder(&paths, device);
        let LeaseStatus::Unreadable { file, why } = &status else {
            panic!("{status:?}")
        };
        assert!(status.is_held() && !why.is_empty());
        assert_eq!(*file, path);
        let lock = DeviceLock::take(&paths, device, &record("a")).unwrap();
        assert_eq!(holder(&paths, device).record().unwrap().name, "a");
        drop(lock.unwrap());
        assert_eq!(holder(&paths, device), LeaseStatus::Free);
        let left = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(left, 1, "nothing is left behind");
    }
    assert_eq!(fs::read_to_string(&target).unwrap(), "text");
}

#[test]
fn another_users_record_names_only_that_users_processes() {
    let root = tempfile::tempdir().unwrap();
    let paths = HostPaths::under(root.path());
    let own = nix::unistd::geteuid().as_raw();
    fs::create_dir_all(paths.proc.join("123")).unwrap();
    let wild = LeaseRecord {
        name: "a\u{1b}[2J\u{202e}b\" (pid 1); $(x)\n".to_owned(),
        ..record("a")
    };
    // The process is this user's.
    let said = credible(&paths, own, wild.clone());
    assert_eq!(said.to_string(), "VM \"a[2Jb\" (pid 1); $(x)\" (pid 123)");
    let said = credible(&paths, own + 1, wild);
    assert_eq!(said.to_string(), "VM \"a2Jb pid 1 x\"");
}

#[test]
fn a_run_directory_that_cannot_be_used_is_named() {
    let (root, mut paths) = paths();
    fs::write(root.path().join("file"), "").unwrap();
    paths.run = root.path().join("file/run");
    let error = DeviceLock::take(&paths, bdf("01:00.0"), &record("a"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("file/run/leases/0000:01:00.0.lock"),
        "{error}"
    );
    assert!(AllocationLock::acquire(&paths, &record("a"), Duration::ZERO).is_err());
}

#[test]
fn waiting_for_those_who_choose_ends_and_names_them() {
    let (_root, paths) = paths();
    let choosing = AllocationLock::acquire(&paths, &record("slow"), Duration::ZERO).unwrap();
    let error =
        AllocationLock::acquire(&paths, &record("b"), Duration::from_millis(30)).unwrap_err();
    assert!(
        error.to_string().contains("30ms for VM \"slow\" (pid 123)"),
        "{error}"
    );
    drop(choosing);
    AllocationLock::acquire(&paths, &record("b"), Duration::ZERO).unwrap();
}

#[test]
fn a_spawned_process_takes_no_lock_along() {
    let (_root, paths) = paths();
    let lock = DeviceLock::take(&paths, bdf("01:00.0"), &record("a")).unwrap();
    let mut child = Command::new("sleep").arg("600").spawn().unwrap();
    drop(lock);
    assert_eq!(holder(&paths, bdf("01:00.0")), LeaseStatus::Free);
    child.kill().unwrap();
    child.wait().unwrap();
}

const RUN: &str = "GANTRY_TEST_RUN";

/// The other process of the next test: it leases a device and stays until it is killed.
#[test]
#[ignore = "run by killing_the_holder_frees_the_device"]
fn hold_until_killed() {
    let run = std::env::var_os(RUN).expect("only for the test that starts it");
    let paths = HostPaths {
        run: run.into(),
        ..HostPaths::default()
    };
    let _choosing =
        AllocationLock::acquire(&paths, &LeaseRecord::task("child"), Duration::ZERO).unwrap();
    let _lock = DeviceLock::take(&paths, bdf("01:00.0"), &record("victim"))
        .unwrap()
        .unwrap();
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn killing_the_holder_frees_the_device() {
    let (_root, paths) = paths();
    let device = bdf("01:00.0");
    for _ in 0..3 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "--ignored",
                "holding::device_lock::tests::hold_until_killed",
            ])
            .env(RUN, &paths.run)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while !holder(&paths, device).is_held() {
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "the other process does not lease"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(
            DeviceLock::take(&paths, device, &record("b"))
                .unwrap()
                .is_none()
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(holder(&paths, device), LeaseStatus::Free);
        drop(
            DeviceLock::take(&paths, device, &record("b"))
                .unwrap()
                .unwrap(),
        );
        AllocationLock::acquire(&paths, &record("b"), Duration::ZERO).unwrap();
    }
}
