//! What the host uses network cards for: who carries whose traffic.

use super::*;

/// The only NIC of [`host`].
const NIC: &str = "0000:02:00.0";

#[test]
fn the_nic_of_a_default_route_stays() {
    let route =
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n";
    let host = host();
    host.file(
        "proc/net/route",
        &format!("{route}eth0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"),
    );
    assert!(uses(&host).is_empty());
    host.file(
        "proc/net/route",
        &format!("{route}eth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"),
    );
    assert_eq!(
        uses(&host),
        ["0000:02:00.0 is eth0, which carries a default route"]
    );
}

#[test]
fn the_nic_that_the_host_is_reached_by_stays() {
    let host = host();
    let dir = host.paths.sysfs.join("devices/virtual/net/bond0");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("lower_eth0"), "").unwrap();
    symlink(&dir, host.paths.sysfs.join("class/net/bond0")).unwrap();
    let said = |name: &str| -> Vec<String> {
        let address = "10.9.1.1".parse().unwrap();
        let addressed = BTreeMap::from([(name.to_owned(), address)]);
        let uses = uses_with(&host.paths, &host.scan(), &addressed).unwrap();
        uses.iter().map(Guarded::to_string).collect()
    };
    let up = "which is up with the address 10.9.1.1";
    assert_eq!(said("eth0"), [format!("0000:02:00.0 is eth0, {up}")]);
    let part = format!("0000:02:00.0 is eth0, part of bond0, {up}");
    assert_eq!(said("bond0"), [part]);
    assert_eq!(said("eth1"), [format!("{NIC} is eth0, part of bond0")]);
    // What says more is said alone.
    host.file(
        "proc/net/route",
        "Iface\tDestination\neth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n",
    );
    let route = "0000:02:00.0 is eth0, which carries a default route";
    assert_eq!(said("bond0"), [route]);
}

#[test]
fn the_nic_below_a_bridge_with_the_default_route_stays() {
    let host = host();
    let zeros = "0".repeat(32);
    host.file("proc/net/ipv6_route", &format!(
        "{zeros} 00 {zeros} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003   br0.7\n\
         {zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200       lo\n"
    ));
    for (upper, lower) in [("br0.7", "br0"), ("br0", "eth0")] {
        let dir = host.paths.sysfs.join("devices/virtual/net").join(upper);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("lower_{lower}")), "").unwrap();
        symlink(&dir, host.paths.sysfs.join("class/net").join(upper)).unwrap();
    }
    assert_eq!(
        uses(&host),
        ["0000:02:00.0 is eth0, part of br0; br0.7, connected to it, carries a default route"]
    );
}

#[test]
fn a_card_whose_interface_is_out_of_sight_stays() {
    let card = |address| Fake::nvme(address, 2).class(0x02_00_00);
    let host = FakeHost::new(&[card("02:00.0").driver("ixgbevf"), card("02:00.1").unbound()]);
    // A driver that made no interface is not one whose interface is elsewhere.
    assert!(uses(&host).is_empty());
    fs::create_dir_all(host.dir(bdf("02:00.0")).join("net")).unwrap();
    let said =
        "0000:02:00.0 is a network card (ixgbevf) whose interface is in another network namespace";
    let uses = uses(&host);
    assert!(uses.len() == 1 && uses[0].starts_with(said), "{uses:?}");
    let dir = host.dir(bdf("02:00.0")).join("net/eth7");
    fs::create_dir_all(dir).unwrap();
    assert!(host_uses(&host.paths, &host.scan()).unwrap().is_empty());
}

#[test]
fn the_interface_of_a_virtio_card_is_in_sight() {
    let card = Fake::nvme("02:00.0", 2).class(0x02_00_00);
    let host = FakeHost::new(&[card.driver("virtio-pci")]);
    let below = host.dir(bdf("02:00.0")).join("virtio0");
    fs::create_dir_all(&below).unwrap();
    assert!(uses(&host).is_empty(), "virtio_net is not loaded");
    fs::create_dir_all(below.join("net")).unwrap();
    assert_eq!(uses(&host).len(), 1);
    fs::create_dir_all(below.join("net/eth7")).unwrap();
    assert!(uses(&host).is_empty());
}

/// Makes interfaces that belong to no device, and relations of two: `lower < upper`.
fn connect(host: &FakeHost, relations: &str) {
    let class = host.paths.sysfs.join("class/net");
    for relation in relations.split(", ") {
        let (lower, upper) = relation.split_once(" < ").unwrap();
        for name in [lower, upper] {
            let dir = host.paths.sysfs.join("devices/virtual/net").join(name);
            if !class.join(name).exists() {
                fs::create_dir_all(&dir).unwrap();
                symlink(&dir, class.join(name)).unwrap();
            }
        }
        fs::write(class.join(lower).join(format!("upper_{upper}")), "").unwrap();
        fs::write(class.join(upper).join(format!("lower_{lower}")), "").unwrap();
    }
}

fn default_route(host: &FakeHost, interface: &str) {
    host.file(
        "proc/net/route",
        &format!("Iface\tDestination\n{interface}\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"),
    );
}

#[test]
fn a_port_of_a_bridge_stays_whoever_has_the_address() {
    let host = host();
    default_route(&host, "eno1");
    assert!(uses(&host).is_empty(), "the route is another one's");
    connect(&host, "eth0 < br0");
    assert_eq!(uses(&host), [format!("{NIC} is eth0, part of br0")]);
    connect(&host, "vnet3 < br0");
    let tap = host.paths.sysfs.join("class/net/vnet3/tun_flags");
    fs::write(tap, "0x1002\n").unwrap();
    let said = "eth0, part of br0; vnet3, connected to it, is a tap device, as VMs have";
    assert_eq!(uses(&host), [format!("{NIC} is {said}")]);
    // The address is on a leaf on the other side of the bridge.
    connect(&host, "veth7 < br0");
    default_route(&host, "veth7");
    let said = "eth0, part of br0; veth7, connected to it, carries a default route";
    assert_eq!(uses(&host), [format!("{NIC} is {said}")]);
}

#[test]
fn the_far_end_of_a_veth_pair_is_connected_and_a_number_of_another_namespace_is_not() {
    let host = host();
    connect(&host, "eth0 < br0, veth0 < br0, veth1 < br1");
    default_route(&host, "br1");
    let class = host.paths.sysfs.join("class/net");
    let number = |name: &str, own: &str, link: &str| {
        fs::write(class.join(name).join("ifindex"), own).unwrap();
        fs::write(class.join(name).join("iflink"), link).unwrap();
    };
    let port = format!("{NIC} is eth0, part of br0");
    number("veth0", "5", "6");
    number("veth1", "6", "9");
    assert_eq!(uses(&host), [port.as_str()]);
    number("veth1", "6", "5");
    let said = "; br1, connected to it, carries a default route";
    assert_eq!(uses(&host), [port + said]);
}

#[test]
fn a_port_that_only_its_master_names_stays() {
    let host = host();
    let nic = host.paths.sysfs.join("class/net/eth0");
    symlink("../../../../virtual/net/ovs-system", nic.join("master")).unwrap();
    assert_eq!(uses(&host), [format!("{NIC} is eth0, part of ovs-system")]);
}

#[test]
fn a_card_below_a_pppoe_session_stays() {
    let host = host();
    host.file(
        "proc/net/pppoe",
        "Id       Address              Device\n00000001 52:54:00:12:34:56     eth0\n",
    );
    let said = "is eth0, which carries a PPPoE session";
    assert_eq!(uses(&host), [format!("{NIC} {said}")]);
}

#[test]
fn a_vm_on_demand_takes_no_port_of_a_bridge() {
    let host = host();
    connect(&host, "eth0 < br0");
    host.groups(
        r#"{"groups": [{"name": "nic", "bind": "demand", "rules": [{"slot": "02:00.0"}]}]}"#,
    );
    let asked = [crate::pools::request::DeviceRequest::group("nic", 1)];
    let found = crate::allocation::fit(
        &host.paths,
        &asked,
        &crate::pools::request::Placement::default(),
    )
    .unwrap();
    let blocked: Vec<String> = found.requests[0]
        .blocked
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(
        !found.fits && blocked[0].contains("eth0, part of br0"),
        "{blocked:?}"
    );
}

#[test]
fn a_card_whose_packets_a_program_receives_is_named_and_free() {
    let host = host();
    let nic = host.paths.sysfs.join("class/net/eth0");
    fs::write(nic.join("ifindex"), "4\n").unwrap();
    let socket = |index: u32| {
        let table = format!(
            "sk               RefCnt Type Proto  Iface R Rmem   User   Inode\n\
             0000000000000000 3      3    0003   {index}     1 0      0      28273\n"
        );
        host.file("proc/net/packet", &table);
        assert!(uses(&host).is_empty());
        doubts(&host.paths, &host.scan()).unwrap()
    };
    // A socket for all interfaces has the index 0.
    assert!(socket(0).is_empty() && socket(5).is_empty());
    let said = "is eth0, whose packets a program receives (/proc/net/packet)";
    assert_eq!(socket(4), [format!("{NIC} {said}")]);
}
