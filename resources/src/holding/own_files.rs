//! Files and directories of gantry that a process changes while it builds a VM or opens devices for one. A sandbox
//! must allow these.

use std::path::PathBuf;

use crate::base::atomic::make_dir;
use crate::base::host::HostPaths;
use crate::holding::restore::Change;

/// Files of gantry that building a VM changes. Everything else is only read: the sockets of clients, the records of
/// running VMs, maintenance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnFiles {
    /// Directories of records, which are replaced and removed.
    pub records: Vec<PathBuf>,
    /// Directories of lock files, which are created and written, and never removed.
    pub locks: Vec<PathBuf>,
    /// Lock files that exist already.
    pub lock_files: Vec<PathBuf>,
}

/// What is changed below these paths. Missing directories are created where that is allowed, since the kernel can
/// allow access only to paths that exist.
pub fn own_files(paths: &HostPaths) -> OwnFiles {
    let below = |name: &str| vec![paths.run.join(name)];
    let mut own = OwnFiles {
        records: below("vf-token"),
        locks: below("leases"),
        lock_files: below("allocate.lock"),
    };
    own.records
        .extend(Change::OF_VMS.map(|change| change.dir(paths)));
    own.records.push(paths.state.join("quarantine"));
    for dir in own.records.iter().chain(&own.locks) {
        if let Err(error) = make_dir(dir) {
            tracing::debug!("{} is missing: {error}", dir.display());
        }
    }
    for file in &own.lock_files {
        if let Err(error) = crate::holding::lock_file::open(file) {
            tracing::debug!("{} cannot be used: {error}", file.display());
        }
    }
    own
}
