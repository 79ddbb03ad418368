//! Devices that are bound while a VM has them: taken from the host when it starts, given back when it
//! ends, however it ends.
//!
//! What a device was is written down before it is touched, with a mark that it is owed to the host. The
//! VM's process holds the device's lock and one end of a pipe; a helper that was started before the
//! first write waits on the other end and gives the devices back when the pipe closes, which the kernel
//! does for a killed process too. If the helper is gone as well, the mark stays, and the next command
//! that moves devices finds a mark without a lock and does the same.

use std::collections::BTreeMap;
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
    if let Err(error) = sriov::reap(paths, host.writer) {
        tracing::warn!("new virtual functions stay without drivers of the host: {error}");
    }
    // A tenant may not set the card.
    if paths.only.is_none() {
        sriov::granted::mend(paths, host.links);
    }
    let functions = DriverRecord::on_demand(paths);
    let functions = functions.chain(
        Change::VfSettings
            .recorded(paths)
            .into_iter()
            .filter_map(DeviceName::pci),
    );
    let mut marked: Vec<DeviceName> = functions.map(Into::into).collect();
    marked.extend(Change::Vgpu.recorded(paths));
    let restored = match marked.is_empty() {
        true => Ok(Vec::new()),
        false => restore(paths, host, &marked, Duration::ZERO),
    };
    if paths.only.is_none() {
        vgpu::owed::sweep_locks(paths);
    }
    restored
}

/// Gives devices back that carry the mark, IOMMU group by IOMMU group, as soon as nobody holds them.
/// Those that somebody holds when patience is over are left to him.
pub(crate) fn restore(
    paths: &HostPaths,
    host: HostAccess<'_>,
    devices: &[DeviceName],
    patience: Duration,
) -> Result<Vec<HostBdf>, RestoreError> {
    let started = Instant::now();
    let mdevs: Vec<Uuid> = devices.iter().filter_map(|name| name.mdev()).collect();
    let devices: Vec<HostBdf> = devices.iter().filter_map(|name| name.pci()).collect();
    let devices = devices.as_slice();
    let mut restored = Vec::new();
    let mut failed = BTreeMap::new();
    let mut pause = Duration::from_millis(50);
    let mut pending = owed(paths, devices)?;
    let mut unmade = unmake(paths, host, &mdevs);
    while !pending.is_empty() || !matches!(unmade, Ok(true)) {
        let last = started.elapsed() >= patience;
        for (group, members) in &pending {
            match restore_group(paths, host, members) {
                Ok(moved) => {
                    failed.remove(group);
                    restored.extend(moved.unwrap_or_default());
                }
                Err(error) => drop(failed.insert(*group, error)),
            }
        }
        if last {
            break;
        }
        // A killed process may have left a writer at work: what failed once may be right the next time.
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
        pending = owed(paths, devices)?;
        unmade = unmake(paths, host, &mdevs);
    }
    unmade?;
    match failed.into_values().next() {
        Some(error) => Err(error),
        None => Ok(restored),
    }
}

/// Removes mediated devices that were made for a VM, as far as nobody holds them. Whether all are gone.
fn unmake(paths: &HostPaths, host: HostAccess<'_>, mdevs: &[Uuid]) -> Result<bool, RestoreError> {
    let left = || {
        mdevs
            .iter()
            .any(|uuid| Change::Vgpu.is_recorded(paths, *uuid))
    };
    if !left() {
        return Ok(true);
    }
    vgpu::owed::reap_mdevs(paths, host.writer, mdevs)?;
    Ok(!left())
}

/// The endpoints of the IOMMU groups of devices that carry the mark. One in quarantine hung when it was
/// moved, and waits until somebody releases it.
fn owed(
    paths: &HostPaths,
    devices: &[HostBdf],
) -> Result<BTreeMap<u32, Vec<HostBdf>>, RestoreError> {
    let all = scan(paths)?;
    let marked = all.iter().filter(|device| {
        devices.contains(&device.bdf)
            && device.quarantine.is_none()
            && (DriverRecord::owed(paths, device).is_some()
                || Change::VfSettings.is_recorded(paths, device.bdf)
                || Change::Vgpu.is_recorded(paths, device.bdf))
    });
    let groups: Vec<u32> = marked.filter_map(|device| device.iommu_group).collect();
    let mut members: BTreeMap<u32, Vec<HostBdf>> = BTreeMap::new();
    for device in all.iter().filter(|device| !device.is_bridge()) {
        if let Some(group) = device.iommu_group.filter(|group| groups.contains(group)) {
            members.entry(group).or_default().push(device.bdf);
        }
    }
    Ok(members)
}

/// Gives an IOMMU group's marked devices back; none if somebody holds one of its devices.
fn restore_group(
    paths: &HostPaths,
    host: HostAccess<'_>,
    members: &[HostBdf],
) -> Result<Option<Vec<HostBdf>>, RestoreError> {
    let record = LeaseRecord::restore();
    let choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
    let mut locks = Vec::new();
    for &bdf in members {
        match DeviceLock::take(paths, bdf, &record)? {
            Some(lock) => locks.push(lock),
            None => return Ok(None),
        }
    }
    drop(choosing);
    // A setting that cannot be had back keeps no device from its driver; it stays owed.
    let mut set_back = Ok(());
    for &bdf in members
        .iter()
        .filter(|bdf| Change::VfSettings.is_recorded(paths, **bdf))
    {
        if let Err(source) = sriov::owed::restore(paths, host.links, bdf) {
            let source = Box::new(source);
            set_back = Err(RestoreError::Settings { bdf, source });
        }
    }
    for &bdf in members
        .iter()
        .filter(|bdf| Change::Vgpu.is_recorded(paths, **bdf))
    {
        vgpu::owed::untype(paths, host.writer, bdf)?;
    }
    let report = give_back(paths, host.writer, members)?;
    set_back.map(|()| Some(report.moved))
}

#[cfg(test)]
mod tests;
