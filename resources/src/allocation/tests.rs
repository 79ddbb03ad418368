//! Tests: what is chosen, what is refused and why, and that nothing is given twice.

mod recorded;

use super::fit::SHOWN;
use super::*;
use crate::base::bdf::HostBdf;
use crate::facts::topology::Sockets;
use crate::fixture::{Fake, FakeHost, bdf, ungrouped, vm};
use crate::holding::device_lock::DeviceLock;
use crate::holding::record::LeaseStatus;
use crate::pools::group::Groups;
use crate::pools::request::{DeviceRequest, DeviceSource};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::fs;
use std::sync::Barrier;

const NVME: &str = r#"{"groups": [{"name": "nvme", "rules": [{"class": "0108"}]}]}"#;

fn host(devices: &[Fake], groups: &str) -> FakeHost {
    let host = FakeHost::new(devices);
    host.groups(groups);
    host
}

fn of(group: &str, count: u32) -> DeviceRequest {
    DeviceRequest::group(group, count)
}

fn exact(address: &str) -> DeviceRequest {
    DeviceRequest::device(bdf(address))
}

fn addresses(leases: &[Lease]) -> Vec<String> {
    leases
        .iter()
        .map(|lease| lease.device().unwrap().bdf.to_string())
        .collect()
}

fn refusal(host: &FakeHost, requests: &[DeviceRequest]) -> String {
    allocate(&host.paths, requests, &vm("b"))
        .unwrap_err()
        .to_string()
}

/// The function of a card that nobody thinks of.
#[test]
fn a_function_that_the_host_has_bound_again_is_named_with_its_driver() {
    let function = |number: u8| Fake::nvme(&format!("01:00.{number}"), 7);
    let groups = r#"{"groups": [{"name": "gpu", "rules": [{"class": "03"}]}]}"#;
    let devices = [function(0).class(0x03_00_00), function(1).class(0x04_03_00)];
    let host = host(&devices, groups);
    let wish = [of("gpu", 1)];
    assert_eq!(allocate(&host.paths, &wish, &vm("a")).unwrap().len(), 2);
    host.bind(bdf("01:00.1"), Some("snd_hda_intel"));
    let why = refusal(&host, &wish);
    for words in [
        "0000:01:00.1",
        "snd_hda_intel",
        "`gantry device detach 0000:01:00",
    ] {
        assert!(why.contains(words), "no {words:?} in {why}");
    }
    assert!(host.held().is_empty());
}

#[test]
fn a_group_gives_its_first_free_devices_until_they_are_given_back() {
    let devices = ["02:00.0", "10:00.0", "01:00.0"]
        .map(|address| Fake::nvme(address, u32::from(bdf(address).bus())));
    let host = host(&devices, NVME);
    let first = allocate(&host.paths, &[of("nvme", 1)], &vm("a")).unwrap();
    assert_eq!(addresses(&first), ["0000:01:00.0"]);
    let next = allocate(&host.paths, &[of("nvme", 2)], &vm("b")).unwrap();
    assert_eq!(addresses(&next), ["0000:02:00.0", "0000:10:00.0"]);
    drop(first);
    let again = allocate(&host.paths, &[of("nvme", 1)], &vm("c")).unwrap();
    assert_eq!(addresses(&again), ["0000:01:00.0"]);
    let LeaseStatus::Held(record) = host.read("0000:01:00.0").lease else {
        panic!()
    };
    assert_eq!(record.name, "c");
}

#[test]
fn a_holder_that_is_ending_is_waited_for_and_no_other() {
    let host = host(&[Fake::nvme("01:00.0", 1)], NVME);
    let first = allocate(&host.paths, &[of("nvme", 1)], &vm("a")).unwrap();
    // In another PID namespace, or alive.
    assert!(refusal(&host, &[of("nvme", 1)]).contains("held by VM \"a\""));
    host.file("proc/123/stat", "123 (gantry) S 1 123 123 0 -1 4194560 0\n");
    assert!(refusal(&host, &[exact("01:00.0")]).contains("held by VM \"a\""));
    host.file("proc/123/stat", "123 (gantry) R 1 123 123 0 -1 4195332 0\n");
    let late = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            drop(first);
        });
        allocate(&host.paths, &[exact("01:00.0")], &vm("b"))
    });
    assert_eq!(addresses(&late.unwrap()), ["0000:01:00.0"]);
}

#[test]
fn who_comes_between_the_choice_and_the_lock_is_waited_for_if_he_lets_go() {
    let host = host(&[Fake::nvme("01:00.0", 1)], NVME);
    let (devices, record) = (host.scan(), LeaseRecord::vm(&vm("b")));
    let locked = || super::lock(&host.paths, &devices, &[&devices[0]], &[], &record);
    for (other, waits) in [
        (LeaseRecord::restore(), true),
        (LeaseRecord::task("gantry device detach"), false),
    ] {
        let held = DeviceLock::take(&host.paths, bdf("01:00.0"), &other).unwrap();
        let got = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(300));
                drop(held);
            });
            locked()
        });
        assert_eq!(got.is_ok(), waits, "{other}");
    }
}

#[test]
fn what_others_give_back_is_not_waited_for() {
    let groups = r#"{"groups": [{"name": "one", "rules": [{"slot": "0000:01:00.0"}]},
        {"name": "two", "rules": [{"slot": "0000:02:00.0"}]}]}"#;
    let host = host(
        &[Fake::nvme("01:00.0", 1), Fake::nvme("02:00.0", 2)],
        groups,
    );
    let _taken = allocate(&host.paths, &[of("one", 1)], &vm("a")).unwrap();
    let restore = LeaseRecord::restore();
    let returned = DeviceLock::take(&host.paths, bdf("02:00.0"), &restore).unwrap();
    let started = Instant::now();
    for request in [of("one", 1), exact("01:00.0")] {
        assert!(refusal(&host, &[request]).contains("held by VM \"a\""));
    }
    assert!(started.elapsed() < Duration::from_secs(5));
    let late = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            drop(returned);
        });
        allocate(&host.paths, &[of("two", 1)], &vm("b"))
    });
    assert_eq!(addresses(&late.unwrap()), ["0000:02:00.0"]);
}

#[test]
fn devices_come_in_the_order_of_the_requests_and_none_twice() {
    let devices: Vec<Fake> = (1..5)
        .map(|bus| Fake::nvme(&format!("{bus:02x}:00.0"), bus))
        .collect();
    let host = host(&devices, NVME);
    let requests = [
        of("nvme", 1),
        exact("01:00.0"),
        of("nvme", 2),
        of("nvme", 0),
    ];
    let leases = allocate(&host.paths, &requests, &vm("a")).unwrap();
    assert_eq!(
        addresses(&leases),
        [
            "0000:02:00.0",
            "0000:01:00.0",
            "0000:03:00.0",
            "0000:04:00.0"
        ]
    );
    let host = self::host(&devices, NVME);
    let error = refusal(&host, &[exact("01:00.0"), exact("0000:01:00.0")]);
    assert!(error.contains("0000:01:00.0 is asked for twice"), "{error}");
}

#[test]
fn nothing_is_taken_when_one_request_fails() {
    let host = host(&[Fake::nvme("01:00.0", 1), Fake::nvme("02:00.0", 2)], NVME);
    for requests in [
        [of("nvme", 1), of("gpu", 1)],
        [exact("01:00.0"), of("nvme", 2)],
        [of("nvme", 1), exact("03:00.0")],
    ] {
        refusal(&host, &requests);
        assert!(host.held().is_empty());
    }
}

#[test]
fn a_vm_without_devices_touches_nothing() {
    let host = host(&[], "not JSON");
    assert!(allocate(&host.paths, &[], &vm("a")).unwrap().is_empty());
    assert!(!host.paths.run.exists());
}

#[test]
fn an_iommu_group_is_given_to_one_vm_only() {
    let devices = [
        Fake::nvme("00:01.0", 7)
            .class(0x06_04_00)
            .driver("pcieport"),
        Fake::nvme("01:00.0", 7),
        Fake::nvme("01:00.1", 7).class(0x04_03_00),
        Fake::nvme("01:00.2", 7).class(0x0c_03_30).unbound(),
    ];
    let host = host(
        &devices,
        r#"{"groups": [{"name": "all", "rules": [{"vendor": "1b36"}]}]}"#,
    );
    let mut leases =
        allocate(&host.paths, &[exact("01:00.0"), exact("01:00.1")], &vm("a")).unwrap();
    let group = ["0000:01:00.0", "0000:01:00.1", "0000:01:00.2"];
    assert_eq!(
        leases[0]
            .locked()
            .map(|bdf| bdf.to_string())
            .collect::<Vec<_>>(),
        group
    );
    assert_eq!(host.held(), group);
    leases.pop();
    assert_eq!(
        host.held(),
        group,
        "one device less, but the VM still is in the group"
    );
    let error = refusal(&host, &[exact("01:00.1")]);
    assert_eq!(error, "0000:01:00.1 is held by VM \"a\" (pid 123)");
    leases.pop();
    assert!(host.held().is_empty());
}

#[test]
fn a_device_added_to_a_leased_group_is_not_free() {
    let host = host(&[Fake::nvme("01:00.0", 7)], NVME);
    let _leases = allocate(&host.paths, &[of("nvme", 1)], &vm("a")).unwrap();
    host.add(&Fake::nvme("01:00.1", 7));
    let error = refusal(&host, &[exact("01:00.1")]);
    assert!(
        error.contains("shares IOMMU group 7 with 0000:01:00.0, which is held by VM \"a\""),
        "{error}"
    );
}

#[test]
fn what_is_missing_is_said_device_by_device() {
    let devices = [
        Fake::nvme("01:00.0", 1),
        Fake::nvme("02:00.0", 2).driver("nvme"),
        Fake::nvme("03:00.0", 3).unbound(),
        Fake::nvme("04:00.0", 4).no_group(),
        Fake::nvme("05:00.0", 5),
        Fake::nvme("05:00.1", 5).class(0x02_00_00).driver("igb"),
        Fake::nvme("06:00.0", 6),
        Fake::nvme("07:00.0", 7),
    ];
    let host = host(&devices, NVME);
    fs::remove_file(host.paths.vfio_group(6)).unwrap();
    let _held = allocate(&host.paths, &[exact("01:00.0")], &vm("a")).unwrap();
    let error = refusal(&host, &[exact("07:00.0"), of("nvme", 2)]);
    let lines: Vec<&str> = error.lines().map(str::trim).collect();
    for (line, said) in lines.iter().zip([
            "No valid host was found: group \"nvme\" has no free device (2 asked for); of 7 devices dropped: 1 held by others, 1 bound to a host driver, 1 bound to no driver, 1 without IOMMU group, 1 sharing an IOMMU group with a device in use, 1 whose VFIO node cannot be opened, 1 asked for twice",
            "0000:01:00.0 is held by VM \"a\" (pid 123)",
            "0000:02:00.0 is bound to nvme: `gantry device detach 0000:02:00.0` frees it for VMs",
            "0000:03:00.0 is bound to no driver: `gantry device detach 0000:03:00.0` binds it to vfio-pci",
            "0000:04:00.0 is in no IOMMU group: switch the IOMMU on",
            "0000:05:00.0 shares IOMMU group 5 with 0000:05:00.1 (igb), which the host uses",
            "0000:06:00.0 is bound to vfio-pci, but /dev/vfio/6 is not there",
            "0000:07:00.0 is asked for twice in the request",
        ]) {
            assert!(line.starts_with(said), "{line}\n{error}");
        }
    assert_eq!(lines.len(), 8);
}

#[test]
fn a_long_list_of_reasons_fits_the_screen() {
    let devices: Vec<Fake> = (1..40)
        .map(|bus| Fake::nvme(&format!("{bus:02x}:00.0"), bus).driver("nvme"))
        .collect();
    let error = refusal(&host(&devices, NVME), &[of("nvme", 1)]);
    assert_eq!(error.lines().count(), SHOWN + 2, "{error}");
    assert!(
        error.ends_with("and 27 more (`gantry device list`)"),
        "{error}"
    );
}

#[test]
fn unknown_and_empty_groups_are_explained() {
    let groups = r#"{"groups": [{"name": "nvme", "rules": [{"class": "0108"}]}, {"name": "gpu"}]}"#;
    let full = host(&[], groups);
    let error = refusal(&full, &[of("nvm", 1)]);
    assert!(
        error.contains("no group \"nvm\": did you mean \"nvme\"? There are: nvme, gpu"),
        "{error}"
    );
    let error = refusal(&full, &[of("frobnicators", 1)]);
    assert!(error.contains("there are: nvme, gpu"), "{error}");
    let error = refusal(&full, &[of("gpu", 1)]);
    assert!(
        error.ends_with("group \"gpu\" has no free device (1 asked for); this host has 0 devices"),
        "{error}"
    );
    let error = refusal(&FakeHost::new(&[]), &[of("nvme", 1)]);
    assert!(error.contains("no groups are defined"), "{error}");
}

#[test]
fn the_group_defined_first_owns_what_both_match() {
    let groups = r#"{"groups": [{"name": "one", "rules": [{"slot": "01:00.0"}]}, {"name": "all", "rules": [{"class": "01"}]}]}"#;
    let host = host(&[Fake::nvme("01:00.0", 1)], groups);
    let error = refusal(&host, &[of("all", 1)]);
    assert!(
        error.contains("0000:01:00.0 belongs to group \"one\", which is defined earlier"),
        "{error}"
    );
    assert_eq!(
        allocate(&host.paths, &[of("one", 1)], &vm("a"))
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn exact_devices_are_refused_with_their_reason() {
    let devices = [
        Fake::nvme("00:01.0", 9)
            .class(0x06_04_00)
            .with("reset_method", "")
            .driver("pcieport"),
        Fake::nvme("01:00.0", 1).class(0x02_00_00),
        Fake::nvme("02:00.0", 2).driver("nvme"),
    ];
    let host = host(&devices, NVME);
    for (address, said) in [
        (
            "01:00.0",
            "in no group: add a rule such as {\"slot\": \"0000:01:00.0\"} to a group, or give --allow-ungrouped",
        ),
        (
            "02:00.0",
            "bound to nvme: `gantry device detach 0000:02:00.0`",
        ),
        ("03:00.0", "no PCI device 0000:03:00.0"),
        ("00:01.0", "is a bridge"),
    ] {
        let error = refusal(&host, &[exact(address)]);
        assert!(error.contains(said), "{error}");
    }
    let request = ungrouped(bdf("01:00.0"));
    assert_eq!(
        allocate(&host.paths, &[request], &vm("a")).unwrap().len(),
        1
    );
}

#[test]
fn a_rule_by_serial_number_finds_a_detached_device() {
    let groups = r#"{"groups": [{"name": "mine", "rules": [{"serial": "GN-2"}]}]}"#;
    let host = host(
        &[
            Fake::nvme("01:00.0", 1),
            Fake::nvme("02:00.0", 2).with("nvme/nvme1/serial", "GN-2"),
        ],
        groups,
    );
    let leases = allocate(&host.paths, &[of("mine", 1)], &vm("a")).unwrap();
    assert_eq!(addresses(&leases), ["0000:02:00.0"]);
}

#[test]
fn a_run_directory_that_cannot_be_written_is_named() {
    let host = host(&[Fake::nvme("01:00.0", 1)], NVME);
    host.file("run", "a file");
    assert!(refusal(&host, &[of("nvme", 1)]).contains("run/allocate.lock"));
}

#[test]
fn fifty_vms_over_three_devices_give_three_winners() {
    let devices: Vec<Fake> = (1..4)
        .map(|bus| Fake::nvme(&format!("{bus:02x}:00.0"), bus))
        .collect();
    let host = host(&devices, NVME);
    let start = Barrier::new(50);
    let results: Vec<_> = std::thread::scope(|scope| {
        let contend = |number: usize| {
            let (host, start) = (&host, &start);
            scope.spawn(move || {
                start.wait();
                allocate(&host.paths, &[of("nvme", 1)], &vm(&format!("vm{number}")))
            })
        };
        let threads: Vec<_> = (0..50).map(contend).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    let mut taken: Vec<String> = won
        .iter()
        .flat_map(|leases| addresses(leases.as_ref().unwrap()))
        .collect();
    taken.sort();
    assert_eq!(taken, ["0000:01:00.0", "0000:02:00.0", "0000:03:00.0"]);
    assert_eq!(lost.len(), 47);
    for error in lost
        .into_iter()
        .map(|result| result.unwrap_err().to_string())
    {
        assert!(
            error.starts_with("No valid host was found: group \"nvme\" has no free device (1 asked for); of 3 devices dropped: 3 held by others\n"),
            "{error}"
        );
        assert_eq!(error.matches("is held by VM \"vm").count(), 3, "{error}");
    }
    drop(won);
    assert_eq!(
        allocate(&host.paths, &[of("nvme", 3)], &vm("last"))
            .unwrap()
            .len(),
        3
    );
}

#[test]
fn contenders_for_two_devices_cannot_all_give_up() {
    let host = host(&[Fake::nvme("01:00.0", 1), Fake::nvme("02:00.0", 2)], NVME);
    for round in 0..10 {
        let contend = |name: &str| {
            allocate(&host.paths, &[of("nvme", 2)], &vm(name)).is_ok_and(|leases| {
                std::thread::sleep(std::time::Duration::from_millis(20));
                leases.len() == 2
            })
        };
        let won = std::thread::scope(|scope| {
            let other = scope.spawn(|| contend("b"));
            contend("a") as u32 + u32::from(other.join().unwrap())
        });
        assert!(won >= 1, "round {round}");
    }
}

/// Devices on buses 1.. as `(IOMMU group, kind)`: of kind 0 and 1 free, the others not.
fn arbitrary_host() -> impl Strategy<Value = Vec<Fake>> {
    let device = (0u32..6, 0u8..6);
    prop::collection::vec(device, 0..10).prop_map(|devices| {
        let fake = |(index, (group, kind)): (usize, (u32, u8))| {
            let device = Fake::nvme(&format!("{:02x}:00.0", index + 1), group);
            match kind {
                0 | 1 => device,
                2 => device.class(0x02_00_00),
                3 => device.driver("nvme"),
                4 => device.unbound(),
                _ => device.class(0x06_04_00).driver("pcieport"),
            }
        };
        devices.into_iter().enumerate().map(fake).collect()
    })
}

fn arbitrary_requests() -> impl Strategy<Value = Vec<DeviceRequest>> {
    let group = (prop::sample::select(vec!["nvme", "net"]), 0u32..4)
        .prop_map(|(name, count)| of(name, count));
    let device = (1u8..11, any::<bool>()).prop_map(|(bus, allow_ungrouped)| DeviceRequest {
        allow_ungrouped,
        ..DeviceRequest::device(HostBdf::new(0, bus, 0, 0).unwrap())
    });
    prop::collection::vec(prop_oneof![group, device], 1..4)
}

const BOTH: &str = r#"{"groups": [{"name": "nvme", "rules": [{"class": "0108"}]},
                                      {"name": "net", "rules": [{"class": "02"}]}]}"#;

/// What VFIO and the groups allow, said in another way than the code says it.
fn is_free(devices: &[HostDevice], device: &HostDevice) -> bool {
    let alike = |other: &&HostDevice| other.iommu_group == device.iommu_group;
    let harmless = |other: &HostDevice| {
        other.lease == LeaseStatus::Free && !matches!(other.driver.as_deref(), Some("nvme" | "igb"))
    };
    device.driver.as_deref() == Some("vfio-pci") && devices.iter().filter(alike).all(harmless)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_choice_is_what_was_asked_for_or_a_true_excuse(fakes in arbitrary_host(), requests in arbitrary_requests()) {
        let host = host(&fakes, BOTH);
        let devices = host.scan();
        let groups = Groups::load(&host.paths).unwrap();
        let look = HostView::over(devices.clone(), groups.clone(), Sockets::default());
        match choose(&look, &requests, &Placement::default()) {
            Ok(picks) => {
                let chosen: Vec<&HostDevice> = picks.iter().filter_map(Pick::device).collect();
                let distinct: BTreeSet<HostBdf> = chosen.iter().map(|device| device.bdf).collect();
                prop_assert_eq!(distinct.len(), chosen.len());
                prop_assert!(chosen.iter().all(|device| is_free(&devices, device)));
                let mut rest = chosen.as_slice();
                for request in &requests {
                    let (own, others) = rest.split_at(request.count as usize);
                    rest = others;
                    for device in own {
                        match &request.from {
                            DeviceSource::Device(name) => prop_assert_eq!(*name, device.bdf),
                            from => prop_assert_eq!(from, &DeviceSource::Group(groups.group_of(device).unwrap().name.clone())),
                        }
                    }
                }
                prop_assert!(rest.is_empty());
            }
            Err(AllocateError::NoFit(fit)) => {
                let Some(DeviceSource::Group(group)) = fit.from.clone() else { panic!() };
                let (wanted, free, blocked) = (fit.wanted as usize, fit.free, &fit.blocked);
                let passed: usize = fit.dropped.values().sum();
                prop_assert_eq!(passed + free, fit.considered, "every device is counted once");

                let asked: BTreeSet<HostBdf> = requests.iter().filter_map(|request| request.from.device()?.pci()).collect();
                let of_group = devices.iter().filter(|device| groups.group_of(device).is_some_and(|own| own.name == group));
                let really = of_group.clone().filter(|device| is_free(&devices, device) && !asked.contains(&device.bdf)).count();
                let earlier: u32 = requests.iter().map(|request| match request.from.pool() {
                    Some(name) if name == group => request.count,
                    _ => 0,
                }).sum();
                prop_assert!(really < earlier as usize && free < wanted);
                prop_assert_eq!(blocked.len() + free, of_group.count());
            }
            Err(AllocateError::Unavailable(blocked)) => {
                let device = devices.iter().find(|device| device.bdf == blocked.bdf).unwrap();
                prop_assert!(!is_free(&devices, device));
            }
            Err(AllocateError::Ungrouped { bdf }) => {
                let device = devices.iter().find(|device| device.bdf == bdf).unwrap();
                prop_assert!(groups.group_of(device).is_none());
            }
            Err(AllocateError::NoSuchDevice { bdf }) => prop_assert!(devices.iter().all(|device| device.bdf != bdf)),
            Err(AllocateError::AskedTwice { bdf }) => {
                let same = |request: &&DeviceRequest| request.from == DeviceSource::Device(bdf.into());
                prop_assert!(requests.iter().filter(same).count() > 1);
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn no_sequence_of_allocations_and_releases_gives_a_group_to_two(
        fakes in arbitrary_host(),
        steps in prop::collection::vec((arbitrary_requests(), any::<bool>(), any::<prop::sample::Index>()), 1..8),
    ) {
        let host = host(&fakes, BOTH);
        let mut vms: Vec<Vec<Lease>> = Vec::new();
        for (requests, release, which) in steps {
            if release && !vms.is_empty() {
                let mut gone = vms.swap_remove(which.index(vms.len()));
                gone.reverse();
            }
            vms.extend(allocate(&host.paths, &requests, &vm("a")).ok().filter(|leases| !leases.is_empty()));
            let groups_of = |leases: &Vec<Lease>| {
                leases.iter().filter_map(|lease| lease.device().unwrap().iommu_group).collect::<BTreeSet<u32>>()
            };
            let groups: Vec<u32> = vms.iter().flat_map(groups_of).collect();
            let distinct: BTreeSet<u32> = groups.iter().copied().collect();
            prop_assert_eq!(groups.len(), distinct.len(), "two VMs share an IOMMU group");
            let devices = host.scan();
            for device in devices.iter().filter(|device| !device.is_bridge()) {
                let expected = device.iommu_group.is_some_and(|group| distinct.contains(&group));
                prop_assert_eq!(device.lease.is_held(), expected, "{}", device.bdf);
            }
        }
        drop(vms);
        prop_assert!(host.held().is_empty());
    }
}

#[test]
fn what_a_lease_kept_is_free_for_its_vm_though_it_ends_after_the_look() {
    let host = host(&[Fake::nvme("01:00.0", 7), Fake::nvme("01:00.1", 7)], NVME);
    let mut leases = allocate(&host.paths, &[exact("01:00.0")], &vm("a")).unwrap();
    let own = [leases[0].as_own()];
    let look = HostView::at(&host.paths).unwrap();
    leases.clear();
    let look = look.beside(&own);
    assert!(look.devices.iter().all(|device| !device.lease.is_held()));
    let picks = choose(&look, &[exact("01:00.1")], &Placement::default()).unwrap();
    let chosen: Vec<&HostDevice> = picks.iter().filter_map(Pick::device).collect();
    let record = LeaseRecord::vm(&vm("a"));
    let leases = lock(&host.paths, &look.devices, &chosen, &own, &record).unwrap();
    assert_eq!(addresses(&leases), ["0000:01:00.1"]);
}
