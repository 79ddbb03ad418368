//! The records of virtual GPUs that are created or removed for a VM. A record is written before the device is
//! created. The helper that outlives the VM, or the next command or VM, removes the device.
//!
//! A driver may take long to create or remove one, or for ever. Only a VM or command that wants the device waits
//! for that: it claims the device under the allocation lock, by the device's own lock and record, and creates it
//! after the allocation lock is released. The record stays locked while the kernel works, by the process that
//! writes and not only by the one that waits for it. If the waiting process is killed, the device is left alone
//! until the kernel returns.

use std::fs::{File, OpenOptions};
use std::path::Path;

use super::VgpuError;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::regular::open_no_link_as;
use crate::base::sysfs;
use crate::base::uuid::Uuid;
use crate::facts::vgpu;
use crate::holding::device_lock::DeviceLock;
use crate::holding::lock_file::{lock_path, try_lock, unlock};
use crate::holding::record::LeaseRecord;
use crate::holding::restore::{Change, RestoreRecord};
use crate::holding::vgpu_records::VgpuRecord;
use crate::moving::writer::{SysfsWriter, WriteError};

/// Records a device that is about to be created or removed. This process has locked it.
pub(super) fn remember(
    paths: &HostPaths,
    name: DeviceName,
    parent: Option<&str>,
    record: &LeaseRecord,
) -> Result<(), VgpuError> {
    // Replacing a record in use would lose its lock.
    drop(LockedRecord::begin(paths, name)?);
    let record = VgpuRecord {
        vm: record.name.clone(),
        parent: parent.map(str::to_owned),
    };
    let stored = record.store(paths, name);
    stored.map_err(|(path, source)| VgpuError::Record { path, source })
}

/// A record that is locked during a write.
pub(super) struct LockedRecord {
    record: File,
    /// The kernel did not return: the lock is left to the process that waits for it.
    hangs: bool,
}

impl LockedRecord {
    /// Locks a record; none if there is no record. Refused while the kernel has not returned from an earlier
    /// write.
    pub(super) fn begin(paths: &HostPaths, name: DeviceName) -> Result<Option<Self>, VgpuError> {
        let path = Change::Vgpu.path(paths, name);
        let opened = open_no_link_as(&path, OpenOptions::new().read(true).write(true));
        let locked = opened.and_then(|record| Ok((try_lock(&record)?, record)));
        match locked {
            Ok((true, record)) => Ok(Some(Self {
                record,
                hangs: false,
            })),
            Ok((false, _)) => Err(VgpuError::AtWork { name }),
            Err(_) if !Change::Vgpu.is_recorded(paths, name) => Ok(None),
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

impl Drop for LockedRecord {
    fn drop(&mut self) {
        if !self.hangs {
            // Explicitly, as a child that another thread is starting has a copy for a moment.
            let _ = unlock(&self.record);
        }
    }
}

/// Removes a mediated device that has a record. This process has locked it.
pub(crate) fn remove_mdev(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    uuid: Uuid,
) -> Result<(), VgpuError> {
    let Some(mut work) = LockedRecord::begin(paths, uuid.into())? else {
        return Ok(());
    };
    let dir = paths.mdev(uuid);
    if dir.exists() {
        work.write(writer, &dir.join("remove"), "1")?;
        // The record stays until the device is gone.
        if dir.exists() {
            return Err(VgpuError::Stays { uuid });
        }
    }
    Change::Vgpu.forget(paths, uuid);
    Ok(())
}

/// Removes the lock files of mediated devices that are gone, since no UUID comes again. The processes that removed
/// the devices may have been confined, and remove no lock file.
pub(crate) fn sweep_locks(paths: &HostPaths) {
    let names = sysfs::entries(&paths.run.join("leases")).unwrap_or_default();
    let uuids = names.iter().filter_map(|name| name.strip_suffix(".lock"));
    let uuids = uuids.filter_map(|name| name.parse::<Uuid>().ok());
    let record = LeaseRecord::restore();
    for uuid in uuids {
        let left = || !Change::Vgpu.is_recorded(paths, uuid) && !paths.mdev(uuid).exists();
        // A process that opened the file meanwhile checks that it is still at its path.
        if left()
            && let Ok(Some(_lock)) = DeviceLock::take(paths, uuid, &record)
            && left()
        {
            let _ = std::fs::remove_file(lock_path(paths, uuid));
        }
    }
}

/// Clears the type of a function that has a record. This process has locked it.
pub(crate) fn untype(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    bdf: HostBdf,
) -> Result<(), VgpuError> {
    let Some(mut work) = LockedRecord::begin(paths, bdf.into())? else {
        return Ok(());
    };
    let file = vgpu::current(paths, bdf);
    if sysfs::decimal::<u32>(&file).is_ok_and(|kind| kind.is_some_and(|kind| kind != 0)) {
        work.write(writer, &file, "0")?;
    }
    Change::Vgpu.forget(paths, bdf);
    Ok(())
}
