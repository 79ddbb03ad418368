//! The address ranges that an IOMMU group may not map.

use std::fs;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::base::host::HostPaths;

/// Why a range is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReservedKind {
    /// The firmware needs it mapped one to one (RMRR).
    Direct,
    /// As `Direct`, but only until a driver takes the device.
    DirectRelaxable,
    /// It must never be mapped.
    Reserved,
    /// The target of message-signalled interrupts.
    Msi,
    /// A kind that this version does not know; treat it as `Reserved`.
    Other,
}

/// A range of I/O virtual addresses that must not be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
        source: io::Error,
    },
    /// A line of the file is no region.
    #[error("{path} has a line that is no reserved region: \"{line}\"")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line.
        line: String,
    },
}

/// The reserved regions of an IOMMU group, in the order in which sysfs lists them
/// (Documentation/ABI/testing/sysfs-kernel-iommu_groups).
pub fn reserved_regions(
    paths: &HostPaths,
    group: u32,
) -> Result<Vec<ReservedRegion>, ReservedError> {
    let path = paths
        .sysfs
        .join(format!("kernel/iommu_groups/{group}/reserved_regions"));
    let text = fs::read_to_string(&path).map_err(|source| ReservedError::Read {
        path: path.clone(),
        source,
    })?;
    let region = |line: &str| {
        parse(line).ok_or_else(|| ReservedError::Line {
            path: path.clone(),
            line: line.into(),
        })
    };
    text.lines().map(region).collect()
}

/// Reads `0x00000000fee00000 0x00000000feefffff msi`.
fn parse(line: &str) -> Option<ReservedRegion> {
    let mut words = line.split_whitespace();
    let mut address = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let (start, end) = (address()?, address()?);
    let kind = match words.next()? {
        "direct" => ReservedKind::Direct,
        "direct-relaxable" => ReservedKind::DirectRelaxable,
        "reserved" => ReservedKind::Reserved,
        "msi" => ReservedKind::Msi,
        _ => ReservedKind::Other,
    };
    (start <= end).then_some(ReservedRegion { start, end, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(text: &str) -> Result<Vec<ReservedRegion>, ReservedError> {
        let root = tempfile::tempdir().unwrap();
        let paths = HostPaths::under(root.path());
        let dir = paths.sysfs.join("kernel/iommu_groups/7");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("reserved_regions"), text).unwrap();
        reserved_regions(&paths, 7)
    }

    #[test]
    fn regions_are_read_with_their_kinds() {
        let text = "0x000000007b800000 0x000000007fffffff direct-relaxable\n\
                    0x00000000fee00000 0x00000000feefffff msi\n\
                    0x000000fd00000000 0x000000ffffffffff reserved\n\
                    0x0000000000000000 0x0000000000000fff direct\n\
                    0x0000000000001000 0xffffffffffffffff something-new\n";
        let regions = with(text).unwrap();
        let kinds: Vec<_> = regions.iter().map(|region| region.kind).collect();
        use ReservedKind::*;
        assert_eq!(kinds, [DirectRelaxable, Msi, Reserved, Direct, Other]);
        assert_eq!(
            (regions[1].start, regions[1].end),
            (0xfee0_0000, 0xfeef_ffff)
        );
        assert_eq!(regions[4].end, u64::MAX);
        assert_eq!(with("").unwrap(), []);
    }

    #[test]
    fn a_group_that_is_not_there_and_a_line_that_is_none_are_named() {
        let paths = HostPaths::under(std::path::Path::new("/nonexistent"));
        let error = reserved_regions(&paths, 7).unwrap_err().to_string();
        assert!(error.contains("iommu_groups/7/reserved_regions"), "{error}");
        for line in [
            "0x2000 0x1000 msi",
            "1000 2000 msi",
            "0x1000 msi",
            "0x1000 0x2000",
        ] {
            let error = with(line).unwrap_err().to_string();
            assert!(error.contains(line), "{error}");
        }
    }
}
