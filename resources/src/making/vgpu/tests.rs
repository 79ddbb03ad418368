//! Tests: devices made for VMs and removed after them, made ahead, the vendor's types; with faults and
//! kills at every write.

use super::recorded::{LockedRecord, remember};
use super::*;
use crate::allocation::{AllocateError, Lease, fit};
use crate::base::name::DeviceName;
use crate::base::uuid::Uuid;
use crate::facts::vgpu::NVIDIA;
use crate::fixture::{Fake, FakeHost, FakeKernel, Fault, bdf, lease, ungrouped};
use crate::holding::host_lock::AllocationLock;
use crate::holding::record::LeaseRecord;
use crate::holding::restore::Change;
use crate::holding::vgpu_records::{claims, hangs};
use crate::inventory::device::DeviceState;
use crate::making::demand::reap_with;
use crate::making::sriov::HostAccess;
use crate::pools::group::Groups;
use crate::pools::request::{DeviceRequest, Placement};
use std::cell::RefCell;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;

const ONE: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
const TWO: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";

/// Two parents of a type, the first with room for one; the group `vgpus` asks for it.
fn host(more: &str) -> FakeHost {
    let host = FakeHost::new(&[Fake::nvme("01:00.0", 1)]);
    host.mdev_parent("mtty", "mtty-2", "Dual port serial", 1);
    host.mdev_parent("zwei", "mtty-2", "Dual port serial", 2);
    host.file("proc/sys/kernel/random/uuid", &format!("{ONE}\n"));
    host.groups(&format!(
            r#"{{"groups": [{{"name": "vgpus", "type": "vgpu",
                "vgpu": {{"type": "Dual port serial"{more}}}}}, {{"name": "disks", "rules": [{{"class": "01"}}]}}]}}"#
        ),
    );
    host
}

fn take(
    host: &FakeHost,
    kernel: &FakeKernel<'_>,
    requests: &[DeviceRequest],
) -> Result<Vec<Lease>, AllocateError> {
    lease(host, kernel.access(), requests)
}

fn one() -> [DeviceRequest; 1] {
    [DeviceRequest::group("vgpus", 1)]
}

/// The devices, the room of each parent, and the records.
fn seen(host: &FakeHost) -> (Vec<String>, Vec<u32>, Vec<String>) {
    let mdevs = Mdevs::read(&host.paths).unwrap();
    let room = mdevs.parents.iter().map(|parent| parent.types[0].available);
    (
        mdevs
            .devices
            .iter()
            .map(|device| device.uuid.to_string())
            .collect(),
        room.collect(),
        crate::base::sysfs::entries(&host.paths.run.join("restore/vgpu")).unwrap(),
    )
}

fn group(host: &FakeHost) -> ResourceGroup {
    Groups::load(&host.paths)
        .unwrap()
        .get("vgpus")
        .unwrap()
        .clone()
}

#[test]
fn a_vm_gets_a_new_device_and_it_goes_with_it() {
    let host = host("");
    let kernel = FakeKernel::new(&host);
    let before = seen(&host);
    let requests = [
        DeviceRequest::group("disks", 1),
        DeviceRequest::group("vgpus", 1),
    ];
    let leases = take(&host, &kernel, &requests).unwrap();
    let names: Vec<String> = leases
        .iter()
        .map(|lease| lease.name().to_string())
        .collect();
    assert_eq!(names, ["0000:01:00.0", ONE]);
    assert!(leases[1].iommu_group().is_some() && leases[1].device().is_none());
    let (devices, room, records) = seen(&host);
    assert_eq!((devices, room), (vec![ONE.to_owned()], vec![0, 2]));
    assert_eq!(records, [ONE]);
    let mdevs = Mdevs::read(&host.paths).unwrap();
    let groups = Groups::load(&host.paths).unwrap();
    assert!(matches!(
        mdevs.devices[0].state(),
        crate::inventory::device::DeviceState::Assigned { vm: Some(vm) } if vm == "a"
    ));
    assert_eq!(
        groups.group_of_mdev(&mdevs.devices[0]).unwrap().name,
        "vgpus"
    );
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(seen(&host).0.len(), 1, "the VM has it");
    let locks = || crate::base::sysfs::entries(&host.paths.run.join("leases")).unwrap();
    assert!(locks().contains(&format!("{ONE}.lock")));
    drop(leases);
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(seen(&host), before);
    assert_eq!(locks(), ["0000:01:00.0.lock"]);
}

#[test]
fn what_a_killed_vm_left_makes_room_for_the_next() {
    let host = host(r#", "parents": ["mtty"]"#);
    let kernel = FakeKernel::new(&host);
    drop(take(&host, &kernel, &one()).unwrap());
    assert_eq!(seen(&host).1, [0, 2]);
    host.file("proc/sys/kernel/random/uuid", &format!("{TWO}\n"));
    let next = take(&host, &kernel, &one()).unwrap();
    assert_eq!(seen(&host).0, [TWO]);
    let error = take(&host, &kernel, &one()).unwrap_err().to_string();
    assert!(
        error.contains("group \"vgpus\" has no free device (1 asked for)"),
        "{error}"
    );
    drop(next);
}

#[test]
fn a_choice_counts_what_is_left_over_all_parents() {
    let host = host("");
    let requests = [
        DeviceRequest::group("vgpus", 2),
        DeviceRequest::group("vgpus", 2),
    ];
    let found = fit(&host.paths, &requests, &Placement::default()).unwrap();
    let of = |index: usize| -> Vec<&str> {
        let instances = found.requests[index].instances.iter();
        instances.map(|one| one.parent.as_str()).collect()
    };
    assert!(!found.fits);
    assert_eq!((of(0), of(1)), (vec!["mtty", "zwei"], vec!["zwei"]));
    assert_eq!(seen(&host).0, Vec::<String>::new());
}

#[test]
fn devices_made_ahead_stay_and_are_given_by_their_names() {
    let host = host(&format!(r#", "uuids": ["{ONE}", "{TWO}"]"#));
    let kernel = FakeKernel::new(&host);
    let before = seen(&host);
    let dry = make_ahead(&host.paths, &kernel, &group(&host), true).unwrap();
    assert_eq!(seen(&host), before);
    let made = make_ahead(&host.paths, &kernel, &group(&host), false).unwrap();
    assert_eq!(dry.writes, made.writes);
    assert_eq!(seen(&host).0, [ONE, TWO]);
    assert!(
        make_ahead(&host.paths, &kernel, &group(&host), false)
            .unwrap()
            .writes
            .is_empty()
    );
    let leases = take(&host, &kernel, &[DeviceRequest::group("vgpus", 2)]).unwrap();
    let error = unmake_ahead(&host.paths, &kernel, &group(&host), false).unwrap_err();
    let held = format!("is held by VM \"a\" (pid {})", std::process::id());
    assert!(error.to_string().contains(&held), "{error}");
    drop(leases);
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(seen(&host).0, [ONE, TWO], "they are not the VM's");
    unmake_ahead(&host.paths, &kernel, &group(&host), false).unwrap();
    assert_eq!(seen(&host), before);
    let plain = super::tests::host("");
    let error = make_ahead(&plain.paths, &kernel, &group(&plain), false).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("to create devices ahead, add \"uuids\""),
        "{error}"
    );
}

#[test]
fn a_device_that_is_there_is_asked_for_by_its_identifier() {
    let host = host(&format!(r#", "uuids": ["{ONE}"]"#));
    let kernel = FakeKernel::new(&host);
    let exact = || DeviceRequest::device(ONE.parse::<Uuid>().unwrap());
    let error = take(&host, &kernel, &[exact()]).unwrap_err().to_string();
    assert!(error.contains("no mediated device"), "{error}");
    make_ahead(&host.paths, &kernel, &group(&host), false).unwrap();
    let error = take(&host, &kernel, &[exact(), exact()])
        .unwrap_err()
        .to_string();
    assert!(error.contains("asked for twice"), "{error}");
    let lease = take(&host, &kernel, &[exact()]).unwrap();
    assert_eq!(lease[0].name().to_string(), ONE);
    let error = take(&host, &kernel, &[exact()]).unwrap_err().to_string();
    assert!(error.contains("held by VM \"a\""), "{error}");
    drop(lease);
    host.groups(r#"{"groups": []}"#);
    let error = take(&host, &kernel, &[exact()]).unwrap_err().to_string();
    assert!(error.contains("in no group"), "{error}");
    let anyhow = ungrouped(ONE.parse::<Uuid>().unwrap());
    take(&host, &kernel, &[anyhow]).unwrap();
    assert_eq!(seen(&host).0, [ONE]);
}

#[test]
fn all_are_made_ahead_or_none() {
    for (at, fault) in [
        (0, Fault::Refuses),
        (1, Fault::Refuses),
        (1, Fault::Ignores),
    ] {
        let host = host(&format!(r#", "uuids": ["{ONE}", "{TWO}"]"#));
        let before = seen(&host);
        let kernel = FakeKernel::new(&host).with_fault(at, fault);
        make_ahead(&host.paths, &kernel, &group(&host), false).unwrap_err();
        assert_eq!(seen(&host), before, "{fault:?} at {at}");
    }
    let host = host(&format!(
        r#", "parents": ["mtty"], "uuids": ["{ONE}", "{TWO}"]"#
    ));
    let kernel = FakeKernel::new(&host);
    let error = make_ahead(&host.paths, &kernel, &group(&host), false).unwrap_err();
    assert!(
        error.to_string().contains("lacks 1 of its 2 devices"),
        "{error}"
    );
    assert!(kernel.written.borrow().is_empty());
}

#[test]
fn a_fault_or_a_kill_while_making_and_removing_leaves_nothing() {
    for fault in [Fault::Refuses, Fault::Ignores, Fault::Dead] {
        for at in 0..2 {
            let host = host("");
            let before = seen(&host);
            let kernel = FakeKernel::new(&host).with_fault(at, fault);
            let taken = take(&host, &kernel, &one());
            assert_eq!(taken.is_err(), at == 0, "{fault:?} at {at}");
            drop(taken);
            let _ = reap_with(&host.paths, kernel.access());
            let kernel = FakeKernel::new(&host);
            reap_with(&host.paths, kernel.access()).unwrap();
            assert_eq!(seen(&host), before, "{fault:?} at {at}");
        }
    }
}

/// A card with two functions that the vendor's driver keeps.
fn vendor_host(kind: &str) -> FakeHost {
    let function = |address: &str, group| Fake {
        id: (NVIDIA, 0x2236),
        ..Fake::nvme(address, group)
            .class(0x03_02_00)
            .driver("nvidia")
            .with("nvidia/current_vgpu_type", "0")
            .with(
                "nvidia/creatable_vgpu_types",
                "ID    : vGPU Name\n557   : NVIDIA A40-1B\n558   : NVIDIA A40-2B",
            )
    };
    let card = Fake {
        id: (NVIDIA, 0x2235),
        ..Fake::nvme("3b:00.0", 9).class(0x03_02_00).driver("nvidia")
    };
    let host = FakeHost::new(&[card, function("3b:00.4", 10), function("3b:00.5", 11)]);
    for address in ["3b:00.4", "3b:00.5"] {
        let link = host.dir(bdf(address)).join("physfn");
        std::os::unix::fs::symlink("../0000:3b:00.0", link).unwrap();
    }
    host.file("dev/vfio/10", "");
    host.file("dev/vfio/11", "");
    host.groups(&format!(
        r#"{{"groups": [{{"name": "vgpus", "type": "vgpu",
                "vgpu": {{"type": "{kind}", "parents": ["3b:00.0"]}}}}]}}"#
    ));
    host
}

fn types(host: &FakeHost) -> Vec<u32> {
    let all = host.scan().into_iter();
    all.filter_map(|device| device.vgpu)
        .map(|vgpu| vgpu.current)
        .collect()
}

#[test]
fn the_vendors_functions_get_their_type_for_a_vm_and_lose_it_after() {
    for (kind, at) in [("558", 558), ("NVIDIA A40-1B", 557)] {
        let host = vendor_host(kind);
        let kernel = FakeKernel::new(&host);
        let leases = take(&host, &kernel, &one()).unwrap();
        assert_eq!(leases[0].device().unwrap().bdf, bdf("3b:00.4"));
        assert_eq!(types(&host), [at, 0]);
        assert_eq!(host.read("3b:00.4").driver.as_deref(), Some("nvidia"));
        let more = take(&host, &kernel, &one()).unwrap();
        assert_eq!(more[0].device().unwrap().bdf, bdf("3b:00.5"));
        take(&host, &kernel, &one()).unwrap_err();
        drop(leases);
        reap_with(&host.paths, kernel.access()).unwrap();
        assert_eq!(types(&host), [0, at]);
        drop(more);
        reap_with(&host.paths, kernel.access()).unwrap();
        assert_eq!(types(&host), [0, 0]);
    }
    let host = vendor_host("559");
    let kernel = FakeKernel::new(&host);
    let error = take(&host, &kernel, &one()).unwrap_err().to_string();
    assert!(error.contains("3 not in the group"), "{error}");
}

#[test]
fn a_fault_or_a_kill_leaves_no_type_behind() {
    for fault in [Fault::Refuses, Fault::Dead] {
        for at in 0..2 {
            let host = vendor_host("558");
            let kernel = FakeKernel::new(&host).with_fault(at, fault);
            let taken = take(&host, &kernel, &one());
            assert_eq!(taken.is_err(), at == 0, "{fault:?} at {at}");
            drop(taken);
            let _ = reap_with(&host.paths, kernel.access());
            let kernel = FakeKernel::new(&host);
            reap_with(&host.paths, kernel.access()).unwrap();
            assert_eq!(types(&host), [0, 0], "{fault:?} at {at}");
            assert!(
                fs::read_dir(host.paths.run.join("restore/vgpu"))
                    .is_ok_and(|mut dir| dir.next().is_none())
            );
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_file_and_key() {
    for (vgpu, words) in [
        (
            r#""type": "vgpu", "vgpu": {"type": " "}"#,
            "`vgpu.type`: it is empty: name a type",
        ),
        (
            r#""vgpu": {"type": "x"}"#,
            "`vgpu`: only groups of type \"vgpu\"",
        ),
        (
            r#""type": "vgpu", "vgpu": {"type": "x", "uuids": ["83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
                "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"]}"#,
            "`vgpu.uuids`: 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001 is given twice",
        ),
        (
            r#""type": "vgpu", "vgpu": {"type": "x", "uuids": ["y"]}"#,
            "is no UUID",
        ),
    ] {
        let host = FakeHost::new(&[]);
        host.groups(&format!(r#"{{"groups": [{{"name": "g", {vgpu}}}]}}"#));
        let error = Groups::load(&host.paths).unwrap_err().to_string();
        assert!(
            error.contains(words) && error.contains("groups.json:1:"),
            "{error}"
        );
    }
}

/// A kernel that is looked at from outside while it makes and removes devices.
struct Watched<'a> {
    kernel: FakeKernel<'a>,
    look: &'a dyn Fn(&Path),
}

impl SysfsWriter for Watched<'_> {
    fn write(&self, path: &Path, value: &str) -> Result<(), WriteError> {
        (self.look)(path);
        self.kernel.write(path, value)
    }

    fn write_keeping(&self, path: &Path, value: &str, kept: &File) -> Result<(), WriteError> {
        (self.look)(path);
        self.kernel.write_keeping(path, value, kept)
    }
}

#[test]
fn a_device_in_the_making_stops_nobody_and_is_counted() {
    let host = host("");
    let seen_free: RefCell<Vec<(String, usize)>> = RefCell::default();
    let look = |path: &Path| {
        // As any other VM would, at once.
        let record = LeaseRecord::task("another");
        drop(AllocationLock::acquire(&host.paths, &record, Duration::ZERO).unwrap());
        let disks = [DeviceRequest::group("disks", 1)];
        assert_eq!(
            take(&host, &FakeKernel::new(&host), &disks).unwrap().len(),
            1
        );
        let all = [DeviceRequest::group("vgpus", 3)];
        let found = fit(&host.paths, &all, &Placement::default()).unwrap();
        let what = path.file_name().unwrap().to_str().unwrap().to_owned();
        RefCell::borrow_mut(&seen_free).push((what, found.requests[0].free));
        // Nobody unmakes it meanwhile.
        let kernel = FakeKernel::new(&host);
        reap_with(&host.paths, kernel.access()).unwrap();
        assert!(kernel.written.borrow().is_empty());
    };
    let kernel = Watched {
        kernel: FakeKernel::new(&host),
        look: &look,
    };
    let access = HostAccess {
        writer: &kernel,
        links: &kernel.kernel,
    };
    let leases = lease(&host, access, &one()).unwrap();
    drop(leases);
    reap_with(&host.paths, access).unwrap();
    let created = ("create".to_owned(), 2);
    let seen_free = seen_free.into_inner();
    assert_eq!(seen_free[0], created);
    assert_eq!(seen_free[1].0, "remove");
    assert_eq!(seen_free.len(), 2);
    assert_eq!(seen(&host).1, [1, 2]);
}

#[test]
fn of_two_at_once_one_gets_the_last_device() {
    let host = host(r#", "parents": ["mtty"]"#);
    let slow = |_: &Path| std::thread::sleep(Duration::from_millis(300));
    let start = |after: u64| {
        std::thread::sleep(Duration::from_millis(after));
        let kernel = Watched {
            kernel: FakeKernel::new(&host),
            look: &slow,
        };
        let access = HostAccess {
            writer: &kernel,
            links: &kernel.kernel,
        };
        lease(&host, access, &one()).map_err(|error| error.to_string())
    };
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| start(0));
        let second = scope.spawn(|| start(100));
        (first.join().unwrap(), second.join().unwrap())
    });
    assert_eq!(first.unwrap()[0].name().to_string(), ONE);
    let said = second.unwrap_err();
    assert!(said.contains("no free device"), "{said}");
    assert_eq!(seen(&host).0, [ONE]);
}

#[test]
fn a_driver_that_hangs_is_left_alone_until_it_comes_back() {
    let host = host(r#", "parents": ["mtty"]"#);
    let before = seen(&host);
    let kernel = FakeKernel::new(&host).with_fault(0, Fault::Hangs);
    let error = take(&host, &kernel, &one()).unwrap_err().to_string();
    assert!(error.contains("did not return"), "{error}");
    let after = FakeKernel::new(&host);
    let errors = reap_with(&host.paths, after.access()).unwrap_err();
    let texts = crate::base::chain::chain(&errors[0]);
    assert!(
        texts.contains("not finished creating or removing"),
        "{texts}"
    );
    // What it will take is not given to anybody.
    let error = take(&host, &after, &one()).unwrap_err().to_string();
    assert!(error.contains("no free device"), "{error}");
    assert!(after.written.borrow().is_empty());
    // It comes back in the end, and the device goes.
    let (create, uuid) = kernel.written.borrow()[0].clone();
    after.write(&create, &uuid).unwrap();
    kernel.come_back();
    assert_eq!(seen(&host).0, [ONE]);
    reap_with(&host.paths, after.access()).unwrap();
    assert_eq!(seen(&host), before);
}

#[test]
fn a_device_whose_removal_hangs_is_asked_to_go_once() {
    for ahead in [false, true] {
        let uuids = match ahead {
            true => format!(r#", "uuids": ["{ONE}"]"#),
            false => String::new(),
        };
        let host = host(&uuids);
        let before = seen(&host);
        let kernel = FakeKernel::new(&host).with_fault(1, Fault::Hangs);
        match ahead {
            true => {
                make_ahead(&host.paths, &kernel, &group(&host), false).unwrap();
                unmake_ahead(&host.paths, &kernel, &group(&host), false).unwrap_err();
            }
            false => {
                drop(take(&host, &kernel, &one()).unwrap());
                reap_with(&host.paths, kernel.access()).unwrap_err();
            }
        }
        let after = FakeKernel::new(&host);
        reap_with(&host.paths, after.access()).unwrap_err();
        let exact = ungrouped(ONE.parse::<Uuid>().unwrap());
        let error = take(&host, &after, &[exact]).unwrap_err().to_string();
        assert!(
            error.contains("has not finished creating or removing"),
            "{error}"
        );
        // It is shown as what it is, with who is in the way.
        let device = Mdevs::read(&host.paths).unwrap().devices.remove(0);
        assert!(matches!(device.state(), DeviceState::Quarantined { .. }));
        let group = device.iommu_group.unwrap();
        host.file("proc/77/comm", "qemu\n");
        fs::create_dir_all(host.paths.proc.join("77/fd")).unwrap();
        symlink(
            format!("/dev/vfio/{group}"),
            host.paths.proc.join("77/fd/5"),
        )
        .unwrap();
        let found = || {
            let report = crate::check::check(&host.paths, &[]).unwrap();
            report.findings.into_iter().find(|one| one.check == "vgpus")
        };
        let warned = found().unwrap();
        let said = format!("removing {ONE}: process 77 (qemu) has it open");
        assert!(warned.reason.contains(&said), "{}", warned.reason);
        assert!(after.written.borrow().is_empty(), "ahead: {ahead}");
        let (remove, _) = kernel.written.borrow()[1].clone();
        after.write(&remove, "1").unwrap();
        kernel.come_back();
        reap_with(&host.paths, after.access()).unwrap();
        assert_eq!(seen(&host), before, "ahead: {ahead}");
        assert_eq!(found(), None);
    }
}

#[test]
fn a_killed_command_whose_write_goes_on_leaves_nothing() {
    let host = host("");
    let before = seen(&host);
    let record = LeaseRecord::task("gantry run");
    let mdevs = Mdevs::read(&host.paths).unwrap();
    let spec = group(&host).vgpu.unwrap();
    let instance = spec
        .instances(&mdevs, &TakenInstances::default(), 1)
        .remove(0);
    let uuid = ONE.parse().unwrap();
    drop(claim(&host.paths, &instance, uuid, &record).unwrap());
    // The child that writes has the record, and nobody has the device.
    let mut child = recorded::LockedRecord::begin(&host.paths, uuid.into()).unwrap();
    let kernel = FakeKernel::new(&host);
    reap_with(&host.paths, kernel.access()).unwrap_err();
    let write = create_write(&host.paths, &instance, uuid);
    let work = child.as_mut().unwrap();
    work.write(&kernel, &write.path, &write.value).unwrap();
    drop(child);
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(seen(&host), before);
}

/// Whoever puts it there may write the directory, and is confined.
#[test]
fn what_is_in_the_place_of_a_record_is_none_and_neither_waited_for_nor_followed() {
    let host = host("");
    let uuid: Uuid = ONE.parse().unwrap();
    let path = Change::Vgpu.path(&host.paths, uuid);
    host.file("run/restore/vgpu/other", "text");
    let other = path.with_file_name("other");
    let ways: [&dyn Fn(); 3] = [
        &|| nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
        &|| symlink(&other, &path).unwrap(),
        &|| fs::create_dir_all(path.join("full")).unwrap(),
    ];
    for put in ways {
        put();
        assert!(claims(&host.paths).is_empty());
        assert!(!hangs(&host.paths, uuid));
        assert!(!Change::Vgpu.is_recorded(&host.paths, uuid));
        assert!(Change::Vgpu.recorded(&host.paths).is_empty());
        assert!(
            LockedRecord::begin(&host.paths, uuid.into())
                .unwrap()
                .is_none()
        );
        remember(&host.paths, uuid.into(), None, &LeaseRecord::task("x")).unwrap();
        assert_eq!(Change::Vgpu.recorded(&host.paths), [DeviceName::from(uuid)]);
        Change::Vgpu.forget(&host.paths, uuid);
        put();
        Change::Vgpu.forget(&host.paths, uuid);
        assert!(fs::symlink_metadata(&path).is_err());
    }
    assert_eq!(fs::read(&other).unwrap(), b"text");
}
