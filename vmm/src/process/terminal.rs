//! The terminal on standard input: raw while a VM has it, restored however the process ends.
//!
//! A shell gives the terminal to a job and takes it away again (POSIX.1-2017, 2.204 and 11.1.4). Most shells
//! announce it by SIGCONT. Some send none to a job that runs already: then the next line of input announces it.
#![allow(unsafe_code)] // tcsetattr from a signal handler.

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::getpgrp;

/// The terminal's settings before it was made raw, for signal handlers, which must not allocate.
static BEFORE: OnceLock<libc::termios> = OnceLock::new();
/// Whether the terminal is raw now.
static RAW: AtomicBool = AtomicBool::new(false);

/// Restores the terminal's settings if it is raw and belongs to no other job. Async-signal-safe.
pub fn restore_terminal() {
    if !RAW.swap(false, Ordering::AcqRel) || in_background() {
        return;
    }
    if let Some(before) = BEFORE.get() {
        // SAFETY: tcsetattr is async-signal-safe and reads one termios, which is never changed.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, before) };
    }
}

/// Whether another job of the shell has the terminal. A background job that reads it or changes its settings is
/// stopped. Async-signal-safe.
fn in_background() -> bool {
    // SAFETY: tcgetpgrp takes a number and touches no memory of this process.
    let foreground = unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) };
    // An error means that it is no terminal, or not the one that controls this process.
    foreground != -1 && foreground != getpgrp().as_raw()
}

/// The terminal that standard input is. Dropping it restores the settings.
pub struct Terminal {
    /// Whether this job had it at the last check. It is raw then.
    ours: bool,
    /// Reads SIGCONT, which [`Signals`](super::signals::Signals) keeps blocked.
    continued: SignalFd,
}

impl Terminal {
    /// None if standard input is no terminal.
    ///
    /// # Errors
    /// The kernel has no descriptors left.
    pub fn open() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        Ok(Some(Self {
            ours: false,
            continued: SignalFd::with_flags(&SigSet::from(Signal::SIGCONT), flags)?,
        }))
    }

    /// Whether this job had it at the last check.
    pub fn is_ours(&self) -> bool {
        self.ours
    }

    /// The file that becomes readable when a SIGCONT has come.
    pub fn continued(&self) -> &SignalFd {
        &self.continued
    }

    /// Forgets the SIGCONT that have come.
    pub fn clear_continued(&self) {
        while let Ok(Some(_)) = self.continued.read_signal() {}
    }

    /// Checks which job has the terminal. Makes it raw if this job has got it, or if other jobs may have
    /// changed its settings.
    ///
    /// # Errors
    /// The terminal refused.
    pub fn follow(&mut self, others_may_have_set_it: bool) -> io::Result<()> {
        let had = std::mem::replace(&mut self.ours, !in_background());
        if !self.ours {
            // Its settings are the other job's now.
            RAW.store(false, Ordering::Release);
        } else if !had || others_may_have_set_it {
            let stdin = io::stdin();
            let mut settings = tcgetattr(stdin.as_fd())?;
            let _ = BEFORE.set(settings.clone().into());
            cfmakeraw(&mut settings);
            RAW.store(true, Ordering::Release);
            tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &settings)?;
        }
        Ok(())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// The key that begins a command to gantry itself: ctrl-a.
const ESCAPE: u8 = 0x01;

/// Takes apart what a user types at a guest's console. Ctrl-a and one of `commands` is a command to gantry itself;
/// ctrl-a twice sends one.
#[derive(Debug)]
pub struct Keys {
    commands: &'static [u8],
    escaped: bool,
}

impl Keys {
    /// With these commands.
    pub fn new(commands: &'static [u8]) -> Self {
        Self {
            commands,
            escaped: false,
        }
    }

    /// Appends what is for the guest to `out`. Returns the first command that was typed; what follows it is dropped.
    pub fn take(&mut self, typed: &[u8], out: &mut VecDeque<u8>) -> Option<u8> {
        for &byte in typed {
            match (std::mem::take(&mut self.escaped), byte) {
                (true, command) if self.commands.contains(&command) => return Some(command),
                (true, ESCAPE) => out.push_back(ESCAPE),
                (true, other) => out.extend([ESCAPE, other]),
                (false, ESCAPE) => self.escaped = true,
                (false, byte) => out.push_back(byte),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn type_all(parts: &[&[u8]]) -> (Vec<u8>, Option<u8>) {
        let (mut keys, mut out) = (Keys::new(b"xd"), VecDeque::new());
        let command = parts.iter().find_map(|part| keys.take(part, &mut out));
        (out.into(), command)
    }

    #[test]
    fn keys_reach_the_guest_and_commands_do_not() {
        assert_eq!(type_all(&[b"ls\r"]), (b"ls\r".to_vec(), None));
        assert_eq!(type_all(&[b"a\x01x", b"b"]), (b"a".to_vec(), Some(b'x')));
        assert_eq!(type_all(&[b"\x01", b"d"]), (Vec::new(), Some(b'd')));
        assert_eq!(type_all(&[b"\x01\x01x"]), (b"\x01x".to_vec(), None));
        assert_eq!(type_all(&[b"\x01c"]), (b"\x01c".to_vec(), None));
    }
}
