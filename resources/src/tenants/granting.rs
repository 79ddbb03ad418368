//! Grants devices to tenants.

use super::devices::{Devices, are_of_one_kind};
use super::hand_over::Owner;
use super::{TenantError, lock_owners};
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::{DeviceName, is_name};
use crate::inventory::card::{Card, cards};
use crate::inventory::device::HostDevice;
use crate::inventory::mdev::{MdevDevice, Mdevs};
use crate::inventory::scan::scan;
use crate::making::sriov::granted::{self, GrantedRecord};
use crate::making::sriov::{HostAccess, VfLinks};
use crate::pools::group::{Groups, ResourceGroup};
use crate::pools::tenant::{Tenant, Tenants, definitions};

/// A grant of devices to a tenant.
#[derive(Clone, Copy, Debug)]
pub struct Grant<'a> {
    /// The devices.
    pub devices: GrantedDevices<'a>,
    /// The tenant's group to add them to; the group of the tenant's name if none.
    pub group: Option<&'a str>,
    /// Devices to take although the host uses them, each by its address.
    pub overrides: &'a [HostBdf],
}

/// Which devices a tenant gets.
#[derive(Clone, Copy, Debug)]
pub enum GrantedDevices<'a> {
    /// These, of one kind: PCI functions with all endpoints of their IOMMU groups, or mediated devices that a host
    /// group makes ahead.
    Named(&'a [DeviceName]),
    /// The first free devices of a host group.
    Free {
        /// The group.
        from: &'a str,
        /// How many.
        count: usize,
    },
}

/// Gives devices to a tenant. PCI functions are bound to vfio-pci.
///
/// Grants run one at a time, so that each sees which devices the one before took.
pub fn grant(
    host: &HostPaths,
    access: HostAccess<'_>,
    name: &str,
    wanted: &Grant<'_>,
) -> Result<Vec<DeviceName>, TenantError> {
    if let GrantedDevices::Named(names) = wanted.devices {
        are_of_one_kind(names)?;
    }
    let _owners = lock_owners(host)?;
    let tenants = Tenants::load(host)?;
    let tenant = tenants.find(name)?;
    let group = wanted.group.unwrap_or(name);
    if !is_name(group) {
        return Err(TenantError::Name(group.to_owned()));
    }
    let names = match wanted.devices {
        GrantedDevices::Named(names) => names.to_vec(),
        GrantedDevices::Free { from, count } => free(host, from, count)?,
    };
    let owner = Owner::of(host, tenant)?;
    let devices = Devices::read(host, &names)?;
    not_of_others(&tenants, tenant, &devices.names())?;
    devices.are_available(host, &tenants)?;
    // The settings now: the tenant's guests may change them.
    let mut settings = Vec::new();
    for device in devices.functions() {
        let (bdf, links) = (device.bdf, access.links);
        let record = GrantedRecord::of(host, links, bdf).map_err(TenantError::settings(bdf))?;
        settings.extend(record.map(|record| (bdf, record)));
    }
    let scope = definitions(host, name);
    // Refuse a wrong group before a device moves. The lock of the files must be free meanwhile.
    drop(devices.add_to(&scope, group)?);
    devices.detach(host, access, &names, wanted.overrides)?;
    owner.make_dirs(host, name)?;
    owner.open_iommufd(host)?;
    // From here on the devices are the tenant's: `restore_tenants` completes a grant that was cut short.
    devices.add_to(&scope, group)?.save()?;
    let names = devices.names();
    names
        .iter()
        .try_for_each(|name| owner.take_over(host, *name))?;
    for (bdf, record) in settings {
        record.keep(host, bdf).map_err(TenantError::settings(bdf))?;
    }
    granted::restore_all(host, access.links);
    Ok(names)
}

/// The first free devices of a host group: all functions of cards, or the mediated devices that it makes ahead.
fn free(host: &HostPaths, from: &str, count: usize) -> Result<Vec<DeviceName>, TenantError> {
    let groups = Groups::load(host)?;
    let ahead = groups.find(from)?.vgpu.as_ref().map(|spec| &spec.uuids);
    let is = |group: Option<&ResourceGroup>| group.is_some_and(|group| group.name == from);
    let idle =
        |device: &HostDevice| !device.lease.is_held() && device.quarantine_reason().is_none();
    let (all, mdevs) = (scan(host)?, Mdevs::read(host)?);
    let made = |device: &&MdevDevice| {
        let ahead = ahead.is_some_and(|ahead| ahead.contains(&device.uuid));
        let idle = !device.lease.is_held() && device.quarantine.is_none();
        ahead && idle && !mdevs.is_claimed(device.uuid) && is(groups.group_of_mdev(device))
    };
    let mut free = cards(all.iter().filter(|device| is(groups.group_of(device))));
    free.retain(|card| card.functions().all(idle));
    free.truncate(count);
    let functions = free.iter().flat_map(Card::functions);
    let mut names: Vec<DeviceName> = functions.map(|device| device.bdf.into()).collect();
    let mut found = free.len();
    if names.is_empty() {
        let uuids = mdevs.devices.iter().filter(made).take(count);
        names = uuids.map(|device| device.uuid.into()).collect();
        found = names.len();
    }
    match found == count {
        true => Ok(names),
        false => Err(TenantError::NotFree {
            group: from.to_owned(),
            count,
            found,
        }),
    }
}

/// Refuses devices that belong to other tenants.
fn not_of_others(
    tenants: &Tenants,
    tenant: &Tenant,
    devices: &[DeviceName],
) -> Result<(), TenantError> {
    for &device in devices {
        let owner = tenants.owner_of(device);
        if let Some(other) = owner.filter(|other| other.name != tenant.name) {
            let owner = other.name.clone();
            return Err(TenantError::Owned { device, owner });
        }
    }
    Ok(())
}

/// Records the settings of a tenant's virtual functions for [`granted::restore_all`]. A function whose settings cannot
/// be read stays the tenant's.
pub(super) fn keep_settings(host: &HostPaths, links: &dyn VfLinks, devices: &[HostBdf]) {
    for &bdf in devices {
        let kept = GrantedRecord::of(host, links, bdf);
        if let Err(error) = kept.and_then(|kept| kept.map_or(Ok(()), |kept| kept.keep(host, bdf))) {
            tracing::warn!(
                "the settings of {bdf} will not be restored after the tenant's guests: {error}"
            );
        }
    }
}
