//! The guest's serial console: standard input to the serial port, and what the guest writes without a newline.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use gantry_devices::serial::Serial;

use crate::process::terminal::{Keys, Terminal};

/// Carries standard input to the serial port.
pub struct Keyboard<F> {
    serial: Arc<Serial>,
    on_quit: F,
    // Ctrl-a is special on a terminal only: a pipe carries bytes. Ctrl-a x ends the VM.
    terminal: Option<(Terminal, Keys)>,
    waiting: VecDeque<u8>,
    // The input has ended: it must not be read again each time that the guest makes room.
    ended: bool,
}

impl<F: FnMut()> Keyboard<F> {
    /// Feeds `serial`, and calls `on_quit` when the user asks to end the VM. Makes the terminal raw if there is one
    /// that this job has. Dropping it restores the terminal.
    ///
    /// # Errors
    /// The terminal refused, or the kernel has no descriptors left.
    pub fn new(serial: Arc<Serial>, on_quit: F) -> io::Result<Self> {
        let mut terminal = Terminal::open()?;
        if let Some(terminal) = &mut terminal {
            terminal.follow(false)?;
            if !terminal.is_ours() {
                tracing::info!("in the background: the guest's console has no keyboard until `fg`");
            }
        }
        Ok(Self {
            serial,
            on_quit,
            terminal: terminal.map(|terminal| (terminal, Keys::new(b"x"))),
            waiting: VecDeque::new(),
            ended: false,
        })
    }

    /// The event of standard input. While another job has the terminal, its input is that job's: it is reported
    /// once and left alone.
    fn stdin(&self) -> Events {
        let terminal = self.terminal.as_ref();
        let edge = match terminal.is_none_or(|(terminal, _)| terminal.is_ours()) {
            true => EventSet::empty(),
            false => EventSet::EDGE_TRIGGERED,
        };
        Events::with_data_raw(io::stdin().as_raw_fd(), STDIN, EventSet::IN | edge)
    }

    /// Checks which job has the terminal. Returns whether the input is for the guest.
    fn follow(&mut self, others_may_have_set_it: bool, ops: &EventOps<'_>) -> bool {
        let Some((terminal, _)) = &mut self.terminal else {
            return true;
        };
        let had = terminal.is_ours();
        if let Err(error) = terminal.follow(others_may_have_set_it) {
            tracing::warn!(%error, "the terminal cannot be made raw");
        }
        let ours = terminal.is_ours();
        if ours != had {
            // Fails if standard input is not watched now.
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
                tracing::warn!(%error, "cannot read standard input any more");
                return false;
            }
        };
        let typed = typed.get(..len).unwrap_or(&[]);
        match &mut self.terminal {
            Some((_, keys)) => {
                if keys.take(typed, &mut self.waiting).is_some() {
                    (self.on_quit)();
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

impl<F: FnMut()> MutEventSubscriber for Keyboard<F> {
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
        if let Some((terminal, _)) = &self.terminal {
            let continued = Events::with_data(terminal.continued(), CONTINUED, EventSet::IN);
            if let Err(error) = ops.add(continued) {
                tracing::warn!(?error, "the console may miss `fg`");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            CONTINUED => {
                if let Some((terminal, _)) = &self.terminal {
                    terminal.clear_continued();
                }
                self.follow(true, ops);
            }
            ROOM => {
                let _ = self.serial.room().read();
                self.feed();
                if self.waiting.is_empty() && !self.ended {
                    // Fails if it is watched already: only input that did not fit was unwatched, below.
                    let _ = ops.add(self.stdin());
                }
            }
            _ if !self.follow(false, ops) => {}
            _ => {
                self.ended = !self.read();
                self.feed();
                // Input that does not fit waits, and the rest is not read meanwhile.
                if self.ended || !self.waiting.is_empty() {
                    let _ = ops.remove(self.stdin());
                }
            }
        }
    }
}

/// Writes out an unfinished line of the guest, such as a prompt.
pub struct SerialOutput(pub Arc<Serial>);

impl MutEventSubscriber for SerialOutput {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let due = Events::new_raw(self.0.timer().as_raw_fd(), EventSet::IN);
        if let Err(error) = ops.add(due) {
            tracing::warn!(?error, "unfinished lines of the serial port are delayed");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.0.flush();
    }
}
