//! The settings that a tenant's virtual function had when it was granted, so that they do not stay as a trusted
//! guest changed them.
//!
//! A tenant's gantry may not change the card. The record is in the host's run directory, where root writes it when
//! it grants the function. Every command of root's that gives devices back also restores the function, while no VM
//! has it. A VM that starts before that gets the function as it is, with a warning: only guests of the same tenant
//! can have changed it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::{SriovError, not_recorded};
use super::links::VfLinks;
use super::pf::Pf;
use super::vf_restore::{self, Card, SettingsRecord};
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::holding::device_lock::DeviceLock;
use crate::holding::host_lock::LeaseError;
use crate::holding::record::LeaseRecord;
use crate::holding::restore::{Change, RestoreRecord};
use crate::inventory::device::HostDevice;
use crate::pools::group::Groups;
use crate::pools::tenant::Tenants;
use crate::pools::vf_settings::VfState;

/// The record of a tenant's virtual function: the settings that it shall have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct GrantedRecord(SettingsRecord);

impl RestoreRecord for GrantedRecord {
    const CHANGE: Change = Change::Granted;
}

impl GrantedRecord {
    /// For a device that is a tenant's or about to be; none if it is no virtual function of a network card.
    /// Recorded settings stay, except those that the card's group now asks for.
    pub(crate) fn of(
        host: &HostPaths,
        links: &dyn VfLinks,
        bdf: HostBdf,
    ) -> Result<Option<Self>, SriovError> {
        let Some(physfn) = HostDevice::read(host, bdf)?.physfn else {
            return Ok(None);
        };
        let pf = Pf::read(host, physfn)?;
        let vf = pf.vfs.iter().position(|vf| *vf == bdf);
        let (Some(vf), Some(interface)) = (vf.and_then(|vf| u16::try_from(vf).ok()), &pf.interface)
        else {
            return Ok(None);
        };
        // Settings that a VM left, the tenant's or the host's, are not those to keep.
        let granted = Self::load(host, bdf).map(|granted| granted.0);
        let known = [granted, SettingsRecord::load(host, bdf)];
        let mut known = known.into_iter().flatten();
        let now = match known.find(|known| (known.pf, known.vf) == (physfn, vf)) {
            Some(known) => known.before,
            None => links.read(interface)?.remove(&vf).unwrap_or_default(),
        };
        let groups = Groups::load(host)?;
        let specs = groups.iter().filter_map(|group| group.sriov.as_ref());
        let wanted = specs.filter(|spec| spec.pf == physfn).last();
        let wanted = wanted.map_or_else(VfState::default, |spec| spec.wanted(vf));
        Ok(Some(Self(SettingsRecord {
            pf: physfn,
            vf,
            before: now.with(&wanted),
        })))
    }

    /// Writes the record, if it differs from the existing one.
    pub(crate) fn keep(&self, host: &HostPaths, bdf: HostBdf) -> Result<(), SriovError> {
        match Self::load(host, bdf) {
            Some(known) if known == *self => Ok(()),
            _ => self.store(host, bdf).map_err(not_recorded),
        }
    }
}

/// Restores the tenants' functions that no VM has, if this user may; and functions that are no tenant's any more,
/// where that was cut short.
pub(crate) fn restore_all(host: &HostPaths, links: &dyn VfLinks) {
    let mut cards: BTreeMap<HostBdf, Vec<(HostBdf, SettingsRecord)>> = BTreeMap::new();
    let functions = Change::Granted.recorded(host).into_iter();
    for bdf in functions.filter_map(DeviceName::pci) {
        if let Some(GrantedRecord(record)) = GrantedRecord::load(host, bdf) {
            cards.entry(record.pf).or_default().push((bdf, record));
        }
    }
    if cards.is_empty() {
        return;
    }
    // After the records: a record is written when the definition of the tenant names the function already.
    let tenants = match Tenants::load(host) {
        Ok(tenants) => tenants,
        Err(error) => {
            tracing::warn!("cannot restore the settings of tenants' functions: {error}");
            return;
        }
    };
    for (pf, functions) in cards {
        // One read of the card is enough for all its functions.
        let card = match Card::read(host, links, pf) {
            Ok(card) => card,
            Err(error) => {
                tracing::warn!(
                    "cannot restore the settings of tenants' functions of {pf}: {error}"
                );
                continue;
            }
        };
        for (bdf, record) in functions {
            let has_owner = tenants.owner_of(bdf).is_some();
            let right = card
                .as_ref()
                .is_none_or(|card| record.writes_to(card, bdf).is_empty());
            let mended = match (has_owner, right) {
                (true, true) => Ok(()),
                (true, false) => restore_one(host, links, bdf),
                (false, _) => finish_end(host, links, bdf),
            };
            if let Err(error) = mended {
                tracing::warn!(
                    "cannot restore the settings of {bdf}, which is a tenant's: {error}"
                );
            }
        }
    }
}

fn restore_one(host: &HostPaths, links: &dyn VfLinks, bdf: HostBdf) -> Result<(), SriovError> {
    let Some(_lock) = lock(host, bdf)? else {
        return Ok(());
    };
    // Read again: a VM or another command may have come in between.
    let Some(GrantedRecord(mut record)) = GrantedRecord::load(host, bdf) else {
        return Ok(());
    };
    let writes = record.writes(host, links, bdf)?;
    let (done, result) = vf_restore::write_back(links, &writes);
    if !done.refused.is_empty() {
        // It is reported once: the next command does not try again.
        let known = done.refused.iter();
        record.before = known.fold(record.before, |state, setting| state.without(setting));
        let stored = GrantedRecord(record).store(host, bdf);
        stored.map_err(not_recorded)?;
    }
    result
}

/// [`end`] of a function whose command was cut short.
fn finish_end(host: &HostPaths, links: &dyn VfLinks, bdf: HostBdf) -> Result<(), SriovError> {
    let Some(_lock) = lock(host, bdf)? else {
        return Ok(());
    };
    match record_former(host, bdf)? {
        true => vf_restore::restore(host, links, bdf).map(drop),
        false => Ok(()),
    }
}

/// Locks a function; none if it is held, or if this user is neither root nor the tenant.
fn lock(host: &HostPaths, bdf: HostBdf) -> Result<Option<DeviceLock>, SriovError> {
    match DeviceLock::take(host, bdf, &LeaseRecord::restore()) {
        Err(LeaseError::File { source, .. })
            if source.kind() == std::io::ErrorKind::PermissionDenied =>
        {
            Ok(None)
        }
        lock => Ok(lock?),
    }
}

/// Turns the record of a former tenant's function into that of a VM's, and restores the function if nobody holds it
/// already.
pub(crate) fn end(host: &HostPaths, links: &dyn VfLinks, bdf: HostBdf) -> Result<(), SriovError> {
    if !record_former(host, bdf)? {
        return Ok(());
    }
    match DeviceLock::take(host, bdf, &LeaseRecord::restore())? {
        Some(_lock) => vf_restore::restore(host, links, bdf).map(drop),
        None => Ok(()),
    }
}

/// Whether there was a record.
fn record_former(host: &HostPaths, bdf: HostBdf) -> Result<bool, SriovError> {
    let Some(GrantedRecord(record)) = GrantedRecord::load(host, bdf) else {
        return Ok(false);
    };
    record.store(host, bdf).map_err(not_recorded)?;
    Change::Granted.forget(host, bdf);
    Ok(true)
}

/// Warns of a function that a tenant's VM gets with other settings than it was granted with.
pub(crate) fn warn_if_changed(paths: &HostPaths, links: &dyn VfLinks, bdf: HostBdf) {
    // The card is not the tenant's, but the tenant may read it.
    let whole = HostPaths {
        only: None,
        ..paths.clone()
    };
    let Some(GrantedRecord(record)) = GrantedRecord::load(paths, bdf) else {
        return;
    };
    match record.writes(&whole, links, bdf) {
        Ok(writes) => {
            let was: Vec<String> = writes.iter().map(|one| one.setting.to_string()).collect();
            if !was.is_empty() {
                tracing::warn!(
                    "{bdf} has other settings than it was granted with ({}): a guest has changed them; `gantry boot` by root restores them while no VM has the device",
                    was.join(", ")
                );
            }
        }
        Err(error) => tracing::debug!("cannot read the settings of {bdf}: {error}"),
    }
}
