//! The locks of the whole host: the allocation lock, and the lock under which devices change owners.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::holding::lock_file::{LockFile, status};
use crate::holding::record::LeaseRecord;

/// How long to wait for others who are choosing devices. Choosing takes milliseconds.
pub(crate) const ALLOCATION_DEADLINE: Duration = Duration::from_secs(10);

/// Leasing failed.
#[derive(Debug, Error)]
pub enum LeaseError {
    /// A file or directory of the run directory cannot be used.
    #[error(
        "cannot use {path} to keep leases{}",
        sysfs::if_denied(
            .source,
            "run as root, or as a tenant's user (`gantry tenant create`)"
        )
    )]
    File {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process holds the allocation lock for too long.
    #[error(
        "waited {waited:?} for {holder} to finish choosing devices, which takes milliseconds: is that process stopped?"
    )]
    AllocationBusy {
        /// The holder, or words for an unknown one.
        holder: String,
        /// How long.
        waited: Duration,
    },
    /// Another process changes owners for too long.
    #[error(
        "waited a minute for {holder} to finish: is that process stopped, or does a device hang? see dmesg"
    )]
    OwnersBusy {
        /// The holder, or words for an unknown one.
        holder: String,
    },
}

impl LeaseError {
    pub(super) fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        |source| Self::File { path, source }
    }
}

/// The host-wide lock under which devices are chosen, so that contenders for several devices cannot
/// all give up. Always taken before any device's lock.
#[derive(Debug)]
pub(crate) struct AllocationLock {
    _lock: LockFile,
}

/// The host-wide lock under which devices change owners. It is held while devices move, which may take long, and is
/// therefore taken before all other locks.
#[derive(Debug)]
pub(crate) struct OwnersLock {
    _lock: LockFile,
}

impl OwnersLock {
    /// How long one command may hold it: a write to sysfs that hangs is abandoned after half a minute.
    const DEADLINE: Duration = Duration::from_secs(60);

    pub(crate) fn acquire(paths: &HostPaths, record: &LeaseRecord) -> Result<Self, LeaseError> {
        let path = paths.run.join("owners.lock");
        let waited = wait(paths, &path, record, Self::DEADLINE)?;
        waited
            .map(|_lock| Self { _lock })
            .map_err(|holder| LeaseError::OwnersBusy { holder })
    }
}

impl AllocationLock {
    /// Waits for one holder until the deadline.
    pub(crate) fn acquire(
        paths: &HostPaths,
        record: &LeaseRecord,
        deadline: Duration,
    ) -> Result<Self, LeaseError> {
        let path = paths.run.join("allocate.lock");
        let waited = wait(paths, &path, record, deadline)?;
        waited
            .map(|_lock| Self { _lock })
            .map_err(|holder| LeaseError::AllocationBusy {
                holder,
                waited: deadline,
            })
    }
}

/// Waits for a lock as long as its holders change. A holder that keeps it until the deadline is named in the error;
/// a long wait is reported before that.
fn wait(
    paths: &HostPaths,
    path: &Path,
    record: &LeaseRecord,
    deadline: Duration,
) -> Result<Result<LockFile, String>, LeaseError> {
    let mut started = Instant::now();
    let mut pause = Duration::from_micros(200);
    let mut seen = None;
    let mut told = false;
    loop {
        if let Some(lock) = LockFile::take(paths, path, record).map_err(LeaseError::file(path))? {
            return Ok(Ok(lock));
        }
        // The deadline is for one holder: the last of many contenders waits for all of them.
        let patience = match told {
            true => deadline,
            false => deadline.min(ALLOCATION_DEADLINE),
        };
        if seen.is_none() || started.elapsed() >= patience {
            let holder = status(paths, path);
            if seen.as_ref() == Some(&holder) && holder.is_held() {
                let record = holder.record().map(ToString::to_string);
                let name = record.unwrap_or_else(|| "an unknown process".to_owned());
                if patience == deadline {
                    return Ok(Err(name));
                }
                tracing::warn!("waiting for {name} to finish");
                told = true;
            } else {
                seen = Some(holder);
                started = Instant::now();
                told = false;
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
