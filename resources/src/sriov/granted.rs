//! What a tenant's virtual function was set to when it was granted, so that it does not stay as a trusted
//! guest made it.
//!
//! A tenant's gantry may not set the card. The record lies with the host's, where root puts it when it grants
//! the function; every command of root's that gives back what killed VMs left puts the function back too, while
//! no VM has it. A VM that comes before gets the function as it is, with a warning: what its tenant's guests may
//! change they may find changed, and nobody else gets the function.

use std::path::PathBuf;

use super::error::SriovError;
use super::links::VfLinks;
use super::owed::{self, Owed};
use super::pf::Pf;
use super::settings::VfState;
use crate::group::Groups;
use crate::host::{HostBdf, HostPaths};
use crate::inventory::HostDevice;
use crate::lease::{DeviceLock, LeaseError, LeaseRecord};
use crate::sysfs;

/// Where records lie, below the run directory; a tenant's leads to the host's.
pub(crate) const DIR: &str = "granted";

fn path(paths: &HostPaths, bdf: HostBdf) -> PathBuf {
    paths.run.join(DIR).join(bdf.to_string())
}

/// Forgets a function: it is no more.
pub(super) fn forget(paths: &HostPaths, bdf: HostBdf) {
    owed::remove(&path(paths, bdf));
}

/// Writes down what a device is set to that is about to be a tenant's, if it is a virtual function of a
/// network card. What is known of it stays.
pub(crate) fn keep(host: &HostPaths, links: &dyn VfLinks, bdf: HostBdf) -> Result<(), SriovError> {
    let Some(physfn) = HostDevice::read(host, bdf)?.physfn else {
        return Ok(());
    };
    let pf = Pf::read(host, physfn)?;
    let vf = pf.vfs.iter().position(|vf| *vf == bdf);
    let (Some(vf), Some(interface)) = (vf.and_then(|vf| u16::try_from(vf).ok()), &pf.interface)
    else {
        return Ok(());
    };
    let path = path(host, bdf);
    if Owed::load(&path).is_some_and(|known| (known.pf, known.vf) == (physfn, vf)) {
        return Ok(());
    }
    // What a VM of the host's left is not what it should be.
    let now = match Owed::load(&owed::path(host, bdf)) {
        Some(left) if (left.pf, left.vf) == (physfn, vf) => left.before,
        _ => links.read(interface)?.remove(&vf).unwrap_or_default(),
    };
    let groups = Groups::load(host)?;
    let specs = groups.iter().filter_map(|group| group.sriov.as_ref());
    let wanted = specs.filter(|spec| spec.pf == physfn).last();
    let wanted = wanted.map_or_else(VfState::default, |spec| spec.wanted(vf));
    let before = now.with(&wanted);
    let pf = physfn;
    Owed { pf, vf, before }.store(path)
}

/// Puts back those of tenants' functions that no VM has, by whoever may.
pub(crate) fn mend(host: &HostPaths, links: &dyn VfLinks) {
    let names = sysfs::entries(&host.run.join(DIR)).unwrap_or_default();
    for bdf in names.iter().filter_map(|name| name.parse().ok()) {
        if let Err(error) = mend_one(host, links, bdf) {
            tracing::warn!("{bdf}, a tenant's, stays as a guest has set it: {error}");
        }
    }
}

fn mend_one(host: &HostPaths, links: &dyn VfLinks, bdf: HostBdf) -> Result<(), SriovError> {
    let Some(record) = Owed::load(&path(host, bdf)) else {
        return Ok(());
    };
    let writes = || Ok::<_, SriovError>(record.writes(host, links, bdf)?.unwrap_or_default());
    if writes()?.is_empty() {
        return Ok(());
    }
    let lock = match DeviceLock::take(host, bdf, &LeaseRecord::restore()) {
        // Somebody who is neither root nor the tenant.
        Err(LeaseError::File { source, .. })
            if source.kind() == std::io::ErrorKind::PermissionDenied =>
        {
            return Ok(());
        }
        lock => lock?,
    };
    if lock.is_some() {
        owed::put_back(links, &writes()?)?;
    }
    Ok(())
}

/// Makes a function that was a tenant's one that is owed to the host as it was, and puts it back if
/// nobody has it already.
pub(crate) fn end(host: &HostPaths, links: &dyn VfLinks, bdf: HostBdf) -> Result<(), SriovError> {
    let Some(record) = Owed::load(&path(host, bdf)) else {
        return Ok(());
    };
    record.store(owed::path(host, bdf))?;
    forget(host, bdf);
    match DeviceLock::take(host, bdf, &LeaseRecord::restore())? {
        Some(_lock) => owed::restore(host, links, bdf).map(drop),
        None => Ok(()),
    }
}

/// Warns of a function that a tenant's VM gets other than it was granted.
pub(crate) fn look(paths: &HostPaths, links: &dyn VfLinks, bdf: HostBdf) {
    // The card is not the tenant's, but may be looked at.
    let whole = HostPaths {
        only: None,
        ..paths.clone()
    };
    let Some(record) = Owed::load(&path(paths, bdf)) else {
        return;
    };
    match record.writes(&whole, links, bdf) {
        Ok(writes) => {
            let writes = writes.unwrap_or_default();
            let was: Vec<String> = writes.iter().map(|one| one.setting.to_string()).collect();
            if !was.is_empty() {
                tracing::warn!(
                    "{bdf} is not set as it was granted ({}): a guest has changed it; `gantry boot` by root, while no VM \
                     has the device, puts it back",
                    was.join(", ")
                );
            }
        }
        Err(error) => tracing::debug!("cannot tell how {bdf} is set: {error}"),
    }
}
