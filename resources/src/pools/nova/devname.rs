//! `devname`: the PCI function that a network interface of the host is on.

use std::fs;
use std::path::Path;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::inventory::driver_record::DriverRecord;

/// The function of a network interface, also if gantry has taken it from its host driver. None if there is no such
/// interface, or it is not on a PCI function itself, such as a bridge.
pub(crate) fn function(paths: &HostPaths, name: &str) -> Option<HostBdf> {
    let there = fs::canonicalize(paths.sysfs.join("class/net").join(name));
    match there {
        Ok(path) => of_interface(&path),
        Err(_) => DriverRecord::of_interface(paths, name),
    }
}

/// Reads `.../0000:03:00.0/net/eth0` and `.../0000:03:00.0/virtio1/net/eth0`. The path of a USB adapter goes
/// through a PCI function too, but the adapter is another device.
fn of_interface(path: &Path) -> Option<HostBdf> {
    let mut device = path.parent()?.parent()?;
    if file_name(device)?.starts_with("virtio") {
        device = device.parent()?;
    }
    file_name(device)?.parse().ok()
}

fn file_name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

/// The network interfaces of a function.
pub(crate) fn interfaces(paths: &HostPaths, bdf: HostBdf) -> Vec<String> {
    let dir = paths.pci_device(bdf);
    let names = |dir: &Path| sysfs::entries(&dir.join("net")).unwrap_or_default();
    let mut all = names(&dir);
    let below = sysfs::entries(&dir).unwrap_or_default();
    for virtio in below.iter().filter(|name| name.starts_with("virtio")) {
        all.extend(names(&dir.join(virtio)));
    }
    all
}
