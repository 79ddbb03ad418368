//! What a holder writes about itself, and what others know about a holder.

use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// The name under which the helper holds devices that it gives back to the host.
pub(super) const RESTORE: &str = "gantry restore";

/// The VM that a device is leased for, and the process that keeps the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Name of the VM.
    pub vm: String,
    /// Its process.
    pub pid: u32,
}

/// What a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseKind {
    /// A VM has the device.
    Vm,
    /// A command is moving the device between drivers.
    Task,
}

/// What a holder writes about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// What the lease is for.
    pub kind: LeaseKind,
    /// Name of the VM or of the command.
    pub name: String,
    /// Its process; none where another user names a process that it does not own.
    pub pid: Option<NonZeroU32>,
    /// Since when, in seconds since 1970.
    pub since: u64,
}

impl LeaseRecord {
    fn now(kind: LeaseKind, name: &str, pid: u32) -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |passed| passed.as_secs());
        Self {
            kind,
            name: name.to_owned(),
            pid: NonZeroU32::new(pid),
            since,
        }
    }

    pub(crate) fn vm(holder: &Holder) -> Self {
        Self::now(LeaseKind::Vm, &holder.vm, holder.pid)
    }

    pub(crate) fn task(name: &str) -> Self {
        Self::now(LeaseKind::Task, name, std::process::id())
    }

    /// The record of the helper that gives devices back to the host. It holds them no longer than their drivers
    /// take.
    pub(crate) fn restore() -> Self {
        Self::task(RESTORE)
    }
}

impl fmt::Display for LeaseRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            LeaseKind::Vm => write!(f, "VM \"{}\"", self.name)?,
            LeaseKind::Task => write!(f, "`{}`", self.name)?,
        }
        match self.pid {
            Some(pid) => write!(f, " (pid {pid})"),
            None => Ok(()),
        }
    }
}

/// Whether a device is leased, and by whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseStatus {
    /// It is not leased.
    Free,
    /// It is leased by this holder.
    Held(LeaseRecord),
    /// It is leased without a readable record: the disk is full, or the lease is another user's.
    Unrecorded,
    /// It counts as leased: the lock file cannot be read.
    Unreadable {
        /// The lock file.
        file: PathBuf,
        /// Why not.
        why: String,
    },
}

impl LeaseStatus {
    /// Whether the device is leased, or counts as leased.
    pub fn is_held(&self) -> bool {
        *self != Self::Free
    }

    /// The holder's record.
    pub fn record(&self) -> Option<&LeaseRecord> {
        match self {
            Self::Held(record) => Some(record),
            Self::Free | Self::Unrecorded | Self::Unreadable { .. } => None,
        }
    }
}
