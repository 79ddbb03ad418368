//! Calls that are repeated while another user of a device or group is about to leave.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// How long to wait between two attempts.
const STEP: Duration = Duration::from_millis(20);

/// Repeats `attempt` while it answers one of `errnos`, until the deadline.
pub fn while_refused<T>(
    deadline: Instant,
    errnos: &[i32],
    attempt: impl Fn() -> io::Result<T>,
) -> io::Result<T> {
    loop {
        let result = attempt();
        let errno = result.as_ref().err().and_then(io::Error::raw_os_error);
        if !errno.is_some_and(|errno| errnos.contains(&errno)) || Instant::now() >= deadline {
            return result;
        }
        thread::sleep(STEP);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const BUSY: &[i32] = &[libc::EBUSY];

    #[test]
    fn a_busy_group_is_waited_for_until_the_deadline() {
        let calls = Cell::new(0);
        let third = || {
            calls.set(calls.get() + 1);
            match calls.get() {
                3 => Ok(()),
                _ => Err(io::Error::from_raw_os_error(libc::EBUSY)),
            }
        };
        while_refused(Instant::now() + Duration::from_secs(5), BUSY, third).unwrap();
        assert_eq!(calls.get(), 3);

        let never = || Err::<(), _>(io::Error::from_raw_os_error(libc::EBUSY));
        let error = while_refused(Instant::now() + 2 * STEP, BUSY, never).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
    }

    #[test]
    fn other_failures_are_not_repeated() {
        let calls = Cell::new(0);
        let attempt = || {
            calls.set(calls.get() + 1);
            Err::<(), _>(io::Error::from_raw_os_error(libc::EPERM))
        };
        while_refused(Instant::now() + Duration::from_secs(5), BUSY, attempt).unwrap_err();
        assert_eq!(calls.get(), 1);
    }
}
