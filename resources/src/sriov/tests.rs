//! Tests: functions made, set, given to VMs and destroyed, with faults and kills at every write.

use super::*;
use crate::AllocateError;
use crate::allocate::allocate_with;
use crate::demand::{Binder, reap_with};
use crate::fixture::{Fake, FakeHost, FakeKernel, Fault, bdf, hung};
use crate::group::Groups;
use crate::inventory::HostDevice;
use crate::lease::{Holder, Lease};
use crate::request::{Placement, Request};
use crate::writer::WriteError;
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
    host.file(
        "etc/groups.json",
        &format!(
            r#"{{"groups": [{{"name": "vfs", "type": "sriov-nic", "bind": "{bind}",
                "sriov": {{"pf": "{PF}", "id": "8086:10c9", "count": 3{more}}}}}]}}"#
        ),
    );
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
    let records = ["autoprobe", "vf", "former"]
        .into_iter()
        .flat_map(|dir| crate::sysfs::entries(&host.paths.run.join(dir)).unwrap());
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
    let binder = Binder {
        host: kernel.access(),
        helper: "/bin/true".as_ref(),
    };
    let holder = Holder {
        vm: "a".to_owned(),
        pid: 1,
    };
    let requests = [Request::group("vfs", count)];
    let near = Placement::default();
    allocate_with(&host.paths, &requests, &near, &holder, &[], &binder)
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
fn a_fault_at_any_write_leaves_the_host_as_it_was() {
    for fault in [Fault::Refuses, Fault::Ignores] {
        for at in 0.. {
            let host = host("manual", SETTINGS);
            let kernel = FakeKernel::new(&host).with_fault(at, fault);
            let before = seen(&host, &kernel);
            let result = up(&host, &kernel);
            if kernel.written.borrow().len() <= at {
                assert!(result.is_ok() && at == 21, "{at}: {result:?}");
                break;
            }
            // A setting that is taken and not done is the driver's word against ours.
            if result.is_ok() {
                assert_eq!(fault, Fault::Ignores);
                continue;
            }
            assert!(
                matches!(result, Err(SriovError::Failed { ref left, .. }) if left.is_empty()),
                "{fault:?} at {at}: {result:?}"
            );
            assert_eq!(seen(&host, &kernel), before, "{fault:?} at {at}");
            assert!(host.scan().iter().all(|device| !device.lease.is_held()));
        }
    }
}

/// Two functions that somebody has set and bound, and a group that wants three.
fn used_host() -> FakeHost {
    let host = host("manual", r#", "mac": "52:54:00:00:09:00", "vlan": 7"#);
    let text = fs::read_to_string(host.paths.config.join("groups.json")).unwrap();
    let smaller = text.replace("\"count\": 3", "\"count\": 2");
    host.file("etc/groups.json", &smaller);
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    // The second one is the host's, by hand, and idle.
    host.bind(bdf("03:10.2"), Some("igbvf"));
    let second = host.dir(bdf("03:10.2"));
    fs::write(second.join("driver_override"), "(null)\n").unwrap();
    Former::forget(&host.paths, bdf("03:10.2"));
    fs::create_dir_all(second.join("net/eth5")).unwrap();
    let wanted = text.replace("\"vlan\": 7", "\"vlan\": 100, \"trust\": true");
    host.file("etc/groups.json", &wanted.replace("09:00", "01:00"));
    host
}

#[test]
fn functions_that_were_there_come_back_with_settings_and_drivers() {
    for fault in [Fault::Refuses, Fault::Ignores] {
        for at in 0.. {
            let host = used_host();
            let mut kernel = FakeKernel::new(&host);
            // What the functions were given before, by another kernel of the fake.
            for vf in 0..2 {
                let interface = Pf::read(&host.paths, bdf(PF)).unwrap().interface.unwrap();
                let mac = serde_json::from_str(&format!("\"52:54:00:00:09:0{vf}\"")).unwrap();
                for setting in [VfSetting::Mac(mac), VfSetting::Vlan { vlan: 7, qos: 0 }] {
                    let interface = interface.clone();
                    let write = LinkWrite {
                        interface,
                        vf,
                        setting,
                    };
                    kernel.set(&write).unwrap();
                }
            }
            kernel.written.borrow_mut().clear();
            kernel.fault = Some((at, fault));
            let before = seen(&host, &kernel);
            assert_eq!(before.states[1].vlan, Some(7));
            let drivers = [Some("vfio-pci".to_owned()), Some("igbvf".to_owned())];
            assert_eq!(before.drivers, drivers);
            let result = up(&host, &kernel);
            if kernel.written.borrow().len() <= at {
                assert!(result.is_ok(), "{at}: {result:?}");
                break;
            }
            if result.is_ok() {
                assert_eq!(fault, Fault::Ignores);
                continue;
            }
            let words = format!("{fault:?} at {at}: {result:?}");
            assert!(words.contains("left: \"\""), "{words}");
            assert_eq!(seen(&host, &kernel), before, "{words}");
        }
    }
}

#[test]
fn nothing_is_written_to_a_card_while_a_function_of_it_hangs() {
    let host = host("manual", "");
    // The first function is bound, the second refuses, and the first hangs on its way back.
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    let at = kernel.written.borrow().len() - 4;
    down(&host, &kernel).unwrap();
    let kernel = FakeKernel::new(&host);
    let kernel = HangsThen(kernel.with_fault(at, Fault::Refuses), at + 1);
    let host_access = HostAccess {
        writer: &kernel,
        links: &kernel.0,
    };
    let error = activate(&host.paths, host_access, &group(&host), false).unwrap_err();
    assert!(error.to_string().contains("could not be undone"), "{error}");
    let written = kernel.0.written.borrow();
    let last = written
        .iter()
        .rposition(|(path, _)| path.ends_with("sriov_numvfs"));
    assert!(last.unwrap() < at, "{written:?}");
    // Nor is it by the next one, which names what hangs.
    let next = FakeKernel::new(&host);
    let error = down(&host, &next).unwrap_err().to_string();
    assert!(error.contains("in quarantine: it hung"), "{error}");
    assert!(next.written.borrow().is_empty());
}

/// A kernel that does not come back from a write, beside the fault that it has.
struct HangsThen<'a>(FakeKernel<'a>, usize);

impl SysfsWriter for HangsThen<'_> {
    fn write(&self, path: &Path, value: &str) -> Result<(), WriteError> {
        if self.0.written.borrow().len() != self.1 {
            return self.0.write(path, value);
        }
        let _ = self.0.write(path, value);
        Err(hung(path, value))
    }

    fn write_keeping(&self, path: &Path, value: &str, _: &fs::File) -> Result<(), WriteError> {
        self.write(path, value)
    }
}

/// The tenant `a`, of this user.
fn tenant(host: &FakeHost) {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid());
    let file = crate::TenantFile {
        user: user.unwrap().unwrap().name,
        description: String::new(),
    };
    crate::create_tenant(&host.paths, "a", &file).unwrap();
}

/// Gives it the first function.
fn grant_first(host: &FakeHost, access: HostAccess<'_>) -> Result<(), crate::TenantError> {
    let wanted = crate::Grant {
        devices: crate::Granted::Functions(&[bdf(FIRST)]),
        group: None,
        overrides: &[],
    };
    crate::grant(&host.paths, access, "a", &wanted).map(drop)
}

/// A guest has changed what it may.
fn spoil(kernel: &FakeKernel<'_>) {
    let mut functions = kernel.functions.borrow_mut();
    let state = functions.entry((3, 0)).or_default();
    state.mac = Some(Mac([2, 0, 0, 0, 0, 9]));
    state.vlan = Some(77);
}

/// The records of tenants' functions, and of functions that are owed to the host.
fn vf_records(host: &FakeHost) -> [Vec<String>; 2] {
    ["granted", "vf"].map(|dir| crate::sysfs::entries(&host.paths.run.join(dir)).unwrap())
}

fn edit_group(host: &FakeHost, from: &str, to: &str) {
    let text = fs::read_to_string(host.paths.config.join("groups.json")).unwrap();
    assert!(text.contains(from), "{text}");
    host.file("etc/groups.json", &text.replace(from, to));
}

#[test]
fn a_groups_new_settings_come_to_a_tenants_function_when_it_is_put_right_and_stay() {
    let host = host("boot", SETTINGS);
    let kernel = FakeKernel::new(&host);
    let vlan = || seen(&host, &kernel).states[0].vlan;
    up(&host, &kernel).unwrap();
    tenant(&host);
    grant_first(&host, kernel.access()).unwrap();
    edit_group(&host, "\"vlan\": 100", "\"vlan\": 7");
    // Activating leaves what is a tenant's, and says so; no later command sees it otherwise.
    let report = up(&host, &kernel).unwrap();
    assert_eq!(report.left[0].bdf, bdf(FIRST));
    for _ in 0..2 {
        assert_eq!(vlan(), Some(100));
        reap_with(&host.paths, kernel.access()).unwrap();
    }
    // Not under a VM, though.
    let tenants = Tenants::load(&host.paths).unwrap();
    let scope = tenants.find("a").unwrap().scope(&host.paths);
    let holder = Holder {
        vm: "a".to_owned(),
        pid: 1,
    };
    let lease = crate::allocate(&scope, &[Request::group("a", 1)], &holder).unwrap();
    tenants.put_right_with(&host.paths, &kernel).unwrap();
    assert_eq!(vlan(), Some(100));
    drop(lease);
    for change in [None, Some("\"vlan\": 8"), None] {
        if let Some(vlan) = change {
            edit_group(&host, "\"vlan\": 7", vlan);
            grant_first(&host, kernel.access()).unwrap();
        }
        spoil(&kernel);
        up(&host, &kernel).unwrap();
        reap_with(&host.paths, kernel.access()).unwrap();
        let now = seen(&host, &kernel).states;
        let wanted = group(&host).sriov.unwrap().wanted(0);
        assert_eq!(now[0], now[0].with(&wanted), "{change:?}");
    }
}

/// A card that refuses one change, and one that does not tell what its functions have.
struct Broken<'a> {
    kernel: &'a FakeKernel<'a>,
    refuses: Option<&'static str>,
    mute: bool,
}

impl VfLinks for Broken<'_> {
    fn read(&self, interface: &Interface) -> Result<BTreeMap<u16, VfState>, LinkError> {
        match self.mute {
            false => self.kernel.read(interface),
            true => Err(LinkError::Ask {
                interface: interface.name.clone(),
                source: std::io::ErrorKind::InvalidData.into(),
            }),
        }
    }

    fn set(&self, write: &LinkWrite) -> Result<(), LinkError> {
        match self.refuses.filter(|key| write.setting.key() == *key) {
            None => self.kernel.set(write),
            Some(_) => Err(LinkError::Refused {
                write: write.clone(),
                source: std::io::Error::from_raw_os_error(nix::libc::EIO),
            }),
        }
    }
}

#[test]
fn a_grant_whose_settings_cannot_be_kept_changes_nothing() {
    let host = host("manual", SETTINGS);
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    let before = (seen(&host, &kernel), host.bindings());
    tenant(&host);
    let links = Broken {
        kernel: &kernel,
        refuses: None,
        mute: true,
    };
    let access = HostAccess {
        writer: &kernel,
        links: &links,
    };
    let error = grant_first(&host, access).unwrap_err().to_string();
    assert!(error.contains("the settings of 0000:03:10.0"), "{error}");
    let owned = || {
        Tenants::load(&host.paths)
            .unwrap()
            .owner_of(bdf(FIRST))
            .is_some()
    };
    assert!(!owned());
    assert_eq!((seen(&host, &kernel), host.bindings()), before);
    assert_eq!(vf_records(&host), [Vec::<String>::new(), Vec::new()]);
    // Where only the record cannot be written, it is the tenant's, and the command can be given again.
    host.file("run/granted", "");
    grant_first(&host, kernel.access()).unwrap_err();
    fs::remove_file(host.paths.run.join("granted")).unwrap();
    grant_first(&host, kernel.access()).unwrap();
    assert!(owned());
    assert_eq!(vf_records(&host)[0], [FIRST]);
}

#[test]
fn what_is_put_back_half_way_is_put_back_by_the_next_command() {
    let host = host("boot", SETTINGS);
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    let before = seen(&host, &kernel).states;
    tenant(&host);
    grant_first(&host, kernel.access()).unwrap();
    spoil(&kernel);
    let links = Broken {
        kernel: &kernel,
        refuses: Some("vlan"),
        mute: false,
    };
    let access = HostAccess {
        writer: &kernel,
        links: &links,
    };
    reap_with(&host.paths, access).unwrap();
    let half = seen(&host, &kernel).states;
    assert_eq!((half[0].mac, half[0].vlan), (before[0].mac, Some(77)));
    // Nor does it stay so when it is taken back.
    crate::revoke(&host.paths, access, "a", &[bdf(FIRST)]).unwrap();
    assert_eq!(seen(&host, &kernel).states, half);
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(seen(&host, &kernel).states, before);
    assert_eq!(vf_records(&host), [Vec::<String>::new(), Vec::new()]);
}

#[test]
fn a_function_that_was_a_tenants_is_the_hosts_as_it_was_whatever_came_in_between() {
    for is_held in [false, true] {
        let host = host("boot", SETTINGS);
        let kernel = FakeKernel::new(&host);
        up(&host, &kernel).unwrap();
        let before = seen(&host, &kernel).states;
        tenant(&host);
        grant_first(&host, kernel.access()).unwrap();
        spoil(&kernel);
        let spoilt = seen(&host, &kernel).states;
        if is_held {
            let record = LeaseRecord::task("gantry device detach");
            let lock = DeviceLock::take(&host.paths, bdf(FIRST), &record).unwrap();
            granted::end(&host.paths, &kernel, bdf(FIRST)).unwrap();
            reap_with(&host.paths, kernel.access()).unwrap();
            assert_eq!(seen(&host, &kernel).states, spoilt);
            drop(lock);
        } else {
            // In the place of the directory of what is owed.
            host.file("run/vf", "");
            crate::revoke(&host.paths, kernel.access(), "a", &[bdf(FIRST)]).unwrap();
            reap_with(&host.paths, kernel.access()).unwrap();
            assert_eq!(seen(&host, &kernel).states, spoilt);
            fs::remove_file(host.paths.run.join("vf")).unwrap();
        }
        reap_with(&host.paths, kernel.access()).unwrap();
        assert_eq!(seen(&host, &kernel).states, before);
        assert_eq!(vf_records(&host), [Vec::<String>::new(), Vec::new()]);
        // What the host sets it to from here on is nothing to a tenant.
        spoil(&kernel);
        reap_with(&host.paths, kernel.access()).unwrap();
        assert_eq!(seen(&host, &kernel).states, spoilt);
    }
}

#[test]
fn one_look_at_a_card_tells_of_all_its_functions() {
    let host = host("boot", SETTINGS);
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    tenant(&host);
    let all = seen(&host, &kernel).functions;
    let wanted = crate::Grant {
        devices: crate::Granted::Functions(&all),
        group: None,
        overrides: &[],
    };
    crate::grant(&host.paths, kernel.access(), "a", &wanted).unwrap();
    let links = Counts(&kernel, 0.into());
    granted::mend(&host.paths, &links);
    assert_eq!(links.1.get(), 1);
    spoil(&kernel);
    granted::mend(&host.paths, &links);
    assert_eq!(links.1.get(), 3, "one more under the lock");
}

/// Counts the looks at cards.
struct Counts<'a>(&'a FakeKernel<'a>, std::cell::Cell<u32>);

impl VfLinks for Counts<'_> {
    fn read(&self, interface: &Interface) -> Result<BTreeMap<u16, VfState>, LinkError> {
        self.1.set(self.1.get() + 1);
        self.0.read(interface)
    }

    fn set(&self, write: &LinkWrite) -> Result<(), LinkError> {
        self.0.set(write)
    }
}

#[test]
fn a_tenants_function_keeps_its_settings_and_is_not_destroyed() {
    let host = host("boot", SETTINGS);
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    let before = seen(&host, &kernel).states;
    tenant(&host);
    grant_first(&host, kernel.access()).unwrap();
    assert_eq!(seen(&host, &kernel).states, before);
    let error = down(&host, &kernel).unwrap_err().to_string();
    assert!(
        error.contains("03:10.0: belongs to tenant \"a\""),
        "{error}"
    );
    // The tenant's VM gets it without a look at the card, which is not the tenant's.
    let tenants = Tenants::load(&host.paths).unwrap();
    let scope = tenants.find("a").unwrap().scope(&host.paths);
    let holder = Holder {
        vm: "a".to_owned(),
        pid: 1,
    };
    let lease = crate::allocate(&scope, &[Request::group("a", 1)], &holder).unwrap();
    assert_eq!(lease[0].name(), bdf(FIRST));
    drop(lease);
    assert_eq!(seen(&host, &kernel).states, before);
    // What its guest changes is put back by the next command of root's, and not while a VM has it.
    let spoil = || self::spoil(&kernel);
    spoil();
    let lease = crate::allocate(&scope, &[Request::group("a", 1)], &holder).unwrap();
    reap_with(&scope, kernel.access()).unwrap();
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_ne!(seen(&host, &kernel).states, before, "a VM has it");
    drop(lease);
    reap_with(&scope, kernel.access()).unwrap();
    assert_ne!(seen(&host, &kernel).states, before, "a tenant may not");
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(seen(&host, &kernel).states, before);
    // A boot writes it down again, as the group wants it and not as it is.
    fs::remove_dir_all(host.paths.run.join("granted")).unwrap();
    spoil();
    let tenants = Tenants::load(&host.paths).unwrap();
    tenants.put_right_with(&host.paths, &kernel).unwrap();
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(seen(&host, &kernel).states, before);
    // And what is taken back is as it was.
    spoil();
    crate::revoke(&host.paths, kernel.access(), "a", &[bdf(FIRST)]).unwrap();
    let records = crate::sysfs::entries(&host.paths.run.join("granted")).unwrap();
    assert_eq!((seen(&host, &kernel).states, records), (before, Vec::new()));
    down(&host, &kernel).unwrap();
}

#[test]
fn a_card_in_quarantine_is_left_alone_with_its_functions() {
    let host = host("demand", "");
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    quarantine(&host.paths, &host.read(PF), "it hung", Until::Boot).unwrap();
    let kernel = FakeKernel::new(&host);
    for error in [up(&host, &kernel), down(&host, &kernel)] {
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("03:00.0 is in quarantine: it hung"),
            "{error}"
        );
    }
    let error = take(&host, &kernel, 1).unwrap_err().to_string();
    assert!(
        error.contains("03:10.0 is a function of 0000:03:00.0, which is in quarantine"),
        "{error}"
    );
    assert!(kernel.written.borrow().is_empty());
}

#[test]
fn killed_at_any_write_the_next_command_heals_it() {
    for at in 0..21 {
        let host = host("manual", SETTINGS);
        let kernel = FakeKernel::new(&host).with_fault(at, Fault::Dead);
        up(&host, &kernel).unwrap_err();
        let kernel = FakeKernel::new(&host);
        reap_with(&host.paths, kernel.access()).unwrap();
        let pf = Pf::read(&host.paths, bdf(PF)).unwrap();
        assert_eq!(pf.autoprobe, Some(true), "killed at {at}");
        up(&host, &kernel).unwrap();
        assert_eq!(take(&host, &kernel, 3).unwrap().len(), 3);
        down(&host, &kernel).unwrap();
    }
}

#[test]
fn a_kernel_that_hangs_is_left_alone() {
    let host = host("manual", SETTINGS);
    let kernel = FakeKernel::new(&host).with_fault(1, Fault::Hangs);
    let error = up(&host, &kernel).unwrap_err().to_string();
    assert!(error.contains("03:00.0 hangs"), "{error}");
    assert!(host.read(PF).quarantine.is_some());
    assert_eq!(kernel.written.borrow().len(), 2);
}

#[test]
fn functions_in_use_are_not_resized_away() {
    let host = host("manual", "");
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    let lease = take(&host, &kernel, 1).unwrap();
    let smaller = fs::read_to_string(host.paths.config.join("groups.json")).unwrap();
    host.file(
        "etc/groups.json",
        &smaller.replace("\"count\": 3", "\"count\": 2"),
    );
    for result in [up(&host, &kernel), down(&host, &kernel)] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("03:10.0: held by VM 'a' (pid 1)"), "{error}");
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
fn a_helper_that_gives_a_function_back_is_waited_for_and_nobody_else() {
    for (helper, waited) in [(true, true), (false, false)] {
        let host = host("manual", "");
        let kernel = FakeKernel::new(&host);
        up(&host, &kernel).unwrap();
        let record = match helper {
            true => LeaseRecord::restore(),
            false => LeaseRecord::task("gantry device detach"),
        };
        let lock = DeviceLock::take(&host.paths, bdf(FIRST), &record).unwrap();
        let letting_go = std::thread::spawn(|| {
            std::thread::sleep(Duration::from_millis(200));
            drop(lock);
        });
        let result = down(&host, &kernel);
        letting_go.join().unwrap();
        assert_eq!(result.is_ok(), waited, "{result:?}");
        assert_eq!(seen(&host, &kernel).functions.is_empty(), waited);
    }
}

#[test]
fn functions_in_use_keep_their_settings_and_the_others_get_new_ones() {
    let host = host("manual", "");
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    let _lease = take(&host, &kernel, 1).unwrap();
    let more = fs::read_to_string(host.paths.config.join("groups.json")).unwrap();
    host.file(
        "etc/groups.json",
        &more.replace("\"count\": 3", "\"count\": 3, \"vlan\": 9"),
    );
    let report = up(&host, &kernel).unwrap();
    assert_eq!(report.left.len(), 1);
    let vlans: Vec<_> = seen(&host, &kernel)
        .states
        .iter()
        .map(|state| state.vlan)
        .collect();
    assert_eq!(vlans, [Some(0), Some(9), Some(9)]);
}

#[test]
fn a_vm_makes_the_functions_it_asks_for() {
    let host = host("demand", SETTINGS);
    let kernel = FakeKernel::new(&host);
    let leases = take(&host, &kernel, 2).unwrap();
    assert!(leases.iter().all(|lease| lease.device().unwrap().on_vfio()));
    let drivers = |host: &FakeHost| -> Vec<Option<String>> { seen(host, &kernel).drivers };
    let vfio = Some("vfio-pci".to_owned());
    assert_eq!(drivers(&host), [vfio.clone(), vfio, None]);
    drop(leases);
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(drivers(&host), [None, None, None]);
    let after = seen(&host, &kernel);
    assert_eq!((after.autoprobe, after.records), (Some(true), Vec::new()));
    down(&host, &kernel).unwrap();
}

#[test]
fn what_a_guest_changed_is_put_back_by_the_next_command_or_the_next_vm() {
    let host = host("manual", r#", "vlan": 7"#);
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    let before = seen(&host, &kernel);
    let spoil = || {
        let mut functions = kernel.functions.borrow_mut();
        let state = functions.entry((3, 0)).or_default();
        state.mac = Some(Mac([2, 0, 0, 0, 0, 9]));
        state.vlan = Some(0);
    };
    let lease = take(&host, &kernel, 1).unwrap();
    spoil();
    assert_eq!(
        reap_with(&host.paths, kernel.access()).unwrap(),
        [],
        "the VM has it"
    );
    assert_ne!(seen(&host, &kernel).states, before.states);
    drop(lease);
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(seen(&host, &kernel), before);
    // Killed, and nobody comes but the next VM.
    let lease = take(&host, &kernel, 1).unwrap();
    spoil();
    drop(lease);
    let lease = take(&host, &kernel, 1).unwrap();
    assert_eq!(seen(&host, &kernel).states, before.states);
    drop(lease);
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(seen(&host, &kernel), before);
}

#[test]
fn a_setting_that_fails_gives_the_vm_nothing() {
    let host = host("demand", SETTINGS);
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    kernel.functions.borrow_mut().clear();
    let kernel = FakeKernel::new(&host).with_fault(0, Fault::Refuses);
    let error = take(&host, &kernel, 1).unwrap_err();
    assert!(matches!(error, AllocateError::Sriov(_)), "{error}");
    assert!(
        error.to_string().contains("take \"mac\" out of the group"),
        "{error}"
    );
    assert!(host.scan().iter().all(|device| !device.lease.is_held()));
    assert_eq!(host.read(FIRST).driver, None);
}

#[test]
fn what_cannot_be_is_refused_with_the_way_out() {
    let said = |change: &dyn Fn(&FakeHost)| {
        let host = host("manual", r#", "vlan": 7"#);
        change(&host);
        let kernel = FakeKernel::new(&host);
        let error = up(&host, &kernel).unwrap_err().to_string();
        assert!(kernel.written.borrow().is_empty(), "{error}");
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
                host.file("etc/groups.json", &text.replace("10c9", "1521"));
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
            &|host| fs::remove_dir_all(host.dir(bdf(PF)).join("net")).unwrap(),
            "have no vlan: take it out",
        ),
        (&|host| host.remove(bdf(PF)), "no PCI device 0000:03:00.0"),
    ] {
        let error = said(change);
        assert!(error.contains(words), "{error}");
    }
    let plain: ResourceGroup = serde_json::from_str(r#"{"name": "x"}"#).unwrap();
    let host = host("manual", "");
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
    let device: HostDevice = host.read(PF);
    assert!(device.lease.is_held());
}

/// The card is with vfio-pci and has two functions; a group asks for the card, and one for them.
fn shared(token: &str) -> FakeHost {
    let host = host("manual", token);
    host.bind(bdf(PF), Some("vfio-pci"));
    host.file(
        "proc/sys/kernel/random/uuid",
        "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001\n",
    );
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    host.bind(bdf(PF), Some("vfio-pci"));
    let text = fs::read_to_string(host.paths.config.join("groups.json")).unwrap();
    let card = format!(r#"{{"groups": [{{"name": "card", "rules": [{{"slot": "{PF}"}}]}},"#);
    host.file("etc/groups.json", &text.replace(r#"{"groups": ["#, &card));
    host
}

fn lease_of(host: &FakeHost, groups: &[&str]) -> Result<Vec<Lease>, AllocateError> {
    lease_beside(host, groups, &[])
}

fn lease_beside(
    host: &FakeHost,
    groups: &[&str],
    own: &[&Lease],
) -> Result<Vec<Lease>, AllocateError> {
    let kernel = FakeKernel::new(host);
    let binder = Binder {
        host: kernel.access(),
        helper: "/bin/true".as_ref(),
    };
    let holder = Holder {
        vm: groups.join("-"),
        pid: 1,
    };
    let requests: Vec<Request> = groups.iter().map(|name| Request::group(*name, 1)).collect();
    let near = Placement::default();
    allocate_with(&host.paths, &requests, &near, &holder, own, &binder)
}

#[test]
fn a_card_and_its_functions_part_only_with_a_token() {
    let without = shared("");
    let error = lease_of(&without, &["vfs"]).unwrap_err().to_string();
    assert!(
        error.contains("3 parted from their physical or virtual functions"),
        "{error}"
    );
    assert!(error.contains("set \"vf_token\": true"), "{error}");
    // Held by another program that keeps to leases, say.
    let record = LeaseRecord::task("x");
    let _lock = DeviceLock::take(&without.paths, bdf(FIRST), &record).unwrap();
    let error = lease_of(&without, &["card"]).unwrap_err().to_string();
    assert!(
        error.contains("has the virtual function 0000:03:10.0, which somebody holds"),
        "{error}"
    );

    let with = shared(r#", "vf_token": true"#);
    let error = lease_of(&with, &["vfs"]).unwrap_err().to_string();
    assert!(error.contains("its owner comes first"), "{error}");
    let card = lease_of(&with, &["card"]).unwrap();
    let function = lease_of(&with, &["vfs"]).unwrap();
    let token = card[0].token().unwrap().to_string();
    assert_eq!(token, "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001");
    assert_eq!(function[0].token(), card[0].token());
    // Made once, and kept from others.
    with.file(
        "proc/sys/kernel/random/uuid",
        "00000000-0000-0000-0000-000000000000\n",
    );
    drop(card);
    let again = lease_of(&with, &["card"]).unwrap();
    assert_eq!(again[0].token(), function[0].token());
    let file = with.paths.run.join("vf-token").join(PF);
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    drop((again, function));
    let both = lease_of(&with, &["card", "vfs"]).unwrap();
    assert!(both.iter().all(|lease| lease.token().is_some()));
}

#[test]
fn a_vm_that_has_the_card_is_given_its_functions() {
    let with = shared(r#", "vf_token": true"#);
    let card = lease_of(&with, &["card"]).unwrap();
    let function = lease_beside(&with, &["vfs"], &[&card[0]]).unwrap();
    assert_eq!(function[0].token(), card[0].token());
    let without = shared("");
    let record = LeaseRecord::task("x");
    let _lock = DeviceLock::take(&without.paths, bdf(FIRST), &record).unwrap();
    assert!(lease_of(&without, &["card"]).is_err());
}

#[test]
fn a_token_may_be_known_to_others_and_is_not_given_where_the_host_has_the_card() {
    let known = r#", "vf_token": "00000000-1111-2222-3333-444444444444""#;
    let host_ = shared(known);
    let card = lease_of(&host_, &["card"]).unwrap();
    assert_eq!(
        card[0].token().unwrap().to_string(),
        "00000000-1111-2222-3333-444444444444"
    );
    let host = host("manual", known);
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    assert_eq!(take(&host, &kernel, 1).unwrap()[0].token(), None);
}
