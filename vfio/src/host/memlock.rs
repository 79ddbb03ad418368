//! How much memory this process may lock, since every page that a device can reach is.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

/// CAP_IPC_LOCK, which lifts the limit: a bit of `CapEff` in `/proc/self/status`.
const CAP_IPC_LOCK: u32 = 14;

/// How many bytes this process may lock, if there is a limit.
pub(super) fn limit() -> Option<u64> {
    let (allowed, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    (allowed != RLIM_INFINITY && !may_lock_all(&status)).then_some(allowed)
}

fn may_lock_all(status: &str) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> CAP_IPC_LOCK & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capability_is_found_in_the_status() {
        assert!(may_lock_all("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(may_lock_all("CapEff:\t0000000000004000"));
        assert!(!may_lock_all(
            "CapEff:\t0000000000003fff\nCapBnd:\t000001ffffffffff"
        ));
        assert!(!may_lock_all(""));
    }

    #[test]
    fn the_text_says_how_much_and_how_to_raise_it() {
        let error = crate::Error::MemoryLock {
            needed: 512 << 20,
            allowed: 8 << 20,
        };
        let text = error.to_string();
        assert!(text.contains("512 MiB") && text.contains("8 MiB"), "{text}");
        assert!(text.contains("ulimit -l 524288"), "{text}");
    }
}
