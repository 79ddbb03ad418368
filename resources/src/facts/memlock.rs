//! How much memory this process may pin.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use crate::base::host::HostPaths;
use crate::base::sysfs;

/// CAP_IPC_LOCK of linux/capability.h, as a bit of the effective set.
const CAP_IPC_LOCK: u64 = 1 << 14;

/// Bytes that this process may lock, which is also the limit for VFIO; none if there is no limit.
///
/// With CAP_IPC_LOCK the kernel checks no limit (getrlimit(2), RLIMIT_MEMLOCK).
pub fn memlock_limit(paths: &HostPaths) -> Option<u64> {
    let status = sysfs::table(&paths.proc.join("self/status")).unwrap_or_default();
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    limit(&status, soft)
}

pub(crate) fn limit(status: &str, soft: u64) -> Option<u64> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let unlimited = soft == RLIM_INFINITY || capabilities & CAP_IPC_LOCK != 0;
    (!unlimited).then_some(soft)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capability_lifts_the_limit() {
        let with = "Name:\tgantry\nCapEff:\t0000000000004000\n";
        let without = "Name:\tgantry\nCapPrm:\t000001ffffffffff\nCapEff:\t000001ffffffbfff\n";
        for (status, soft, expected) in [
            (with, 65536, None),
            (without, 65536, Some(65536)),
            (without, RLIM_INFINITY, None),
            ("", 65536, Some(65536)),
            ("CapEff:\tnonsense\n", 65536, Some(65536)),
        ] {
            assert_eq!(limit(status, soft), expected, "{status}");
        }
    }

    #[test]
    fn this_process_has_an_answer() {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
        assert_eq!(memlock_limit(&HostPaths::default()), limit(&status, soft));
    }
}
