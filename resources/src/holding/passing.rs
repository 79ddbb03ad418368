//! Holders that are about to release a device: the helper that gives devices back to the host, and processes that
//! are ending. The kernel frees the memory of a process before its locks, which takes a while for much memory.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::facts::process::is_ending;
use crate::holding::host_lock::{ALLOCATION_DEADLINE, AllocationLock, LeaseError};
use crate::holding::lock_file::{holder, is_trusted, lock_path};
use crate::holding::record::{LeaseKind, LeaseRecord, LeaseStatus, RESTORE};

/// How long others wait for holders that are about to release their devices.
pub(crate) const PASSING_PATIENCE: Duration = Duration::from_secs(15);
/// A longer wait is reported.
const SILENT: Duration = Duration::from_millis(500);

/// A device that is held, and its holder if that is recorded.
pub(crate) type InTheWay = (DeviceName, Option<LeaseRecord>);

/// Whether the holder of a device is about to release it, or has released it since the device was read.
pub(crate) fn is_passing(
    paths: &HostPaths,
    name: impl Into<DeviceName>,
    record: Option<&LeaseRecord>,
) -> bool {
    let name = name.into();
    let Some(record) = record else {
        // A holder removes its record before it releases the lock.
        return holder(paths, name) == LeaseStatus::Free;
    };
    if record.kind == LeaseKind::Task && record.name == RESTORE {
        return is_record_trusted(paths, name);
    }
    // A process that is not visible may run in another PID namespace.
    let free = || holder(paths, name) == LeaseStatus::Free;
    let ending = record.pid.and_then(|pid| is_ending(&paths.proc, pid.get()));
    ending.unwrap_or_else(free)
}

/// Whether the content of a device's lock file is trusted.
fn is_record_trusted(paths: &HostPaths, name: DeviceName) -> bool {
    let file = fs::symlink_metadata(lock_path(paths, name));
    file.is_ok_and(|file| is_trusted(file.uid()))
}

/// Does something under the allocation lock, which is released when this returns. Tries again as long as only
/// holders are in the way that are about to release their devices.
///
/// `in_the_way` returns the held devices that caused a failure, with their holders; none if it has another cause.
pub(crate) fn under_lock<T, E: From<LeaseError>>(
    paths: &HostPaths,
    record: &LeaseRecord,
    in_the_way: impl Fn(&E) -> Vec<InTheWay>,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let started = Instant::now();
    let mut told = false;
    loop {
        let choosing = AllocationLock::acquire(paths, record, ALLOCATION_DEADLINE)?;
        let result = attempt();
        drop(choosing);
        let held = match &result {
            Ok(_) => return result,
            Err(error) => in_the_way(error),
        };
        let passing = |(name, record): &InTheWay| is_passing(paths, *name, record.as_ref());
        let waited = started.elapsed();
        if held.is_empty() || !held.iter().all(passing) || waited >= PASSING_PATIENCE {
            return result;
        }
        if let Some((name, Some(record))) = held.first()
            && !told
            && waited >= SILENT
        {
            tracing::warn!("waiting for {record} to let go of {name}");
            told = true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost, bdf};
    use crate::holding::device_lock::DeviceLock;

    #[test]
    fn the_word_of_another_user_is_not_believed() {
        let host = FakeHost::new(&[Fake::nvme("01:00.0", 1)]);
        let name = DeviceName::from(bdf("01:00.0"));
        let restore = LeaseRecord::restore();
        let _lock = DeviceLock::take(&host.paths, name, &restore).unwrap();
        assert!(is_passing(&host.paths, name, Some(&restore)));
        let own = nix::unistd::geteuid().as_raw();
        assert!(is_trusted(0) && is_trusted(own) && !is_trusted(own + 1));
    }
}
