//! Mediated devices that are granted to tenants.

use std::fs;
use std::time::Duration;

use super::*;
use crate::allocation::Lease;
use crate::base::uuid::Uuid;
use crate::fixture::{Fault, ungrouped};
use crate::holding::device_lock::DeviceLock;
use crate::holding::host_lock::{ALLOCATION_DEADLINE, AllocationLock};
use crate::inventory::mdev::{MdevDevice, Mdevs};
use crate::making::vgpu::{make_ahead, unmake_ahead};
use crate::pools::group::ResourceGroup;
use crate::pools::tenant::definitions;
use crate::tenants::devices::Devices;

const ONE: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
const TWO: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";

fn uuid(text: &str) -> Uuid {
    text.parse().unwrap()
}

fn grant_mdevs(
    host: &FakeHost,
    name: &str,
    devices: GrantedDevices<'_>,
    group: Option<&str>,
) -> Result<Vec<DeviceName>, TenantError> {
    let wanted = Grant {
        devices,
        group,
        overrides: &[],
    };
    grant(&host.paths, FakeKernel::new(host).access(), name, &wanted)
}

fn group(host: &FakeHost) -> ResourceGroup {
    let groups = Groups::load(&host.paths).unwrap();
    groups.get("vgpus").unwrap().clone()
}

/// Two devices made ahead, and tenants `a` and `b`.
fn host() -> FakeHost {
    let host = FakeHost::new(&[Fake::nvme("01:00.0", 1)]);
    host.mdev_parent("mtty", "mtty-2", "Dual port serial", 3);
    let groups = format!(
        r#"{{"groups": [{{"name": "vgpus", "type": "vgpu",
            "vgpu": {{"type": "mtty-2", "uuids": ["{ONE}", "{TWO}"]}}}}]}}"#
    );
    host.groups(&groups);
    let kernel = FakeKernel::new(&host);
    make_ahead(&host.paths, &kernel, &group(&host), false).unwrap();
    for name in ["a", "b"] {
        create_tenant(&host.paths, name, &user()).unwrap();
    }
    host
}

fn taken(paths: &HostPaths, request: DeviceRequest) -> Result<Vec<Lease>, String> {
    let holder = holder_of("x", std::process::id());
    allocate(paths, &[request], &holder).map_err(|error| error.to_string())
}

fn exact(text: &str) -> DeviceRequest {
    ungrouped(text.parse::<Uuid>().unwrap())
}

#[test]
fn a_tenant_has_its_vgpu_and_nobody_else_has() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    grant_mdevs(&host, "a", GrantedDevices::Named(&[uuid(ONE).into()]), None).unwrap();
    grant_mdevs(&host, "a", GrantedDevices::Named(&[uuid(ONE).into()]), None).unwrap();
    let (a, b) = (scope(&host, "a"), scope(&host, "b"));
    let seen = |paths: &HostPaths| Mdevs::read(paths).unwrap().devices.len();
    assert_eq!((seen(&host.paths), seen(&a), seen(&b)), (2, 1, 0));
    // The host's group has one left, and by its name the other one is refused.
    let left = taken(&host.paths, DeviceRequest::group("vgpus", 1)).unwrap();
    assert_eq!(left[0].name().to_string(), TWO);
    assert!(taken(&host.paths, DeviceRequest::group("vgpus", 1)).is_err());
    let said = taken(&host.paths, exact(ONE)).unwrap_err();
    assert!(said.contains("belongs to tenant \"a\""), "{said}");
    for paths in [&b, &a] {
        assert!(
            taken(paths, exact(TWO))
                .unwrap_err()
                .contains("no mediated device")
        );
    }
    // Nor does its deactivation take it away.
    drop(left);
    let said = unmake_ahead(&host.paths, &kernel, &group(&host), false).unwrap_err();
    assert!(
        said.to_string().contains("belongs to tenant \"a\""),
        "{said}"
    );
    let lease = taken(&a, DeviceRequest::group("a", 1)).unwrap();
    assert_eq!(lease[0].name().to_string(), ONE);
    assert!(
        taken(&a, DeviceRequest::group("a", 1)).is_err(),
        "it can make no more"
    );
    let said =
        grant_mdevs(&host, "b", GrantedDevices::Named(&[uuid(ONE).into()]), None).unwrap_err();
    assert!(
        said.to_string().contains("belongs to tenant \"a\""),
        "{said}"
    );
    drop(lease);
    assert_eq!(seen(&a), 1, "it stays");
}

#[test]
fn what_comes_out_of_a_group_is_what_can_be_granted() {
    let host = host();
    host.file(&format!("run/restore/vgpu/{ONE}"), r#"{"vm": "x"}"#);
    let free = |count| GrantedDevices::Free {
        from: "vgpus",
        count,
    };
    let said = grant_mdevs(&host, "a", free(2), None).unwrap_err();
    assert!(said.to_string().contains("only 1 free device"), "{said}");
    grant_mdevs(&host, "a", free(1), None).unwrap();
    let tenants = Tenants::load(&host.paths).unwrap();
    assert_eq!(tenants.find("a").unwrap().mdevs(), [uuid(TWO)].into());
}

#[test]
fn what_is_granted_or_removed_meanwhile_stays_whole() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    let all = Mdevs::read(&host.paths).unwrap().devices;
    let scope = definitions(&host.paths, "a");
    let granted = |device: &MdevDevice| {
        let devices = Devices::Mdevs(vec![device.clone()]);
        devices.add_to(&scope, "a").unwrap_err().to_string()
    };
    // The grant of a device that a deactivation has locked since it was looked at.
    let record = LeaseRecord::task("gantry group deactivate");
    let lock = DeviceLock::take(&host.paths, all[0].uuid, &record).unwrap();
    let said = granted(&all[0]);
    assert!(
        said.contains("is held by `gantry group deactivate`"),
        "{said}"
    );
    drop(lock);
    // The other way round: it is granted while the deactivation waits.
    let choosing = AllocationLock::acquire(&host.paths, &record, ALLOCATION_DEADLINE).unwrap();
    let said = std::thread::scope(|threads| {
        threads.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            let granted = format!(
                r#"{{"groups": [{{"name": "a", "type": "vgpu",
                    "vgpu": {{"type": "mtty-2", "uuids": ["{ONE}"]}}}}]}}"#
            );
            host.file("etc/tenants/a/groups.json", &granted);
            drop(choosing);
        });
        unmake_ahead(&host.paths, &kernel, &group(&host), false).unwrap_err()
    });
    assert!(
        said.to_string().contains("belongs to tenant \"a\""),
        "{said}"
    );
    assert_eq!(Mdevs::read(&host.paths).unwrap().devices.len(), 2);
    // What is gone is not granted.
    fs::remove_file(host.paths.config.join("tenants/a/groups.json")).unwrap();
    unmake_ahead(&host.paths, &kernel, &group(&host), false).unwrap();
    let said = granted(&all[0]);
    assert!(said.contains("no mediated device"), "{said}");
}

#[test]
fn what_is_taken_back_is_the_hosts_again() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    grant_mdevs(
        &host,
        "a",
        GrantedDevices::Named(&[uuid(ONE).into(), uuid(TWO).into()]),
        Some("gpus"),
    )
    .unwrap();
    let said = delete_tenant(&host.paths, "a").unwrap_err().to_string();
    assert!(said.contains(ONE), "{said}");
    revoke(&host.paths, kernel.access(), "a", &[uuid(ONE)]).unwrap();
    let lease = taken(&host.paths, DeviceRequest::group("vgpus", 1)).unwrap();
    assert_eq!(lease[0].name().to_string(), ONE);
    drop(lease);
    let said = revoke(&host.paths, kernel.access(), "a", &[uuid(ONE)]).unwrap_err();
    assert!(said.to_string().contains("does not belong"), "{said}");
    let tenant = taken(&scope(&host, "a"), DeviceRequest::group("gpus", 1)).unwrap();
    let said = revoke(&host.paths, kernel.access(), "a", &[uuid(TWO)]).unwrap_err();
    assert!(said.to_string().contains("held by VM \"x\""), "{said}");
    drop(tenant);
    revoke(&host.paths, kernel.access(), "a", &[uuid(TWO)]).unwrap();
    delete_tenant(&host.paths, "a").unwrap();
    unmake_ahead(&host.paths, &kernel, &group(&host), false).unwrap();
}

#[test]
fn a_mixed_revoke_whose_reattach_fails_names_all_that_was_revoked() {
    let host = host();
    host.add(&Fake::nvme("02:00.0", 2).driver("nvme"));
    let kernel = FakeKernel::new(&host);
    let wanted = Grant {
        devices: GrantedDevices::Named(&[bdf("02:00.0").into()]),
        group: Some("disks"),
        overrides: &[],
    };
    grant(&host.paths, kernel.access(), "a", &wanted).unwrap();
    grant_mdevs(
        &host,
        "a",
        GrantedDevices::Named(&[uuid(ONE).into()]),
        Some("gpus"),
    )
    .unwrap();
    let faulty = FakeKernel::new(&host).with_fault(0, Fault::Refuses);
    let both = [DeviceName::from(bdf("02:00.0")), uuid(ONE).into()];
    let said = revoke(&host.paths, faulty.access(), "a", &both).unwrap_err();
    let said = said.to_string();
    assert!(
        said.starts_with(&format!("0000:02:00.0 {ONE} no longer of tenant \"a\""))
            && said.contains("but 0000:02:00.0 not given back")
            && said.contains("`gantry device reattach 0000:02:00.0`"),
        "{said}"
    );
    assert!(scope(&host, "a").only.unwrap().is_empty());
}

#[test]
fn what_cannot_be_granted_is_refused() {
    let host = host();
    let own = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1003";
    let grant = |uuid: Uuid, group| {
        let said = grant_mdevs(&host, "a", GrantedDevices::Named(&[uuid.into()]), group);
        said.unwrap_err().to_string()
    };
    assert!(grant(uuid(own), None).contains("no mediated device"));
    let group = r#"{"groups": [{"name": "a", "rules": [{"slot": "0000:01:00.0"}]}]}"#;
    host.file("etc/tenants/a/groups.json", group);
    let said = grant(uuid(ONE), None);
    assert!(said.contains("--group"), "{said}");
    host.file(
        "etc/tenants/b/groups.json",
        &format!(
            r#"{{"groups": [{{"name": "b", "type": "vgpu",
                "vgpu": {{"type": "mtty-2", "uuids": ["{ONE}"]}}}}]}}"#
        ),
    );
    let group = format!(
        r#"{{"groups": [{{"name": "c", "type": "vgpu",
            "vgpu": {{"type": "mtty-2", "uuids": ["{ONE}"]}}}}]}}"#
    );
    host.file("etc/tenants/a/groups.json", &group);
    let said = Tenants::load(&host.paths).unwrap_err().to_string();
    assert!(
        said.contains("`vgpu.uuids`: ") && said.contains("tenant \"a\" too"),
        "{said}"
    );
}
