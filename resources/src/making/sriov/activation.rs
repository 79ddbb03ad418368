//! An activation: its writes, and how each is undone.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::autoprobe::AutoprobeRecord;
use super::error::{SriovError, not_recorded};
use super::links::LinkWrite;
use super::pf::{Pf, VfInUse};
use super::{
    HostAccess, HostWrite, SriovReport, autoprobe, check_functions_not_hung, forget, found,
    refused, report, set_aside_if_hung,
};
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::holding::device_lock::DeviceLock;
use crate::holding::restore::{Change, RestoreRecord};
use crate::inventory::device::HostDevice;
use crate::inventory::driver_record::DriverRecord;
use crate::moving::bind::{BindError, BindRequest, detach, has_vfio_pci};
use crate::moving::moves::{Move, Mover};
use crate::moving::writer::SysfsWrite;
use crate::pools::group::{Bind, ResourceGroup};
use crate::pools::sriov::SriovSpec;
use crate::pools::vf_settings::VfState;

/// How long a card may take to get its link back.
const LINK_PATIENCE: Duration = Duration::from_secs(15);

/// An activation under way.
pub(super) struct Activation<'a> {
    pub(super) paths: &'a HostPaths,
    pub(super) host: HostAccess<'a>,
    pub(super) group: &'a ResourceGroup,
    pub(super) spec: &'a SriovSpec,
    /// As it was before.
    pub(super) pf: Pf,
    /// Its functions as they were before, with their records.
    pub(super) former: Vec<(HostDevice, Option<DriverRecord>)>,
    pub(super) live: Vec<VfInUse>,
    pub(super) resized: bool,
    /// Whether the physical function's interface had a link.
    pub(super) had_link: bool,
    pub(super) writes: Vec<HostWrite>,
    pub(super) dry_run: bool,
    /// The lock of the physical function comes first.
    pub(super) locks: Vec<DeviceLock>,
}

impl Activation<'_> {
    pub(super) fn carry_out(mut self) -> Result<SriovReport, SriovError> {
        let before = self.states()?;
        if let Err(source) = self.apply(&before) {
            let left = self.undo(&before, &source);
            set_aside_if_hung(self.paths, &self.pf, &source);
            return Err(SriovError::Failed {
                group: self.group.name.clone(),
                left,
                source: Box::new(source),
            });
        }
        let mut report = report(self.group, &self.pf, self.spec.count);
        if !self.dry_run {
            report.functions = Pf::read(self.paths, self.pf.device.bdf)?.vfs;
        }
        report.left = self.live;
        report.writes = self.writes;
        Ok(report)
    }

    fn apply(&mut self, before: &BTreeMap<u16, VfState>) -> Result<(), SriovError> {
        if self.pf.vfs.len() != usize::from(self.spec.count) {
            self.resize()?;
        }
        let now = match self.resized && !self.dry_run {
            true => {
                self.wait_for_link();
                self.states()?
            }
            false => before.clone(),
        };
        self.set(&now)?;
        if self.group.bind == Bind::Demand {
            return Ok(());
        }
        // Detaching locks the functions itself; their number does not change while the physical function is
        // locked.
        self.locks.truncate(1);
        self.bind()
    }

    /// The present settings of the functions, by their numbers.
    fn states(&self) -> Result<BTreeMap<u16, VfState>, SriovError> {
        let Some(interface) = &self.pf.interface else {
            return Ok(BTreeMap::new());
        };
        if !self.host_has_functions()? {
            return Ok(BTreeMap::new());
        }
        match self.host.links.read(interface) {
            // If the group has no settings, they are only read to restore them after a failure.
            Err(_) if !self.spec.is_for_network() => Ok(BTreeMap::new()),
            read => Ok(read?),
        }
    }

    fn host_has_functions(&self) -> Result<bool, SriovError> {
        let now = Pf::read(self.paths, self.pf.device.bdf)?;
        Ok(!now.vfs.is_empty())
    }

    fn resize(&mut self) -> Result<(), SriovError> {
        let quiet = self.pf.autoprobe == Some(true);
        if quiet {
            if !self.dry_run {
                self.remember_autoprobe()?;
            }
            self.write("sriov_drivers_autoprobe", "0")?;
        }
        self.resized = true;
        if !self.pf.vfs.is_empty() {
            self.write("sriov_numvfs", "0")?;
            if !self.dry_run {
                self.pf.vfs.iter().for_each(|bdf| forget(self.paths, *bdf));
            }
        }
        self.write("sriov_numvfs", &self.spec.count.to_string())?;
        if quiet {
            self.write("sriov_drivers_autoprobe", "1")?;
        }
        if !self.dry_run {
            Change::Autoprobe.forget(self.paths, self.pf.device.bdf);
            let now = found(self.paths, &self.pf, self.spec.count)?;
            // Records of functions that another program destroyed would be taken for records of these.
            now.vfs.iter().for_each(|bdf| forget(self.paths, *bdf));
        }
        Ok(())
    }

    fn remember_autoprobe(&self) -> Result<(), SriovError> {
        let stored = AutoprobeRecord::of(&self.pf.device).store(self.paths, self.pf.device.bdf);
        stored.map_err(not_recorded)
    }

    /// Some cards reset when functions are created, and take no rate before their link is up again.
    fn wait_for_link(&self) {
        let rated = self.spec.min_rate.is_some() || self.spec.max_rate.is_some();
        let deadline = Instant::now() + LINK_PATIENCE;
        while rated && self.had_link && !self.pf.has_link() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn set(&mut self, now: &BTreeMap<u16, VfState>) -> Result<(), SriovError> {
        let Some(interface) = self.pf.interface.clone() else {
            return Ok(());
        };
        for index in 0..self.spec.count {
            if self.is_live(self.pf.address(index)) {
                continue;
            }
            // The settings of functions that do not exist yet are unknown: each gets all of the group's.
            let has = now.get(&index).cloned().unwrap_or_default();
            for setting in has.changes_to(&self.spec.wanted(index)) {
                self.link(LinkWrite {
                    interface: interface.clone(),
                    vf: index,
                    setting,
                })?;
            }
        }
        Ok(())
    }

    fn is_live(&self, bdf: Option<HostBdf>) -> bool {
        bdf.is_some_and(|bdf| self.live.iter().any(|one| one.bdf == bdf))
    }

    fn bind(&mut self) -> Result<(), SriovError> {
        if self.dry_run && self.resized {
            has_vfio_pci(self.paths).map_err(|error| SriovError::Bind(Box::new(error)))?;
            self.would_bind();
            return Ok(());
        }
        let there = Pf::read(self.paths, self.pf.device.bdf)?;
        let devices: Vec<HostBdf> = there
            .vfs
            .into_iter()
            .filter(|bdf| !self.is_live(Some(*bdf)))
            .collect();
        if devices.is_empty() {
            return Ok(());
        }
        let request = BindRequest {
            devices: &devices,
            overrides: &[],
            dry_run: self.dry_run,
        };
        let bound = detach(self.paths, self.host.writer, &request)
            .map_err(|error| SriovError::Bind(Box::new(error)))?;
        self.writes
            .extend(bound.writes.into_iter().map(HostWrite::Sysfs));
        Ok(())
    }

    /// The writes that bind functions which do not exist yet.
    fn would_bind(&mut self) {
        let addresses = (0..self.spec.count).filter_map(|index| self.pf.address(index));
        for bdf in addresses {
            let all = [
                (
                    self.paths.pci_device(bdf).join("driver_override"),
                    "vfio-pci".to_owned(),
                ),
                (
                    self.paths.sysfs.join("bus/pci/drivers_probe"),
                    bdf.to_string(),
                ),
            ];
            let writes = all.map(|(path, value)| HostWrite::Sysfs(SysfsWrite { path, value }));
            self.writes.extend(writes);
        }
    }

    fn write(&mut self, attribute: &str, value: &str) -> Result<(), SriovError> {
        let path = self.pf.attribute(attribute);
        if !self.dry_run {
            let written = self.host.writer.write(&path, value);
            written.map_err(|error| refused(&self.pf, error))?;
        }
        let value = value.to_owned();
        self.writes
            .push(HostWrite::Sysfs(SysfsWrite { path, value }));
        Ok(())
    }

    fn link(&mut self, write: LinkWrite) -> Result<(), SriovError> {
        if !self.dry_run {
            self.host.links.set_when_ready(&write)?;
        }
        self.writes.push(HostWrite::Link(write));
        Ok(())
    }

    /// Undoes what was done; returns in words what could not be undone.
    fn undo(&mut self, before: &BTreeMap<u16, VfState>, why: &SriovError) -> String {
        if self.dry_run {
            return String::new();
        }
        // A device that hangs is left alone: another write would hang too.
        if why.is_hung() {
            return format!(": {} hangs and is left as it is", self.pf.device.bdf);
        }
        let undone = match self.resized {
            true => self.undo_resize(before),
            false => self.undo_settings(before),
        };
        let probing = autoprobe::restore(self.paths, self.host.writer, self.pf.device.bdf);
        match undone.and(probing) {
            Ok(()) => String::new(),
            Err(error) => format!(", and could not be undone ({error})"),
        }
    }

    /// Creates as many functions as there were, with the settings and the drivers that they had.
    fn undo_resize(&self, before: &BTreeMap<u16, VfState>) -> Result<(), SriovError> {
        let path = self.pf.attribute("sriov_numvfs");
        let now = Pf::read(self.paths, self.pf.device.bdf)?;
        let resized =
            |write: &HostWrite| matches!(write, HostWrite::Sysfs(one) if one.path == path);
        if now.vfs.len() == self.pf.vfs.len() && !self.writes.iter().any(resized) {
            return Ok(());
        }
        // Destroying a function that hangs would hang as well, with the card.
        check_functions_not_hung(self.paths, &now)?;
        if !now.vfs.is_empty() {
            self.host.writer.write(&path, "0")?;
            now.vfs.iter().for_each(|bdf| forget(self.paths, *bdf));
        }
        if self.pf.vfs.is_empty() {
            return Ok(());
        }
        // Each gets its own driver again, and no other one before that.
        if self.pf.autoprobe == Some(true) {
            self.remember_autoprobe()?;
            let autoprobe = self.pf.attribute("sriov_drivers_autoprobe");
            self.host.writer.write(&autoprobe, "0")?;
        }
        let former = self.pf.vfs.len().to_string();
        self.host.writer.write(&path, &former)?;
        self.wait_for_link();
        // A setting that cannot be restored keeps no function from its driver.
        let set = self.undo_settings(before);
        self.undo_drivers().and(set)
    }

    fn undo_drivers(&self) -> Result<(), SriovError> {
        let mut mover = Mover {
            paths: self.paths,
            writer: self.host.writer,
            writes: Vec::new(),
        };
        let mut failed = Ok(());
        for (device, former) in &self.former {
            let bdf = device.bdf;
            let kept = former.as_ref().map_or(Ok(()), |former| {
                former.store(self.paths, bdf).map_err(not_recorded)
            });
            let back = Move::to_where_it_was(device);
            let moved = mover.make(&back).map_err(|source| {
                mover.set_aside_if_hung(device, &source);
                let left = vec![bdf];
                SriovError::Bind(Box::new(BindError::Failed { bdf, left, source }))
            });
            let hangs = moved.as_ref().is_err_and(SriovError::is_hung);
            failed = failed.and(kept).and(moved);
            if hangs {
                break;
            }
        }
        failed
    }

    fn undo_settings(&self, before: &BTreeMap<u16, VfState>) -> Result<(), SriovError> {
        let Some(interface) = self
            .pf
            .interface
            .as_ref()
            .filter(|_| !self.writes.is_empty() && !before.is_empty())
        else {
            return Ok(());
        };
        let now = self.host.links.read(interface)?;
        let mut undone = Ok(());
        for (vf, state) in &now {
            let Some(before) = before.get(vf) else {
                continue;
            };
            // A refused setting does not keep the others from being restored.
            for setting in state.changes_to(before) {
                let interface = interface.clone();
                let set = self.host.links.set_when_ready(&LinkWrite {
                    interface,
                    vf: *vf,
                    setting,
                });
                undone = undone.and(set);
            }
        }
        Ok(undone?)
    }
}
