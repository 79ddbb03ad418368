//! The settings of a virtual function before a VM got it, which are restored for the next VM.
//!
//! A trusted guest changes its MAC address, and a group may ask for other settings than the function had. The
//! record is written before the first change; the helper that outlives the VM, or the next command, restores the
//! settings under the function's lock and removes the record.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::{SriovError, not_recorded};
use super::links::{Interface, LinkError, LinkWrite, VfLinks};
use super::pf::Pf;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::holding::restore::{Change, RestoreRecord};
use crate::inventory::device::HostDevice;
use crate::inventory::error::InventoryError;
use crate::pools::group::Groups;
use crate::pools::vf_settings::{VfSetting, VfState};

/// The record of a virtual function that a VM gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SettingsRecord {
    pub(super) pf: HostBdf,
    pub(super) vf: u16,
    pub(super) before: VfState,
}

impl RestoreRecord for SettingsRecord {
    const CHANGE: Change = Change::VfSettings;
}

impl SettingsRecord {
    /// The writes that restore the function; none if it is gone.
    pub(super) fn writes(
        &self,
        paths: &HostPaths,
        links: &dyn VfLinks,
        bdf: HostBdf,
    ) -> Result<Vec<LinkWrite>, SriovError> {
        let card = Card::read(paths, links, self.pf)?;
        Ok(card.map_or_else(Vec::new, |card| self.writes_to(&card, bdf)))
    }

    /// [`SettingsRecord::writes`] to a card that has been read.
    pub(super) fn writes_to(&self, card: &Card, bdf: HostBdf) -> Vec<LinkWrite> {
        let vf = self.vf;
        if card.vfs.get(usize::from(vf)) != Some(&bdf) {
            return Vec::new();
        }
        let now = card.states.get(&vf).cloned().unwrap_or_default();
        let write = |setting| LinkWrite {
            interface: card.interface.clone(),
            vf,
            setting,
        };
        let settings = now.changes_to(&self.before).into_iter();
        settings.map(write).collect()
    }
}

/// A network card, and the settings of its functions.
pub(super) struct Card {
    interface: Interface,
    vfs: Vec<HostBdf>,
    states: BTreeMap<u16, VfState>,
}

impl Card {
    /// Reads a card; none if it is gone, or has no functions any more.
    pub(super) fn read(
        paths: &HostPaths,
        links: &dyn VfLinks,
        pf: HostBdf,
    ) -> Result<Option<Self>, SriovError> {
        let pf = match Pf::read(paths, pf) {
            Err(InventoryError::NoSuchDevice { .. }) => return Ok(None),
            read => read?,
        };
        let Some(interface) = pf.interface.filter(|_| !pf.vfs.is_empty()) else {
            return Ok(None);
        };
        Ok(Some(Self {
            states: links.read(&interface)?,
            interface,
            vfs: pf.vfs,
        }))
    }
}

/// The result of restoring settings.
#[derive(Debug, Default)]
pub(super) struct WriteBack {
    /// Whether the card took any of them.
    pub(super) changed: bool,
    /// Values that the card had by itself and refuses: the function keeps its present ones.
    pub(super) refused: Vec<VfSetting>,
}

/// Writes the recorded settings of a function: all of them, even where some are refused.
pub(super) fn write_back(
    links: &dyn VfLinks,
    writes: &[LinkWrite],
) -> (WriteBack, Result<(), SriovError>) {
    let mut done = WriteBack::default();
    let mut result = Ok(());
    for write in writes {
        match links.set_when_ready(write) {
            Ok(()) => {
                tracing::info!("restored: `{write}`");
                done.changed = true;
            }
            Err(error) if error.is_of_value() => {
                tell(write, &error);
                done.refused.push(write.setting);
            }
            Err(error) => result = result.and(Err(error.into())),
        }
    }
    (done, result)
}

/// Reports a value that a card had by itself and refuses to take.
fn tell(write: &LinkWrite, error: &LinkError) {
    let reason = std::error::Error::source(error).map_or_else(String::new, ToString::to_string);
    tracing::warn!(
        "function {} of {} keeps its {}: the kernel refused `{write}` ({reason})",
        write.vf,
        write.interface.name,
        write.setting.key()
    );
}

/// The physical function and the number of a device that is one of a group's virtual functions, with an interface.
pub(crate) fn function(
    paths: &HostPaths,
    groups: &Groups,
    device: &HostDevice,
) -> Result<Option<(Pf, u16)>, InventoryError> {
    let made = groups
        .group_of(device)
        .and_then(|group| group.sriov.as_ref());
    let Some(spec) = made.filter(|spec| device.physfn == Some(spec.pf)) else {
        return Ok(None);
    };
    let pf = Pf::read(paths, spec.pf)?;
    let index = pf.vfs.iter().position(|vf| *vf == device.bdf);
    let index = index.and_then(|index| u16::try_from(index).ok());
    Ok(index
        .filter(|_| pf.interface.is_some())
        .map(|index| (pf, index)))
}

/// Gives a function, which this process has locked, the settings of its group, and otherwise those from before the
/// last VM. Records its settings before that.
pub(crate) fn prepare(
    paths: &HostPaths,
    links: &dyn VfLinks,
    groups: &Groups,
    device: &HostDevice,
) -> Result<(), SriovError> {
    let Some((pf, vf)) = function(paths, groups, device)? else {
        return Ok(());
    };
    let (Some(interface), Some(spec)) = (
        &pf.interface,
        groups
            .group_of(device)
            .and_then(|group| group.sriov.as_ref()),
    ) else {
        return Ok(());
    };
    let now = links.read(interface)?.remove(&vf).unwrap_or_default();
    let before = match SettingsRecord::load(paths, device.bdf) {
        Some(older) if (older.pf, older.vf) == (pf.device.bdf, vf) => older.before,
        _ => now.clone(),
    };
    let wanted = before.with(&spec.wanted(vf));
    let record = SettingsRecord {
        pf: pf.device.bdf,
        vf,
        before,
    };
    record.store(paths, device.bdf).map_err(not_recorded)?;
    let asked = spec.wanted(vf);
    let mut result = Ok(());
    for setting in now.changes_to(&wanted) {
        let write = LinkWrite {
            interface: interface.clone(),
            vf,
            setting,
        };
        match links.set_when_ready(&write) {
            // The group's settings count more than those from before the last VM.
            Err(error) if error.is_of_value() && !asked.asks_for(&setting) => tell(&write, &error),
            set => result = result.and(set),
        }
    }
    Ok(result?)
}

/// Restores a function that this process has locked. Returns whether anything was restored.
pub(crate) fn restore(
    paths: &HostPaths,
    links: &dyn VfLinks,
    bdf: HostBdf,
) -> Result<bool, SriovError> {
    let writes = match SettingsRecord::load(paths, bdf) {
        Some(record) => record.writes(paths, links, bdf)?,
        None => Vec::new(),
    };
    let (done, result) = write_back(links, &writes);
    result?;
    Change::VfSettings.forget(paths, bdf);
    Ok(done.changed)
}
