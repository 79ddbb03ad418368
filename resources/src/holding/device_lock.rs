//! The lock of one device, which the kernel releases when its holder dies.
//!
//! Each device has a file in `<run>/leases`. It is made at the first lease and never removed, except that of a
//! mediated device, which is removed under its lock when the device is gone. The lock is an open-file-description
//! write lock on the file (fcntl(2), "Open file description locks"): the kernel releases it when the last
//! descriptor closes, and so when the holder dies. The descriptors are close-on-exec; only the opener passes them
//! on, to the VM that it leased for, so that either process keeps the lock. The content names the holder, for
//! people; only the lock counts. Only the owner can read the files, since a user who can open one can block it.

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
    /// Takes the lock of a device; none if another process has it. First stores the note of quarantine that the
    /// last holder left.
    pub(crate) fn take(
        paths: &HostPaths,
        name: impl Into<DeviceName>,
        record: &LeaseRecord,
    ) -> Result<Option<Self>, LeaseError> {
        let name = name.into();
        let path = lock_path(paths, name);
        let keep = |note: &[u8]| match name {
            DeviceName::Pci(bdf) => quarantine::store_note(paths, bdf, note),
            DeviceName::Mdev(_) => Ok(()),
        };
        let lock =
            LockFile::take_after(paths, &path, record, keep).map_err(LeaseError::file(&path))?;
        Ok(lock.map(|lock| Self { name, lock }))
    }

    /// The locked device.
    pub(crate) fn name(&self) -> DeviceName {
        self.name
    }

    /// The locked file. The lock holds as long as any process has it open.
    pub(crate) fn file(&self) -> &File {
        &self.lock.file
    }

    /// Puts the device into quarantine once the lock is released. This opens no file: the reason stays in the
    /// lock file as a note, and the next process that takes the lock stores it as a record.
    pub(crate) fn leave_quarantine(&self, id: PciId, reason: &str) {
        let _ = self.lock.leave.set(quarantine::note(id, reason));
    }
}

#[cfg(test)]
mod tests;
