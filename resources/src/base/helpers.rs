//! Helper processes that this process has started and does not wait for.
//!
//! Each is reaped by its number. Other children are left to the code that started them.

use std::process::Child;
use std::sync::{Mutex, PoisonError};

static HELPERS: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// Remembers a helper, which ends by itself.
pub(crate) fn keep(helper: Child) {
    let mut helpers = HELPERS.lock().unwrap_or_else(PoisonError::into_inner);
    helpers.push(helper);
}

/// Reaps the helpers that have ended. Does not wait.
pub fn reap_helpers() {
    let mut helpers = HELPERS.lock().unwrap_or_else(PoisonError::into_inner);
    helpers.retain_mut(|helper| matches!(helper.try_wait(), Ok(None)));
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    fn has(pid: u32) -> bool {
        let helpers = HELPERS.lock().unwrap();
        helpers.iter().any(|helper| helper.id() == pid)
    }

    #[test]
    fn helpers_are_reaped_and_other_children_left_to_their_owners() {
        let spawn = |program| Command::new(program).spawn().unwrap();
        let (helper, mut other) = (spawn("true"), spawn("false"));
        let pid = helper.id();
        keep(helper);
        let deadline = Instant::now() + Duration::from_secs(60);
        while has(pid) && Instant::now() < deadline {
            reap_helpers();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!has(pid));
        reap_helpers();
        assert_eq!(other.wait().unwrap().code(), Some(1));
    }
}
