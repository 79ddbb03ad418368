//! Functions in use, and those that VMs ask for.

use super::*;
use crate::pools::vf_settings::Mac;

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
    host.groups(&more.replace("\"count\": 3", "\"count\": 3, \"vlan\": 9"));
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
fn a_value_that_the_card_does_not_take_back_is_in_nobodys_way() {
    let host = host("manual", r#", "vlan": 7, "trust": true"#);
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    kernel.wants_macs.set(true);
    // A trusted guest changes its address, and somebody the VLAN.
    let spoil = |mac: u8| {
        let mut functions = kernel.functions.borrow_mut();
        let state = functions.entry((3, 0)).or_default();
        (state.mac, state.vlan) = (Some(Mac([2, 0, 0, 0, 0, mac])), Some(9));
    };
    let state = || seen(&host, &kernel).states[0].clone();
    let lease = take(&host, &kernel, 1).unwrap();
    spoil(1);
    drop(lease);
    // Nobody came since: the next VM puts right what can be put right.
    let lease = take(&host, &kernel, 1).unwrap();
    assert_eq!((state().vlan, state().trust), (Some(7), Some(true)));
    assert_eq!(state().mac, Some(Mac([2, 0, 0, 0, 0, 1])));
    spoil(2);
    drop(lease);
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(state().vlan, Some(7));
    assert!(!Change::VfSettings.is_recorded(&host.paths, bdf(FIRST)));
    let writes = kernel.written.borrow().len();
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(
        kernel.written.borrow().len(),
        writes,
        "it is not tried for ever"
    );
    take(&host, &kernel, 1).unwrap();
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
