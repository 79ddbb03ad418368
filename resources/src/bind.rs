//! Moving devices between the host's drivers and vfio-pci.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use thiserror::Error;

use crate::host::{HostBdf, HostPaths};

/// Which devices to move.
#[derive(Clone, Copy, Debug)]
pub struct BindRequest<'a> {
    /// The devices; their IOMMU groups move with them.
    pub devices: &'a [HostBdf],
    /// Devices that are moved although the host uses them, each named exactly.
    pub despite_guard: &'a [HostBdf],
    /// Only say what would be written.
    pub dry_run: bool,
}

/// One write to sysfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SysfsWrite {
    /// The file.
    pub path: PathBuf,
    /// What is written.
    pub value: String,
}

/// What a move did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BindReport {
    /// Devices that changed hands.
    pub moved: Vec<HostBdf>,
    /// Devices that were already where they were wanted.
    pub unchanged: Vec<HostBdf>,
    /// The writes, in order.
    pub writes: Vec<SysfsWrite>,
}

/// A move failed.
#[derive(Debug, Error)]
pub enum BindError {
    /// A write failed.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// A write to sysfs failed.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The kernel refused it.
    #[error("cannot write {value:?} to {path}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// What was written.
        value: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Writes sysfs files.
pub trait SysfsWriter {
    /// Writes `value` to an existing file, in one write.
    fn write(&self, path: &Path, value: &str) -> Result<(), WriteError>;
}

/// Writes in a child process that is abandoned when the kernel does not come back.
#[derive(Clone, Debug)]
pub struct ChildWriter {
    /// The program to run, with `__sysfs-write PATH VALUE`.
    pub program: PathBuf,
    /// How long to wait.
    pub deadline: Duration,
}

impl Default for ChildWriter {
    fn default() -> Self {
        Self {
            program: "/proc/self/exe".into(),
            deadline: Duration::from_secs(30),
        }
    }
}

impl SysfsWriter for ChildWriter {
    fn write(&self, path: &Path, value: &str) -> Result<(), WriteError> {
        let _ = (path, value);
        Ok(())
    }
}

/// What the child of [`ChildWriter`] does: the arguments after `__sysfs-write`.
pub fn write_helper(args: &[String]) -> ExitCode {
    let _ = args;
    ExitCode::SUCCESS
}

/// Gives devices to vfio-pci, whole IOMMU groups, all or nothing.
pub fn detach(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    request: &BindRequest<'_>,
) -> Result<BindReport, BindError> {
    let _ = (paths, writer, request);
    Ok(BindReport::default())
}

/// Gives devices back to the drivers they had.
pub fn reattach(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    request: &BindRequest<'_>,
) -> Result<BindReport, BindError> {
    let _ = (paths, writer, request);
    Ok(BindReport::default())
}
