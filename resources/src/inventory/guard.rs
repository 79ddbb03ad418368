//! Devices that the host itself needs: disks in use, its network, the console display, devices that programs have
//! open.

mod addresses;
mod blocks;
mod claim;
mod console;
mod framebuffer;
mod graph;
mod interfaces;
mod mounts;
mod network;
mod nodes;
mod served;
mod session;
mod storage;
mod uses;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;

use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::inventory::device::HostDevice;
use network::Network;
use storage::Storage;
pub(crate) use uses::{Guarded, HostUse};

/// The host's uses of these devices, one line each; empty if they can be detached.
pub(crate) fn host_uses(paths: &HostPaths, devices: &[HostDevice]) -> io::Result<Vec<Guarded>> {
    uses_with(paths, devices, &addresses::addressed(paths)?)
}

/// Effects of detaching that are no reason to refuse it: one sentence each.
pub(crate) fn doubts(paths: &HostPaths, devices: &[HostDevice]) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for device in devices {
        let dir = fs::canonicalize(paths.pci_device(device.bdf))?;
        for interface in network::listened_to(paths, &dir)? {
            found.push(format!(
                "{} is {interface}, whose packets a program receives (/proc/net/packet)",
                device.bdf
            ));
        }
    }
    Ok(found)
}

/// [`host_uses`], with the interfaces that have an address.
fn uses_with(
    paths: &HostPaths,
    devices: &[HostDevice],
    addressed: &BTreeMap<String, IpAddr>,
) -> io::Result<Vec<Guarded>> {
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    let storage = Storage::read(paths)?;
    let network = Network::read(paths, addressed)?;
    let framebuffers = framebuffer::owners(&sysfs::table(&paths.proc.join("iomem"))?);
    let seats = console::Consoles::read(paths)?;
    let mut uses = Vec::new();
    let mut idle = Vec::new();
    for device in devices {
        let dir = fs::canonicalize(paths.pci_device(device.bdf))?;
        let mut own = Vec::new();
        if device.boot_vga {
            own.push(HostUse::ConsoleDisplay);
        }
        if framebuffers.contains(&device.bdf) && !device.boot_vga {
            own.push(HostUse::Framebuffer);
        }
        own.extend(seats.uses(&dir)?);
        if let Some(driver) = device.driver.clone().filter(|_| !device.on_vfio())
            && network::is_elsewhere(&dir)?
        {
            own.push(HostUse::OutOfSight { driver });
        }
        own.extend(storage.uses(paths, &dir));
        own.extend(network.uses(&dir));
        let bdf = device.bdf;
        if own.is_empty() && !device.on_vfio() {
            idle.push((bdf, dir));
        }
        uses.extend(own.into_iter().map(|host_use| Guarded { bdf, host_use }));
    }
    // Read once for all of them, since every process is examined; and only for devices that have no other use.
    let open = storage.kept_open(paths, &idle);
    uses.extend(open.map(|(bdf, host_use)| Guarded { bdf, host_use }));
    uses.sort_by_key(|one| devices.iter().position(|device| device.bdf == one.bdf));
    Ok(uses)
}

#[cfg(test)]
mod tests;
