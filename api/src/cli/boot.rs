//! `gantry boot`: repeats what a reboot of the host undid.

use clap::Args;
use gantry_resources::base::{HostBdf, HostPaths};
use gantry_resources::inventory::{HostDevice, scan};
use gantry_resources::moving::{BindRequest, ChildWriter, detach};
use gantry_resources::pools::{Bind, Groups, Tenants};
use gantry_resources::tenants::restore_tenants;

use crate::output::print;
use crate::report::Failure;
use crate::signals::SignalsHeld;

#[derive(Debug, Args)]
#[command(after_help = "\
Makes the virtual functions of groups with \"bind\": \"boot\", and binds the devices of these groups and of \
tenants to vfio-pci. Gives the device nodes and locks of each tenant's devices to its user. A device that the \
host itself uses stays with its driver, and is named.

Run it as root after the host has booted; running it again does no harm. `gantry device persist --by systemd` \
prints a unit that runs it.

Example: gantry boot")]
pub struct BootArgs {}

pub fn boot(_: &BootArgs, paths: &HostPaths) -> Result<(), Failure> {
    let _whole = SignalsHeld::new();
    let writer = ChildWriter::default();
    super::reap_or_warn(paths);
    let mut failed = Vec::new();
    // Virtual functions first: they may have to be bound.
    failed.extend(super::group::activate::at_boot(paths).err());
    let groups = Groups::load(paths)?;
    let devices = scan(paths)?;
    let tenants = Tenants::load(paths)?;
    let wanted = |device: &&HostDevice| is_wanted(device, &groups, &tenants, &devices);
    for device in devices.iter().filter(wanted) {
        let before = device.driver.as_deref().unwrap_or("no driver");
        match bind(paths, &writer, device.bdf) {
            Ok(moved) => print(|out| match moved {
                true => writeln!(out, "{}: {before} -> vfio-pci", device.bdf),
                false => writeln!(out, "{}: already with vfio-pci", device.bdf),
            })?,
            // A device that fails does not stop the others.
            Err(failure) => failed.push(failure),
        }
    }
    failed.extend(restore_tenants(paths).map_err(Failure::host).err());
    match failed.pop() {
        None => Ok(()),
        Some(last) => {
            failed
                .iter()
                .for_each(|failure| tracing::error!("{failure}"));
            Err(last)
        }
    }
}

/// Whether a device must be bound to vfio-pci and is not. Other hardware at a tenant's address is left alone;
/// `restore_tenants` reports it.
fn is_wanted(device: &HostDevice, groups: &Groups, tenants: &Tenants, all: &[HostDevice]) -> bool {
    let of_boot = groups
        .group_of(device)
        .is_some_and(|group| group.bind == Bind::Boot);
    let granted = tenants
        .owner_of(device.bdf)
        .is_some_and(|tenant| tenant.may_have(device.bdf, all).is_ok());
    (of_boot || granted) && !device.on_vfio()
}

/// Binds a device with its IOMMU group. False if it was bound already.
fn bind(paths: &HostPaths, writer: &ChildWriter, bdf: HostBdf) -> Result<bool, Failure> {
    let report = detach(paths, writer, &BindRequest::of(&[bdf]))?;
    Ok(report.moved.contains(&bdf))
}
