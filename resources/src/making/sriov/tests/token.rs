//! A card and its functions in two VMs, with a VF token.

use super::*;
use crate::allocation::{Recipient, allocate_with};
use crate::fixture::vm;
use crate::making::demand::Binder;
use crate::pools::request::Placement;

/// The card is with vfio-pci and has two functions; a group asks for the card, and one for them.
fn shared(token: &str) -> FakeHost {
    let host = host("manual", token);
    host.bind(bdf(PF), Some("vfio-pci"));
    host.file("sys/module/vfio_pci/parameters/enable_sriov", "Y\n");
    host.file(
        "proc/sys/kernel/random/uuid",
        "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001\n",
    );
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    host.bind(bdf(PF), Some("vfio-pci"));
    let text = fs::read_to_string(host.paths.config.join("groups.json")).unwrap();
    let card = format!(r#"{{"groups": [{{"name": "card", "rules": [{{"slot": "{PF}"}}]}},"#);
    host.groups(&text.replace(r#"{"groups": ["#, &card));
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
    let holder = vm(&groups.join("-"));
    let requests: Vec<DeviceRequest> = groups
        .iter()
        .map(|name| DeviceRequest::group(*name, 1))
        .collect();
    let near = Placement::default();
    let own: Vec<_> = own.iter().map(|lease| lease.as_own()).collect();
    let vm = Recipient {
        own: &own,
        ..Recipient::new(&holder, &near)
    };
    allocate_with(&host.paths, &requests, vm, &binder)
}

#[test]
fn a_card_and_its_functions_part_only_with_a_token() {
    let without = shared("");
    let error = lease_of(&without, &["vfs"]).unwrap_err().to_string();
    assert!(error.contains("3 that need a VF token"), "{error}");
    assert!(error.contains("set \"vf_token\": true"), "{error}");
    // Held by another program that keeps to leases, say.
    let record = LeaseRecord::task("x");
    let _lock = DeviceLock::take(&without.paths, bdf(FIRST), &record).unwrap();
    let error = lease_of(&without, &["card"]).unwrap_err().to_string();
    assert!(
        error.contains("has the virtual function 0000:03:10.0, which is held"),
        "{error}"
    );

    let with = shared(r#", "vf_token": true"#);
    let error = lease_of(&with, &["vfs"]).unwrap_err().to_string();
    assert!(
        error.contains("start the VM that gets 0000:03:00.0 first"),
        "{error}"
    );
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
