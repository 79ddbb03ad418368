//! What is read of devices, and of those that come and go meanwhile.

use super::*;
use crate::fixture::{Fake, FakeHost, bdf};
use crate::inventory::device::{DeviceState, is_vfio_driver};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn a_device_is_read_with_everything_sysfs_says() {
    let host = FakeHost::new(&[
        Fake::nvme("0000:01:00.0", 12)
            .driver("nvme")
            .with("numa_node", "1")
            .with("nvme/nvme0/serial", "gantry-0001     "),
        Fake::nvme("0000:02:00.0", 13)
            .class(0x03_00_00)
            .with("sriov_totalvfs", "7")
            .with("sriov_numvfs", "2")
            .with("boot_vga", "1"),
    ]);
    let nvme = host.read("0000:01:00.0");
    assert_eq!(nvme.id.to_string(), "1b36:0010");
    assert_eq!(nvme.subsystem.unwrap().to_string(), "1af4:1100");
    assert_eq!(nvme.class.to_string(), "010802");
    assert_eq!(
        (nvme.revision, nvme.numa_node, nvme.iommu_group),
        (Some(2), Some(1), Some(12))
    );
    assert_eq!(nvme.serial.as_deref(), Some("gantry-0001"));
    assert_eq!(
        (nvme.driver.as_deref(), nvme.driver_override.as_deref()),
        (Some("nvme"), None)
    );
    assert_eq!((nvme.state(), nvme.node), (DeviceState::Attached, None));
    let nic = host.read("0000:02:00.0");
    assert_eq!(
        nic.sriov,
        Some(Sriov {
            total: 7,
            active: 2
        })
    );
    assert_eq!((nic.numa_node, nic.boot_vga), (None, true));
    assert_eq!(
        (nic.state(), nic.node),
        (DeviceState::Detached, Some(NodeAccess::Ready))
    );
}

#[test]
fn a_virtual_function_knows_its_physical_one() {
    let host = FakeHost::new(&[Fake::nvme("0000:01:00.0", 1), Fake::nvme("0000:01:10.0", 2)]);
    std::os::unix::fs::symlink(
        "../0000:01:00.0",
        host.dir(bdf("0000:01:10.0")).join("physfn"),
    )
    .unwrap();
    assert_eq!(host.read("0000:01:10.0").physfn, Some(bdf("0000:01:00.0")));
}

#[test]
fn a_host_without_iommu_and_a_device_without_driver_are_read() {
    let host = FakeHost::new(&[Fake::nvme("0000:01:00.0", 1).no_group().unbound()]);
    let device = host.read("0000:01:00.0");
    assert_eq!(
        (device.iommu_group, device.state()),
        (None, DeviceState::Unbound)
    );
    fs::create_dir_all(host.paths.dev.join("vfio")).unwrap();
    host.bind(device.bdf, Some("vfio-pci"));
    assert_eq!(host.read("0000:01:00.0").node, None);
}

#[test]
fn the_vfio_node_may_be_missing() {
    let host = FakeHost::new(&[Fake::nvme("0000:01:00.0", 12)]);
    fs::remove_file(host.paths.vfio_group(12)).unwrap();
    assert_eq!(host.read("0000:01:00.0").node, Some(NodeAccess::Missing));
}

#[test]
fn devices_come_in_the_order_of_their_addresses() {
    let addresses = [
        "10000:00:00.0",
        "0000:02:00.1",
        "0000:02:00.0",
        "0000:01:00.0",
        "0001:00:00.0",
    ];
    let devices: Vec<Fake> = addresses
        .iter()
        .map(|address| Fake::nvme(address, 1))
        .collect();
    let host = FakeHost::new(&devices);
    let found: Vec<String> = host
        .scan()
        .iter()
        .map(|device| device.bdf.to_string())
        .collect();
    assert_eq!(
        found,
        [
            "0000:01:00.0",
            "0000:02:00.0",
            "0000:02:00.1",
            "0001:00:00.0",
            "10000:00:00.0"
        ]
    );
}

#[test]
fn a_device_that_comes_and_goes_never_fails_a_scan() {
    let host = FakeHost::new(&[Fake::nvme("0000:01:00.0", 1)]);
    let flicker = Fake::nvme("0000:02:00.0", 2).with("nvme/nvme0/serial", "x");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..200 {
                host.add(&flicker);
                host.remove(flicker.bdf);
            }
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            let seen = scan(&host.paths).unwrap();
            assert!(seen.iter().any(|device| device.bdf == bdf("0000:01:00.0")));
        }
    });
    let error = HostDevice::read(&host.paths, flicker.bdf).unwrap_err();
    assert!(
        error.to_string().contains("no PCI device 0000:02:00.0"),
        "{error}"
    );
}

#[test]
fn a_host_without_sysfs_is_said_to_have_none() {
    let paths = HostPaths::under(Path::new("/nonexistent"));
    let error = scan(&paths).unwrap_err().to_string();
    assert!(
        error.contains("/nonexistent/sys/bus/pci/devices"),
        "{error}"
    );
}

#[test]
fn variant_drivers_of_vfio_are_known() {
    for (name, vfio) in [
        ("vfio-pci", true),
        ("mlx5_vfio_pci", true),
        ("nvgrace-gpu-vfio-pci", true),
        ("pci-stub", false),
        ("nvme", false),
        ("notvfio-pci", false),
    ] {
        assert_eq!(is_vfio_driver(name), vfio, "{name}");
    }
}

#[test]
fn json_shows_ids_as_people_write_them() {
    let host = FakeHost::new(&[Fake::nvme("0000:01:00.0", 12)]);
    let json = serde_json::to_value(host.read("0000:01:00.0")).unwrap();
    assert_eq!(
        (&json["bdf"], &json["id"]),
        (&"0000:01:00.0".into(), &"1b36:0010".into())
    );
    assert_eq!(
        (&json["class"], &json["lease"]),
        (&"010802".into(), &"free".into())
    );
}

#[test]
fn a_cdev_stands_in_for_the_vfio_node_that_is_missing() {
    let host = FakeHost::new(&[Fake::nvme("0000:01:00.0", 12)]);
    fs::remove_file(host.paths.vfio_group(12)).unwrap();
    host.file(
        "sys/bus/pci/devices/0000:01:00.0/vfio-dev/vfio3/dev",
        "511:3",
    );
    host.file("dev/vfio/vfio", "");
    host.file("dev/vfio/14", "");
    host.file("dev/vfio/devices/vfio3", "");
    assert_eq!(host.read("0000:01:00.0").node, Some(NodeAccess::Ready));
}
