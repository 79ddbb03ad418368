//! Who is set aside, who sees it, and how a device gets out.

use super::*;
use crate::fixture::{Fake, FakeHost, bdf, vm};
use crate::holding::device_lock::DeviceLock;
use crate::holding::record::LeaseRecord;
use crate::inventory::device::DeviceState;
use crate::inventory::device::HostDevice;
use crate::inventory::release::release_quarantine;
use std::os::unix::fs::PermissionsExt;

fn host() -> FakeHost {
    let host = FakeHost::new(&[Fake::nvme("01:00.0", 1)]);
    host.file("proc/sys/kernel/random/boot_id", "one\n");
    host
}

fn put(host: &FakeHost, device: &HostDevice, reason: &str, until: Until) {
    quarantine(&host.paths, device.bdf, device.id, reason, until).unwrap();
}

#[test]
fn a_device_is_kept_out_until_it_is_released() {
    let host = host();
    let disk = host.read("01:00.0");
    put(&host, &disk, "it was used", Until::Released);
    host.file("proc/sys/kernel/random/boot_id", "two\n");
    let reason = "it was used".to_owned();
    assert_eq!(
        host.read("01:00.0").state(),
        DeviceState::Quarantined { reason }
    );
    release_quarantine(&host.paths, disk.bdf).unwrap();
    assert_eq!(host.read("01:00.0").state(), DeviceState::Detached);
    let error = release_quarantine(&host.paths, disk.bdf)
        .unwrap_err()
        .to_string();
    assert!(error.contains("not in quarantine"), "{error}");
}

#[test]
fn what_a_confined_vm_sets_aside_stays_out_until_it_is_released() {
    let host = host();
    let holder = vm("a");
    host.groups(r#"{"groups": [{"name": "g", "rules": [{"class": "0108"}]}]}"#);
    let wish = [crate::pools::request::DeviceRequest::group("g", 1)];
    let lease = crate::allocation::allocate(&host.paths, &wish, &holder).unwrap();
    lease[0].set_aside("its reset failed");
    assert!(matches!(
        host.read("01:00.0").state(),
        DeviceState::Assigned { .. }
    ));
    drop(lease);
    let reason = "its reset failed".to_owned();
    let quarantined = DeviceState::Quarantined { reason };
    assert_eq!(host.read("01:00.0").state(), quarantined);
    let refused = crate::allocation::allocate(&host.paths, &wish, &holder).unwrap_err();
    assert!(refused.to_string().contains("release-quarantine"));
    // A command that takes the lock writes it down before it takes its place.
    let record = LeaseRecord::task("a");
    drop(DeviceLock::take(&host.paths, bdf("01:00.0"), &record).unwrap());
    assert_eq!(host.read("01:00.0").state(), quarantined);
    host.file("proc/sys/kernel/random/boot_id", "two\n");
    assert_eq!(host.read("01:00.0").quarantine, None, "a boot ends it");
    host.file("proc/sys/kernel/random/boot_id", "one\n");
    release_quarantine(&host.paths, bdf("01:00.0")).unwrap();
    assert_eq!(host.read("01:00.0").state(), DeviceState::Detached);
}

#[test]
fn a_device_that_does_not_answer_when_its_lease_ends_stays_out_until_it_answers() {
    let host = host();
    let group = r#"{"groups": [{"name": "g", "rules": [{"class": "0108"}]}]}"#;
    host.groups(group);
    let holder = vm("a");
    let wish = [crate::pools::request::DeviceRequest::group("g", 1)];
    let lease = || crate::allocation::allocate(&host.paths, &wish, &holder);
    let config = host.dir(bdf("01:00.0")).join("config");
    let alive = std::fs::read(&config).unwrap();
    // A virtual function has no vendor id of its own.
    let mut virtual_function = alive.clone();
    virtual_function[..4].fill(0xff);
    std::fs::write(&config, virtual_function).unwrap();
    drop(lease().unwrap());
    assert_eq!(host.read("01:00.0").quarantine, None);

    let held = lease().unwrap();
    std::fs::write(&config, vec![0xff; alive.len()]).unwrap();
    drop(held);
    let device = host.read("01:00.0");
    let why = device.quarantine.unwrap();
    assert!(
        why.contains("all-ones") && why.contains("reboot the host"),
        "{why}"
    );
    let refused = lease().unwrap_err().to_string();
    assert!(
        refused.contains("all-ones") && refused.contains("release-quarantine"),
        "{refused}"
    );
    let dead = release_quarantine(&host.paths, device.bdf).unwrap_err();
    assert!(dead.to_string().contains("does not answer"), "{dead}");
    std::fs::write(&config, alive).unwrap();
    release_quarantine(&host.paths, device.bdf).unwrap();
    drop(lease().unwrap());
}

#[test]
fn a_note_that_cannot_be_kept_stays_in_its_place() {
    let host = host();
    let device = host.read("01:00.0");
    host.file(
        "run/leases/0000:01:00.0.lock",
        std::str::from_utf8(&note(device.id, "it hangs")).unwrap(),
    );
    host.file("var", "no directory");
    let record = LeaseRecord::task("a");
    assert!(DeviceLock::take(&host.paths, device.bdf, &record).is_err());
    assert_eq!(host.read("01:00.0").quarantine.as_deref(), Some("it hangs"));
}

#[test]
fn a_tenant_reads_the_hosts_records_whatever_the_umask_was() {
    let host = host();
    let disk = host.read("01:00.0");
    let file = path(&host.paths, disk.bdf, Until::Boot);
    let dir = file.parent().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    host.file("var/quarantine/0000:01:00.0.boot.json", "{}");
    for (path, closed) in [(&*file, 0o600), (dir, 0o700)] {
        fs::set_permissions(path, fs::Permissions::from_mode(closed)).unwrap();
    }
    put(&host, &disk, "it hangs", Until::Boot);
    assert_eq!((mode(dir), mode(&file)), (0o755, 0o644));
}

#[test]
fn a_tenant_that_may_not_look_at_the_hosts_records_keeps_its_devices() {
    let is_kept = |owner, error: io::ErrorKind| {
        let dir = RecordDir {
            dir: PathBuf::from("/x"),
            held: None,
            owner,
        };
        dir.unread(Path::new("/x/y"), &error.into()).is_some()
    };
    let denied = io::ErrorKind::PermissionDenied;
    let cases = [
        (Owner::Own, true),
        (Owner::Host, false),
        (Owner::Tenant, false),
    ];
    for (owner, keeps_out) in cases {
        assert_eq!(is_kept(owner, denied), keeps_out, "{owner:?}");
        assert!(!is_kept(owner, io::ErrorKind::NotFound), "{owner:?}");
    }
    assert!(is_kept(Owner::Host, io::ErrorKind::InvalidData));
}

#[test]
fn what_a_note_says_is_fit_for_a_terminal() {
    let host = host();
    let disk = host.read("01:00.0");
    let wild = format!("\u{1b}[2Jgone\n\u{7}{}", "x".repeat(999));
    let note = String::from_utf8(note(disk.id, &wild)).unwrap();
    host.file("run/leases/0000:01:00.0.lock", &note);
    let tame = format!("[2Jgone{}", "x".repeat(193));
    assert_eq!(host.read("01:00.0").quarantine.as_ref(), Some(&tame));
    let record = LeaseRecord::task("a");
    drop(DeviceLock::take(&host.paths, disk.bdf, &record).unwrap());
    let kept = fs::read_to_string(path(&host.paths, disk.bdf, Until::Boot)).unwrap();
    assert!(kept.contains(&format!("\"{tame}\"")), "{kept}");
}

/// The lock file is a tenant's, who writes into it what it likes.
#[test]
fn a_forged_note_takes_nothing_back() {
    let host = host();
    let disk = host.read("01:00.0");
    let used = "it was used by VM \"x\" (one_time_use)";
    let record = LeaseRecord::task("a");
    let forge = |note: &str| {
        host.file("run/leases/0000:01:00.0.lock", note);
        drop(DeviceLock::take(&host.paths, disk.bdf, &record).unwrap());
        host.read("01:00.0").quarantine
    };
    let note = |id: &str, until: &str| {
        format!(r#"{{"id": "{id}", "reason": "x", "until": "{until}", "boot": "none"}}"#)
    };
    let foreign = [
        note("ffff:ffff", "boot"),
        note("ffff:ffff", "released"),
        "[".repeat(1 << 14),
        "null".to_owned(),
    ];
    for forged in &foreign {
        assert_eq!(forge(forged), None, "{forged}");
    }
    assert!(
        !host.paths.state.join(DIR).exists(),
        "nothing is written down"
    );
    put(&host, &disk, used, Until::Released);
    for forged in &foreign {
        assert_eq!(forge(forged).as_deref(), Some(used), "{forged}");
    }
    // One of the device's own is added, until the host boots.
    let own = note("1b36:0010", "released");
    assert_eq!(forge(&own).unwrap(), format!("x; {used}"));
    host.file("proc/sys/kernel/random/boot_id", "two\n");
    assert_eq!(host.read("01:00.0").quarantine.as_deref(), Some(used));
    // A reason that the host has found is not replaced.
    put(&host, &disk, "it hangs", Until::Boot);
    assert_eq!(forge(&own).unwrap(), format!("it hangs; {used}"));
    release_quarantine(&host.paths, disk.bdf).unwrap();
    assert_eq!(host.read("01:00.0").quarantine, None);
}

#[test]
fn a_boot_or_other_hardware_ends_it() {
    let host = host();
    let disk = host.read("01:00.0");
    put(&host, &disk, "it hangs", Until::Boot);
    let reason = |id| find(&host.paths, disk.bdf, id).map(|found| found.reason());
    assert_eq!(reason(disk.id).as_deref(), Some("it hangs"));
    let (vendor, device) = (disk.id.vendor, disk.id.device + 1);
    assert_eq!(reason(PciId { vendor, device }), None);
    host.file("proc/sys/kernel/random/boot_id", "two\n");
    assert_eq!(host.read("01:00.0").quarantine, None);
}

#[test]
fn a_damaged_record_keeps_the_device_out_and_a_dead_device_stays() {
    let host = host();
    let disk = host.read("01:00.0");
    host.file("var/quarantine/0000:01:00.0.json", "{");
    assert!(
        host.read("01:00.0")
            .quarantine
            .unwrap()
            .contains("is damaged")
    );
    fs::write(host.paths.pci_device(disk.bdf).join("config"), [0xff; 64]).unwrap();
    let error = release_quarantine(&host.paths, bdf("01:00.0"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("does not answer"), "{error}");
}

#[test]
fn a_record_of_another_boot_hides_no_note() {
    let host = host();
    let disk = host.read("01:00.0");
    put(&host, &disk, "it hung", Until::Boot);
    host.file("proc/sys/kernel/random/boot_id", "two\n");
    assert_eq!(find(&host.paths, disk.bdf, disk.id), None);
    let note = String::from_utf8(note(disk.id, "its reset failed")).unwrap();
    host.file("run/leases/0000:01:00.0.lock", &note);
    let found = find(&host.paths, disk.bdf, disk.id).unwrap();
    assert_eq!(found.reason(), "its reset failed");
}

#[test]
fn only_the_record_that_was_made_is_taken_back() {
    let host = host();
    let disk = host.read("01:00.0");
    put(&host, &disk, "it was used", Until::Released);
    put(&host, &disk, "it hung", Until::Boot);
    let both = host.read("01:00.0").quarantine;
    assert_eq!(both.as_deref(), Some("it hung; it was used"));
    forget_reason(&host.paths, disk.bdf, "it was used").unwrap();
    assert_eq!(
        hung(&host.paths, disk.bdf, disk.id).as_deref(),
        Some("it hung")
    );
    forget_reason(&host.paths, disk.bdf, "it hung").unwrap();
    assert_eq!(hung(&host.paths, disk.bdf, disk.id), None);
}

#[test]
fn what_is_kept_out_with_its_card_is_released_with_it() {
    let gpu = |function: u8| Fake::nvme(&format!("0b:00.{function}"), 7);
    let host = FakeHost::new(&[gpu(0), gpu(1)]);
    let first = host.read("0b:00.0");
    put(&host, &first, "it was used", Until::Released);
    let reason = "it was used".to_owned();
    let state = || host.read("0b:00.1").state();
    assert_eq!(state(), DeviceState::Quarantined { reason });
    let error = release_quarantine(&host.paths, bdf("0b:00.1")).unwrap_err();
    let way_out = "`gantry device release-quarantine 0000:0b:00.0`";
    assert!(error.to_string().contains(way_out), "{error}");
    release_quarantine(&host.paths, first.bdf).unwrap();
    assert_eq!(state(), DeviceState::Detached);
}
