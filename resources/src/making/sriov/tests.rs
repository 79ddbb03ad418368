//! Tests: functions made, set, given to VMs and destroyed, with faults and kills at every write.

mod faults;
mod guests;
mod probing;
mod tenants;
mod token;

use super::*;
use crate::allocation::{AllocateError, Lease};
use crate::fixture::{Fake, FakeHost, FakeKernel, Fault, bdf, hung, lease};
use crate::inventory::device::HostDevice;
use crate::making::demand::reap_with;
use crate::moving::writer::WriteError;
use crate::pools::group::Groups;
use crate::pools::request::DeviceRequest;
use crate::pools::vf_settings::{VfSetting, VfState};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const PF: &str = "0000:03:00.0";
const FIRST: &str = "0000:03:10.0";

/// A disk, and a network card that can have seven functions; the group `vfs` asks for three.
fn host(bind: &str, more: &str) -> FakeHost {
    let host = FakeHost::new(&[
        Fake::nvme("01:00.0", 1).driver("nvme"),
        Fake {
            id: (0x8086, 0x10c9),
            ..Fake::nvme(PF, 2)
        }
        .class(0x02_00_00)
        .driver("igb")
        .with("sriov_totalvfs", "7")
        .with("sriov_numvfs", "0")
        .with("sriov_drivers_autoprobe", "1")
        .with("sriov_offset", "128")
        .with("sriov_stride", "2")
        .with("net/eth0/ifindex", "3"),
    ]);
    host.groups(&format!(
        r#"{{"groups": [{{"name": "vfs", "type": "sriov-nic", "bind": "{bind}",
                "sriov": {{"pf": "{PF}", "id": "8086:10c9", "count": 3{more}}}}}]}}"#
    ));
    host
}

const SETTINGS: &str =
    r#", "mac": "52:54:00:00:01:00", "vlan": 100, "spoof_check": false, "max_rate": 50"#;

fn group(host: &FakeHost) -> ResourceGroup {
    let groups = Groups::load(&host.paths).unwrap();
    groups.get("vfs").unwrap().clone()
}

fn up(host: &FakeHost, kernel: &FakeKernel<'_>) -> Result<SriovReport, SriovError> {
    activate(&host.paths, kernel.access(), &group(host), false)
}

fn down(host: &FakeHost, kernel: &FakeKernel<'_>) -> Result<SriovReport, SriovError> {
    deactivate(&host.paths, kernel.access(), &group(host), false)
}

/// Everything that activation changes.
#[derive(Debug, PartialEq)]
struct Seen {
    functions: Vec<HostBdf>,
    drivers: Vec<Option<String>>,
    states: Vec<VfState>,
    autoprobe: Option<bool>,
    records: Vec<String>,
}

fn seen(host: &FakeHost, kernel: &FakeKernel<'_>) -> Seen {
    let pf = Pf::read(&host.paths, bdf(PF)).unwrap();
    let states = kernel.read(pf.interface.as_ref().unwrap()).unwrap();
    let records = ["restore/autoprobe", "restore/vf-settings", "restore/driver"]
        .into_iter()
        .flat_map(|dir| crate::base::sysfs::entries(&host.paths.run.join(dir)).unwrap());
    Seen {
        drivers: pf
            .vfs
            .iter()
            .map(|vf| host.read(&vf.to_string()).driver)
            .collect(),
        functions: pf.vfs,
        states: states.into_values().collect(),
        autoprobe: pf.autoprobe,
        records: records.collect(),
    }
}

fn take(host: &FakeHost, kernel: &FakeKernel<'_>, count: u32) -> Result<Vec<Lease>, AllocateError> {
    lease(host, kernel.access(), &[DeviceRequest::group("vfs", count)])
}

#[test]
fn functions_are_made_set_and_bound_and_go_again() {
    let host = host("manual", SETTINGS);
    let kernel = FakeKernel::new(&host);
    let before = seen(&host, &kernel);
    let report = up(&host, &kernel).unwrap();
    assert_eq!((report.before, report.after), (0, 3));
    let made = seen(&host, &kernel);
    assert_eq!(made.functions, [bdf(FIRST), bdf("03:10.2"), bdf("03:10.4")]);
    assert_eq!(report.functions, made.functions);
    assert!(
        made.drivers
            .iter()
            .all(|driver| driver.as_deref() == Some("vfio-pci"))
    );
    assert_eq!(made.autoprobe, Some(true));
    let last = &made.states[2];
    assert_eq!(last.mac.unwrap().to_string(), "52:54:00:00:01:02");
    assert_eq!((last.vlan, last.qos), (Some(100), Some(0)));
    assert_eq!((last.spoof_check, last.trust), (Some(false), Some(false)));
    assert_eq!((last.min_rate, last.max_rate), (Some(0), Some(50)));
    // Settings come before vfio-pci.
    let written = kernel.written.borrow().clone();
    let position = |word: &str| written.iter().position(|(_, value)| value.contains(word));
    assert!(position("vf 2 ") < position("vfio-pci"));
    assert_eq!(report.writes.len(), written.len());
    let lease = take(&host, &kernel, 3).unwrap();
    assert_eq!(lease.len(), 3);
    drop(lease);
    down(&host, &kernel).unwrap();
    assert_eq!(seen(&host, &kernel), before);
    assert!(down(&host, &kernel).unwrap().writes.is_empty());
}

#[test]
fn a_dry_run_writes_nothing_and_tells_everything() {
    let host = host("manual", SETTINGS);
    let kernel = FakeKernel::new(&host);
    let before = seen(&host, &kernel);
    let dry = activate(&host.paths, kernel.access(), &group(&host), true).unwrap();
    assert!(kernel.written.borrow().is_empty());
    assert_eq!(seen(&host, &kernel), before);
    let real = up(&host, &kernel).unwrap();
    assert_eq!(dry.writes, real.writes);
    let dry = deactivate(&host.paths, kernel.access(), &group(&host), true).unwrap();
    assert_eq!(seen(&host, &kernel).functions.len(), 3);
    assert_eq!(dry.writes, down(&host, &kernel).unwrap().writes);
}

#[test]
fn only_what_differs_is_written() {
    let host = host("manual", SETTINGS);
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    let writes = |dry_run| {
        let report = activate(&host.paths, kernel.access(), &group(&host), dry_run).unwrap();
        let writes = report.writes.iter().map(HostWrite::to_string);
        writes.collect::<Vec<_>>()
    };
    assert!(writes(true).is_empty() && writes(false).is_empty());
    kernel
        .set(&LinkWrite {
            interface: Pf::read(&host.paths, bdf(PF)).unwrap().interface.unwrap(),
            vf: 1,
            setting: VfSetting::Vlan { vlan: 9, qos: 0 },
        })
        .unwrap();
    let back = ["ip link set eth0 vf 1 vlan 100 qos 0"];
    assert_eq!(writes(true), back);
    assert_eq!(writes(false), back);
    assert!(writes(true).is_empty());
}

#[test]
fn functions_in_use_are_not_resized_away() {
    let host = host("manual", "");
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    let lease = take(&host, &kernel, 1).unwrap();
    let smaller = fs::read_to_string(host.paths.config.join("groups.json")).unwrap();
    host.groups(&smaller.replace("\"count\": 3", "\"count\": 2"));
    for result in [up(&host, &kernel), down(&host, &kernel)] {
        let error = result.unwrap_err().to_string();
        let held = format!("03:10.0: held by VM \"a\" (pid {})", std::process::id());
        assert!(error.contains(&held), "{error}");
    }
    assert_eq!(seen(&host, &kernel).functions.len(), 3);
    drop(lease);
    // The host uses one.
    host.bind(bdf("03:10.2"), Some("igbvf"));
    let net = host.dir(bdf("03:10.2")).join("net/eth5");
    fs::create_dir_all(&net).unwrap();
    fs::write(net.join("flags"), "0x1003\n").unwrap();
    let error = up(&host, &kernel).unwrap_err().to_string();
    assert!(
        error.contains("03:10.2: the host's eth5, which is up"),
        "{error}"
    );
    fs::write(net.join("flags"), "0x1002\n").unwrap();
    let report = up(&host, &kernel).unwrap();
    assert_eq!((report.before, report.after), (3, 2));
    assert_eq!(seen(&host, &kernel).functions.len(), 2);
}

#[test]
fn what_cannot_be_is_refused_with_the_way_out() {
    let said = |change: &dyn Fn(&FakeHost)| {
        let host = host("manual", r#", "vlan": 7"#);
        change(&host);
        let kernel = FakeKernel::new(&host);
        let error = up(&host, &kernel).unwrap_err().to_string();
        assert!(kernel.written.borrow().is_empty(), "{error}");
        let dry = activate(&host.paths, kernel.access(), &group(&host), true);
        assert_eq!(dry.unwrap_err().to_string(), error, "a dry run");
        error
    };
    let attribute = |host: &FakeHost, name: &str, text: &str| {
        fs::write(host.dir(bdf(PF)).join(name), text).unwrap();
    };
    for (change, words) in [
        (
            &(|host: &FakeHost| {
                let file = host.paths.config.join("groups.json");
                let text = fs::read_to_string(file).unwrap();
                host.groups(&text.replace("10c9", "1521"));
            }) as &dyn Fn(&FakeHost),
            "is 8086:10c9 now, not 8086:1521",
        ),
        (
            &|host| attribute(host, "sriov_totalvfs", "2\n"),
            "2 virtual functions at most",
        ),
        (
            &|host| attribute(host, "sriov_totalvfs", "0\n"),
            "no SR-IOV",
        ),
        (&|host| host.bind(bdf(PF), None), "has no driver"),
        (
            &|host| host.bind(bdf(PF), Some("vfio-pci")),
            "bound to vfio-pci, which makes no virtual functions: `gantry device reattach 0000:03:00.0`",
        ),
        (
            &|host| host.bind(bdf(PF), Some("pci-stub")),
            "bound to pci-stub, which makes no virtual functions: `echo 0000:03:00.0 > ",
        ),
        (
            &|host| fs::remove_dir_all(host.dir(bdf(PF)).join("net")).unwrap(),
            "have no vlan: take it out",
        ),
        (&|host| host.remove(bdf(PF)), "no PCI device 0000:03:00.0"),
    ] {
        let error = said(change);
        assert!(error.contains(words), "{error}");
    }
    // Of other drivers only the kernel knows.
    let host = host("manual", "");
    let pf = Pf::read(&host.paths, bdf(PF)).unwrap();
    let enoent = WriteError::Refused {
        path: pf.attribute("sriov_numvfs"),
        value: "3".to_owned(),
        source: std::io::Error::from_raw_os_error(nix::libc::ENOENT),
    };
    let said = refused(&pf, enoent).to_string();
    assert!(
        said.contains("bound to igb, which makes no virtual"),
        "{said}"
    );
    let plain: ResourceGroup = serde_json::from_str(r#"{"name": "x"}"#).unwrap();
    let kernel = FakeKernel::new(&host);
    let error = activate(&host.paths, kernel.access(), &plain, false).unwrap_err();
    assert!(error.to_string().contains("--sriov"), "{error}");
}

#[test]
fn a_group_that_is_not_active_says_so() {
    let host = host("manual", "");
    let kernel = FakeKernel::new(&host);
    let error = take(&host, &kernel, 1).unwrap_err().to_string();
    assert!(
        error.contains("`gantry group activate vfs` makes them"),
        "{error}"
    );
    assert!(kernel.written.borrow().is_empty());
}

#[test]
fn somebody_at_work_on_the_card_is_named() {
    let host = host("manual", "");
    let kernel = FakeKernel::new(&host);
    let record = LeaseRecord::task("gantry group activate");
    let _lock = DeviceLock::take(&host.paths, bdf(PF), &record).unwrap();
    let error = up(&host, &kernel).unwrap_err().to_string();
    assert!(
        error.contains("is held by `gantry group activate`"),
        "{error}"
    );
    let dry = activate(&host.paths, kernel.access(), &group(&host), true);
    assert_eq!(dry.unwrap_err().to_string(), error, "a dry run");
    let device: HostDevice = host.read(PF);
    assert!(device.lease.is_held());
}
