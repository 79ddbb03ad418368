//! Virtual GPUs that are created or removed for one VM or command: each has a record in the run directory, which is
//! locked while the kernel works on the device.

use std::io;

use serde::{Deserialize, Serialize};

use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::regular::open_no_link;
use crate::base::uuid::Uuid;
use crate::holding::lock_file::{holder, is_locked};
use crate::holding::restore::{Change, RestoreRecord};

/// The record of a virtual GPU that is being created or removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VgpuRecord {
    /// The VM or command, for messages.
    pub(crate) vm: String,
    /// The parent of a mediated device.
    #[serde(default)]
    pub(crate) parent: Option<String>,
}

impl RestoreRecord for VgpuRecord {
    const CHANGE: Change = Change::Vgpu;
}

/// A mediated device with a record, as allocation counts it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) uuid: Uuid,
    /// Its parent.
    pub(crate) parent: Option<String>,
    /// Whether it is being created or removed now, so that its parent may not have counted it yet.
    pub(crate) under_way: bool,
    /// Whether nobody holds it any more.
    pub(crate) left: bool,
}

/// Whether the kernel still works on a device that no process waits for any more.
pub(crate) fn hangs(paths: &HostPaths, name: impl Into<DeviceName>) -> bool {
    let name = name.into();
    hangs_by(
        || open_no_link(&Change::Vgpu.path(paths, name)).and_then(|file| is_locked(&file)),
        || holder(paths, name).is_held(),
    )
}

/// A process may have finished and released the device between the two reads: a third one decides.
fn hangs_by(at_work: impl Fn() -> io::Result<bool>, is_held: impl FnOnce() -> bool) -> bool {
    let at_work = || at_work().unwrap_or(false);
    at_work() && !is_held() && at_work()
}

/// The mediated devices with records.
pub(crate) fn claims(paths: &HostPaths) -> Vec<Claim> {
    let mdevs = Change::Vgpu
        .recorded(paths)
        .into_iter()
        .filter_map(DeviceName::mdev);
    mdevs.filter_map(|uuid| claim_on(paths, uuid)).collect()
}

fn claim_on(paths: &HostPaths, uuid: Uuid) -> Option<Claim> {
    let file = open_no_link(&Change::Vgpu.path(paths, uuid));
    let at_work = file.and_then(|file| is_locked(&file));
    let record = VgpuRecord::load(paths, uuid);
    // Another process may have removed it since it was listed.
    let there = record.is_some() || Change::Vgpu.is_recorded(paths, uuid);
    there.then(|| Claim {
        uuid,
        parent: record.and_then(|record| record.parent),
        under_way: at_work.unwrap_or(true) || !paths.mdev(uuid).exists(),
        left: !holder(paths, uuid).is_held(),
    })
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
