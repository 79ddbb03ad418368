//! Giving devices to tenants.

use super::hand_over::{Owner, is_closed};
use super::{TenantError, alone, vgpus};
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::uuid::Uuid;
use crate::inventory::card::{Card, cards};
use crate::inventory::device::HostDevice;
use crate::inventory::mdev::{MdevDevice, Mdevs};
use crate::inventory::scan::scan;
use crate::inventory::unavailable::{Unavailable, UnavailableDevice};
use crate::making::sriov::granted::{self, GrantedRecord};
use crate::making::sriov::{HostAccess, VfLinks};
use crate::moving::bind::{BindRequest, detach};
use crate::pools::group::{Bind, GroupChange, GroupFiles, Groups, ResourceGroup, is_name};
use crate::pools::tenant::{Tenant, Tenants, definitions};

/// What a tenant gets.
#[derive(Clone, Copy, Debug)]
pub struct Grant<'a> {
    /// The devices.
    pub devices: Granted<'a>,
    /// The tenant's group that they come into; one of the tenant's name if there is none.
    pub group: Option<&'a str>,
    /// Devices that are taken although the host uses them, each named exactly.
    pub overrides: &'a [HostBdf],
}

/// Which devices a tenant gets. One group of a tenant takes one kind of them.
#[derive(Clone, Copy, Debug)]
pub enum Granted<'a> {
    /// These PCI functions, with all endpoints of their IOMMU groups.
    Functions(&'a [HostBdf]),
    /// These mediated devices, which a group of the host's makes ahead.
    Mdevs(&'a [Uuid]),
    /// The first devices of a group of the host's that nobody has.
    Free {
        /// The group.
        from: &'a str,
        /// How many.
        count: usize,
    },
}

/// Gives devices to a tenant; PCI functions bound to vfio-pci.
///
/// One grant at a time: what is free is looked for when those before have what they wanted.
pub fn grant(
    host: &HostPaths,
    access: HostAccess<'_>,
    name: &str,
    wanted: &Grant<'_>,
) -> Result<Vec<DeviceName>, TenantError> {
    let _alone = alone(host)?;
    let tenants = Tenants::load(host)?;
    let tenant = tenants.find(name)?;
    let group = wanted.group.unwrap_or(name);
    if !is_name(group) {
        return Err(TenantError::Name(group.to_owned()));
    }
    let chosen;
    let (functions, mdevs) = match wanted.devices {
        Granted::Functions(functions) => (functions, &[][..]),
        Granted::Mdevs(mdevs) => (&[][..], mdevs),
        Granted::Free { from, count } => {
            chosen = free(host, from, count)?;
            (chosen.0.as_slice(), chosen.1.as_slice())
        }
    };
    if !mdevs.is_empty() {
        vgpus::give(host, &tenants, tenant, mdevs, group)?;
        return Ok(mdevs.iter().map(|uuid| (*uuid).into()).collect());
    }
    let given = give(host, access, &tenants, tenant, functions, wanted)?;
    Ok(given.into_iter().map(DeviceName::from).collect())
}

/// The first devices of a group that nobody has: all functions of cards, or the mediated devices that it makes ahead.
fn free(
    host: &HostPaths,
    from: &str,
    count: usize,
) -> Result<(Vec<HostBdf>, Vec<Uuid>), TenantError> {
    let groups = Groups::load(host)?;
    let ahead = groups.find(from)?.vgpu.as_ref().map(|spec| &spec.uuids);
    let is = |group: Option<&ResourceGroup>| group.is_some_and(|group| group.name == from);
    let idle = |device: &HostDevice| !device.lease.is_held() && device.kept_out().is_none();
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
    let functions: Vec<HostBdf> = functions.map(|device| device.bdf).collect();
    let uuids = mdevs.devices.iter().filter(made);
    let mdevs: Vec<Uuid> = match functions.is_empty() {
        true => uuids.map(|device| device.uuid).take(count).collect(),
        false => Vec::new(),
    };
    let found = free.len() + mdevs.len();
    match found == count {
        true => Ok((functions, mdevs)),
        false => Err(TenantError::NotFree {
            group: from.to_owned(),
            count,
            found,
        }),
    }
}

fn give(
    host: &HostPaths,
    access: HostAccess<'_>,
    tenants: &Tenants,
    tenant: &Tenant,
    functions: &[HostBdf],
    wanted: &Grant<'_>,
) -> Result<Vec<HostBdf>, TenantError> {
    let name = tenant.name.as_str();
    let owner = Owner::of(host, tenant)?;
    let all = scan(host)?;
    let devices: Vec<HostDevice> = crate::moving::bind::members(&all, functions)?;
    let addresses: Vec<HostBdf> = devices.iter().map(|device| device.bdf).collect();
    not_of_others(tenants, tenant, &addresses)?;
    if let Some(held) = devices.iter().find(|device| device.lease.is_held()) {
        return Err(TenantError::InUse(UnavailableDevice::leased(
            held.bdf,
            &held.lease,
        )));
    }
    if let Some((bdf, why)) = devices.iter().find_map(quarantined) {
        let why = Unavailable::Quarantined { why };
        return Err(TenantError::InUse(UnavailableDevice { bdf, why }));
    }
    let fresh = |device: &&HostDevice| device.on_vfio() && tenants.owner_of(device.bdf).is_none();
    let mut fresh = devices.iter().filter(fresh);
    fresh.try_for_each(|device| is_closed(host, device.bdf.into()))?;
    let request = BindRequest {
        devices: functions,
        overrides: wanted.overrides,
        dry_run: false,
    };
    // Whoever gets a function later must not find it as this tenant's guests leave it.
    let mut kept = Vec::new();
    for &bdf in &addresses {
        let one = GrantedRecord::of(host, access.links, bdf).map_err(TenantError::settings(bdf))?;
        kept.extend(one.map(|one| (bdf, one)));
    }
    let group = wanted.group.unwrap_or(name);
    // What is wrong with the group is said before a device moves; its lock must be free meanwhile.
    drop(with_devices(&definitions(host, name), group, &devices)?);
    detach(host, access.writer, &request)?;
    owner.make_dirs(host, name)?;
    // It is the tenant's from here on; should this be cut short, `put_tenants_right` does the rest.
    with_devices(&definitions(host, name), group, &devices)?.save()?;
    addresses
        .iter()
        .try_for_each(|bdf| owner.take_over(host, (*bdf).into()))?;
    for (bdf, one) in kept {
        one.keep(host, bdf).map_err(TenantError::settings(bdf))?;
    }
    granted::mend(host, access.links);
    Ok(addresses)
}

/// Refuses devices that belong to other tenants.
pub(super) fn not_of_others(
    tenants: &Tenants,
    tenant: &Tenant,
    devices: &[impl Copy + Into<DeviceName>],
) -> Result<(), TenantError> {
    for device in devices.iter().map(|device| (*device).into()) {
        let owner = tenants.owner_of(device);
        if let Some(other) = owner.filter(|other| other.name != tenant.name) {
            let owner = other.name.clone();
            return Err(TenantError::Owned { device, owner });
        }
    }
    Ok(())
}

fn quarantined(device: &HostDevice) -> Option<(HostBdf, String)> {
    Some((device.bdf, device.quarantine.clone()?))
}

/// Writes down what a tenant's virtual functions are to be set to, for [`granted::mend`]. One of which that
/// is not known is the tenant's nevertheless.
pub(super) fn keep_settings(host: &HostPaths, links: &dyn VfLinks, devices: &[HostBdf]) {
    for &bdf in devices {
        let kept = GrantedRecord::of(host, links, bdf);
        if let Err(error) = kept.and_then(|kept| kept.map_or(Ok(()), |kept| kept.keep(host, bdf))) {
            tracing::warn!("{bdf} will stay as a guest sets it: {error}");
        }
    }
}

/// A tenant's groups with these devices in one, not yet written.
fn with_devices(
    scope: &HostPaths,
    group: &str,
    devices: &[HostDevice],
) -> Result<GroupFiles, TenantError> {
    let mut files = GroupFiles::open(scope)?;
    if files.groups()?.get(group).is_none() {
        files.create(ResourceGroup::named(group))?;
    }
    let bind = Some(Bind::Boot);
    files.change(
        group,
        GroupChange {
            bind,
            ..GroupChange::default()
        },
    )?;
    files.add(group, devices)?;
    Ok(files)
}
