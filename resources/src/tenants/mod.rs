//! Tenants: users who own devices, whether they use them or not, and run VMs with them unprivileged.
//!
//! A tenant is a directory of definitions, `tenants/NAME` of the configuration directory: its user (`tenant.json`)
//! and its groups. A device that its groups name belongs to the tenant: no other VM gets it, and the tenant gets no
//! other device. The device stays bound to vfio-pci. The tenant's user owns its VFIO nodes and its lock file, so
//! that the kernel separates tenants. A boot of the host resets these owners: [`restore_tenants`] sets them
//! again.

mod devices;
mod error;
mod granting;
mod hand_over;
mod removal;
mod revoking;

use std::fs;
use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use crate::base::bdf::HostBdf;
use crate::base::config;
use crate::base::host::HostPaths;
use crate::base::name::{DeviceName, is_name};
use crate::holding::host_lock::{LeaseError, OwnersLock};
use crate::holding::maintenance::{RunningVm, running_vms};
use crate::holding::quarantine::copy_tenant_records;
use crate::holding::record::LeaseRecord;
use crate::inventory::scan::scan;
use crate::making::sriov::{Netlink, VfLinks, granted};
use crate::pools::tenant::{Tenant, TenantFile, Tenants, definition, dirs};
pub use error::TenantError;
pub use granting::{Grant, GrantedDevices, grant};
use hand_over::Owner;
use removal::FormerDirs;
pub use revoking::revoke;

/// [`restore_tenants`] for a caller who holds the owners' lock, and has read the tenants under it.
fn restore(host: &HostPaths, tenants: &Tenants) -> Result<(), TenantError> {
    restore_with(host, tenants, &Netlink::new(host))
}

pub(crate) fn restore_with(
    host: &HostPaths,
    tenants: &Tenants,
    links: &dyn VfLinks,
) -> Result<(), TenantError> {
    let all = scan(host)?;
    let restore = |tenant: &Tenant| {
        let owner = Owner::of(host, tenant)?;
        owner.make_dirs(host, &tenant.name)?;
        owner.open_iommufd(host)?;
        let mut there = Vec::new();
        let mut give = |bdf: HostBdf| {
            tenant.may_have(bdf, &all)?;
            owner.take_over(host, bdf.into())?;
            let device = all.iter().find(|device| device.bdf == bdf);
            there.extend(device.map(|device| device.bdf));
            Ok(())
        };
        let given: Vec<_> = tenant.devices().into_iter().map(&mut give).collect();
        granting::keep_settings(host, links, &there);
        // Devices that no group of the host makes do not exist.
        let mdevs = tenant.mdevs().into_iter();
        let mdevs = mdevs.filter(|uuid| host.mdev(*uuid).exists());
        let mdevs = mdevs.map(|uuid| owner.take_over(host, uuid.into()));
        // A device that fails keeps no other one away.
        all_of(given.into_iter().chain(mdevs))
    };
    let done = all_of(tenants.iter().map(restore));
    granted::restore_all(host, links);
    done
}

/// Gives every tenant its directories, nodes and lock files, after a boot of the host or a rebind of a device reset
/// their owners. The devices must be bound to vfio-pci already. The tenants are read under the lock, since another
/// command may just have changed them.
pub fn restore_tenants(host: &HostPaths) -> Result<(), TenantError> {
    let _owners = lock_owners(host)?;
    restore(host, &Tenants::load(host)?)
}

/// Takes the lock under which devices change their owners.
fn lock_owners(host: &HostPaths) -> Result<OwnersLock, LeaseError> {
    OwnersLock::acquire(host, &LeaseRecord::task("gantry tenant"))
}

/// Makes a tenant that owns nothing yet.
pub fn create_tenant(
    host: &HostPaths,
    name: &str,
    file: &TenantFile,
) -> Result<PathBuf, TenantError> {
    if !is_name(name) {
        return Err(TenantError::Name(name.to_owned()));
    }
    let _owners = lock_owners(host)?;
    let path = definition(host, name);
    if path.exists() {
        let name = name.to_owned();
        return Err(TenantError::Duplicate { name, path });
    }
    Owner::named(&file.user, &path)?;
    config::write(&path, file)?;
    Ok(path)
}

/// Changes the user or description of a tenant. The new user gets the nodes and files.
pub fn edit_tenant(
    host: &HostPaths,
    name: &str,
    file: &TenantFile,
) -> Result<PathBuf, TenantError> {
    let owners = lock_owners(host)?;
    let tenants = Tenants::load(host)?;
    let tenant = tenants.find(name)?;
    let path = definition(host, name);
    Owner::named(&file.user, &path)?;
    if tenant.file.user == file.user {
        config::write(&path, file)?;
        return Ok(path);
    }
    // A running VM would belong to the former user.
    check_no_vm_runs(host, tenant)?;
    for device in tenant.names() {
        hand_over::is_free(host, device)?;
        hand_over::is_closed(host, device)?;
    }
    // Keep the quarantine records of the former user's VMs.
    for bdf in tenant.devices() {
        copy_tenant_records(host, bdf).map_err(failed(&host.state))?;
    }
    // The former user opens nothing from here on, even if this command fails later.
    let mut names = tenant.names().into_iter();
    let taken = names.try_for_each(|device| Owner::host().take_over(host, device));
    let changed = taken.and_then(|()| Ok(config::write(&path, file)?));
    if let Err(error) = changed {
        restore(host, &tenants)?;
        return Err(error);
    }
    // It loses the directories too.
    let former = FormerDirs::of(host, name);
    let given = restore(host, &Tenants::load(host)?);
    drop(owners);
    former.remove();
    given.map(|()| path)
}

/// Refuses while a VM of the tenant runs.
fn check_no_vm_runs(host: &HostPaths, tenant: &Tenant) -> Result<(), TenantError> {
    let is_own = |vm: &RunningVm| vm.tenant.as_ref() == Some(&tenant.name);
    let Some(vm) = running_vms(host)?.into_iter().find(is_own) else {
        return Ok(());
    };
    let runs =
        |pid: NonZeroU32| Owner::of(host, tenant).is_ok_and(|owner| owner.runs(host, pid.get()));
    Err(match vm.record.pid.is_some_and(runs) {
        true => TenantError::Running(vm),
        false => TenantError::SaysItRuns {
            name: tenant.name.clone(),
            vm: vm.record.name,
            user: tenant.file.user.clone(),
        },
    })
}

/// Deletes a tenant without devices and running VMs.
pub fn delete_tenant(host: &HostPaths, name: &str) -> Result<(), TenantError> {
    let owners = lock_owners(host)?;
    let tenants = Tenants::load(host)?;
    let tenant = tenants.find(name)?;
    let owned = tenant.names();
    check_no_vm_runs(host, tenant)?;
    if !owned.is_empty() {
        let devices: Vec<String> = owned.iter().map(DeviceName::to_string).collect();
        return Err(TenantError::NotEmpty {
            name: name.to_owned(),
            devices: devices.join(", "),
        });
    }
    let HostPaths { config, .. } = dirs(host, name);
    // The definition first: without it, the rest belongs to no tenant.
    let definition = config.join("tenant.json");
    for path in [&definition, &config] {
        let removed = match path.is_dir() {
            true => fs::remove_dir_all(path),
            false => fs::remove_file(path),
        };
        removed.or_else(ignore_missing).map_err(failed(path))?;
    }
    let former = FormerDirs::of(host, name);
    // Removing the directories needs no lock.
    drop(owners);
    former.remove();
    Ok(())
}

/// Runs all steps. Returns the last failure, and logs the others.
fn all_of(steps: impl Iterator<Item = Result<(), TenantError>>) -> Result<(), TenantError> {
    let mut failed: Vec<TenantError> = steps.filter_map(Result::err).collect();
    let last = failed.pop();
    failed.iter().for_each(|error| tracing::error!("{error}"));
    last.map_or(Ok(()), Err)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> TenantError {
    let path = path.to_owned();
    |source| TenantError::File { path, source }
}

fn ignore_missing(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests;
