//! What tenants have: their functions keep their settings, whatever their guests do.

use super::*;
use crate::allocation::allocate;
use crate::base::name::DeviceName;
use crate::fixture::vm;
use crate::pools::vf_settings::{Mac, VfState};

/// The tenant `a`, of this user.
fn tenant(host: &FakeHost) {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid());
    let file = crate::pools::tenant::TenantFile {
        user: user.unwrap().unwrap().name,
        description: String::new(),
    };
    crate::tenants::create_tenant(&host.paths, "a", &file).unwrap();
}

/// Gives it the first function.
fn grant_first(host: &FakeHost, access: HostAccess<'_>) -> Result<(), crate::tenants::TenantError> {
    let wanted = crate::tenants::Grant {
        devices: crate::tenants::GrantedDevices::Named(&[bdf(FIRST).into()]),
        group: None,
        overrides: &[],
    };
    crate::tenants::grant(&host.paths, access, "a", &wanted).map(drop)
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
    ["restore/granted", "restore/vf-settings"]
        .map(|dir| crate::base::sysfs::entries(&host.paths.run.join(dir)).unwrap())
}

fn edit_group(host: &FakeHost, from: &str, to: &str) {
    let text = fs::read_to_string(host.paths.config.join("groups.json")).unwrap();
    assert!(text.contains(from), "{text}");
    host.groups(&text.replace(from, to));
}

#[test]
fn a_value_that_the_card_does_not_take_back_is_told_of_once() {
    let host = host("boot", r#", "vlan": 7, "trust": true"#);
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    tenant(&host);
    grant_first(&host, kernel.access()).unwrap();
    kernel.wants_macs.set(true);
    spoil(&kernel);
    reap_with(&host.paths, kernel.access()).unwrap();
    let state = seen(&host, &kernel).states[0].clone();
    assert_eq!(state.vlan, Some(7));
    assert_eq!(state.mac, Some(Mac([2, 0, 0, 0, 0, 9])));
    let writes = kernel.written.borrow().len();
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(kernel.written.borrow().len(), writes);
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
    let holder = vm("a");
    let take = || allocate(&scope, &[DeviceRequest::group("a", 1)], &holder).unwrap();
    let lease = take();
    crate::tenants::restore_with(&host.paths, &tenants, &kernel).unwrap();
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
    host.file("run/restore/granted", "");
    grant_first(&host, kernel.access()).unwrap_err();
    fs::remove_file(host.paths.run.join("restore/granted")).unwrap();
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
    crate::tenants::revoke(&host.paths, access, "a", &[bdf(FIRST)]).unwrap();
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
            host.file("run/restore/vf-settings", "");
            crate::tenants::revoke(&host.paths, kernel.access(), "a", &[bdf(FIRST)]).unwrap();
            reap_with(&host.paths, kernel.access()).unwrap();
            assert_eq!(seen(&host, &kernel).states, spoilt);
            fs::remove_file(host.paths.run.join("restore/vf-settings")).unwrap();
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
    let all: Vec<DeviceName> = all.into_iter().map(DeviceName::from).collect();
    let wanted = crate::tenants::Grant {
        devices: crate::tenants::GrantedDevices::Named(&all),
        group: None,
        overrides: &[],
    };
    crate::tenants::grant(&host.paths, kernel.access(), "a", &wanted).unwrap();
    let links = Counts(&kernel, 0.into());
    granted::restore_all(&host.paths, &links);
    assert_eq!(links.1.get(), 1);
    spoil(&kernel);
    granted::restore_all(&host.paths, &links);
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
    let holder = vm("a");
    let take = || allocate(&scope, &[DeviceRequest::group("a", 1)], &holder).unwrap();
    let lease = take();
    assert_eq!(lease[0].name(), bdf(FIRST));
    drop(lease);
    assert_eq!(seen(&host, &kernel).states, before);
    // What its guest changes is put back by the next command of root's, and not while a VM has it.
    let spoil = || self::spoil(&kernel);
    spoil();
    let lease = take();
    reap_with(&scope, kernel.access()).unwrap();
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_ne!(seen(&host, &kernel).states, before, "a VM has it");
    drop(lease);
    reap_with(&scope, kernel.access()).unwrap();
    assert_ne!(seen(&host, &kernel).states, before, "a tenant may not");
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(seen(&host, &kernel).states, before);
    // A boot writes it down again, as the group wants it and not as it is.
    fs::remove_dir_all(host.paths.run.join("restore/granted")).unwrap();
    spoil();
    let tenants = Tenants::load(&host.paths).unwrap();
    crate::tenants::restore_with(&host.paths, &tenants, &kernel).unwrap();
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(seen(&host, &kernel).states, before);
    // And what is taken back is as it was.
    spoil();
    crate::tenants::revoke(&host.paths, kernel.access(), "a", &[bdf(FIRST)]).unwrap();
    let records = crate::base::sysfs::entries(&host.paths.run.join("restore/granted")).unwrap();
    assert_eq!((seen(&host, &kernel).states, records), (before, Vec::new()));
    down(&host, &kernel).unwrap();
}
