//! Blocks signals during changes that must not be interrupted.

use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// Blocks SIGXFSZ for good: a write beyond RLIMIT_FSIZE fails, as on a full disk, instead of ending the process.
pub fn outlive_size_limits() {
    // It fails only for an invalid mask.
    let _ = SigSet::from(Signal::SIGXFSZ).thread_block();
}

/// Blocks the signals that would end gantry, also in children that are started meanwhile. Dropping it lets a
/// pending signal end gantry.
#[derive(Debug)]
pub struct SignalsHeld(Option<SigSet>);

impl SignalsHeld {
    /// Blocks the signals that terminals, shells and service managers send.
    pub fn new() -> Self {
        let signals = [
            Signal::SIGHUP,
            Signal::SIGINT,
            Signal::SIGQUIT,
            Signal::SIGTERM,
        ];
        let held: SigSet = signals.into_iter().collect();
        // It fails only for an invalid mask; then there is nothing to restore.
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
