//! Maintenance, during which no VM starts, and the list of running VMs.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::base::atomic;
use crate::base::host::{HostPaths, TENANTS};
use crate::base::regular::HeldDir;
use crate::base::sysfs;
use crate::holding::lock_file::{LockFile, status, status_of};
use crate::holding::record::{Holder, LeaseRecord, LeaseStatus};

/// Why no VM may start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Maintenance {
    /// A description.
    pub reason: String,
    /// Since when, in seconds since 1970.
    pub since: u64,
}

/// Maintenance could not be switched or asked about.
#[derive(Debug, Error)]
pub enum MaintenanceError {
    /// The state directory cannot be used.
    #[error("cannot use {path}{}", sysfs::if_denied(.source, "run as root"))]
    File {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The reason where none is given.
const NO_REASON: &str = "ask the administrator";

/// At most so many files of one tenant are read for its running VMs.
const MOST_OF_TENANT: usize = 1024;

/// Switches maintenance on; it outlives a reboot. Without a new reason, an earlier one stays.
pub fn begin_maintenance(paths: &HostPaths, reason: Option<&str>) -> Result<(), MaintenanceError> {
    if reason.is_none() && maintenance(paths)?.is_some() {
        return Ok(());
    }
    let path = path(paths);
    let state = Maintenance {
        reason: reason.unwrap_or(NO_REASON).to_owned(),
        since: LeaseRecord::task("gantry maintenance").since,
    };
    let written = serde_json::to_vec(&state)
        .map_err(io::Error::from)
        .and_then(|text| atomic::replace(&path, &text));
    written.map_err(|source| MaintenanceError::File { path, source })
}

/// Switches maintenance off. Returns whether it was on.
pub fn end_maintenance(paths: &HostPaths) -> Result<bool, MaintenanceError> {
    let path = path(paths);
    match std::fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if sysfs::is_gone(&error) => Ok(false),
        Err(source) => Err(MaintenanceError::File { path, source }),
    }
}

/// Whether the host is in maintenance. A file that cannot be understood counts as maintenance.
pub fn maintenance(paths: &HostPaths) -> Result<Option<Maintenance>, MaintenanceError> {
    let path = path(paths);
    match std::fs::read(&path) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text).unwrap_or_else(|_| {
            Maintenance {
                reason: format!("{} says so", path.display()),
                since: 0,
            }
        }))),
        Err(error) if sysfs::is_gone(&error) => Ok(None),
        Err(source) => Err(MaintenanceError::File { path, source }),
    }
}

/// Maintenance is the host's, also for a tenant, who can read but not end it.
fn path(paths: &HostPaths) -> PathBuf {
    paths.state_of_host().join("maintenance.json")
}

/// Announces a running VM by a locked file; the kernel unlocks it when the process ends.
#[derive(Debug)]
pub struct Announced {
    _lock: LockFile,
}

/// A running VM. Shown with its process, and its tenant if it has one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RunningVm {
    /// The tenant that owns it; none for the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// What it writes about itself.
    #[serde(flatten)]
    pub record: LeaseRecord,
}

impl fmt::Display for RunningVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.record)?;
        match &self.tenant {
            Some(tenant) => write!(f, " of tenant {tenant}"),
            None => Ok(()),
        }
    }
}

/// Announces a VM to [`running_vms`]. None where this user may not write the run directory; the VM runs without it.
pub fn announce(paths: &HostPaths, holder: &Holder) -> Option<Announced> {
    let dir = paths.run.join("vms");
    clear(paths, &dir, holder.pid);
    let path = dir.join(format!("{}.lock", holder.pid));
    // Another VM that starts may have the file open for a moment.
    for _ in 0..100 {
        match LockFile::take(paths, &path, &LeaseRecord::vm(holder)) {
            Ok(Some(lock)) => return Some(Announced { _lock: lock }),
            Ok(None) => std::thread::sleep(std::time::Duration::from_millis(1)),
            Err(error) => {
                let path = path.display();
                tracing::debug!("the VM is not announced: {path} cannot be used: {error}");
                break;
            }
        }
    }
    None
}

/// The running VMs, with and without devices, in the order of their names.
pub fn running_vms(paths: &HostPaths) -> Result<Vec<RunningVm>, MaintenanceError> {
    let vms = paths.run.join("vms");
    let own = list(&vms)?.into_iter();
    let own = own.filter_map(|name| match status(paths, &vms.join(name)) {
        LeaseStatus::Held(record) => Some(record),
        _ => None,
    });
    let announced = |tenant: Option<&str>, record| RunningVm {
        tenant: tenant.map(str::to_owned),
        record,
    };
    let mut running: Vec<_> = own.map(|record| announced(None, record)).collect();
    let tenants = paths.run.join(TENANTS);
    for name in list(&tenants)? {
        // Another user's directory may be closed to this one.
        let dir = HeldDir::below(&tenants, &Path::new(&name).join("vms"));
        if let Ok(Some(dir)) = dir {
            let records = announced_in(paths, &dir, &name).into_iter();
            running.extend(records.map(|record| announced(Some(&name), record)));
        }
    }
    running.sort_by(
        |RunningVm { record: one, .. }, RunningVm { record: other, .. }| {
            (&one.name, one.pid).cmp(&(&other.name, other.pid))
        },
    );
    Ok(running)
}

/// The VMs that a tenant's directory announces. The tenant may put anything there: each file is read once, whatever
/// its names, and only a limited number of files is read.
fn announced_in(paths: &HostPaths, dir: &HeldDir, tenant: &str) -> Vec<LeaseRecord> {
    let (names, more) = dir.names(MOST_OF_TENANT).unwrap_or_default();
    if more {
        tracing::warn!(
            "tenant {tenant} has more than {MOST_OF_TENANT} files in its directory of running VMs: not all \
             are looked at"
        );
    }
    let mut seen = BTreeSet::new();
    let mut record = |name: &String| {
        let file = dir.regular(name).ok()?;
        let meta = file.metadata().ok()?;
        let new = seen.insert((meta.dev(), meta.ino()));
        match new.then(|| status_of(paths, &file)) {
            Some(Ok(LeaseStatus::Held(record))) => Some(record),
            _ => None,
        }
    };
    names.iter().filter_map(&mut record).collect()
}

fn list(dir: &Path) -> Result<Vec<String>, MaintenanceError> {
    sysfs::entries(dir).map_err(|source| MaintenanceError::File {
        path: dir.to_owned(),
        source,
    })
}

/// Removes the files of processes that have ended. For a process with the same number the file is made anew: a
/// process that locks a file checks that it is still at its path.
fn clear(paths: &HostPaths, dir: &Path, own: u32) {
    for name in sysfs::entries(dir).unwrap_or_default() {
        let path = dir.join(&name);
        let record = LeaseRecord::task("gantry run");
        let other = name != format!("{own}.lock");
        if let (true, Ok(Some(_lock))) = (other, LockFile::take(paths, &path, &record)) {
            let _ = std::fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::FakeHost;

    #[test]
    fn maintenance_goes_on_and_off() {
        let host = FakeHost::new(&[]);
        assert_eq!(maintenance(&host.paths).unwrap(), None);
        for (given, told) in [
            (None, NO_REASON),
            (Some("new disks"), "new disks"),
            (None, "new disks"),
            (Some("new GPUs"), "new GPUs"),
        ] {
            begin_maintenance(&host.paths, given).unwrap();
            let state = maintenance(&host.paths).unwrap().unwrap();
            assert_eq!(state.reason, told);
        }
        host.file("var/maintenance.json", "");
        let state = maintenance(&host.paths).unwrap().unwrap();
        assert!(state.reason.contains("maintenance.json says so"));
        assert!(end_maintenance(&host.paths).unwrap());
        assert!(!end_maintenance(&host.paths).unwrap());
        assert_eq!(maintenance(&host.paths).unwrap(), None);
    }

    #[test]
    fn a_tenant_is_told_of_the_hosts() {
        let host = FakeHost::new(&[]);
        let tenant = HostPaths {
            state: host.paths.state.join("tenants/lab"),
            only: Some(Default::default()),
            ..host.paths.clone()
        };
        host.file("var/tenants/lab/maintenance.json", "");
        assert_eq!(maintenance(&tenant).unwrap(), None);
        begin_maintenance(&host.paths, Some("new disks")).unwrap();
        let told = maintenance(&tenant).unwrap().unwrap();
        assert_eq!(told.reason, "new disks");
    }

    #[test]
    fn vms_are_seen_while_they_run() {
        let host = FakeHost::new(&[]);
        let vm = |name: &str, pid| Holder {
            vm: name.to_owned(),
            pid,
        };
        let seen = || -> Vec<String> {
            let running = running_vms(&host.paths).unwrap();
            running.into_iter().map(|vm| vm.record.name).collect()
        };
        assert_eq!(seen(), Vec::<String>::new());
        let b = announce(&host.paths, &vm("b", 7)).unwrap();
        let a = announce(&host.paths, &vm("a", 8)).unwrap();
        assert_eq!(seen(), ["a", "b"]);
        drop(b);
        assert_eq!(seen(), ["a"]);
        let _c = announce(&host.paths, &vm("c", 9)).unwrap();
        assert_eq!(seen(), ["a", "c"]);
        let files = sysfs::entries(&host.paths.run.join("vms")).unwrap();
        assert_eq!(files, ["8.lock", "9.lock"], "the one that ended is cleared");
        drop(a);
    }
}
