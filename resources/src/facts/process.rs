//! Whether a process is about to end, as procfs shows it.

use std::fs;
use std::path::Path;

use nix::libc;

/// `PF_EXITING` of `include/linux/sched.h`, in the flags of proc_pid_stat(5).
const EXITING: u64 = 4;
/// Signal 9 in the masks of proc_pid_status(5).
const KILLED: u64 = 1 << (libc::SIGKILL - 1);

/// Whether a process is ending or has been killed; none if it is not visible in procfs, which is at `proc`.
pub(crate) fn is_ending(proc: &Path, pid: u32) -> Option<bool> {
    let process = proc.join(pid.to_string());
    let read = |name: &str| fs::read_to_string(process.join(name)).ok();
    let stat = read("stat")?;
    let exits = flags(&stat).is_some_and(|flags| flags & EXITING != 0);
    Some(exits || read("status").is_some_and(|status| pending(&status) & KILLED != 0))
}

/// The seventh field after the process's name, which may contain anything.
fn flags(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(6)?.parse().ok()
}

/// Pending signals of the first thread: a kill is pending for all threads.
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
