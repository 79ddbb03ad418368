//! Devices that are bound on demand: taken from the host when a VM starts, given back when it ends by any cause.
//!
//! The state of a device is recorded before it is changed, with a mark that a VM took it. The VM's process holds
//! the device's lock and one end of a pipe. A helper that was started before the first write waits on the other
//! end, and gives the devices back when the pipe closes, as it does when the process is killed. If the helper is
//! gone as well, the mark stays: the next command that moves devices finds a mark without a lock, and gives the
//! device back.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, Write};
use std::path::Path;
use std::process::{ChildStdin, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use std::os::unix::process::CommandExt;

use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::base::helpers;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::uuid::Uuid;
use crate::holding::device_lock::DeviceLock;
use crate::holding::host_lock::{ALLOCATION_DEADLINE, AllocationLock, LeaseError};
use crate::holding::quarantine::hung;
use crate::holding::record::LeaseRecord;
use crate::holding::restore::Change;
use crate::inventory::device::{HostDevice, NodeAccess};
use crate::inventory::driver_record::DriverRecord;
use crate::inventory::error::InventoryError;
use crate::inventory::scan::scan;
use crate::making::sriov::{self, HostAccess, Netlink, SriovError};
use crate::making::vgpu::{self, VgpuError};
use crate::moving::bind::{BindError, detach_held, give_back};
use crate::moving::writer::{ChildWriter, SysfsWriter};

/// The first argument of the helper.
const SUBCOMMAND: &str = "__restore";
/// How long the kernel may take to free a killed process's locks and devices.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long to wait for one device of a VM that continues.
const EARLY_PATIENCE: Duration = Duration::from_secs(5);
/// How long udev may take to create a VFIO node and set its owner.
const NODE_DEADLINE: Duration = Duration::from_secs(5);

/// A device of a VM was not given back to the host, or a setting of a card was not restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// A device was not moved.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A device cannot be read.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The locks cannot be used.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The settings of a virtual function could not be restored.
    #[error("cannot restore the settings of {bdf}")]
    Settings {
        /// The function.
        bdf: HostBdf,
        /// Why.
        #[source]
        source: Box<SriovError>,
    },
    /// New functions of a card stay without host drivers, as a command ended while it made some.
    #[error("new virtual functions of {bdf} stay without host drivers")]
    Autoprobe {
        /// The card.
        bdf: HostBdf,
        /// Why.
        #[source]
        source: Box<SriovError>,
    },
    /// A virtual GPU of a VM could not be removed.
    #[error("cannot remove a virtual GPU that was created for a VM")]
    Vgpu(#[from] VgpuError),
}

/// The only kind of failure in some places.
impl From<RestoreError> for Vec<RestoreError> {
    fn from(error: RestoreError) -> Self {
        vec![error]
    }
}

/// What binds devices for a VM.
pub(crate) struct Binder<'a> {
    pub(crate) host: HostAccess<'a>,
    /// The program that waits for the VM's end; it must call [`restore_helper`].
    pub(crate) helper: &'a Path,
}

/// The VM's end of the pipe. A line written to it is a device given back; when it closes, by any cause, the VM has
/// ended.
#[derive(Debug)]
pub(crate) struct HelperPipe {
    pipe: Option<ChildStdin>,
}

impl HelperPipe {
    /// Tells the helper that a device is about to be released.
    pub(crate) fn released(&self, name: DeviceName) {
        if let Some(mut pipe) = self.pipe.as_ref() {
            // If the helper is gone, its work is left to the next command.
            let _ = writeln!(pipe, "{name}");
        }
    }
}

impl Binder<'_> {
    /// Takes devices from the host, which this process has locked. After a failure they have their former
    /// drivers.
    pub(crate) fn bind(&self, paths: &HostPaths, devices: &[HostBdf]) -> Result<(), BindError> {
        detach_held(paths, self.host.writer, devices)?;
        devices
            .iter()
            .try_for_each(|bdf| wait_for_node(paths, *bdf))
    }

    /// Starts the helper for devices that are about to be changed.
    pub(crate) fn watch(
        &self,
        paths: &HostPaths,
        devices: &[DeviceName],
    ) -> io::Result<HelperPipe> {
        let mut command = Command::new(self.helper);
        command.arg(SUBCOMMAND).args(paths.to_args());
        command.args(devices.iter().map(DeviceName::to_string));
        // In a process group of its own, so that it does not get the terminal's ctrl-c and does not end
        // with it.
        command.env_clear().process_group(0);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.spawn()?;
        let pipe = child.stdin.take();
        helpers::keep(child);
        Ok(HelperPipe { pipe })
    }
}

fn wait_for_node(paths: &HostPaths, bdf: HostBdf) -> Result<(), BindError> {
    let started = Instant::now();
    loop {
        let device = HostDevice::read(paths, bdf)?;
        if device.node == Some(NodeAccess::Ready) || started.elapsed() >= NODE_DEADLINE {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// What the helper does with the arguments after `__restore`: the host's directories, and the devices.
pub fn restore_helper(args: &[String]) -> ExitCode {
    let Some((paths, devices)) = HostPaths::from_args(args) else {
        return ExitCode::FAILURE;
    };
    let devices: Vec<DeviceName> = devices
        .iter()
        .filter_map(|text| text.parse().ok())
        .collect();
    let links = Netlink::new(&paths);
    let host = HostAccess {
        writer: &ChildWriter::default(),
        links: &links,
    };
    // A line is a device given back early. The lines end when the VM's process closes its end, or dies.
    for line in io::stdin().lock().lines() {
        let Ok(name) = line.unwrap_or_default().parse() else {
            break;
        };
        let _ = restore(&paths, host, &[name], EARLY_PATIENCE);
    }
    match restore(&paths, host, &devices, PATIENCE) {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Gives back to the host the devices that ended VMs had taken on demand. Cheap if there are none.
///
/// # Errors
///
/// All that could not be undone; the rest is undone.
pub fn reap(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
) -> Result<Vec<HostBdf>, Vec<RestoreError>> {
    let links = Netlink::new(paths);
    let links = &links;
    reap_with(paths, HostAccess { writer, links })
}

pub(crate) fn reap_with(
    paths: &HostPaths,
    host: HostAccess<'_>,
) -> Result<Vec<HostBdf>, Vec<RestoreError>> {
    // A tenant may not change the card.
    if paths.only.is_none() {
        sriov::granted::restore_all(paths, host.links);
    }
    let undone = [Change::VfSettings, Change::Autoprobe, Change::Vgpu];
    let undone = undone.iter().flat_map(|change| change.recorded(paths));
    let taken = DriverRecord::on_demand(paths).map(DeviceName::from);
    let recorded: Vec<DeviceName> = taken.chain(undone).collect();
    let restored = match recorded.is_empty() {
        true => Ok(Vec::new()),
        false => restore(paths, host, &recorded, Duration::ZERO),
    };
    if paths.only.is_none() {
        vgpu::recorded::sweep_locks(paths);
    }
    restored
}

/// Undoes what was changed for VMs that have ended, as soon as nobody holds the devices. Devices that are still
/// held after the time limit are left to their holders.
///
/// # Errors
///
/// All that could not be undone, unless another command is undoing it.
pub(crate) fn restore(
    paths: &HostPaths,
    host: HostAccess<'_>,
    devices: &[DeviceName],
    patience: Duration,
) -> Result<Vec<HostBdf>, Vec<RestoreError>> {
    let started = Instant::now();
    let mut restored = Vec::new();
    let mut failed = BTreeMap::new();
    let mut pause = Duration::from_millis(50);
    let mut recorded = Recorded::find(paths, devices)?;
    while !recorded.pending.is_empty() {
        let last = started.elapsed() >= patience;
        for unit in recorded.pending {
            match unit.restore(paths, host) {
                Ok(moved) => {
                    failed.remove(&unit);
                    restored.extend(moved);
                }
                Err(errors) => drop(failed.insert(unit, errors)),
            }
        }
        if last {
            break;
        }
        // A killed process may have left a writer at work: what failed once may succeed the next time.
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
        recorded = Recorded::find(paths, devices)?;
        failed.retain(|unit, _| recorded.has(unit));
    }
    match failed.is_empty() {
        true => Ok(restored),
        false => Err(failed.into_values().flatten().collect()),
    }
}

/// The devices that are locked and restored together.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Unit {
    /// A mediated device.
    Mdev(Uuid),
    /// `sriov_drivers_autoprobe` of a physical function, which concerns no other device of its IOMMU group.
    Autoprobe(HostBdf),
    /// The endpoints of an IOMMU group: settings, types, drivers.
    Group(Vec<HostBdf>),
}

/// The changes of devices that an IOMMU group shares.
const OF_GROUPS: [Change; 3] = [Change::VfSettings, Change::Vgpu, Change::Driver];

/// Units with something to undo.
#[derive(Default)]
struct Recorded {
    pending: BTreeSet<Unit>,
    /// Units in quarantine, which wait until they are released.
    set_aside: BTreeSet<Unit>,
}

impl Recorded {
    /// The records of some devices.
    fn find(paths: &HostPaths, devices: &[DeviceName]) -> Result<Self, RestoreError> {
        let mut recorded = Self::default();
        let mdevs = devices.iter().filter_map(|name| name.mdev());
        let mdevs = mdevs.filter(|uuid| Change::Vgpu.is_recorded(paths, *uuid));
        recorded.pending.extend(mdevs.map(Unit::Mdev));
        let functions: BTreeSet<HostBdf> = devices.iter().filter_map(|name| name.pci()).collect();
        for &pf in &functions {
            if Change::Autoprobe.is_recorded(paths, pf) {
                let hangs = |device: HostDevice| hung(paths, pf, device.id).is_some();
                let hangs = HostDevice::read(paths, pf).is_ok_and(hangs);
                recorded.add(Unit::Autoprobe(pf), hangs);
            }
        }
        let is_recorded = |bdf: &HostBdf| {
            OF_GROUPS
                .iter()
                .any(|change| change.is_recorded(paths, *bdf))
        };
        if functions.iter().any(is_recorded) {
            recorded.add_groups(paths, &functions)?;
        }
        Ok(recorded)
    }

    fn add_groups(
        &mut self,
        paths: &HostPaths,
        functions: &BTreeSet<HostBdf>,
    ) -> Result<(), RestoreError> {
        let all = scan(paths)?;
        let is_changed = |device: &&HostDevice| {
            functions.contains(&device.bdf)
                && (DriverRecord::of_lent(paths, device).is_some()
                    || Change::VfSettings.is_recorded(paths, device.bdf)
                    || Change::Vgpu.is_recorded(paths, device.bdf))
        };
        for device in all.iter().filter(is_changed) {
            let together = |other: &&HostDevice| {
                let same = other.bdf == device.bdf;
                same || device.iommu_group.is_some() && other.iommu_group == device.iommu_group
            };
            let members = all.iter().filter(|other| !other.is_bridge());
            let members = members.filter(together).map(|one| one.bdf).collect();
            self.add(Unit::Group(members), device.quarantine.is_some());
        }
        Ok(())
    }

    fn add(&mut self, unit: Unit, is_set_aside: bool) {
        match is_set_aside {
            true => self.set_aside.insert(unit),
            false => self.pending.insert(unit),
        };
    }

    fn has(&self, unit: &Unit) -> bool {
        self.pending.contains(unit) || self.set_aside.contains(unit)
    }
}

impl Unit {
    fn names(&self) -> Vec<DeviceName> {
        match self {
            Self::Mdev(uuid) => vec![(*uuid).into()],
            Self::Autoprobe(pf) => vec![(*pf).into()],
            Self::Group(functions) => functions.iter().map(|bdf| (*bdf).into()).collect(),
        }
    }

    /// Undoes what the records of a unit say, and returns the functions whose drivers changed; none where one
    /// of its devices is held.
    fn restore(
        &self,
        paths: &HostPaths,
        host: HostAccess<'_>,
    ) -> Result<Vec<HostBdf>, Vec<RestoreError>> {
        let Some(_locks) = self.lock(paths)? else {
            return Ok(Vec::new());
        };
        match self {
            Self::Mdev(uuid) => {
                vgpu::recorded::remove_mdev(paths, host.writer, *uuid)
                    .map_err(RestoreError::from)?;
                Ok(Vec::new())
            }
            Self::Autoprobe(pf) => {
                sriov::autoprobe::restore(paths, host.writer, *pf).map_err(|source| {
                    let source = Box::new(source);
                    RestoreError::Autoprobe { bdf: *pf, source }
                })?;
                Ok(Vec::new())
            }
            Self::Group(functions) => restore_group(paths, host, functions),
        }
    }

    /// The locks of its devices; none where one is held.
    fn lock(&self, paths: &HostPaths) -> Result<Option<Vec<DeviceLock>>, RestoreError> {
        let record = LeaseRecord::restore();
        // Under the allocation lock, no VM chooses these devices now. It ends here, so that a kernel that
        // hangs stops nobody else.
        let _choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
        let mut locks = Vec::new();
        for name in self.names() {
            match DeviceLock::take(paths, name, &record)? {
                Some(lock) => locks.push(lock),
                None => return Ok(None),
            }
        }
        Ok(Some(locks))
    }
}

/// Undoes what is recorded of the functions of an IOMMU group, which are locked.
fn restore_group(
    paths: &HostPaths,
    host: HostAccess<'_>,
    functions: &[HostBdf],
) -> Result<Vec<HostBdf>, Vec<RestoreError>> {
    let recorded = |change: Change| {
        let functions = functions.iter().copied();
        functions.filter(move |bdf| change.is_recorded(paths, *bdf))
    };
    // A setting that cannot be restored keeps no device from its driver; it stays recorded.
    let mut failed = Vec::new();
    for bdf in recorded(Change::VfSettings) {
        if let Err(source) = sriov::vf_restore::restore(paths, host.links, bdf) {
            let source = Box::new(source);
            failed.push(RestoreError::Settings { bdf, source });
        }
    }
    let move_back = || -> Result<Vec<HostBdf>, RestoreError> {
        for bdf in recorded(Change::Vgpu) {
            vgpu::recorded::untype(paths, host.writer, bdf)?;
        }
        Ok(match recorded(Change::Driver).next() {
            Some(_) => give_back(paths, host.writer, functions)?.moved,
            None => Vec::new(),
        })
    };
    match move_back() {
        Ok(moved) if failed.is_empty() => return Ok(moved),
        Ok(_) => {}
        Err(error) => failed.push(error),
    }
    Err(failed)
}

#[cfg(test)]
mod tests;
