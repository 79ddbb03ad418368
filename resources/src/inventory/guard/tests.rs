//! What the host uses, told by the device and the reason.

mod network;

use std::os::unix::fs::symlink;

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
            format!("{DISK} holds nvme0n1, which backs dm-0"),
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
    symlink(&namespace, host.paths.sysfs.join("class/block/nvme9n1")).unwrap();
    for (device, name) in [(DISK, "nvme0"), ("0000:03:00.0", "nvme1")] {
        let controller = host.dir(bdf(device)).join("nvme").join(name);
        fs::create_dir_all(&controller).unwrap();
        symlink(&controller, subsystem.join(name)).unwrap();
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
            "0000:02:00.0 is eth0, which carries an SSH session",
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
fn this_machines_own_files_are_read() {
    let paths = HostPaths::default();
    let blocks = blocks::Blocks::read(&paths).unwrap();
    mounts::Mounts::read(&paths, &blocks).unwrap();
    assert!(host_uses(&paths, &[]).unwrap().is_empty());
}

/// A block device that hangs below no device: loop, device-mapper.
fn virtual_block(host: &FakeHost, name: &str, number: &str) -> std::path::PathBuf {
    let dir = host.paths.sysfs.join("devices/virtual/block").join(name);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("dev"), number).unwrap();
    symlink(&dir, host.paths.sysfs.join("class/block").join(name)).unwrap();
    dir
}

fn put(path: std::path::PathBuf, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

#[test]
fn a_loop_device_keeps_the_disk_that_backs_it() {
    let host = host();
    let loop0 = virtual_block(&host, "loop0", "7:0\n");
    put(loop0.join("loop/backing_file"), "/dev/nvme0n1\n");
    assert_eq!(
        uses(&host),
        [format!("{DISK} holds nvme0n1, which backs loop0")]
    );
    host.file(
        "proc/self/mountinfo",
        "29 1 7:0 / /mnt rw - ext2 /dev/loop0 rw\n",
    );
    let said = format!("{DISK} holds nvme0n1; it backs loop0, which is mounted at /mnt");
    assert_eq!(uses(&host), [said]);
    // A compressed disk in memory that writes back to a partition.
    let zram = virtual_block(&host, "zram0", "252:0\n");
    put(zram.join("backing_dev"), "/dev/nvme0n1p1\n");
    let zram = format!("{DISK} holds nvme0n1p1, which backs zram0");
    assert_eq!(uses(&host).last(), Some(&zram));
    fs::remove_dir_all(host.paths.sysfs.join("devices/virtual/block/zram0")).unwrap();
    // A loop device that has a file of the same name.
    host.file("proc/self/mountinfo", "");
    put(loop0.join("loop/backing_file"), "/srv/nvme0n1\n");
    assert!(uses(&host).is_empty());
}

#[test]
fn the_use_of_a_volume_is_told_across_what_lies_between() {
    let host = host();
    let partition = host.dir(bdf(DISK)).join("nvme/nvme0/nvme0n1/nvme0n1p1");
    fs::create_dir_all(partition.join("holders/md0")).unwrap();
    // A partition of an array is a block device of its own.
    let md = virtual_block(&host, "md0", "9:0\n");
    fs::create_dir_all(md.join("md0p1/holders/dm-1")).unwrap();
    symlink(md.join("md0p1"), host.paths.sysfs.join("class/block/md0p1")).unwrap();
    let volume = virtual_block(&host, "dm-1", "253:1\n");
    put(volume.join("dm/name"), "vg-root\n");
    host.file(
        "proc/self/mountinfo",
        "29 1 0:33 / / rw - btrfs /dev/mapper/vg-root rw\n\
         30 1 0:33 /home /home rw - btrfs /dev/mapper/vg-root rw\n",
    );
    let said = "nvme0n1p1; it backs dm-1 (vg-root), which is mounted at / and 1 other places";
    assert_eq!(uses(&host), [format!("{DISK} holds {said}")]);
}

#[test]
fn every_disk_of_a_file_system_with_several_stays() {
    let host = host();
    let second = host.child(bdf("03:00.0"), "nvme/nvme1/nvme1n1", "class/block/nvme1n1");
    put(second.join("dev"), "259:5\n");
    for disk in ["nvme0n1", "nvme1n1"] {
        put(
            host.paths.sysfs.join("fs/btrfs/1f2e/devices").join(disk),
            "",
        );
    }
    let told = |words: &str| {
        [(DISK, "nvme0n1"), ("0000:03:00.0", "nvme1n1")]
            .map(|(bdf, disk)| format!("{bdf} holds {disk}, which {words}"))
    };
    assert_eq!(uses(&host), told("backs the btrfs file system 1f2e"));
    host.file(
        "proc/self/mountinfo",
        "29 1 0:33 / /srv rw - btrfs /dev/nvme0n1 rw\n",
    );
    assert_eq!(uses(&host), told("is mounted at /srv"));
    fs::remove_dir_all(host.paths.sysfs.join("fs/btrfs")).unwrap();
    host.file(
        "proc/self/mountinfo",
        "29 1 0:33 / /srv rw - bcachefs /dev/nvme0n1:/dev/nvme1n1 rw\n",
    );
    assert_eq!(uses(&host), told("is mounted at /srv"));
}

#[test]
fn a_disk_that_a_target_serves_stays() {
    let configfs = "sys/kernel/config";
    for (object, attribute, value, by) in [
        (
            "target/core/iblock_0/disk1",
            "udev_path",
            "/dev/nvme0n1p1",
            "LIO backstore disk1",
        ),
        (
            "target/core/fileio_0/disk1",
            "info",
            "Status: ACTIVATED\n TCM FILEIO ID: 0 File: /dev/nvme0n1p1 Size: 5 Mode: O_DSYNC",
            "LIO backstore disk1",
        ),
        (
            "nvmet/subsystems/nqn.x/namespaces/1",
            "device_path",
            "/dev/nvme0n1p1",
            "NVMe target nqn.x",
        ),
    ] {
        let host = host();
        host.file(&format!("{configfs}/{object}/{attribute}"), value);
        let said = format!("{DISK} holds nvme0n1p1, which is served by {by}");
        assert_eq!(uses(&host), [said]);
        host.file(&format!("{configfs}/{object}/enable"), "0\n");
        assert!(uses(&host).is_empty(), "{object} has not opened it");
    }
    let host = host();
    let controller = host.dir(bdf(DISK)).join("nvme/nvme0");
    put(controller.join("dev"), "240:0\n");
    fs::create_dir_all(host.paths.sysfs.join("class/nvme")).unwrap();
    symlink(&controller, host.paths.sysfs.join("class/nvme/nvme0")).unwrap();
    host.file(
        &format!("{configfs}/nvmet/subsystems/nqn.x/passthru/device_path"),
        "/dev/nvme0",
    );
    let said = format!("{DISK} holds nvme0, which is served by NVMe target nqn.x");
    assert_eq!(uses(&host), [said]);
}

#[test]
fn what_a_process_keeps_open_stays() {
    let host = host();
    host.file("proc/812/comm", "qemu\n");
    fs::create_dir_all(host.paths.proc.join("812/fd")).unwrap();
    let fd = host.paths.proc.join("812/fd/9");
    let opens = |node: &str| {
        let _ = fs::remove_file(&fd);
        symlink(node, &fd).unwrap();
    };
    // A file of this name, and another disk.
    for other in ["/srv/dev/nvme0n1", "/dev/nvme0n10", "/dev/shm/nvme0n1"] {
        opens(other);
        assert!(uses(&host).is_empty(), "{other}");
    }
    opens("/dev/nvme0n1p1");
    let said = "holds nvme0n1p1, which process 812 (qemu) has open";
    assert_eq!(uses(&host), [format!("{DISK} {said}")]);
    // A GPU has no block device.
    let card = host.child(bdf("03:00.0"), "drm/renderD128", "class/renderD128");
    put(card.join("dev"), "226:128\n");
    put(card.join("uevent"), "MAJOR=226\nDEVNAME=dri/renderD128\n");
    fs::create_dir_all(host.paths.sysfs.join("class/drm")).unwrap();
    symlink(&card, host.paths.sysfs.join("class/drm/renderD128")).unwrap();
    opens("/dev/dri/renderD128");
    let said = "0000:03:00.0 holds dri/renderD128, which process 812 (qemu) has open";
    assert_eq!(uses(&host), [said]);
    host.file(
        "proc/driver/nvidia/gpus/0000:03:00.0/information",
        "Model: \t X\nDevice Minor: \t 4\n",
    );
    opens("/dev/nvidia4");
    let said = "0000:03:00.0 holds nvidia4, which process 812 (qemu) has open";
    assert_eq!(uses(&host), [said]);
}
