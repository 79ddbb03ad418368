//! Tests: what the helper gives and refuses, and that nothing stays leased.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use super::server::serve;
use super::*;
use crate::allocation::{AllocateError, Lease, Recipient, allocate_for, allocate_with};
use crate::fixture::{Fake, FakeHost, FakeKernel, bdf, ungrouped};
use crate::holding::host_lock::AllocationLock;
use crate::holding::record::{LeaseKind, LeaseRecord};
use crate::making::demand::Binder;
use crate::making::sriov::HostAccess;
use crate::moving::writer::{SysfsWriter, WriteError};

const GROUPS: &str = r#"{"groups": [
    {"name": "nvme", "rules": [{"class": "0108"}]},
    {"name": "nic", "rules": [{"class": "0200"}]}
]}"#;

/// Two disks, and a card with two functions in one IOMMU group.
fn host() -> FakeHost {
    host_with_nics(["03:00.0", "03:01.0"])
}

fn host_with_nics(nics: [&str; 2]) -> FakeHost {
    let nic = |address| Fake::nvme(address, 7).class(0x02_00_00);
    let host = FakeHost::new(&[
        Fake::nvme("01:00.0", 1).with("numa_node", "1"),
        Fake::nvme("02:00.0", 2),
        nic(nics[0]),
        nic(nics[1]),
    ]);
    host.groups(GROUPS);
    host.file("dev/vfio/vfio", "container");
    for group in [1, 2, 7] {
        host.file(&format!("dev/vfio/{group}"), &format!("node {group}"));
        host.file(
            &format!("sys/kernel/iommu_groups/{group}/reserved_regions"),
            "0x00000000fee00000 0x00000000feefffff msi\n",
        );
    }
    host
}

type AllocateFn =
    dyn Fn(&HostPaths, &[DeviceRequest], Recipient<'_>) -> Result<Vec<Lease>, AllocateError> + Send;

/// The helper on a thread instead of in a process.
fn started(host: &FakeHost) -> (Opener, JoinHandle<io::Result<()>>) {
    started_with(host, Box::new(allocate_for))
}

fn started_with(
    host: &FakeHost,
    allocate: Box<AllocateFn>,
) -> (Opener, JoinHandle<io::Result<()>>) {
    let ((asks, asked), (returns, returned)) = (pair(), pair());
    let paths = host.paths.clone();
    let helper = thread::spawn(move || serve(&paths, asked, returned, &*allocate));
    let opener = Opener(Arc::new(Sockets::new(asks, returns).unwrap()));
    let hello = Request::Hello {
        vm: "one".to_owned(),
        pid: 123,
    };
    opener.lock().send(&hello).unwrap();
    (opener, helper)
}

fn groups(held: &[u32], address_space: bool) -> Nodes {
    Nodes {
        back_end: VfioBackEnd::Container,
        address_space,
        sent: false,
        held: held.to_vec(),
    }
}

fn pair() -> (UnixStream, UnixStream) {
    UnixStream::pair().unwrap()
}

/// Another VM that chooses devices.
fn others_turn(host: &FakeHost) -> AllocationLock {
    let record = LeaseRecord {
        kind: LeaseKind::Vm,
        name: "two".to_owned(),
        pid: std::num::NonZeroU32::new(124),
        since: 0,
    };
    AllocationLock::acquire(&host.paths, &record, Duration::ZERO).unwrap()
}

fn only(groups: &[&str]) -> Limit {
    let groups = groups
        .iter()
        .map(|group| DeviceSource::Group((*group).to_owned()));
    Limit {
        from: groups.collect(),
        ungrouped: false,
        most: 2,
        read: Vec::new(),
        write: Vec::new(),
    }
}

fn content(mut file: &File) -> String {
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

/// Asks for devices for a VM that has these IOMMU groups and a DMA address space.
fn open(opener: &Opener, request: DeviceRequest, has: &[u32]) -> Result<Opened, OpenerError> {
    opener.open(&[request], &groups(has, false), &|| false)
}

fn refused(opener: &Opener, request: DeviceRequest) -> String {
    match open(opener, request, &[]) {
        Err(OpenerError::Refused(why) | OpenerError::Mistaken(why) | OpenerError::Busy(why)) => why,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was given"),
    }
}

#[test]
fn what_others_hold_may_be_asked_for_again() {
    let host = host();
    let (opener, _helper) = started(&host);
    let both = [DeviceRequest::group("nvme", 2)];
    let _held = opener.open(&both, &groups(&[], false), &|| false).unwrap();
    let ask = |request: DeviceRequest| open(&opener, request, &[]).err();
    let held = ask(DeviceRequest::group("nvme", 1));
    assert!(matches!(held, Some(OpenerError::Busy(_))), "{held:?}");
    let never = ask(DeviceRequest::group("nvme", 9));
    assert!(matches!(never, Some(OpenerError::Refused(_))), "{never:?}");
    let unknown = ask(DeviceRequest::group("disks", 1));
    assert!(
        matches!(unknown, Some(OpenerError::Mistaken(_))),
        "{unknown:?}"
    );
}

#[test]
fn a_device_comes_with_its_group_and_a_container_and_goes_back() {
    let host = host();
    let (opener, helper) = started(&host);
    let opened = opener
        .open(
            &[DeviceRequest::group("nvme", 1)],
            &groups(&[], true),
            &|| false,
        )
        .unwrap();
    assert_eq!(opened.devices[0].name, bdf("01:00.0"));
    assert_eq!(opened.devices[0].group, 1);
    assert_eq!(content(opened.groups[0].node.as_ref().unwrap()), "node 1");
    assert_eq!(opened.groups[0].reserved[0].start, 0xfee0_0000);
    assert_eq!(content(opened.address_space.as_ref().unwrap()), "container");
    assert_eq!(host.held(), ["0000:01:00.0"]);

    let second = open(&opener, DeviceRequest::group("nvme", 1), &[1]).unwrap();
    assert_eq!(second.devices[0].name, bdf("02:00.0"));
    assert!(second.address_space.is_none());
    let none_left = refused(&opener, DeviceRequest::group("nvme", 1));
    assert!(none_left.contains("No valid host was found"), "{none_left}");
    drop(opened);
    assert_eq!(host.held(), ["0000:02:00.0"]);
    drop(second);
    assert!(host.held().is_empty());
    drop(opener);
    helper.join().unwrap().unwrap();
}

#[test]
fn with_iommufd_each_device_comes_with_its_cdev() {
    let host = host();
    let (opener, _helper) = started(&host);
    let nodes = Nodes {
        back_end: VfioBackEnd::Iommufd,
        ..groups(&[], true)
    };
    let open = || opener.open(&[DeviceRequest::group("nic", 2)], &nodes, &|| false);
    let why = |opened: Result<Opened, OpenerError>| opened.err().unwrap().to_string();
    let no_iommufd = why(open());
    assert!(no_iommufd.contains("dev/iommu:"), "{no_iommufd}");
    host.file("dev/iommu", "iommufd");
    let no_cdev = why(open());
    assert!(
        no_cdev.contains("0000:03:00.0 has no VFIO cdev"),
        "{no_cdev}"
    );
    for (name, node) in [("0000:03:00.0", "vfio0"), ("0000:03:01.0", "vfio1")] {
        let device = format!("sys/bus/pci/devices/{name}/vfio-dev/{node}/dev");
        host.file(&device, "511:0");
        host.file(&format!("dev/vfio/devices/{node}"), node);
    }
    assert!(host.held().is_empty(), "what was refused is not held");
    let opened = open().unwrap();
    assert_eq!(content(opened.address_space.as_ref().unwrap()), "iommufd");
    let [group] = opened.groups.as_slice() else {
        panic!("both devices are of one group");
    };
    assert_eq!(group.reserved[0].start, 0xfee0_0000);
    assert!(group.node.is_none());
    for (device, node) in opened.devices.iter().zip(["vfio0", "vfio1"]) {
        assert_eq!(content(device.cdev.as_ref().unwrap()), node);
        assert_eq!(device.lease.locks.as_ref().unwrap().len(), 2);
    }
}

#[test]
fn the_functions_of_a_group_come_with_one_node() {
    let host = host();
    let (opener, _helper) = started(&host);
    let opened = open(&opener, DeviceRequest::group("nic", 2), &[]).unwrap();
    assert_eq!((opened.devices.len(), opened.groups.len()), (2, 1));
    let locks = opened.devices[0].lease.locks.as_ref().unwrap();
    assert_eq!(locks.len(), 2, "the whole group is locked");
    drop(opened);
    let known = open(&opener, DeviceRequest::group("nic", 1), &[7]).unwrap();
    assert!(known.groups.is_empty());
}

#[test]
fn the_second_device_of_a_group_is_the_vms_and_no_others() {
    let host = host();
    let (opener, _helper) = started(&host);
    let first = open(&opener, DeviceRequest::group("nic", 1), &[]).unwrap();
    let (other, _helper) = started(&host);
    assert!(refused(&other, DeviceRequest::group("nic", 1)).contains("03:01.0"));
    let second = open(&opener, DeviceRequest::group("nic", 1), &[7]).unwrap();
    assert_eq!(second.devices[0].name, bdf("03:01.0"));
    assert!(refused(&opener, DeviceRequest::group("nic", 1)).contains("\"one\""));
    drop(first);
    assert_eq!(host.held().len(), 2, "the group is whole");
    let again = open(&opener, DeviceRequest::group("nic", 1), &[7]).unwrap();
    assert_eq!(again.devices[0].name, bdf("03:00.0"));
    drop((second, again));
    assert!(host.held().is_empty());
}

#[test]
fn a_vm_is_given_only_what_its_file_names() {
    let host = host();
    let (opener, _helper) = started(&host);
    opener.limit(only(&["nvme"])).unwrap();
    let why = refused(&opener, DeviceRequest::group("nic", 1));
    assert!(why.contains("group \"nvme\" only"), "{why}");
    let exact = |address| ungrouped(bdf(address));
    refused(&opener, exact("03:00.0"));
    refused(&opener, DeviceRequest::alias("nvme", 1));
    assert!(host.held().is_empty());
    let opened = open(&opener, exact("02:00.0"), &[]).unwrap();
    // Asked for by its address, it is of its group all the same.
    assert_eq!(opened.devices[0].pool.as_deref(), Some("nvme"));
}

#[test]
fn a_vm_whose_file_names_no_groups_has_limits_too() {
    let host = host();
    host.groups(r#"{"groups": [{"name": "nic", "rules": [{"class": "0200"}]}]}"#);
    let disk = ungrouped(bdf("01:00.0"));
    let (opener, _helper) = started(&host);
    opener.limit(only(&[])).unwrap();
    let why = refused(&opener, disk.clone());
    assert!(
        why.contains("01:00.0 is in no group") && why.contains("\"ungrouped\": true"),
        "{why}"
    );
    let nics = |count| DeviceRequest::group("nic", count);
    assert!(refused(&opener, nics(3)).contains("at most 2 devices"));
    // It started without devices, so that no group is its own.
    let why = refused(&opener, nics(1));
    assert!(why.contains("add \"nic\" to `hotplug.groups`"), "{why}");
    assert!(host.held().is_empty());
    let (other, _helper) = started(&host);
    let limit = Limit {
        ungrouped: true,
        most: 1,
        ..only(&[])
    };
    other.limit(limit).unwrap();
    let _disk = open(&other, disk, &[]).unwrap();
    let more = ungrouped(bdf("02:00.0"));
    assert!(refused(&other, more).contains("at most 1 device at a time"));
    assert_eq!(host.held().len(), 1);
}

#[test]
fn a_vm_whose_file_names_no_groups_may_have_more_of_its_own() {
    let host = host();
    let exact = |address, allow_ungrouped| DeviceRequest {
        allow_ungrouped,
        ..DeviceRequest::device(bdf(address))
    };
    for own in [DeviceRequest::group("nvme", 1), exact("01:00.0", false)] {
        let (opener, _helper) = started(&host);
        let first = open(&opener, own, &[]).unwrap();
        opener.limit(only(&[])).unwrap();
        let why = refused(&opener, DeviceRequest::group("nic", 1));
        assert!(
            why.contains("group \"nvme\" only") && why.contains("add \"nic\" to"),
            "{why}"
        );
        refused(&opener, exact("03:00.0", true));
        for more in [DeviceRequest::group("nvme", 1), exact("02:00.0", true)] {
            let second = open(&opener, more, &[]).unwrap();
            assert_eq!(second.devices[0].name, bdf("02:00.0"));
        }
        drop(first);
    }
}

#[test]
fn a_limit_is_never_taken_back() {
    let host = host();
    let (opener, helper) = started(&host);
    opener.limit(only(&["nvme"])).unwrap();
    opener.limit(only(&["nic"])).unwrap();
    assert!(open(&opener, DeviceRequest::group("nic", 1), &[]).is_err());
    assert!(helper.join().unwrap().is_err(), "it ends");
}

#[test]
fn leases_end_with_the_socket_and_a_node_that_is_missing_leaves_none() {
    let host = host();
    let (opener, helper) = started(&host);
    std::fs::remove_file(host.paths.vfio_group(2)).unwrap();
    let exact = |address| ungrouped(bdf(address));
    refused(&opener, exact("02:00.0"));
    // Nor does one that cannot be opened, where the host is to blame.
    std::fs::create_dir(host.paths.vfio_group(2)).unwrap();
    let failed = open(&opener, exact("02:00.0"), &[]);
    assert!(matches!(failed, Err(OpenerError::Failed(_))));
    assert!(refused(&opener, exact("0a:00.0")).contains("no PCI device"));
    assert!(host.held().is_empty());
    let opened = open(&opener, DeviceRequest::group("nvme", 1), &[]).unwrap();
    // As when the VM's process is killed: nobody says anything any more.
    opener
        .lock()
        .socket
        .shutdown(std::net::Shutdown::Both)
        .unwrap();
    helper.join().unwrap().unwrap();
    assert!(host.held().is_empty());
    drop(opened);
}

#[test]
fn nonsense_ends_the_helper() {
    let host = host();
    for nonsense in [&[0xff; 8][..], &[2, 0, 0, 0, b'{', b'}'], &[0, 0, 0, 0]] {
        let (opener, helper) = started(&host);
        opener.lock().socket.write_all(nonsense).unwrap();
        assert!(helper.join().unwrap().is_err());
    }
}

#[test]
fn what_later_devices_reserve_is_known_beforehand() {
    let host = host();
    let from = [DeviceSource::Group("nvme".to_owned())];
    let later = to_come(&host.paths, &from);
    assert_eq!(
        (later.reserved.len(), later.nodes.to_string()),
        (2, "1".to_owned())
    );
    assert_eq!(to_come(&host.paths, &[]), ToCome::default());
}

#[test]
fn what_does_not_arrive_whole_goes_back() {
    let ((asks, mut theirs), (returns, mut returned)) = (pair(), pair());
    // A lease that waits for itself would wait for ever.
    let patience = Some(Duration::from_secs(5));
    returned.set_read_timeout(patience).unwrap();
    let opener = Opener(Arc::new(Sockets::new(asks, returns).unwrap()));
    let helper = thread::spawn(move || {
        let _: Request = wire::receive(&mut theirs).unwrap();
        let leased = |id| wire::Leased {
            id,
            name: bdf("01:00.0").into(),
            group: 1,
            virtual_function: false,
            token: None,
            pool: None,
            terms: crate::inventory::card::Terms::default(),
            locks: 1,
        };
        let devices = vec![leased(4), leased(5)];
        let groups = Vec::new();
        wire::send(&mut theirs, &Reply::Leased { devices, groups }).unwrap();
        let lock = File::open("/dev/null").unwrap();
        wire::send_file(&theirs, lock.as_raw_fd()).unwrap();
        // As when the VM has too many files open: the byte comes alone.
        theirs.write_all(&[0]).unwrap();
        let mut released = Vec::new();
        while released.len() < 2 {
            let Return { id, .. } = wire::receive(&mut returned).unwrap();
            released.push(id);
            wire::send(&mut returned, &()).unwrap();
        }
        released.sort_unstable();
        released
    });
    let failed = open(&opener, DeviceRequest::group("nvme", 2), &[]).err();
    assert!(matches!(failed, Some(OpenerError::Files(_))), "{failed:?}");
    assert_eq!(helper.join().unwrap(), [4, 5]);
}

#[test]
fn a_plan_is_what_its_file_says() {
    let host = host();
    let plans = r#"{"plans": [{"name": "two", "devices": [{"group": "nvme", "count": 2}]}]}"#;
    host.file("etc/plans.json", plans);
    let (opener, _helper) = started(&host);
    let requests = opener.plan("two").unwrap();
    assert_eq!(requests, [DeviceRequest::group("nvme", 2)]);
    let unknown = opener.plan("three").unwrap_err().to_string();
    assert!(unknown.contains("\"three\""), "{unknown}");
    opener
        .open(&requests, &groups(&[], false), &|| false)
        .unwrap();
}

#[test]
fn a_lease_that_is_unwanted_is_not_waited_for_and_goes_back() {
    let host = host();
    let (opener, helper) = started(&host);
    let first = open(&opener, DeviceRequest::group("nvme", 1), &[]).unwrap();
    // Somebody is choosing devices all the time.
    let turn = others_turn(&host);
    let second = opener.open(
        &[DeviceRequest::group("nvme", 1)],
        &groups(&[], false),
        &|| true,
    );
    assert!(matches!(second, Err(OpenerError::Gone(_))));
    drop(first);
    drop(turn);
    drop(opener);
    helper.join().unwrap().unwrap();
    assert!(host.held().is_empty());
}

#[test]
fn who_missed_an_answer_is_leased_nothing_more_and_what_was_goes_back() {
    let host = host();
    let (opener, _helper) = started(&host);
    let first = open(&opener, DeviceRequest::group("nic", 1), &[]).unwrap();
    let before = host.held();
    let turn = others_turn(&host);
    let disk = || {
        opener.open(
            &[DeviceRequest::group("nvme", 1)],
            &groups(&[], false),
            &|| true,
        )
    };
    assert!(matches!(disk(), Err(OpenerError::Gone(_))));
    drop(turn);
    for _ in 0..2 {
        assert!(matches!(disk(), Err(OpenerError::Gone(_))));
        assert!(matches!(opener.plan("x"), Err(OpenerError::Gone(_))));
    }
    let line = opener.lock();
    // What comes next is of this: neither of the lease, nor of what was asked for after it.
    let mut socket = DeadlineStream::new(&line.socket, RELEASE_PATIENCE, &|| false);
    wire::send(&mut socket, &Request::Plan("x".to_owned())).unwrap();
    let said: Reply = wire::receive(&mut socket).unwrap();
    assert!(matches!(said, Reply::Refused(_)), "{said:?}");
    assert!(!wire::has_more(&line.socket));
    drop(line);
    assert_eq!(host.held(), before);
    drop(first);
}

#[test]
fn what_is_leased_in_the_moment_in_which_it_is_given_up_goes_back() {
    let host = host();
    let (opener, _helper) = started(&host);
    let _first = open(&opener, DeviceRequest::group("nic", 1), &[]).unwrap();
    let before = host.held();
    let ask = Request::Lease {
        requests: vec![DeviceRequest::group("nvme", 1)],
        ungrouped: false,
        nodes: groups(&[], false),
    };
    let mut line = opener.lock();
    line.send(&ask).unwrap();
    while !wire::has_more(&line.socket) {}
    line.lost = true;
    // Discards the answer.
    line.send(&Request::ReplyLost).unwrap();
    // The second time it is of nothing.
    line.send(&Request::ReplyLost).unwrap();
    drop(line);
    let deadline = std::time::Instant::now() + RELEASE_PATIENCE;
    while host.held() != before && std::time::Instant::now() < deadline {}
    assert_eq!(host.held(), before);
}

#[test]
fn what_needs_more_slots_than_are_free_is_refused_before_anything_is_leased() {
    let host = host_with_nics(["03:00.0", "03:00.1"]);
    let (opener, _helper) = started(&host);
    opener.slots(1).unwrap();
    let why = refused(&opener, DeviceRequest::group("nvme", 2));
    assert!(why.contains("need 2 slots and this VM has 1 free"), "{why}");
    let both = refused(&opener, DeviceRequest::group("nvme", 4));
    assert!(both.contains("No valid host was found"), "{both}");
    // The lock file of a device that was ever leased stays.
    assert!(!host.paths.run.join("leases").exists());
    // The functions of one card share a slot.
    let card = open(&opener, DeviceRequest::group("nic", 1), &[]);
    assert_eq!(card.unwrap().devices.len(), 2);
    opener.slots(2).unwrap();
    let disks = open(&opener, DeviceRequest::group("nvme", 2), &[]);
    assert_eq!(disks.unwrap().devices.len(), 2);
}

#[test]
fn functions_without_function_0_of_their_card_take_a_slot_each() {
    let host = host_with_nics(["03:00.1", "03:00.2"]);
    let (opener, _helper) = started(&host);
    opener.slots(1).unwrap();
    let card = || DeviceRequest::group("nic", 1);
    let why = refused(&opener, card());
    for part in [
        "need 2 slots and this VM has 1 free",
        "without function 0 of their device, each of 0000:03:00.1, 0000:03:00.2 takes one",
    ] {
        assert!(why.contains(part), "{why}");
    }
    assert!(!host.paths.run.join("leases").exists(), "none was leased");
    opener.slots(2).unwrap();
    let both = open(&opener, card(), &[]).unwrap();
    assert_eq!(both.devices.len(), 2);
}

/// The kernel does not come back from a write until the other end of `goes_on` is dropped.
struct HangingWriter<'a> {
    kernel: FakeKernel<'a>,
    hangs: Sender<()>,
    goes_on: &'a Receiver<()>,
}

impl SysfsWriter for HangingWriter<'_> {
    fn write(&self, path: &Path, value: &str) -> Result<(), WriteError> {
        let _ = self.hangs.send(());
        let _ = self.goes_on.recv();
        self.kernel.write(path, value)
    }
    fn write_keeping(&self, path: &Path, value: &str, _: &File) -> Result<(), WriteError> {
        self.write(path, value)
    }
}

#[test]
fn a_lease_goes_back_while_another_is_being_made() {
    let host = Arc::new(host());
    host.groups(
        r#"{"groups": [
            {"name": "nvme", "rules": [{"slot": "0000:01:00.0"}]},
            {"name": "later", "bind": "demand", "rules": [{"slot": "0000:02:00.0"}]}
        ]}"#,
    );
    host.bind(bdf("02:00.0"), Some("nvme"));
    let ((hangs, hung), (go_on, goes_on)) = (channel::<()>(), channel::<()>());
    let allocate = {
        let host = Arc::clone(&host);
        move |paths: &HostPaths, requests: &[DeviceRequest], vm: Recipient<'_>| {
            let writer = HangingWriter {
                kernel: FakeKernel::new(&host),
                hangs: hangs.clone(),
                goes_on: &goes_on,
            };
            let binder = Binder {
                host: HostAccess {
                    writer: &writer,
                    links: &writer.kernel,
                },
                helper: Path::new("/bin/true"),
            };
            allocate_with(paths, requests, vm, &binder)
        }
    };
    let (opener, helper) = started_with(&host, Box::new(allocate));
    let open = |group: &str| open(&opener, DeviceRequest::group(group, 1), &[]);
    let first = open("nvme").unwrap();
    thread::scope(|threads| {
        let second = threads.spawn(|| open("later"));
        hung.recv().unwrap();
        drop(first);
        assert_eq!(host.held(), ["0000:02:00.0"], "the first is back");
        assert!(!second.is_finished());
        drop(go_on);
        let second = second.join().unwrap().unwrap();
        assert_eq!(second.devices[0].name, bdf("02:00.0"));
    });
    assert!(host.held().is_empty());
    drop(opener);
    helper.join().unwrap().unwrap();
}

#[test]
fn a_lease_goes_back_while_its_answer_is_not_read() {
    use nix::sys::socket::{MsgFlags, send};
    let host = host();
    let ((mut asks, asked), (mut returns, returned)) = (pair(), pair());
    returns
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    // No room for an answer.
    while send(asked.as_raw_fd(), &[0; 64], MsgFlags::MSG_DONTWAIT).is_ok() {}
    let paths = host.paths.clone();
    let helper = thread::spawn(move || serve(&paths, asked, returned, &allocate_for));
    let (vm, pid) = ("one".to_owned(), 123);
    wire::send(&mut asks, &Request::Hello { vm, pid }).unwrap();
    let ask = Request::Lease {
        requests: vec![DeviceRequest::group("nvme", 1)],
        ungrouped: false,
        nodes: groups(&[], false),
    };
    wire::send(&mut asks, &ask).unwrap();
    while host.held().is_empty() {
        assert!(!helper.is_finished());
    }
    while !host.held().is_empty() {
        let back = Return { id: 0, aside: None };
        wire::send(&mut returns, &back).unwrap();
        wire::receive::<()>(&mut returns).unwrap();
    }
    drop(asks);
    assert!(helper.join().unwrap().is_err());
}

#[test]
fn one_deadline_holds_for_all_of_an_answer_and_all_of_a_question() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let patience = Duration::from_millis(100);
    let hear = |unwanted: &dyn Fn() -> bool| {
        wire::receive::<Reply>(&mut DeadlineStream::new(&ours, patience, unwanted)).unwrap_err()
    };
    assert_eq!(hear(&|| false).kind(), io::ErrorKind::TimedOut);
    // The beginning of an answer is no answer.
    theirs.write_all(&[100, 0]).unwrap();
    assert_eq!(hear(&|| false).kind(), io::ErrorKind::TimedOut);
    theirs.write_all(&[1, 0, 0, 0, b'{']).unwrap();
    assert_eq!(hear(&|| true).kind(), io::ErrorKind::InvalidData);
    assert_eq!(hear(&|| true).kind(), io::ErrorKind::ConnectionAborted);
    let file = wire::receive_file(&mut DeadlineStream::new(&ours, patience, &|| false));
    assert_eq!(file.unwrap_err().kind(), io::ErrorKind::TimedOut);
    // More than a socket holds, and nobody reads.
    let long = Request::Plan("x".repeat(4 << 20));
    let said = wire::send(&mut DeadlineStream::new(&ours, patience, &|| false), &long);
    assert_eq!(said.unwrap_err().kind(), io::ErrorKind::TimedOut);
}
