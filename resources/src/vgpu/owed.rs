//! Virtual GPUs made for one VM: the record of each is written before it is made, and it is unmade by the
//! helper that outlives the VM, or by the next command or VM.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{VgpuError, vendor};
use crate::host::{HostBdf, HostPaths};
use crate::lease::{DeviceLock, LeaseRecord};
use crate::mdev::directory;
use crate::name::DeviceName;
use crate::sysfs;
use crate::uuid::Uuid;
use crate::writer::SysfsWriter;

/// A record in the run directory, which a reboot empties, as it ends all virtual GPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owed {
    /// The VM, for people.
    vm: String,
}

fn path(paths: &HostPaths, name: DeviceName) -> PathBuf {
    paths.run.join("vgpu").join(name.to_string())
}

/// What has a record.
pub(crate) fn all(paths: &HostPaths) -> Vec<DeviceName> {
    let names = sysfs::entries(&paths.run.join("vgpu")).unwrap_or_default();
    names.iter().filter_map(|name| name.parse().ok()).collect()
}

/// Whether something has a record.
pub(crate) fn is_owed(paths: &HostPaths, name: impl Into<DeviceName>) -> bool {
    path(paths, name.into()).exists()
}

/// Writes down what is about to be made.
pub(super) fn remember(
    paths: &HostPaths,
    name: DeviceName,
    record: &LeaseRecord,
) -> Result<(), VgpuError> {
    let path = path(paths, name);
    let owed = Owed {
        vm: record.name.clone(),
    };
    let written = serde_json::to_vec(&owed)
        .map_err(io::Error::from)
        .and_then(|text| crate::atomic::replace(&path, &text));
    written.map_err(|source| VgpuError::Record { path, source })
}

fn forget(paths: &HostPaths, name: DeviceName) {
    let path = path(paths, name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!("cannot remove {}: {error}", path.display());
        }
        _ => {}
    }
}

/// Removes a mediated device that has a record. This process has locked it.
pub(super) fn remove_mdev(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    uuid: Uuid,
) -> Result<(), VgpuError> {
    let dir = directory(paths, uuid);
    if dir.exists() {
        writer.write(&dir.join("remove"), "1")?;
        // Only what is gone is not owed any more.
        if dir.exists() {
            return Err(VgpuError::Stays { uuid });
        }
    }
    forget(paths, uuid.into());
    Ok(())
}

/// Takes the type from a function that has a record. This process has locked it.
pub(crate) fn untype(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    bdf: HostBdf,
) -> Result<(), VgpuError> {
    let file = vendor::current(paths, bdf);
    if sysfs::decimal::<u32>(&file).is_ok_and(|kind| kind.is_some_and(|kind| kind != 0)) {
        writer.write(&file, "0")?;
    }
    forget(paths, bdf.into());
    Ok(())
}

/// Removes the mediated devices with records that nobody holds. The allocation lock is held. Those that
/// stay are named in the log and tried again the next time; how many are gone.
pub(crate) fn reap_mdevs(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    which: &[Uuid],
) -> Result<usize, VgpuError> {
    let record = LeaseRecord::restore();
    let mut gone = 0;
    let mut failed = None;
    for &uuid in which.iter().filter(|uuid| is_owed(paths, **uuid)) {
        if let Some(_lock) = DeviceLock::take(paths, uuid, &record)? {
            match remove_mdev(paths, writer, uuid) {
                Ok(()) => gone += 1,
                Err(error) => failed = Some(error),
            }
        }
    }
    failed.map_or(Ok(gone), Err)
}

/// Removes all mediated devices with records that nobody holds. The allocation lock is held.
pub(crate) fn reap(paths: &HostPaths, writer: &dyn SysfsWriter) -> Result<usize, VgpuError> {
    let mdevs: Vec<Uuid> = all(paths)
        .into_iter()
        .filter_map(DeviceName::mdev)
        .collect();
    reap_mdevs(paths, writer, &mdevs)
}
