//! Devices that are bound while a VM has them: taken from the host when it starts, given back when it
//! ends, however it ends.
//!
//! What a device was is recorded before it is touched, with a mark that a VM took it. The
//! VM's process holds the device's lock and one end of a pipe; a helper that was started before the
//! first write waits on the other end and gives the devices back when the pipe closes, which the kernel
//! does for a killed process too. If the helper is gone as well, the mark stays, and the next command
//! that moves devices finds a mark without a lock and does the same.

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
use crate::holding::device_lock::DeviceLock;
use crate::holding::host_lock::{ALLOCATION_DEADLINE, AllocationLock, LeaseError};
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
/// How long to wait for one device of a VM that goes on.
const EARLY_PATIENCE: Duration = Duration::from_secs(5);
/// How long udev may take to make a VFIO node and set its owner.
const NODE_DEADLINE: Duration = Duration::from_secs(5);

/// What a VM had was not given back to the host.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// A device was not moved.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A device cannot be looked at.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The locks cannot be used.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A virtual function that a VM had could not be put back as it was.
    #[error("the settings of {bdf} could not be put back")]
    Settings {
        /// The function.
        bdf: HostBdf,
        /// Why.
        #[source]
        source: Box<SriovError>,
    },
    /// The host's drivers do not get new functions of a card, as a command ended while it made some.
    #[error("new virtual functions of {bdf} stay without drivers of the host")]
    Autoprobe {
        /// The card.
        bdf: HostBdf,
        /// Why.
        #[source]
        source: Box<SriovError>,
    },
    /// A virtual GPU that a VM had could not be unmade.
    #[error("a virtual GPU that was made for a VM could not be unmade")]
    Vgpu(#[from] VgpuError),
}

/// What binds devices for a VM.
pub(crate) struct Binder<'a> {
    pub(crate) host: HostAccess<'a>,
    /// The program that waits for the VM's end; it must call [`restore_helper`].
    pub(crate) helper: &'a Path,
}

/// The VM's end of the pipe: what is written is a device given back, and its closing, by any cause, is
/// the end of the VM.
#[derive(Debug)]
pub(crate) struct Watch {
    pipe: Option<ChildStdin>,
}

impl Watch {
    /// Tells the helper that a device is about to be free.
    pub(crate) fn released(&self, name: DeviceName) {
        if let Some(mut pipe) = self.pipe.as_ref() {
            // A helper that is gone leaves its work to the next command.
            let _ = writeln!(pipe, "{name}");
        }
    }
}

impl Binder<'_> {
    /// Takes devices from the host that this process has locked. After a failure they are where they
    /// were.
    pub(crate) fn bind(&self, paths: &HostPaths, devices: &[HostBdf]) -> Result<(), BindError> {
        detach_held(paths, self.host.writer, devices)?;
        devices
            .iter()
            .try_for_each(|bdf| wait_for_node(paths, *bdf))
    }

    /// Starts the helper for devices that are about to be changed.
    pub(crate) fn watch(&self, paths: &HostPaths, devices: &[DeviceName]) -> io::Result<Watch> {
        let mut command = Command::new(self.helper);
        command.arg(SUBCOMMAND).args(paths.to_args());
        command.args(devices.iter().map(DeviceName::to_string));
        // Neither the terminal's ctrl-c nor its end is meant for the helper.
        command.env_clear().process_group(0);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.spawn()?;
        let pipe = child.stdin.take();
        helpers::keep(child);
        Ok(Watch { pipe })
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

/// What the helper does with the arguments after `__restore`: where things are, and the devices.
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
    // Lines are devices given back early; they end when the VM's process closes its end, or dies.
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

/// Gives back to the host what VMs that are no more had taken on demand. Cheap if there is nothing.
pub fn reap(paths: &HostPaths, writer: &dyn SysfsWriter) -> Result<Vec<HostBdf>, RestoreError> {
    let links = Netlink::new(paths);
    let links = &links;
    reap_with(paths, HostAccess { writer, links })
}

pub(crate) fn reap_with(
    paths: &HostPaths,
    host: HostAccess<'_>,
) -> Result<Vec<HostBdf>, RestoreError> {
    // A tenant may not set the card.
    if paths.only.is_none() {
        sriov::granted::mend(paths, host.links);
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

/// Undoes what was changed for VMs that have ended, as soon as nobody holds the devices. Those that somebody holds
/// when patience is over are left to them.
pub(crate) fn restore(
    paths: &HostPaths,
    host: HostAccess<'_>,
    devices: &[DeviceName],
    patience: Duration,
) -> Result<Vec<HostBdf>, RestoreError> {
    let started = Instant::now();
    let mut restored = Vec::new();
    let mut failed = BTreeMap::new();
    let mut pause = Duration::from_millis(50);
    let mut pending = pending(paths, devices)?;
    while !pending.is_empty() {
        let last = started.elapsed() >= patience;
        for unit in pending {
            match restore_unit(paths, host, &unit) {
                Ok(moved) => {
                    failed.remove(&unit);
                    restored.extend(moved);
                }
                Err(error) => drop(failed.insert(unit, error)),
            }
        }
        if last {
            break;
        }
        // A killed process may have left a writer at work: what failed once may be right the next time.
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
        pending = self::pending(paths, devices)?;
    }
    match failed.into_values().next() {
        Some(error) => Err(error),
        None => Ok(restored),
    }
}

/// What is locked together: a mediated device, or the endpoints of an IOMMU group.
type Unit = Vec<DeviceName>;

/// The devices of which something is to be undone, with those that are locked with them. One in quarantine hung
/// when it was moved, and waits until somebody releases it.
fn pending(paths: &HostPaths, devices: &[DeviceName]) -> Result<BTreeSet<Unit>, RestoreError> {
    let mdevs = devices.iter().filter(|name| name.mdev().is_some());
    let mdevs = mdevs.filter(|name| Change::Vgpu.is_recorded(paths, **name));
    let mut units: BTreeSet<Unit> = mdevs.map(|name| vec![*name]).collect();
    let all = scan(paths)?;
    let is_pending = |device: &&HostDevice| {
        let undone = [Change::VfSettings, Change::Autoprobe, Change::Vgpu];
        let is_recorded = |change: &Change| change.is_recorded(paths, device.bdf);
        devices.contains(&device.bdf.into())
            && device.quarantine.is_none()
            && (DriverRecord::of_lent(paths, device).is_some() || undone.iter().any(is_recorded))
    };
    for device in all.iter().filter(is_pending) {
        let together = |other: &&HostDevice| {
            let same = other.bdf == device.bdf;
            same || device.iommu_group.is_some() && other.iommu_group == device.iommu_group
        };
        let members = all.iter().filter(|other| !other.is_bridge());
        units.insert(members.filter(together).map(|one| one.bdf.into()).collect());
    }
    Ok(units)
}

/// Undoes what is recorded of devices that are locked together, and returns those whose drivers have changed;
/// nothing where somebody holds one of them.
fn restore_unit(
    paths: &HostPaths,
    host: HostAccess<'_>,
    unit: &[DeviceName],
) -> Result<Vec<HostBdf>, RestoreError> {
    let record = LeaseRecord::restore();
    // Nobody has just chosen what is locked here.
    let choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
    let mut locks = Vec::new();
    for &name in unit {
        match DeviceLock::take(paths, name, &record)? {
            Some(lock) => locks.push(lock),
            None => return Ok(Vec::new()),
        }
    }
    // A kernel that hangs stops nobody else.
    drop(choosing);
    for uuid in unit.iter().filter_map(|name| name.mdev()) {
        vgpu::recorded::remove_mdev(paths, host.writer, uuid)?;
    }
    let functions: Vec<HostBdf> = unit.iter().filter_map(|name| name.pci()).collect();
    let recorded = |change: Change| {
        let functions = functions.iter().copied();
        functions.filter(move |bdf| change.is_recorded(paths, *bdf))
    };
    // A setting that cannot be had back keeps no device from its driver; it stays recorded.
    let mut set_back = Ok(());
    for bdf in recorded(Change::VfSettings) {
        if let Err(source) = sriov::vf_restore::restore(paths, host.links, bdf) {
            let source = Box::new(source);
            set_back = Err(RestoreError::Settings { bdf, source });
        }
    }
    for bdf in recorded(Change::Autoprobe) {
        if let Err(source) = sriov::autoprobe::restore(paths, host.writer, bdf) {
            let source = Box::new(source);
            set_back = Err(RestoreError::Autoprobe { bdf, source });
        }
    }
    for bdf in recorded(Change::Vgpu) {
        vgpu::recorded::untype(paths, host.writer, bdf)?;
    }
    let moved = match recorded(Change::Driver).next() {
        Some(_) => give_back(paths, host.writer, &functions)?.moved,
        None => Vec::new(),
    };
    set_back.map(|()| moved)
}

#[cfg(test)]
mod tests;
