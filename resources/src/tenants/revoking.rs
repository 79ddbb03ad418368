//! Revokes devices of tenants.

use std::collections::BTreeSet;

use super::hand_over::{Owner, is_closed, is_free};
use super::{TenantError, failed, lock_owners};
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::uuid::Uuid;
use crate::holding::quarantine::{copy_tenant_records, hung};
use crate::inventory::device::HostDevice;
use crate::inventory::scan::scan;
use crate::making::sriov::HostAccess;
use crate::making::sriov::granted;
use crate::moving::bind::{BindError, BindRequest, reattach};
use crate::pools::group::GroupFiles;
use crate::pools::tenant::{Tenants, definition, definitions};

/// Takes devices back from a tenant: mediated devices, which stay, and PCI functions with all endpoints of their
/// IOMMU groups, which return to their host drivers. A device that hangs stays where it is. Refused while a VM has
/// one of them.
pub fn revoke(
    host: &HostPaths,
    access: HostAccess<'_>,
    name: &str,
    devices: &[impl Copy + Into<DeviceName>],
) -> Result<Vec<DeviceName>, TenantError> {
    let _owners = lock_owners(host)?;
    let owned = Tenants::load(host)?.find(name)?.names();
    let devices: BTreeSet<DeviceName> = devices.iter().map(|device| (*device).into()).collect();
    if let Some(&device) = devices.iter().find(|device| !owned.contains(device)) {
        let name = name.to_owned();
        return Err(TenantError::NotOwned { device, name });
    }
    let all = scan(host)?;
    // A device that is gone is taken back too.
    let groups: BTreeSet<Option<u32>> = all
        .iter()
        .filter(|device| devices.contains(&device.bdf.into()) && device.iommu_group.is_some())
        .map(|device| device.iommu_group)
        .collect();
    let leaves = |name: &DeviceName| {
        let device = all.iter().find(|device| *name == device.bdf);
        devices.contains(name) || device.is_some_and(|device| groups.contains(&device.iommu_group))
    };
    let leaving: Vec<DeviceName> = owned.into_iter().filter(leaves).collect();
    // An open device would delay its host driver and its next user.
    for &device in &leaving {
        is_free(host, device)?;
        is_closed(host, device)?;
    }
    let functions: Vec<HostBdf> = leaving.iter().filter_map(|name| name.pci()).collect();
    let mdevs: Vec<Uuid> = leaving.iter().filter_map(|name| name.mdev()).collect();
    // Keep the quarantine records of the tenant's VMs.
    for &bdf in &functions {
        copy_tenant_records(host, bdf).map_err(failed(&host.state))?;
    }
    // The nodes and locks first: while the definition names the tenant, no other VM gets the device.
    let owner = Owner::host();
    leaving
        .iter()
        .try_for_each(|device| owner.take_over(host, *device))?;
    let mut files = GroupFiles::open(&definitions(host, name))?;
    files.forget(&functions);
    files.forget_mdevs(&mdevs);
    files.save()?;
    if let Some(former) = without_devices(host, name)? {
        former.close_iommufd(host)?;
    }
    for &bdf in &functions {
        if let Err(error) = granted::end(host, access.links, bdf) {
            tracing::warn!(
                "cannot restore the settings of {bdf}, which the next command tries again: {error}"
            );
        }
    }
    let present = all.iter().filter(|device| functions.contains(&device.bdf));
    let present = without_hung(host, &all, present.collect());
    let moved = to_host_drivers(host, access, &present);
    moved.map_err(|source| TenantError::NotReattached {
        tenant: name.to_owned(),
        revoked: listed(&leaving),
        devices: listed(&present),
        source: Box::new(source),
    })?;
    Ok(leaving)
}

/// The user of a tenant, unless this or another of the user's tenants has devices left.
fn without_devices(host: &HostPaths, name: &str) -> Result<Option<Owner>, TenantError> {
    let tenants = Tenants::load(host)?;
    let user = &tenants.find(name)?.file.user;
    let mut users = tenants.iter().filter(|one| one.file.user == *user);
    if users.any(|one| !one.names().is_empty()) {
        return Ok(None);
    }
    Owner::named(user, &definition(host, name)).map(Some)
}

fn listed(devices: &[impl ToString]) -> String {
    let devices: Vec<String> = devices.iter().map(ToString::to_string).collect();
    devices.join(" ")
}

fn to_host_drivers(
    host: &HostPaths,
    access: HostAccess<'_>,
    devices: &[HostBdf],
) -> Result<(), BindError> {
    if devices.is_empty() {
        return Ok(());
    }
    let request = BindRequest::of(devices);
    reattach(host, access.writer, &request).map(drop)
}

/// The devices that can be moved. A write to a device that hangs would hang too, so it stays with its IOMMU group,
/// with a warning.
fn without_hung(host: &HostPaths, all: &[HostDevice], devices: Vec<&HostDevice>) -> Vec<HostBdf> {
    let together = |one: &HostDevice, other: &HostDevice| {
        let neighbours = one.iommu_group.is_some() && one.iommu_group == other.iommu_group;
        one.bdf == other.bdf || neighbours
    };
    let mut stuck: Vec<&HostDevice> = Vec::new();
    for device in all {
        if devices.iter().any(|one| together(one, device))
            && let Some(why) = hung(host, device.bdf, device.id)
        {
            let bdf = device.bdf;
            tracing::warn!(
                "{bdf} is the host's again, but left where it is with its IOMMU group: {why}; once it answers again, `gantry device release-quarantine {bdf}` and `gantry device reattach {bdf}`"
            );
            stuck.push(device);
        }
    }
    let moves = |device: &&&HostDevice| !stuck.iter().any(|one| together(one, device));
    let moves = devices.iter().filter(moves);
    moves.map(|device| device.bdf).collect()
}
