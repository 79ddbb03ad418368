//! The terminal as the guest's serial console: raw while the VM has it, restored whatever ends it.
//!
//! A shell gives a job the terminal, and takes it away again (POSIX.1-2017, 2.204 and 11.1.4). It is told by
//! SIGCONT as a rule; some shells send none to a job that runs anyway, and then a line that comes in tells.
#![allow(unsafe_code)] // tcsetattr from a signal handler.

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use gantry_devices::serial::Serial;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::getpgrp;

use crate::control::{Event, Mailbox};

/// The terminal's settings from before it was made raw, for handlers that may not allocate.
static BEFORE: OnceLock<libc::termios> = OnceLock::new();
/// Whether the terminal is raw now.
static RAW: AtomicBool = AtomicBool::new(false);

/// Puts the terminal back if it is raw and no other job's. Async-signal-safe.
pub fn restore_terminal() {
    if !RAW.swap(false, Ordering::AcqRel) || in_background() {
        return;
    }
    if let Some(before) = BEFORE.get() {
        // SAFETY: tcsetattr is async-signal-safe and reads one termios, which is never changed.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, before) };
    }
}

/// Whether standard input is a terminal that another job of the shell has: whoever reads or sets it
/// from the background is stopped. Async-signal-safe.
fn in_background() -> bool {
    // SAFETY: tcgetpgrp takes a number and touches no memory of this process.
    let foreground = unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) };
    // An error means that it is no terminal, or not the one that controls this process.
    foreground != -1 && foreground != getpgrp().as_raw()
}

/// Standard input, if it is a terminal; dropping it restores the terminal.
struct Terminal {
    /// Whether it is this job's, as far as was seen last. It is raw then.
    ours: bool,
    /// Where SIGCONT comes in, which [`crate::control::Signals`] keeps blocked.
    continued: SignalFd,
    keys: Keys,
}

impl Terminal {
    /// None if standard input is no terminal.
    ///
    /// # Errors
    /// The kernel has no descriptors left.
    fn open() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        Ok(Some(Self {
            ours: false,
            continued: SignalFd::with_flags(&SigSet::from(Signal::SIGCONT), flags)?,
            keys: Keys::default(),
        }))
    }

    /// Sees whose it is, and makes it raw if it has become this job's, or may have been set by others.
    ///
    /// # Errors
    /// The terminal refused.
    fn follow(&mut self, others_may_have_set_it: bool) -> io::Result<()> {
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

/// What the user typed, taken apart.
#[derive(Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    /// Appends what is for the guest to `out`. Returns whether the user asked to end the VM:
    /// ctrl-a x. Ctrl-a twice sends one.
    fn take(&mut self, typed: &[u8], out: &mut VecDeque<u8>) -> bool {
        for &byte in typed {
            match (std::mem::take(&mut self.escaped), byte) {
                (true, b'x') => return true,
                (true, ESCAPE) => out.push_back(ESCAPE),
                (true, other) => out.extend([ESCAPE, other]),
                (false, ESCAPE) => self.escaped = true,
                (false, byte) => out.push_back(byte),
            }
        }
        false
    }
}

/// Carries standard input to the serial port.
pub struct Keyboard {
    serial: Arc<Serial>,
    mailbox: Arc<Mailbox>,
    // Ctrl-a is special on a terminal only: a pipe carries bytes.
    terminal: Option<Terminal>,
    waiting: VecDeque<u8>,
    // Nothing comes any more: a guest that makes room must not have the end read again and again.
    ended: bool,
}

impl Keyboard {
    /// Feeds `serial`, and makes the terminal raw if there is one that this job has. Dropping it restores
    /// the terminal.
    ///
    /// # Errors
    /// The terminal refused, or the kernel has no descriptors left.
    pub fn new(serial: Arc<Serial>, mailbox: Arc<Mailbox>) -> io::Result<Self> {
        let mut terminal = Terminal::open()?;
        if let Some(terminal) = &mut terminal {
            terminal.follow(false)?;
            if !terminal.ours {
                tracing::info!("in the background: the guest's console has no keyboard until `fg`");
            }
        }
        Ok(Self {
            serial,
            mailbox,
            terminal,
            waiting: VecDeque::new(),
            ended: false,
        })
    }

    /// What of standard input is waited for. While another job has the terminal, what comes is that one's:
    /// it is told of once and left alone.
    fn stdin(&self) -> Events {
        let away = self.terminal.as_ref().is_some_and(|one| !one.ours);
        let edge = match away {
            true => EventSet::EDGE_TRIGGERED,
            false => EventSet::empty(),
        };
        Events::with_data_raw(io::stdin().as_raw_fd(), STDIN, EventSet::IN | edge)
    }

    /// Sees who has the terminal. Returns whether what comes from standard input is the guest's.
    fn follow(&mut self, others_may_have_set_it: bool, ops: &EventOps<'_>) -> bool {
        let Some(terminal) = &mut self.terminal else {
            return true;
        };
        let had = terminal.ours;
        if let Err(error) = terminal.follow(others_may_have_set_it) {
            tracing::warn!(%error, "the terminal cannot be made raw");
        }
        let ours = terminal.ours;
        if ours != had {
            // Nothing to change where it is not waited for.
            let _ = ops.modify(self.stdin());
        }
        ours
    }

    /// Reads what is there. Returns whether more may come.
    fn read(&mut self) -> bool {
        let mut typed = [0; 64];
        let len = match nix::unistd::read(io::stdin().as_fd(), &mut typed) {
            Ok(0) => return false,
            Ok(len) => len,
            Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => return true,
            Err(error) => {
                tracing::warn!(%error, "standard input is lost");
                return false;
            }
        };
        let typed = typed.get(..len).unwrap_or(&[]);
        match &mut self.terminal {
            Some(terminal) => {
                if terminal.keys.take(typed, &mut self.waiting) {
                    self.mailbox.post(Event::Quit);
                }
            }
            None => self.waiting.extend(typed),
        }
        true
    }

    fn feed(&mut self) {
        let taken = self.serial.enqueue(self.waiting.make_contiguous());
        self.waiting.drain(..taken);
    }
}

const STDIN: u32 = 0;
const ROOM: u32 = 1;
const CONTINUED: u32 = 2;

impl MutEventSubscriber for Keyboard {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let stdin = self.stdin();
        // A regular file or /dev/null cannot be waited for: it is no console then.
        if let Err(error) = ops.add(stdin) {
            tracing::debug!(?error, "standard input is not read");
        }
        let room = Events::with_data(self.serial.room(), ROOM, EventSet::IN);
        if let Err(error) = ops.add(room) {
            tracing::warn!(?error, "the serial port may drop input");
        }
        if let Some(terminal) = &self.terminal {
            let continued = Events::with_data(&terminal.continued, CONTINUED, EventSet::IN);
            if let Err(error) = ops.add(continued) {
                tracing::warn!(?error, "the console may not hear of `fg`");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            CONTINUED => {
                if let Some(terminal) = &self.terminal {
                    while let Ok(Some(_)) = terminal.continued.read_signal() {}
                }
                self.follow(true, ops);
            }
            ROOM => {
                let _ = self.serial.room().read();
                self.feed();
                if self.waiting.is_empty() && !self.ended {
                    // Already watched unless it had been set aside below.
                    let _ = ops.add(self.stdin());
                }
            }
            _ if !self.follow(false, ops) => {}
            _ => {
                self.ended = !self.read();
                self.feed();
                // What does not fit waits, and so does the rest of the input.
                if self.ended || !self.waiting.is_empty() {
                    let _ = ops.remove(self.stdin());
                }
            }
        }
    }
}

/// Writes out what the guest has not ended with a newline, such as a prompt.
pub struct SerialOutput(pub Arc<Serial>);

impl MutEventSubscriber for SerialOutput {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let due = Events::new_raw(self.0.timer().as_raw_fd(), EventSet::IN);
        if let Err(error) = ops.add(due) {
            tracing::warn!(?error, "unfinished lines of the serial port are held back");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.0.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn type_all(parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut keys, mut out) = (Keys::default(), VecDeque::new());
        let quit = parts.iter().any(|part| keys.take(part, &mut out));
        (out.into(), quit)
    }

    #[test]
    fn keys_reach_the_guest_and_ctrl_a_x_ends_the_vm() {
        assert_eq!(type_all(&[b"ls\r"]), (b"ls\r".to_vec(), false));
        assert_eq!(type_all(&[b"a\x01x", b"b"]), (b"a".to_vec(), true));
        assert_eq!(type_all(&[b"\x01", b"x"]), (Vec::new(), true));
        assert_eq!(type_all(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(type_all(&[b"\x01c"]), (b"\x01c".to_vec(), false));
    }
}
