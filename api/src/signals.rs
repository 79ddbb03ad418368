//! Signals held back while something must not be left half-done.

use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// Lets no limit on the size of files (RLIMIT_FSIZE) end this process: a write that is too long fails
/// instead, as one to a full disk does. It stays so, as a signal that came is never taken.
pub fn outlive_size_limits() {
    // It fails only for a mask that is no mask.
    let _ = SigSet::from(Signal::SIGXFSZ).thread_block();
}

/// While this stands, signals that would end gantry wait; children started meanwhile inherit that.
/// Once it is dropped, a signal that came ends gantry as it would have.
#[derive(Debug)]
pub struct SignalsHeld(Option<SigSet>);

impl SignalsHeld {
    /// Holds back what terminals, shells and service managers send.
    pub fn new() -> Self {
        let signals = [
            Signal::SIGHUP,
            Signal::SIGINT,
            Signal::SIGQUIT,
            Signal::SIGTERM,
        ];
        let held: SigSet = signals.into_iter().collect();
        // It fails only for a mask that is no mask; then there is nothing to restore.
        Self(held.thread_swap_mask(SigmaskHow::SIG_BLOCK).ok())
    }
}

impl Drop for SignalsHeld {
    fn drop(&mut self) {
        if let Some(before) = self.0.take() {
            let _ = before.thread_set_mask();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_held_while_it_stands() {
        let blocked = |signal| SigSet::thread_get_mask().unwrap().contains(signal);
        let held = SignalsHeld::new();
        assert!(blocked(Signal::SIGINT) && blocked(Signal::SIGTERM));
        drop(held);
        assert!(!blocked(Signal::SIGINT) && !blocked(Signal::SIGTERM));
    }
}
