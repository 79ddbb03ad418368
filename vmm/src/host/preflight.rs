//! Checks of the host before a VM is built.

use std::fs;
use std::path::{Path, PathBuf};

use gantry_resources::base::{HostPaths, Numbers};
use gantry_resources::facts::VfioBackEnd;

use super::placement::{PlacementError, VmPlacement};
use crate::config::{VcpuCount, VmConfig};

/// What the host lacks.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PreflightError {
    /// More guest RAM than the host has at all.
    #[error(
        "memory.size: {asked} MiB is more than this host has ({total} MiB)\n\
         give the VM less memory"
    )]
    MoreThanHost {
        /// MiB asked for.
        asked: u64,
        /// MiB of the host.
        total: u64,
    },
    /// More guest RAM than is free, where all of it must be pinned.
    #[error(
        "memory.size: a VM with devices needs all of its {asked} MiB at once, since devices may \
         write anywhere in it, but only {available} MiB of this host are free\n\
         give the VM less memory, or stop something else"
    )]
    MoreThanFree {
        /// MiB asked for.
        asked: u64,
        /// MiB that the kernel calls available.
        available: u64,
    },
    /// The VM cannot be where its file says.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// More vCPUs than KVM gives one VM.
    #[error(
        "cpus.boot_vcpus: {asked} is too many: this host's KVM allows at most {limit} vCPUs in a VM\n\
         give the VM fewer"
    )]
    TooManyVcpus {
        /// vCPUs asked for.
        asked: u8,
        /// `KVM_CAP_MAX_VCPUS`.
        limit: usize,
    },
    /// The kernel has not the interface that the VM's file wants.
    #[error(
        "platform.iommufd: this host has no {}, which `\"iommufd\": {wanted}` needs\n\
         load it with `modprobe {}`, or remove the key: gantry then takes what the host has", node.display(), module
    )]
    NoBackEnd {
        /// What the file says.
        wanted: bool,
        /// The interface's node.
        node: PathBuf,
        /// The kernel module that makes it.
        module: &'static str,
    },
    /// The process may not pin enough memory.
    #[error(
        "the memlock limit is too low: devices need all of the guest's RAM pinned, {needed} MiB, \
         and this user may lock {allowed} MiB\n\
         raise it with `ulimit -l {limit}` in the shell that starts gantry, for a user's logins with a \
         line `USER - memlock {limit}` in /etc/security/limits.d/gantry.conf, or with `LimitMEMLOCK=` \
         in its systemd unit"
    )]
    Memlock {
        /// MiB that must be pinned.
        needed: u64,
        /// MiB that may be.
        allowed: u64,
        /// The limit that would do, in the KiB that `ulimit -l` takes.
        limit: u64,
    },
}

/// Slack for what VFIO pins beside guest RAM. The kernel counts none of it now, but a limit without slack may
/// be too low for a later device.
const MEMLOCK_SLACK: u64 = 64 << 20;

const MIB: u64 = 1 << 20;

/// Checks the host against the VM.
///
/// # Errors
/// What the host lacks first.
pub fn check(config: &VmConfig, host: &HostPaths) -> Result<(), PreflightError> {
    VmPlacement::find(config, &Numbers::default(), host)?;
    check_back_end(config, host)?;
    let memory = HostMemory::read(&host.proc.join("meminfo"));
    let limit = gantry_resources::facts::memlock_limit(host);
    judge(config.memory.bytes(), config.is_pinned(), &memory, limit)
}

/// Checks only what does not depend on other processes: the VM's NUMA nodes, and the total memory.
///
/// # Errors
/// What the host lacks first.
pub fn check_host(config: &VmConfig, host: &HostPaths) -> Result<(), PreflightError> {
    VmPlacement::find(config, &Numbers::default(), host)?;
    check_back_end(config, host)?;
    let memory = HostMemory::read(&host.proc.join("meminfo"));
    judge(config.memory.bytes(), false, &memory, None)
}

fn check_back_end(config: &VmConfig, host: &HostPaths) -> Result<(), PreflightError> {
    let Some(back_end) = config.back_end.filter(|_| config.takes_devices()) else {
        return Ok(());
    };
    let node = back_end.node(host);
    let wanted = back_end == VfioBackEnd::Iommufd;
    match node.exists() {
        true => Ok(()),
        false => Err(PreflightError::NoBackEnd {
            wanted,
            node,
            module: if wanted {
                "iommufd"
            } else {
                "vfio_iommu_type1"
            },
        }),
    }
}

/// Checks the number of vCPUs against KVM's limit (`KVM_CAP_MAX_VCPUS`).
///
/// # Errors
/// It is more.
pub fn check_vcpus(count: VcpuCount, limit: usize) -> Result<(), PreflightError> {
    let asked = count.get();
    if usize::from(asked) > limit {
        return Err(PreflightError::TooManyVcpus { asked, limit });
    }
    Ok(())
}

fn judge(
    asked: u64,
    pinned: bool,
    memory: &HostMemory,
    memlock: Option<u64>,
) -> Result<(), PreflightError> {
    if memory.total.is_some_and(|total| asked > total) {
        let total = memory.total.unwrap_or_default() / MIB;
        return Err(PreflightError::MoreThanHost {
            asked: asked / MIB,
            total,
        });
    }
    if !pinned {
        return Ok(());
    }
    if let Some(available) = memory.available.filter(|available| asked > *available) {
        let available = available / MIB;
        return Err(PreflightError::MoreThanFree {
            asked: asked / MIB,
            available,
        });
    }
    check_pinned(asked, memlock)
}

/// Checks the bytes of guest RAM that devices need pinned against what the process may pin.
///
/// # Errors
/// They are more.
pub fn check_pinned(asked: u64, memlock: Option<u64>) -> Result<(), PreflightError> {
    match memlock.filter(|allowed| asked > *allowed) {
        Some(allowed) => Err(PreflightError::Memlock {
            needed: asked / MIB,
            allowed: allowed / MIB,
            limit: (asked + MEMLOCK_SLACK) / 1024,
        }),
        None => Ok(()),
    }
}

/// Bytes of memory, from `/proc/meminfo` (proc_meminfo(5)). `None` where the kernel does not say.
#[derive(Debug, Default)]
struct HostMemory {
    total: Option<u64>,
    available: Option<u64>,
}

impl HostMemory {
    fn read(path: &Path) -> Self {
        Self::parse(&fs::read_to_string(path).unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
            kib.checked_mul(1024)
        };
        Self {
            total: field("MemTotal:"),
            available: field("MemAvailable:"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(total: u64, available: u64) -> HostMemory {
        HostMemory {
            total: Some(total * MIB),
            available: Some(available * MIB),
        }
    }

    #[test]
    fn meminfo_is_read_in_bytes() {
        let memory = HostMemory::parse("MemTotal:  2048 kB\nMemAvailable:   1024 kB\n");
        assert_eq!(
            (memory.total, memory.available),
            (Some(2 << 20), Some(1 << 20))
        );
        assert_eq!(HostMemory::parse("MemTotal: lots").total, None);
    }

    #[test]
    fn memory_is_judged_by_what_must_be_pinned() {
        let memory = host(8192, 4096);
        assert!(judge(5000 * MIB, false, &memory, Some(0)).is_ok());
        let more = judge(9000 * MIB, false, &memory, None);
        assert_eq!(
            more,
            Err(PreflightError::MoreThanHost {
                asked: 9000,
                total: 8192
            })
        );
        let free = judge(5000 * MIB, true, &memory, None);
        assert_eq!(
            free,
            Err(PreflightError::MoreThanFree {
                asked: 5000,
                available: 4096
            })
        );
    }

    #[test]
    fn an_interface_that_the_file_wants_and_the_host_lacks_is_named() {
        let root = tempfile::tempdir().unwrap();
        let host = HostPaths::under(root.path());
        let mut config = VmConfig {
            back_end: Some(VfioBackEnd::Iommufd),
            ..VmConfig::small()
        };
        check_back_end(&config, &host).unwrap();
        config.hotplug.slots = 1;
        let refused = check_back_end(&config, &host).unwrap_err().to_string();
        assert!(refused.starts_with("platform.iommufd: "), "{refused}");
        assert!(refused.contains("dev/iommu,"), "{refused}");
        assert!(refused.contains("modprobe iommufd"), "{refused}");
        config.back_end = Some(VfioBackEnd::Container);
        let refused = check_back_end(&config, &host).unwrap_err().to_string();
        assert!(refused.contains("`\"iommufd\": false`"), "{refused}");
        config.back_end = None;
        check_back_end(&config, &host).unwrap();
    }

    #[test]
    fn vcpus_are_judged_by_kvms_limit() {
        let count = VcpuCount::new(200).unwrap();
        assert!(check_vcpus(count, 200).is_ok());
        let text = check_vcpus(count, 128).unwrap_err().to_string();
        assert!(text.starts_with("cpus.boot_vcpus: "), "{text}");
        assert!(text.contains("at most 128"), "{text}");
    }

    #[test]
    fn the_memlock_error_says_how_much() {
        let short = judge(512 * MIB, true, &host(8192, 4096), Some(8 * MIB)).unwrap_err();
        let text = short.to_string();
        assert!(text.contains("512 MiB") && text.contains("8 MiB"), "{text}");
        assert!(text.contains("ulimit -l 589824"), "{text}");
        assert!(judge(512 * MIB, true, &host(8192, 4096), None).is_ok());
    }
}
