//! What the host uses, told by the device and the reason.

use super::*;
use crate::fixture::{Fake, FakeHost, bdf};

const DISK: &str = "0000:01:00.0";

/// A disk with a partition, and a NIC.
fn host() -> FakeHost {
    let host = FakeHost::new(&[
        Fake::nvme(DISK, 1).driver("nvme"),
        Fake::nvme("0000:02:00.0", 2)
            .class(0x02_00_00)
            .driver("igb"),
        Fake::nvme("0000:03:00.0", 3).driver("nvme"),
    ]);
    let disk = host.child(bdf(DISK), "nvme/nvme0/nvme0n1", "class/block/nvme0n1");
    fs::write(disk.join("dev"), "259:0\n").unwrap();
    let partition = host.child(
        bdf(DISK),
        "nvme/nvme0/nvme0n1/nvme0n1p1",
        "class/block/nvme0n1p1",
    );
    fs::write(partition.join("dev"), "259:1\n").unwrap();
    host.child(bdf("0000:02:00.0"), "net/eth0", "class/net/eth0");
    host
}

fn uses(host: &FakeHost) -> Vec<String> {
    host_uses(&host.paths, &host.scan())
        .unwrap()
        .iter()
        .map(Guarded::to_string)
        .collect()
}

#[test]
fn an_idle_host_needs_nothing() {
    assert!(uses(&host()).is_empty());
}

#[test]
fn a_host_that_does_not_say_what_is_mounted_is_not_taken_for_idle() {
    let host = host();
    fs::remove_file(host.paths.proc.join("self/mountinfo")).unwrap();
    let error = host_uses(&host.paths, &host.scan())
        .unwrap_err()
        .to_string();
    assert!(error.contains("proc/self/mountinfo"), "{error}");
}

#[test]
fn a_mounted_partition_keeps_its_disk() {
    let host = host();
    host.file(
        "proc/self/mountinfo",
        "22 1 0:21 / /proc rw,nosuid shared:5 - proc proc rw\n\
         29 1 259:1 / /srv/my\\040data rw,relatime shared:1 - ext4 /dev/root rw\n",
    );
    assert_eq!(
        uses(&host),
        [format!(
            "{DISK} holds nvme0n1p1, which is mounted at /srv/my data"
        )]
    );
}

#[test]
fn a_btrfs_is_known_by_its_source() {
    let host = host();
    host.file(
        "proc/self/mountinfo",
        "29 1 0:33 /@ / rw shared:1 - btrfs /dev/nvme0n1p1 rw,subvolid=256\n",
    );
    assert_eq!(
        uses(&host),
        [format!("{DISK} holds nvme0n1p1, which is mounted at /")]
    );
}

#[test]
fn swap_and_volumes_keep_their_disk() {
    let host = host();
    host.file(
        "proc/swaps",
        "Filename\tType\tSize\n/dev/nvme0n1p1  partition\t975868\n",
    );
    fs::create_dir_all(host.dir(bdf(DISK)).join("nvme/nvme0/nvme0n1/holders/dm-0")).unwrap();
    assert_eq!(
        uses(&host),
        [
            format!("{DISK} holds nvme0n1, which is part of dm-0"),
            format!("{DISK} holds nvme0n1p1, which the host swaps to"),
        ]
    );
}

#[test]
fn a_namespace_with_several_paths_keeps_all_its_controllers() {
    let host = host();
    let subsystem = host
        .paths
        .sysfs
        .join("devices/virtual/nvme-subsystem/nvme-subsys0");
    let namespace = subsystem.join("nvme9n1");
    fs::create_dir_all(&namespace).unwrap();
    fs::write(namespace.join("dev"), "259:9\n").unwrap();
    std::os::unix::fs::symlink(&namespace, host.paths.sysfs.join("class/block/nvme9n1")).unwrap();
    for (device, name) in [(DISK, "nvme0"), ("0000:03:00.0", "nvme1")] {
        let controller = host.dir(bdf(device)).join("nvme").join(name);
        fs::create_dir_all(&controller).unwrap();
        std::os::unix::fs::symlink(&controller, subsystem.join(name)).unwrap();
    }
    host.file(
        "proc/self/mountinfo",
        "29 1 259:9 / / rw - ext4 /dev/nvme9n1 rw\n",
    );
    let said = ["0000:01:00.0", "0000:03:00.0"]
        .map(|bdf| format!("{bdf} holds nvme9n1, which is mounted at /"));
    assert_eq!(uses(&host), said);
}

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
    std::os::unix::fs::symlink(&dir, host.paths.sysfs.join("class/net/bond0")).unwrap();
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
    assert!(said("eth1").is_empty());
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
        std::os::unix::fs::symlink(&dir, host.paths.sysfs.join("class/net").join(upper)).unwrap();
    }
    assert_eq!(
        uses(&host),
        ["0000:02:00.0 is eth0, part of br0.7, which carries a default route"]
    );
}

#[test]
fn the_nic_of_a_session_and_the_device_of_the_framebuffer_stay() {
    let host = host();
    host.file(
        "proc/net/route",
        "Iface\tDestination\n\
         eth0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0\n",
    );
    host.file(
        "proc/net/tcp",
        "  sl  local_address rem_address   st\n   0: 0100000A:0016 0200000A:D431 01 0:0\n",
    );
    host.file(
        "proc/iomem",
        "c0000000-cfffffff : 0000:03:00.0\n  c0000000-c07e8fff : BOOTFB\n",
    );
    assert_eq!(
        uses(&host),
        [
            "0000:02:00.0 is eth0, which somebody is logged in over (SSH)",
            "0000:03:00.0 holds the framebuffer that the console is drawn in (/proc/iomem)",
        ]
    );
}

#[test]
fn the_console_display_stays() {
    let host = FakeHost::new(&[Fake::nvme("0000:04:00.0", 4)
        .class(0x03_00_00)
        .with("boot_vga", "1")]);
    assert_eq!(
        uses(&host),
        ["0000:04:00.0 is the display that the firmware started (boot_vga)"]
    );
}

#[test]
fn only_block_devices_are_tried() {
    let host = host();
    host.file("dev/nvme0n1", "a file that happens to be there");
    assert_eq!(claim(&host.paths.dev.join("nvme0n1"), "nvme0n1"), None);
    assert_eq!(claim(Path::new("/dev/null"), "nvme0n1"), None);
    assert_eq!(claim(Path::new("/nonexistent"), "nvme0n1"), None);
}

#[test]
fn this_machines_own_files_are_read() {
    let mounts = mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap());
    assert!(
        mounts
            .iter()
            .any(|mount| mount.at == "/" && mount.number.contains(':'))
    );
    assert!(host_uses(&HostPaths::default(), &[]).unwrap().is_empty());
}

#[test]
fn a_claim_that_cannot_be_asked_for_keeps_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let node = folder.path().join("nvme0n1");
    assert_eq!(claim(&node, "nvme0n1"), None, "no node, nobody to claim it");
    std::os::unix::fs::symlink(&node, &node).unwrap();
    let used = claim(&node, "nvme0n1");
    assert!(matches!(used, Some(HostUse::Unsure { .. })), "{used:?}");
}

#[test]
fn a_card_whose_interface_is_out_of_sight_stays() {
    let card = |address| Fake::nvme(address, 2).class(0x02_00_00);
    let host = FakeHost::new(&[card("02:00.0").driver("ixgbevf"), card("02:00.1")]);
    host.file("proc/self/mountinfo", "");
    let said = "0000:02:00.0 is a network card of ixgbevf with no interface in sight";
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
    host.file("proc/self/mountinfo", "");
    let below = host.dir(bdf("02:00.0")).join("virtio0");
    fs::create_dir_all(&below).unwrap();
    assert_eq!(uses(&host).len(), 1);
    fs::create_dir_all(below.join("net/eth7")).unwrap();
    assert!(uses(&host).is_empty());
}
