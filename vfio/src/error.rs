//! Errors of VFIO, in words for the person who has to fix them.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A failure of the host's side of passthrough. The guest never causes one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A device node could not be opened.
    #[error("cannot open {}{}", path.display(), open_hint(path, source))]
    Open {
        /// The node.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel lacks the container interface that gantry uses.
    #[error(
        "VFIO at {} offers no type1v2 IOMMU: enable the IOMMU (intel_iommu=on or amd_iommu=on) \
         and load vfio_iommu_type1", path.display()
    )]
    NoIommu {
        /// The container's node.
        path: PathBuf,
    },
    /// A driver of the host still has a device of the group.
    #[error(
        "IOMMU group {group} is not viable: a driver of the host still has a device of it; `gantry device \
         detach` one of its devices (/sys/kernel/iommu_groups/{group}/devices lists them), which moves all"
    )]
    NotViable {
        /// The group's number.
        group: u32,
    },
    /// Another process holds the group.
    #[error(
        "IOMMU group {group} is in use by another process (waited {waited:?} for it): \
         `fuser -v /dev/vfio/{group}` shows which; end that one first"
    )]
    GroupInUse {
        /// The group's number.
        group: u32,
        /// How long it was asked for.
        waited: Duration,
    },
    /// A call on a group failed.
    #[error("{call} on IOMMU group {group} failed: `dmesg` may show why")]
    Group {
        /// The group's number.
        group: u32,
        /// The kernel interface that refused.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A call on a container failed.
    #[error("{call} on the VFIO container failed: `dmesg` may show why")]
    Container {
        /// The kernel interface that refused.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A call on iommufd failed.
    #[error("{call} on iommufd failed: `dmesg` may show why")]
    Iommufd {
        /// The kernel interface that refused.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another process has a device open, as a cdev or through its group.
    #[error(
        "{device} is in use by another process (waited {waited:?} for it): `fuser -v /dev/vfio/* \
         /dev/vfio/devices/*` shows which; end that one first"
    )]
    DeviceInUse {
        /// The device's address on the host.
        device: String,
        /// How long it was asked for.
        waited: Duration,
    },
    /// A device that needs a token cannot be opened as a cdev.
    #[error(
        "{device} needs the token of its card, which this kernel does not take for a cdev (Linux 6.17 and later do), \
         or another process has it open: set \"iommufd\": false under \"platform\" in the VM's file"
    )]
    TokenOnCdev {
        /// The device's address on the host.
        device: String,
    },
    /// A range of guest memory could not be mapped or unmapped for DMA.
    #[error(
        "{call} of {len:#x} bytes at IOVA {iova:#x} failed{}",
        pin_hint(source)
    )]
    Dma {
        /// The kernel interface that refused.
        call: &'static str,
        /// First IOVA of the range.
        iova: u64,
        /// Its length in bytes.
        len: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The container has no room for that many mappings.
    #[error(
        "guest memory needs {needed} DMA mappings, but the VFIO container has only {available} left: \
         raise the limit, /sys/module/vfio_iommu_type1/parameters/dma_entry_limit"
    )]
    DmaEntries {
        /// Mappings asked for.
        needed: u64,
        /// Mappings left.
        available: u32,
    },
    /// A call on a device, or an access to one of its regions, failed.
    #[error("device {device}: {place} failed")]
    Device {
        /// The device's address on the host.
        device: String,
        /// The kernel interface, region, offset or vector concerned.
        place: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The device's bus is not this VM's alone.
    #[error(
        "{device} cannot be reset with its bus: {other} is on the bus too and is not this VM's"
    )]
    BusShared {
        /// The device's address on the host.
        device: String,
        /// The IOMMU group or the function that this VM does not have.
        other: String,
    },
    /// The device cannot interrupt a guest, and its entry does not allow that.
    #[error(
        "{device} has no interrupts that VFIO can deliver: add \"interrupts\": \"none\" to the device's entry to \
         use it without interrupts"
    )]
    NoInterrupts {
        /// The device's name in VFIO.
        device: String,
        /// Why the device's pin cannot be connected, if it has only a pin.
        #[source]
        source: Option<Box<Error>>,
    },
    /// The device answers nothing any more.
    #[error("device {device} does not answer: its registers read all ones")]
    Silent {
        /// The device's address on the host.
        device: String,
    },
    /// The device cannot be used by a guest.
    #[error("device {device} cannot be passed through: {why}")]
    Unusable {
        /// The device's address on the host.
        device: String,
        /// The reason.
        why: String,
    },
}

impl Error {
    /// Whether the host has too few interrupt vectors left.
    pub(crate) fn is_vector_shortage(&self) -> bool {
        matches!(self, Self::Device { source, .. } if source.raw_os_error() == Some(libc::ENOSPC))
    }

    /// Whether the device lacks the function that was asked for, and nothing failed.
    pub fn is_unsupported(&self) -> bool {
        match self {
            Self::BusShared { .. } => true,
            Self::Device { source, .. } => source.kind() == io::ErrorKind::Unsupported,
            _ => false,
        }
    }
}

/// gantry checks the limit on pinned memory beforehand: it sufficed then.
fn pin_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => " (out of memory, or of the limit that `ulimit -l` shows)",
        _ => "",
    }
}

fn open_hint(path: &Path, error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        // The module makes the container's node, a bound device makes its group's.
        Some(libc::ENOENT) if path.ends_with("vfio/vfio") => {
            "\nload it with `modprobe vfio_iommu_type1`, or in a container make /dev/vfio visible"
        }
        Some(libc::ENOENT) if path.ends_with("iommu") => {
            " (load it with `modprobe iommufd`, or set \"iommufd\": false under \"platform\" in the VM's file)"
        }
        Some(libc::ENOENT) => {
            " (is the vfio-pci module loaded, by `modprobe vfio-pci`, and the device bound to it?)"
        }
        Some(libc::EACCES | libc::EPERM) => " (run as its owner, or as root)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_cannot_be_pinned_points_at_the_limit() {
        let refused = |errno| Error::Dma {
            call: "VFIO_IOMMU_MAP_DMA",
            iova: 0,
            len: 1 << 30,
            source: io::Error::from_raw_os_error(errno),
        };
        assert!(refused(libc::ENOMEM).to_string().contains("`ulimit -l`"));
        assert!(!refused(libc::EEXIST).to_string().contains("ulimit"));
    }
}
