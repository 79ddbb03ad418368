//! Which virtual GPUs are made, or unmade, for one VM or command: a record of each in the run directory,
//! locked for as long as the kernel is at work on it.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::base::atomic;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::sysfs;
use crate::base::uuid::Uuid;
use crate::holding::lock_file::{holder, is_locked};

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

pub(crate) fn path(paths: &HostPaths, name: DeviceName) -> PathBuf {
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
    let owed = fs::read(&path).ok()?;
    let owed = serde_json::from_slice::<Owed>(&owed).ok();
    Some(Claim {
        uuid,
        parent: owed.and_then(|owed| owed.parent),
        under_way: at_work.unwrap_or(true) || !paths.mdev(uuid).exists(),
        left: !holder(paths, uuid).is_held(),
    })
}

/// Writes the record of a device.
pub(crate) fn store(
    paths: &HostPaths,
    name: DeviceName,
    vm: &str,
    parent: Option<&str>,
) -> io::Result<()> {
    let owed = Owed {
        vm: vm.to_owned(),
        parent: parent.map(str::to_owned),
    };
    atomic::replace(&path(paths, name), &serde_json::to_vec(&owed)?)
}

/// Forgets a device that is gone, or that is to stay.
pub(crate) fn forget(paths: &HostPaths, name: DeviceName) {
    let path = path(paths, name);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!("cannot remove {}: {error}", path.display());
        }
        _ => {}
    }
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
