//! The signals that ask gantry to end.

use std::io;
use std::sync::{Arc, OnceLock};

use event_manager::{EventOps, Events, MutEventSubscriber};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::event_loop::listen;

/// A signal asked gantry to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("signal {0} came before the VM was built")]
pub struct Interrupted(pub i32);

/// The signals that ask gantry to end. They are blocked in every thread and read from a file.
pub struct Signals {
    fd: SignalFd,
    before: SigSet,
    /// The first that was found pending.
    first: OnceLock<i32>,
}

const ENDING: [Signal; 4] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
];

impl Signals {
    /// Blocks the signals for the calling thread and every thread it makes from now on, and SIGCONT, which
    /// [`Terminal`](super::terminal::Terminal) reads where it is used; a process that is stopped goes on by it all
    /// the same. SIGTTOU is blocked too, so that a VM in the background writes to a terminal that is set to stop
    /// such a job (`stty tostop`). Dropping the value discards pending signals, since gantry ends already, and
    /// restores the signal mask.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn block() -> io::Result<Self> {
        let mut set: SigSet = ENDING.into_iter().collect();
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let mut before = SigSet::empty();
        set.add(Signal::SIGCONT);
        set.add(Signal::SIGTTOU);
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), Some(&mut before))?;
        Ok(Self {
            fd,
            before,
            first: OnceLock::new(),
        })
    }

    /// Whether a signal has come, for the time before [`SignalWatch`] reads them. Any thread may ask.
    ///
    /// # Errors
    /// One has.
    pub fn check(&self) -> Result<(), Interrupted> {
        if self.first.get().is_none()
            && let Some(signal) = self.read()
        {
            let _ = self.first.set(signal);
        }
        self.first
            .get()
            .map_or(Ok(()), |&signal| Err(Interrupted(signal)))
    }

    fn read(&self) -> Option<i32> {
        let info = self.fd.read_signal().ok()??;
        i32::try_from(info.ssi_signo).ok()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        while self.read().is_some() {}
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.before), None);
    }
}

/// An event source that passes signals on.
pub struct SignalWatch<F> {
    signals: Arc<Signals>,
    on_signal: F,
}

impl<F: FnMut(i32)> SignalWatch<F> {
    /// Calls `on_signal` with the number of each signal.
    pub fn new(signals: &Arc<Signals>, on_signal: F) -> Self {
        let signals = Arc::clone(signals);
        Self { signals, on_signal }
    }
}

impl<F: FnMut(i32)> MutEventSubscriber for SignalWatch<F> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        listen(ops, &self.signals.fd);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        while let Some(signal) = self.signals.read() {
            (self.on_signal)(signal);
        }
    }
}
