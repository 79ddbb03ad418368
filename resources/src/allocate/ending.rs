//! Holders that are ending: of a killed process, the kernel frees the memory, which takes a while
//! when there is much of it, before the locks.

use std::fs;

use nix::libc;

use crate::host::HostPaths;
use crate::inventory::HostDevice;
use crate::lease::{LeaseStatus, holder};

/// `PF_EXITING` of `include/linux/sched.h`, in the flags of proc_pid_stat(5).
const EXITING: u64 = 4;
/// Signal 9 in the masks of proc_pid_status(5).
const KILLED: u64 = 1 << (libc::SIGKILL - 1);

/// Whether the holder of a device is ending, or has ended since the device was looked at.
pub(super) fn is_ending(paths: &HostPaths, device: &HostDevice) -> bool {
    let LeaseStatus::Held(record) = &device.lease else {
        return false;
    };
    let process = paths.proc.join(record.pid.to_string());
    let read = |name: &str| fs::read_to_string(process.join(name)).ok();
    match read("stat") {
        Some(stat) => {
            flags(&stat).is_some_and(|flags| flags & EXITING != 0)
                || read("status").is_some_and(|status| pending(&status) & KILLED != 0)
        }
        // It may as well be in another PID namespace, and well.
        None => matches!(holder(paths, device.bdf), Ok(LeaseStatus::Free)),
    }
}

/// The seventh field behind the process's name, which may hold anything.
fn flags(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(6)?.parse().ok()
}

/// Signals that wait for the first thread: a kill is told to all of them.
fn pending(status: &str) -> u64 {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigPnd:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_understood() {
        let stat = "77 (a) b (c) D 1 77 77 0 -1 4195332 100 0";
        assert_eq!(flags(stat), Some(4_195_332));
        assert_eq!(flags("77 (a) Z"), None);
        assert_eq!(flags(""), None);
        let status = "Name:\tx\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000004000\n";
        assert_eq!(pending(status), KILLED);
        assert_eq!(pending("SigPnd:\tlots"), 0);
    }
}
