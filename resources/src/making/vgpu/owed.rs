//! Virtual GPUs that are made for a VM, or unmade: the record of each is written before it is touched, and
//! it is unmade by the helper that outlives the VM, or by the next command or VM.
//!
//! A driver may take long over either, or for ever. Nobody waits for that but whoever wants the device: it
//! is claimed under the allocation lock, by its own lock and its record, and made when that lock is free
//! again. The record is locked for as long as the kernel is at it, by the process that writes and not only
//! by the one that waits for it: whoever is killed meanwhile, its device is left alone until it is made.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{VgpuError, vendor};
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::sysfs;
use crate::base::uuid::Uuid;
use crate::holding::lease::{
    ALLOCATION_DEADLINE, AllocationLock, DeviceLock, LeaseRecord, holder, is_locked, lock_path,
    try_lock, unlock,
};
use crate::inventory::mdev::directory;
use crate::moving::writer::{SysfsWriter, WriteError};

/// A record in the run directory, which a reboot empties, as it ends all virtual GPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owed {
    /// The VM or the command, for people.
    vm: String,
    /// What makes a mediated device.
    #[serde(default)]
    parent: Option<String>,
}

/// A mediated device with a record, as a choice counts it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) uuid: Uuid,
    /// What makes it.
    pub(crate) parent: Option<String>,
    /// Whether it is made or unmade just now, so that its parent may not have counted it yet.
    pub(crate) under_way: bool,
    /// Whether nobody has it any more.
    pub(crate) left: bool,
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

/// Whether the kernel is still at work on something that nobody waits for any more.
pub(crate) fn hangs(paths: &HostPaths, name: impl Into<DeviceName>) -> bool {
    let name = name.into();
    hangs_by(
        || File::open(path(paths, name)).and_then(|file| is_locked(&file)),
        || holder(paths, name).is_held(),
    )
}

/// Whoever is at work and then lets go of the device was through between the two looks: a third one tells.
fn hangs_by(at_work: impl Fn() -> io::Result<bool>, is_held: impl FnOnce() -> bool) -> bool {
    let at_work = || at_work().unwrap_or(false);
    at_work() && !is_held() && at_work()
}

/// The mediated devices with records.
pub(crate) fn claims(paths: &HostPaths) -> Vec<Claim> {
    let mdevs = all(paths).into_iter().filter_map(DeviceName::mdev);
    mdevs.filter_map(|uuid| claim_on(paths, uuid)).collect()
}

fn claim_on(paths: &HostPaths, uuid: Uuid) -> Option<Claim> {
    let path = path(paths, uuid.into());
    let at_work = File::open(&path).and_then(|file| is_locked(&file));
    let owed = std::fs::read(&path).ok()?;
    let owed = serde_json::from_slice::<Owed>(&owed).ok();
    Some(Claim {
        uuid,
        parent: owed.and_then(|owed| owed.parent),
        under_way: at_work.unwrap_or(true) || !directory(paths, uuid).exists(),
        left: !holder(paths, uuid).is_held(),
    })
}

/// Writes down what is about to be made or unmade. This process has locked it.
pub(super) fn remember(
    paths: &HostPaths,
    name: DeviceName,
    parent: Option<&str>,
    record: &LeaseRecord,
) -> Result<(), VgpuError> {
    let path = path(paths, name);
    // One that the kernel is still at would lose its lock if it were replaced.
    drop(Work::begin(paths, name)?);
    let owed = Owed {
        vm: record.name.clone(),
        parent: parent.map(str::to_owned),
    };
    let written = serde_json::to_vec(&owed)
        .map_err(io::Error::from)
        .and_then(|text| crate::base::atomic::replace(&path, &text));
    written.map_err(|source| VgpuError::Record { path, source })
}

/// Forgets a device that is gone, or that is to stay.
pub(super) fn forget(paths: &HostPaths, name: DeviceName) {
    let path = path(paths, name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!("cannot remove {}: {error}", path.display());
        }
        _ => {}
    }
}

/// A record that is locked while something is written.
pub(super) struct Work {
    record: File,
    /// The kernel did not come back: the lock is left to the process that waits for it.
    hangs: bool,
}

impl Work {
    /// Locks a record; none if there is none. Refused while the kernel is at an earlier write.
    pub(super) fn begin(paths: &HostPaths, name: DeviceName) -> Result<Option<Self>, VgpuError> {
        let path = path(paths, name);
        let locked = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .and_then(|record| Ok((try_lock(&record)?, record)));
        match locked {
            Ok((true, record)) => Ok(Some(Self {
                record,
                hangs: false,
            })),
            Ok((false, _)) => Err(VgpuError::AtWork { name }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(VgpuError::Record { path, source }),
        }
    }

    pub(super) fn write(
        &mut self,
        writer: &dyn SysfsWriter,
        path: &Path,
        value: &str,
    ) -> Result<(), VgpuError> {
        let written = writer.write_keeping(path, value, &self.record);
        self.hangs |= matches!(written, Err(WriteError::Hung { .. }));
        Ok(written?)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !self.hangs {
            // By name, as a child that another thread is starting has a copy for a moment.
            let _ = unlock(&self.record);
        }
    }
}

/// Removes a mediated device that has a record. This process has locked it.
pub(super) fn remove_mdev(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    uuid: Uuid,
) -> Result<(), VgpuError> {
    let Some(mut work) = Work::begin(paths, uuid.into())? else {
        return Ok(());
    };
    let dir = directory(paths, uuid);
    if dir.exists() {
        work.write(writer, &dir.join("remove"), "1")?;
        // Only what is gone is not owed any more.
        if dir.exists() {
            return Err(VgpuError::Stays { uuid });
        }
    }
    forget(paths, uuid.into());
    Ok(())
}

/// Removes the lock files of mediated devices that are gone: an identifier does not come again, and its file
/// would be one more for ever. Those who removed the devices may have been confined, and remove no lock.
pub(crate) fn sweep_locks(paths: &HostPaths) {
    let names = sysfs::entries(&paths.run.join("leases")).unwrap_or_default();
    let uuids = names.iter().filter_map(|name| name.strip_suffix(".lock"));
    let uuids = uuids.filter_map(|name| name.parse::<Uuid>().ok());
    let record = LeaseRecord::restore();
    for uuid in uuids {
        let left = || !is_owed(paths, uuid) && !directory(paths, uuid).exists();
        // Whoever opened the file meanwhile looks whether it is still in its place.
        if left()
            && let Ok(Some(_lock)) = DeviceLock::take(paths, uuid, &record)
            && left()
        {
            let _ = std::fs::remove_file(lock_path(paths, uuid));
        }
    }
}

/// Takes the type from a function that has a record. This process has locked it.
pub(crate) fn untype(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    bdf: HostBdf,
) -> Result<(), VgpuError> {
    let Some(mut work) = Work::begin(paths, bdf.into())? else {
        return Ok(());
    };
    let file = vendor::current(paths, bdf);
    if sysfs::decimal::<u32>(&file).is_ok_and(|kind| kind.is_some_and(|kind| kind != 0)) {
        work.write(writer, &file, "0")?;
    }
    forget(paths, bdf.into());
    Ok(())
}

/// Removes those of these mediated devices that have records and that nobody holds; how many are gone. Of
/// failures the last one is told.
pub(crate) fn reap_mdevs(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    which: &[Uuid],
) -> Result<usize, VgpuError> {
    let owed: Vec<Uuid> = which
        .iter()
        .copied()
        .filter(|uuid| is_owed(paths, *uuid))
        .collect();
    if owed.is_empty() {
        return Ok(0);
    }
    let record = LeaseRecord::restore();
    let mut locked = Vec::new();
    // Nobody has just chosen what is locked here; and the lock is free again before anything is written.
    let choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
    for uuid in owed {
        locked.extend(DeviceLock::take(paths, uuid, &record)?.map(|lock| (uuid, lock)));
    }
    drop(choosing);
    let mut gone = 0;
    let mut failed = None;
    for (uuid, _lock) in locked {
        match remove_mdev(paths, writer, uuid) {
            Ok(()) => gone += 1,
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(gone), Err)
}

/// Removes all mediated devices with records that nobody holds.
pub(crate) fn reap(paths: &HostPaths, writer: &dyn SysfsWriter) -> Result<usize, VgpuError> {
    let mdevs: Vec<Uuid> = all(paths)
        .into_iter()
        .filter_map(DeviceName::mdev)
        .collect();
    reap_mdevs(paths, writer, &mdevs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn who_is_through_between_two_looks_does_not_hang() {
        for (ends, held, hangs) in [
            (None, false, true),
            (None, true, false),
            (Some(0), false, false),
            (Some(1), false, false),
        ] {
            let looks = Cell::new(0);
            let at_work = || Ok(ends.is_none_or(|ends| looks.replace(looks.get() + 1) < ends));
            assert_eq!(hangs_by(at_work, || held), hangs, "{ends:?} {held}");
        }
        assert!(!hangs_by(|| Err(io::ErrorKind::NotFound.into()), || false));
    }
}
