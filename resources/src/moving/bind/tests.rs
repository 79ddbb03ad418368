//! Tests: there and back, and a fault at every write.

use super::*;
use crate::allocation::allocate;
use crate::fixture::{Fake, FakeHost, FakeKernel, Fault, bdf, ungrouped, vm};
use crate::inventory::device::DeviceState;
use crate::moving::writer::WriteError;
use crate::pools::group::Groups;
use std::fs;
use std::path::Path;

/// A GPU with its audio function behind a bridge, a disk alone, and an unbound device.
fn host() -> FakeHost {
    FakeHost::new(&[
        Fake::nvme("00:01.0", 7)
            .class(0x06_04_00)
            .driver("pcieport"),
        Fake::nvme("01:00.0", 7).class(0x03_02_00).driver("nouveau"),
        Fake::nvme("01:00.1", 7)
            .class(0x04_03_00)
            .driver("snd_hda_intel")
            .with("driver_override", "snd_hda_intel"),
        Fake::nvme("02:00.0", 2)
            .driver("nvme")
            .with("nvme/nvme0/serial", "GN-2"),
        Fake::nvme("03:00.0", 3).unbound(),
    ])
}

fn request<'a>(devices: &'a [HostBdf], overrides: &'a [HostBdf]) -> BindRequest<'a> {
    BindRequest {
        overrides,
        ..BindRequest::of(devices)
    }
}

fn texts(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", texts(source)),
        None => error.to_string(),
    }
}

fn refused(result: Result<BindReport, BindError>) -> String {
    texts(&result.unwrap_err())
}

fn has_no_records(host: &FakeHost) -> bool {
    let mut records = fs::read_dir(host.paths.run.join("restore/driver")).unwrap();
    records.next().is_none()
}

fn drivers(host: &FakeHost) -> Vec<Option<String>> {
    host.scan()
        .into_iter()
        .map(|device| device.driver)
        .collect()
}

#[test]
fn a_group_goes_as_a_whole_and_comes_back_as_it_was() {
    let host = host();
    let before = host.bindings();
    let kernel = FakeKernel::new(&host);
    let gpu = [bdf("01:00.0")];
    let report = detach(&host.paths, &kernel, &request(&gpu, &[])).unwrap();
    assert_eq!(report.moved, [bdf("01:00.0"), bdf("01:00.1")]);
    assert_eq!(report.writes.len(), 6);
    let vfio = Some("vfio-pci".to_owned());
    let bridge = Some("pcieport".to_owned());
    assert_eq!(drivers(&host)[..3], [bridge, vfio.clone(), vfio]);
    assert_eq!(host.read("01:00.1").state(), DeviceState::Detached);
    let again = detach(&host.paths, &kernel, &request(&gpu, &[])).unwrap();
    assert_eq!(
        (again.moved.len(), again.unchanged, again.writes.len()),
        (0, gpu.to_vec(), 0)
    );
    let report = reattach(&host.paths, &kernel, &request(&[bdf("01:00.1")], &[])).unwrap();
    assert_eq!(report.moved, [bdf("01:00.0"), bdf("01:00.1")]);
    assert_eq!(host.bindings(), before);
    assert!(has_no_records(&host));
    assert!(host.scan().iter().all(|device| !device.lease.is_held()));
}

#[test]
fn no_id_is_ever_given_to_a_driver() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    let all = [bdf("01:00.0"), bdf("02:00.0"), bdf("03:00.0")];
    detach(&host.paths, &kernel, &request(&all, &[])).unwrap();
    reattach(&host.paths, &kernel, &request(&all, &[])).unwrap();
    let written = kernel.written.borrow();
    let files: BTreeSet<&str> = written
        .iter()
        .filter_map(|(path, _)| path.file_name()?.to_str())
        .collect();
    assert_eq!(
        files,
        BTreeSet::from(["driver_override", "drivers_probe", "unbind"])
    );
}

#[test]
fn a_fault_at_any_write_leaves_everything_as_it_was() {
    let all = [bdf("01:00.0"), bdf("02:00.0"), bdf("03:00.0")];
    for fault in [Fault::Refuses, Fault::Ignores] {
        for at in 0.. {
            let host = host();
            let before = host.bindings();
            let kernel = FakeKernel::new(&host).with_fault(at, fault);
            let result = detach(&host.paths, &kernel, &request(&all, &[]));
            if kernel.written.borrow().len() <= at {
                assert!(result.is_ok() && at == 11, "{at}: {result:?}");
                break;
            }
            let Err(BindError::Failed { left, .. }) = &result else {
                // An override that was not taken is harmless where the kernel chooses vfio-pci anyway.
                panic!("{fault:?} at {at}: {result:?}");
            };
            assert!(left.is_empty(), "{fault:?} at {at}: {result:?}");
            assert_eq!(host.bindings(), before, "{fault:?} at {at}");
            assert!(has_no_records(&host));
            assert!(refused(result).contains("each device has the driver that it had before"));
        }
    }
}

#[test]
fn a_fault_on_the_way_back_leaves_the_devices_detached() {
    let all = [bdf("01:00.0"), bdf("02:00.0")];
    for at in 0.. {
        let host = host();
        let claims = FakeKernel::new(&host).claims;
        detach(&host.paths, &FakeKernel::new(&host), &request(&all, &[])).unwrap();
        let detached = host.bindings();
        let mut kernel = FakeKernel::new(&host).with_fault(at, Fault::Refuses);
        kernel.claims = claims;
        let result = reattach(&host.paths, &kernel, &request(&all, &[]));
        if kernel.written.borrow().len() <= at {
            assert!(result.is_ok() && at == 11, "{at}: {result:?}");
            break;
        }
        assert!(
            matches!(&result, Err(BindError::Failed { left, .. }) if left.is_empty()),
            "{at}: {result:?}"
        );
        assert_eq!(host.bindings(), detached, "{at}");
        kernel.fault = None;
        reattach(&host.paths, &kernel, &request(&all, &[])).unwrap();
        assert_eq!(
            drivers(&host)[1..4],
            ["nouveau", "snd_hda_intel", "nvme"].map(|name| Some(name.to_owned()))
        );
    }
}

#[test]
fn a_device_that_hangs_is_named_and_left_alone() {
    let all = [bdf("01:00.0"), bdf("02:00.0")];
    for at in 0..9 {
        let host = host();
        let before = host.bindings();
        let kernel = FakeKernel::new(&host).with_fault(at, Fault::Hangs);
        let error = detach(&host.paths, &kernel, &request(&all, &[])).unwrap_err();
        let BindError::Failed {
            bdf: hung, left, ..
        } = &error
        else {
            panic!("{error}")
        };
        assert_eq!(left, &[*hung]);
        assert!(
            texts(&error).contains("the device hangs"),
            "{}",
            texts(&error)
        );
        let mut after = host.bindings();
        after.insert(*hung, before[hung].clone());
        assert_eq!(after, before, "the others are back");
        assert!(!host.read(&hung.to_string()).lease.is_held());
    }
}

#[test]
fn a_dry_run_says_every_write_and_makes_none() {
    let host = host();
    let before = host.bindings();
    let kernel = FakeKernel::new(&host);
    let gpu = [bdf("01:00.0")];
    let dry_run = BindRequest {
        dry_run: true,
        ..BindRequest::of(&gpu)
    };
    let planned = detach(&host.paths, &kernel, &dry_run).unwrap();
    assert!(kernel.written.borrow().is_empty() && !host.paths.run.exists());
    assert_eq!(host.bindings(), before);
    let done = detach(&host.paths, &kernel, &request(&gpu, &[])).unwrap();
    assert_eq!(planned, done);
    let planned = reattach(&host.paths, &kernel, &dry_run).unwrap();
    assert_eq!(
        planned,
        reattach(&host.paths, &kernel, &request(&gpu, &[])).unwrap()
    );
}

#[test]
fn a_leased_device_stays_with_its_vm() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    detach(&host.paths, &kernel, &request(&[bdf("01:00.0")], &[])).unwrap();
    let gpu = ungrouped(bdf("01:00.0"));
    let leases = allocate(&host.paths, &[gpu], &vm("a")).unwrap();
    let sound = [bdf("01:00.1")];
    for dry_run in [true, false] {
        let request = BindRequest {
            dry_run,
            ..request(&sound, &[])
        };
        let error = refused(reattach(&host.paths, &kernel, &request));
        assert!(error.contains("is held by VM \"a\" (pid 123)"), "{error}");
        // With what to do about it.
        assert!(
            error.contains(": `gantry vm detach a 0000:01:00.0`"),
            "{error}"
        );
    }
    assert_eq!(
        detach(&host.paths, &kernel, &request(&[bdf("01:00.0")], &[]))
            .unwrap()
            .moved,
        []
    );
    drop(leases);
    reattach(&host.paths, &kernel, &request(&[bdf("01:00.1")], &[])).unwrap();
}

#[test]
fn a_holder_that_is_killed_is_waited_for() {
    let host = FakeHost::new(&[Fake::nvme("01:00.0", 1)]);
    let mut kernel = FakeKernel::new(&host);
    kernel.claims.clear();
    host.file("proc/123/stat", "123 (gantry) R 1 123 123 0 -1 4195332 0\n");
    let lock = DeviceLock::take(&host.paths, bdf("01:00.0"), &LeaseRecord::vm(&vm("a"))).unwrap();
    let ending = std::thread::spawn(|| {
        std::thread::sleep(std::time::Duration::from_millis(200));
        drop(lock);
    });
    let devices = [bdf("01:00.0")];
    reattach(&host.paths, &kernel, &request(&devices, &[])).unwrap();
    ending.join().unwrap();
    assert_eq!(drivers(&host), [None]);
}

#[test]
fn devices_cannot_be_leased_while_they_move() {
    struct Spy<'a>(FakeKernel<'a>, &'a FakeHost);
    impl SysfsWriter for Spy<'_> {
        fn write(
            &self,
            path: &std::path::Path,
            value: &str,
        ) -> Result<(), crate::moving::writer::WriteError> {
            for address in ["01:00.0", "01:00.1"] {
                let lease = self.1.read(address).lease;
                assert_eq!(lease.record().unwrap().name, "gantry device detach");
            }
            let other = ungrouped(bdf("02:00.0"));
            let error = allocate(&self.1.paths, &[other], &vm("b")).unwrap_err();
            assert!(
                error.to_string().contains("bound to nvme"),
                "others are not held up: {error}"
            );
            self.0.write(path, value)
        }

        fn write_keeping(
            &self,
            path: &std::path::Path,
            value: &str,
            _: &std::fs::File,
        ) -> Result<(), crate::moving::writer::WriteError> {
            self.write(path, value)
        }
    }
    let host = host();
    let spy = Spy(FakeKernel::new(&host), &host);
    detach(&host.paths, &spy, &request(&[bdf("01:00.0")], &[])).unwrap();
}

#[test]
fn what_cannot_be_detached_is_said() {
    let host = FakeHost::new(&[
        Fake::nvme("00:01.0", 7)
            .class(0x06_04_00)
            .driver("pcieport"),
        Fake::nvme("00:1f.0", 8).class(0x06_01_00).driver("lpc_ich"),
        Fake::nvme("00:1f.3", 8)
            .class(0x04_03_00)
            .driver("snd_hda_intel"),
        Fake::nvme("01:00.0", 1).no_group().driver("nvme"),
        Fake::nvme("02:00.0", 2)
            .driver("igb")
            .with("sriov_totalvfs", "7")
            .with("sriov_numvfs", "2"),
    ]);
    let kernel = FakeKernel::new(&host);
    for (address, said) in [
        ("00:01.0", "0000:00:01.0 is a bridge"),
        (
            "00:1f.3",
            "IOMMU group 8 holds the host's bridge 0000:00:1f.0 (lpc_ich)",
        ),
        ("01:00.0", "0000:01:00.0 is in no IOMMU group"),
        ("02:00.0", "0000:02:00.0 has 2 virtual functions"),
        ("09:00.0", "no PCI device 0000:09:00.0"),
    ] {
        let error = refused(detach(&host.paths, &kernel, &request(&[bdf(address)], &[])));
        assert!(error.contains(said), "{error}");
    }
    let host = self::host();
    fs::remove_dir_all(host.paths.sysfs.join("bus/pci/drivers/vfio-pci")).unwrap();
    let error = refused(detach(
        &host.paths,
        &FakeKernel::new(&host),
        &request(&[bdf("02:00.0")], &[]),
    ));
    assert!(error.contains("`modprobe vfio-pci`"), "{error}");
    assert!(kernel.written.borrow().is_empty());
}

#[test]
fn what_the_host_needs_goes_only_when_it_is_named() {
    let host = FakeHost::new(&[
        Fake::nvme("01:00.0", 7)
            .class(0x03_00_00)
            .driver("nouveau")
            .with("boot_vga", "1"),
        Fake::nvme("01:00.1", 7)
            .class(0x04_03_00)
            .driver("snd_hda_intel"),
    ]);
    let kernel = FakeKernel::new(&host);
    let (display, sound) = (bdf("01:00.0"), bdf("01:00.1"));
    for overrides in [vec![], vec![sound]] {
        let error = refused(detach(&host.paths, &kernel, &request(&[sound], &overrides)));
        assert_eq!(
            error,
            "the host uses this:\n  0000:01:00.0 is the display that the firmware started (boot_vga)\n\
                 nothing was changed; to take it anyway, give --override 0000:01:00.0"
        );
    }
    assert!(kernel.written.borrow().is_empty());
    assert_eq!(
        detach(&host.paths, &kernel, &request(&[sound], &[display]))
            .unwrap()
            .moved,
        [display, sound]
    );
}

#[test]
fn without_a_record_the_kernel_chooses() {
    let host = FakeHost::new(&[
        Fake::nvme("01:00.0", 1).with("driver_override", "vfio-pci"),
        Fake::nvme("02:00.0", 2),
        Fake::nvme("03:00.0", 3).with("driver_override", "vfio-pci"),
    ]);
    let mut kernel = FakeKernel::new(&host);
    kernel.claims = [
        (bdf("01:00.0"), "nvme".to_owned()),
        (bdf("02:00.0"), "vfio-pci".to_owned()),
    ]
    .into();
    fs::create_dir_all(host.paths.sysfs.join("bus/pci/drivers/nvme")).unwrap();
    reattach(
        &host.paths,
        &kernel,
        &request(&[bdf("01:00.0"), bdf("03:00.0")], &[]),
    )
    .unwrap();
    assert_eq!(host.read("01:00.0").driver.as_deref(), Some("nvme"));
    assert_eq!(host.read("01:00.0").driver_override, None);
    assert_eq!(
        host.read("03:00.0").driver,
        None,
        "no driver of the host wants it"
    );
    let error = refused(reattach(
        &host.paths,
        &kernel,
        &request(&[bdf("02:00.0")], &[]),
    ));
    assert!(
        error.contains("its driver is now vfio-pci") && error.contains("vfio-pci.ids"),
        "{error}"
    );
}

#[test]
fn a_serial_number_is_remembered_while_its_driver_is_away() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    detach(&host.paths, &kernel, &request(&[bdf("02:00.0")], &[])).unwrap();
    fs::remove_dir_all(host.dir(bdf("02:00.0")).join("nvme")).unwrap();
    assert_eq!(host.read("02:00.0").serial.as_deref(), Some("GN-2"));
    fs::write(host.dir(bdf("02:00.0")).join("driver_override"), "(null)\n").unwrap();
    assert_eq!(
        host.read("02:00.0").serial,
        None,
        "another device may have been put in"
    );
}

#[test]
fn nothing_is_touched_when_the_former_driver_cannot_be_kept() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    host.file("run/restore/driver", "a file, not a directory");
    let error = refused(detach(
        &host.paths,
        &kernel,
        &request(&[bdf("02:00.0")], &[]),
    ));
    assert!(
        error.contains("cannot record its former driver in")
            && error.contains("run/restore/driver"),
        "{error}"
    );
    assert!(kernel.written.borrow().is_empty());
}

#[test]
fn a_neighbour_with_pci_stub_is_out_of_the_way() {
    let host = FakeHost::new(&[
        Fake::nvme("01:00.0", 7).driver("nvme"),
        Fake::nvme("01:00.1", 7).driver("pci-stub"),
    ]);
    let report = detach(
        &host.paths,
        &FakeKernel::new(&host),
        &request(&[bdf("01:00.0")], &[]),
    )
    .unwrap();
    assert_eq!(report.moved, [bdf("01:00.0")]);
    let disk = ungrouped(bdf("01:00.0"));
    allocate(&host.paths, &[disk], &vm("a")).unwrap();
}

#[test]
fn a_death_at_any_write_can_be_made_good() {
    let all = [bdf("01:00.0"), bdf("02:00.0"), bdf("03:00.0")];
    for detach_again in [false, true] {
        for at in 0..11 {
            let host = host();
            let before = host.bindings();
            let mut kernel = FakeKernel::new(&host).with_fault(at, Fault::Dead);
            detach(&host.paths, &kernel, &request(&all, &[])).unwrap_err();
            kernel.fault = None;
            if detach_again {
                detach(&host.paths, &kernel, &request(&all, &[])).unwrap();
                assert!(all.iter().all(|bdf| host.read(&bdf.to_string()).on_vfio()));
            }
            reattach(&host.paths, &kernel, &request(&all, &[])).unwrap();
            assert_eq!(host.bindings(), before, "{at}, again: {detach_again}");
        }
    }
}

#[test]
fn a_rule_that_names_a_driver_goes_on_to_match_what_was_taken_from_it() {
    fn group(host: &FakeHost, address: &str) -> Option<String> {
        let groups = Groups::load(&host.paths).unwrap();
        let all = scan_with(&host.paths, Detail::ForChoice).unwrap();
        let device = all.into_iter().find(|one| one.bdf == bdf(address)).unwrap();
        let chosen = groups.group_of(&device).map(|group| group.name.clone());
        let whole = groups.group_of(&host.read(address));
        assert_eq!(whole.map(|group| group.name.clone()), chosen);
        chosen
    }
    struct Spy<'a>(FakeKernel<'a>, &'a FakeHost);
    impl SysfsWriter for Spy<'_> {
        fn write(&self, path: &Path, value: &str) -> Result<(), WriteError> {
            self.0.write(path, value)?;
            assert_eq!(
                group(self.1, "02:00.0").as_deref(),
                Some("disks"),
                "{value}"
            );
            Ok(())
        }

        fn write_keeping(&self, path: &Path, value: &str, _: &fs::File) -> Result<(), WriteError> {
            self.write(path, value)
        }
    }
    let host = FakeHost::new(&[
        Fake::nvme("01:00.0", 1),
        Fake::nvme("02:00.0", 2).driver("nvme"),
        Fake::nvme("03:00.0", 3).driver("other"),
    ]);
    host.groups(
        r#"{"groups": [{"name": "disks", "rules": [{"driver": "nvme"}]},
            {"name": "others", "rules": [{"driver": {"not": "nvme"}}]}]}"#,
    );
    let spy = Spy(FakeKernel::new(&host), &host);
    let devices = [bdf("02:00.0")];
    detach(&host.paths, &spy, &request(&devices, &[])).unwrap();
    assert_eq!(host.read("02:00.0").former_driver.as_deref(), Some("nvme"));
    // Nobody knows of a driver that the first one had.
    let groups = ["01:00.0", "02:00.0", "03:00.0"].map(|address| group(&host, address));
    let groups = groups.map(Option::unwrap);
    assert_eq!(groups, ["others", "disks", "others"]);
    reattach(&host.paths, &spy, &request(&devices, &[])).unwrap();
    assert_eq!(host.read("02:00.0").former_driver, None);
    // Another driver has it by hand: it is what counts.
    detach(&host.paths, &spy, &request(&devices, &[])).unwrap();
    host.bind(devices[0], Some("other"));
    assert_eq!(group(&host, "02:00.0").as_deref(), Some("others"));
}
