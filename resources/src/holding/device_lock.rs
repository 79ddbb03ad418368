//! The lock of one device, which dies with its holder.
//!
//! Each device has a file in `<run>/leases`, made when it is first leased and never removed, but for that of
//! a mediated device, which is removed under its lock when the device is gone. The lock is
//! an open-file-description write lock on it (fcntl(2), "Open file description locks"): the kernel lets
//! go of it when the last descriptor closes, so with the holder's death by any cause. The descriptors
//! are close-on-exec; only the opener hands them on, to the VM that it leased for, so that either
//! process keeps the lock. The content says who holds the lock, for people; only the
//! lock counts. The files can be read by their owner alone: whoever could open one could block it.

use std::fs::File;

use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::facts::ids::PciId;
use crate::holding::host_lock::LeaseError;
use crate::holding::lock_file::{LockFile, lock_path};
use crate::holding::quarantine;
use crate::holding::record::LeaseRecord;

/// The lock of one device.
#[derive(Debug)]
pub(crate) struct DeviceLock {
    name: DeviceName,
    lock: LockFile,
}

impl DeviceLock {
    /// Takes the lock of a device; none if somebody has it. A note of quarantine that the last holder
    /// left is written down first.
    pub(crate) fn take(
        paths: &HostPaths,
        name: impl Into<DeviceName>,
        record: &LeaseRecord,
    ) -> Result<Option<Self>, LeaseError> {
        let name = name.into();
        let path = lock_path(paths, name);
        let keep = |note: &[u8]| match name {
            DeviceName::Pci(bdf) => quarantine::keep(paths, bdf, note),
            DeviceName::Mdev(_) => Ok(()),
        };
        let lock =
            LockFile::take_after(paths, &path, record, keep).map_err(LeaseError::file(&path))?;
        Ok(lock.map(|lock| Self { name, lock }))
    }

    /// What is locked.
    pub(crate) fn name(&self) -> DeviceName {
        self.name
    }

    /// The locked file. The lock holds as long as any process has it open.
    pub(crate) fn file(&self) -> &File {
        &self.lock.file
    }

    /// Has the device put into quarantine once the lock is free. This opens no file: the reason is left in
    /// the lock's file, and whoever takes the lock next writes it down where quarantine is kept.
    pub(crate) fn leave_quarantine(&self, id: PciId, reason: &str) {
        let _ = self.lock.leave.set(quarantine::note(id, reason));
    }
}

#[cfg(test)]
mod tests;
