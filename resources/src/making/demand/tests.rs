//! Tests: taken and given back, with faults at every write and holders killed at every step.

use std::fs;

use super::*;
use crate::allocation::{AllocateError, Lease};
use crate::fixture::{Fake, FakeHost, FakeKernel, Fault, bdf, lease, lease_with};
use crate::moving::bind::{BindRequest, detach};
use crate::pools::request::DeviceRequest;

const GROUPS: &str = r#"{"groups": [{"name": "gpus", "bind": "demand", "rules": [{"class": "03"}]},
    {"name": "disks", "bind": "demand", "rules": [{"class": "01"}]}]}"#;

/// A GPU with its audio function, a disk that is mounted, and one that is not.
fn host() -> FakeHost {
    let host = FakeHost::new(&[
        Fake::nvme("01:00.0", 7).class(0x03_02_00).driver("nouveau"),
        Fake::nvme("01:00.1", 7)
            .class(0x04_03_00)
            .driver("snd_hda_intel"),
        Fake::nvme("02:00.0", 2).driver("nvme"),
        Fake::nvme("03:00.0", 3).driver("nvme"),
    ]);
    host.groups(GROUPS);
    let block = host.child(bdf("02:00.0"), "nvme/nvme0/nvme0n1", "class/block/nvme0n1");
    fs::write(block.join("dev"), "259:0\n").unwrap();
    host.file(
        "proc/self/mountinfo",
        "29 1 259:0 / / rw - ext4 /dev/nvme0n1 rw\n",
    );
    host
}

fn take(
    host: &FakeHost,
    kernel: &FakeKernel<'_>,
    group: &str,
) -> Result<Vec<Lease>, AllocateError> {
    lease(host, kernel.access(), &[DeviceRequest::group(group, 1)])
}

#[test]
fn a_vm_takes_devices_from_the_host_and_they_go_back() {
    let host = host();
    let before = host.bindings();
    let kernel = FakeKernel::new(&host);
    let leases = take(&host, &kernel, "gpus").unwrap();
    assert!(leases[0].device().unwrap().on_vfio());
    assert_eq!(host.read("01:00.1").driver.as_deref(), Some("vfio-pci"));
    assert_eq!(reap(&host.paths, &kernel).unwrap(), [], "the VM has it");
    drop(leases);
    let restored = reap(&host.paths, &kernel).unwrap();
    assert_eq!(restored, [bdf("01:00.0"), bdf("01:00.1")]);
    assert_eq!(host.bindings(), before);
    assert_eq!(reap(&host.paths, &kernel).unwrap(), []);
}

#[test]
fn what_the_host_needs_is_passed_over_and_named() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    let first = take(&host, &kernel, "disks").unwrap();
    assert_eq!(first[0].device().unwrap().bdf, bdf("03:00.0"));
    let error = take(&host, &kernel, "disks").unwrap_err().to_string();
    assert!(
        error.contains("1 held by others, 1 in use by the host"),
        "{error}"
    );
    assert!(
        error.contains("which is mounted at /: the host uses it"),
        "{error}"
    );
    assert_eq!(host.read("02:00.0").driver.as_deref(), Some("nvme"));
}

#[test]
fn a_device_detached_by_hand_stays_detached() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    let disk = [bdf("03:00.0")];
    let request = BindRequest::of(&disk);
    detach(&host.paths, &kernel, &request).unwrap();
    drop(take(&host, &kernel, "disks").unwrap());
    assert_eq!(reap(&host.paths, &kernel).unwrap(), []);
    assert!(host.read("03:00.0").on_vfio());
    let gpu = take(&host, &kernel, "gpus").unwrap();
    let devices = [bdf("01:00.0"), bdf("01:00.1")];
    let request = BindRequest {
        devices: &devices,
        ..request
    };
    detach(&host.paths, &kernel, &request).unwrap();
    drop(gpu);
    assert_eq!(
        reap(&host.paths, &kernel).unwrap(),
        [],
        "detached while the VM had it"
    );
}

#[test]
fn a_fault_at_any_write_leaves_the_host_as_it_was() {
    for fault in [Fault::Refuses, Fault::Ignores] {
        for at in 0.. {
            let host = host();
            let before = host.bindings();
            let kernel = FakeKernel::new(&host).with_fault(at, fault);
            let result = take(&host, &kernel, "gpus");
            if kernel.written.borrow().len() <= at {
                assert!(result.is_ok() && at == 6, "{at}: {result:?}");
                break;
            }
            assert!(
                matches!(result, Err(AllocateError::Bind(_))),
                "{fault:?} at {at}: {result:?}"
            );
            assert_eq!(host.bindings(), before, "{fault:?} at {at}");
            assert!(host.scan().iter().all(|device| !device.lease.is_held()));
        }
    }
}

#[test]
fn killed_at_any_write_the_next_command_gives_everything_back() {
    for at in 0..=6 {
        let host = host();
        let before = host.bindings();
        let kernel = FakeKernel::new(&host).with_fault(at, Fault::Dead);
        drop(take(&host, &kernel, "gpus"));
        let mut kernel = FakeKernel::new(&host);
        kernel.claims = [("01:00.0", "nouveau"), ("01:00.1", "snd_hda_intel")]
            .map(|(address, driver)| (bdf(address), driver.to_owned()))
            .into();
        reap(&host.paths, &kernel).unwrap();
        assert_eq!(host.bindings(), before, "killed at write {at}");
        // And killed again while giving back.
        for again in 0..=6 {
            let leases = take(&host, &kernel, "gpus").unwrap();
            drop(leases);
            let dying = FakeKernel::new(&host).with_fault(again, Fault::Dead);
            let _ = reap(&host.paths, &dying);
            reap(&host.paths, &kernel).unwrap();
            assert_eq!(
                host.bindings(),
                before,
                "killed at write {at}, again at {again}"
            );
        }
    }
}

#[test]
fn the_next_vm_takes_over_what_a_killed_one_left() {
    let host = host();
    let before = host.bindings();
    let kernel = FakeKernel::new(&host);
    drop(take(&host, &kernel, "gpus").unwrap());
    let written = kernel.written.borrow().len();
    let next = take(&host, &kernel, "gpus").unwrap();
    assert_eq!(
        kernel.written.borrow().len(),
        written,
        "it is with vfio-pci already"
    );
    drop(next);
    reap(&host.paths, &kernel).unwrap();
    assert_eq!(host.bindings(), before);
}

#[test]
fn the_helper_is_told_what_to_give_back() {
    let host = host();
    let out = host.paths.state.join("told");
    fs::create_dir_all(&host.paths.state).unwrap();
    let helper = host.paths.state.join("helper");
    let script = format!(
        "#!/bin/sh\n{{ echo \"$1 $9\"; cat; }} > {}.new\nmv {0}.new {0}\n",
        out.display()
    );
    let made = Command::new("sh")
        .args(["-c", "printf %s \"$2\" > \"$1\" && chmod +x \"$1\"", "sh"])
        .arg(&helper)
        .arg(script)
        .status();
    assert!(made.unwrap().success());
    let kernel = FakeKernel::new(&host);
    let binder = Binder {
        host: kernel.access(),
        helper: &helper,
    };
    drop(lease_with(&host, &binder, &[DeviceRequest::group("gpus", 1)]).unwrap());
    let started = Instant::now();
    while !out.exists() && started.elapsed() < Duration::from_secs(30) {
        thread::sleep(Duration::from_millis(10));
    }
    let told = fs::read_to_string(&out).unwrap();
    assert_eq!(told, "__restore 0000:01:00.0\n0000:01:00.0\n0000:01:00.1\n");
}

#[test]
fn a_use_is_written_down_and_taken_back_when_it_fails() {
    let host = host();
    host.groups(r#"{"groups": [{"name": "gpus", "bind": "demand", "one_time_use": true, "rules": [{"class": "03"}]}]}"#,
    );
    let kernel = FakeKernel::new(&host).with_fault(1, Fault::Refuses);
    take(&host, &kernel, "gpus").unwrap_err();
    assert_eq!(host.read("01:00.0").quarantine, None);
    let kernel = FakeKernel::new(&host);
    drop(take(&host, &kernel, "gpus").unwrap());
    let error = take(&host, &kernel, "gpus").unwrap_err().to_string();
    assert!(
        error.contains("1 in quarantine") && error.contains("used by VM \"a\""),
        "{error}"
    );
    crate::inventory::release::release_quarantine(&host.paths, bdf("01:00.0")).unwrap();
    take(&host, &kernel, "gpus").unwrap();
}

#[test]
fn a_write_that_fails_once_is_tried_again() {
    let host = host();
    let before = host.bindings();
    let kernel = FakeKernel::new(&host);
    drop(take(&host, &kernel, "gpus").unwrap());
    let devices = [bdf("01:00.0"), bdf("01:00.1")].map(DeviceName::from);
    let at = 1;
    let mut kernel = FakeKernel::new(&host).with_fault(at, Fault::Refuses);
    kernel.claims = [("01:00.0", "nouveau"), ("01:00.1", "snd_hda_intel")]
        .map(|(address, driver)| (bdf(address), driver.to_owned()))
        .into();
    restore(&host.paths, kernel.access(), &devices, PATIENCE).unwrap();
    assert_eq!(host.bindings(), before);
}

#[test]
fn a_device_that_hangs_is_not_touched_again() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    drop(take(&host, &kernel, "disks").unwrap());
    let kernel = FakeKernel::new(&host).with_fault(1, Fault::Hangs);
    restore(
        &host.paths,
        kernel.access(),
        &[bdf("03:00.0").into()],
        PATIENCE,
    )
    .unwrap_err();
    assert!(
        host.read("03:00.0")
            .quarantine
            .unwrap()
            .starts_with("it hung")
    );
    let kernel = FakeKernel::new(&host);
    assert_eq!(reap(&host.paths, &kernel).unwrap(), []);
    assert!(kernel.written.borrow().is_empty());
    crate::inventory::release::release_quarantine(&host.paths, bdf("03:00.0")).unwrap();
    let mut kernel = FakeKernel::new(&host);
    kernel.claims.insert(bdf("03:00.0"), "nvme".to_owned());
    assert_eq!(reap(&host.paths, &kernel).unwrap(), [bdf("03:00.0")]);
    assert_eq!(host.read("03:00.0").driver.as_deref(), Some("nvme"));
}
