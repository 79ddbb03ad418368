//! Maintenance: no new VM starts on the host, and those that run can be seen.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::host::{HostPaths, TENANTS};
use crate::lease::{Holder, LeaseError, LeaseRecord, LeaseStatus, LockFile, status};
use crate::{atomic, sysfs};

/// Why no VM may start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Maintenance {
    /// Words for people.
    pub reason: String,
    /// Since when, in seconds since 1970.
    pub since: u64,
}

/// Maintenance could not be switched or asked about.
#[derive(Debug, Error)]
pub enum MaintenanceError {
    /// The state directory cannot be used.
    #[error("cannot use {path}: run as root")]
    File {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The running VMs cannot be listed.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

/// Why, where nobody says.
const NO_REASON: &str = "ask the administrator";

/// Switches maintenance on; it outlives a reboot. Without a reason, one that it is on for stays.
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

/// Whether the host is in maintenance. A file that cannot be understood counts: somebody meant it.
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

/// The host's, whoever asks: a tenant is told of it, and cannot end it.
fn path(paths: &HostPaths) -> PathBuf {
    paths.state_of_host().join("maintenance.json")
}

/// Says that a VM runs for as long as it lives: a locked file, which the kernel unlocks.
#[derive(Debug)]
pub struct Announced {
    _lock: LockFile,
}

/// A VM that runs. Shown with its process, and its tenant where it is one's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RunningVm {
    /// The tenant whose it is; none if it is the host's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// What it says of itself.
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

/// Announces a VM to [`running_vms`]. None where this user may not write the run directory; the VM can
/// run all the same.
pub fn announce(paths: &HostPaths, holder: &Holder) -> Option<Announced> {
    let dir = paths.run.join("vms");
    clear(&dir, holder.pid);
    let path = dir.join(format!("{}.lock", holder.pid));
    // Another VM that starts may look at the file for a moment.
    for _ in 0..100 {
        match LockFile::take(&path, &LeaseRecord::vm(holder)) {
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

/// The VMs that run, with and without devices, in the order of their names.
pub fn running_vms(paths: &HostPaths) -> Result<Vec<RunningVm>, MaintenanceError> {
    let mut running = Vec::new();
    for (tenant, home) in homes(paths)? {
        // A tenant's own, so what lies there may be anything, and is at most not seen.
        let tenants = tenant.is_some();
        let held = match sysfs::HeldDir::open(&home) {
            Ok(held) => held,
            // Another user's.
            Err(_) if tenants => None,
            Err(source) => return Err(MaintenanceError::File { path: home, source }),
        };
        let Some(held) = held else {
            continue;
        };
        let dir = held.path();
        for name in list(&dir)? {
            match status(paths, &dir.join(name)) {
                Ok(LeaseStatus::Held(record)) => running.push(RunningVm {
                    tenant: tenant.clone(),
                    record,
                }),
                Err(error) if !tenants => return Err(error.into()),
                _ => {}
            }
        }
    }
    running.sort_by(
        |RunningVm { record: one, .. }, RunningVm { record: other, .. }| {
            (&one.name, one.pid).cmp(&(&other.name, other.pid))
        },
    );
    Ok(running)
}

/// Where VMs are announced: those of the host, and those of tenants, by these.
fn homes(paths: &HostPaths) -> Result<Vec<(Option<String>, PathBuf)>, MaintenanceError> {
    let tenants = paths.run.join(TENANTS);
    let of_tenants = list(&tenants)?;
    let mut homes = vec![(None, paths.run.join("vms"))];
    homes.extend(of_tenants.into_iter().map(|name| {
        let home = tenants.join(&name).join("vms");
        (Some(name), home)
    }));
    Ok(homes)
}

fn list(dir: &Path) -> Result<Vec<String>, MaintenanceError> {
    sysfs::entries(dir).map_err(|source| MaintenanceError::File {
        path: dir.to_owned(),
        source,
    })
}

/// Removes the files of processes that are no more. A number given anew has its file made anew: whoever
/// locks a file looks whether it still is there.
fn clear(dir: &Path, own: u32) {
    for name in sysfs::entries(dir).unwrap_or_default() {
        let path = dir.join(&name);
        let record = LeaseRecord::task("gantry run");
        let other = name != format!("{own}.lock");
        if let (true, Ok(Some(_lock))) = (other, LockFile::take(&path, &record)) {
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
