//! The host's end of the wire to the agent: many commands at a time over one stream.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::protocol::{Exit, Frame, Kind, Run, Size};

/// Input is cut into frames of this many bytes.
const CHUNK: usize = 64 << 10;

/// Commands that run, each with the sender of its events; `None` when the wire is gone.
type Listeners = Mutex<Option<HashMap<u32, Sender<Frame>>>>;

/// The wire.
#[derive(Debug)]
pub struct Channel {
    stream: Mutex<UnixStream>,
    listeners: Arc<Listeners>,
    next: AtomicU32,
}

impl Channel {
    /// Takes over `stream`.
    pub fn new(stream: UnixStream) -> io::Result<Arc<Self>> {
        let mut input = stream.try_clone()?;
        let listeners = Arc::new(Mutex::new(Some(HashMap::<u32, Sender<Frame>>::new())));
        let shared = Arc::clone(&listeners);
        thread::spawn(move || {
            while let Ok(frame) = Frame::read_from(&mut input) {
                if let Some(to) = lock(&shared).as_ref().and_then(|map| map.get(&frame.id)) {
                    // The command's owner may have lost interest.
                    let _ = to.send(frame);
                }
            }
            // Every waiting owner learns of the end by its sender's drop.
            *lock(&shared) = None;
        });
        Ok(Arc::new(Self {
            stream: Mutex::new(stream),
            listeners,
            next: AtomicU32::new(1),
        }))
    }

    /// Asks whether the agent is there and waits for its answer.
    pub fn hello(self: &Arc<Self>, patience: Duration) -> io::Result<bool> {
        let mut process = self.listen()?;
        self.send(&Frame::bytes(process.id, Kind::Hello, []))?;
        let answer = process.next(Some(Instant::now() + patience));
        process.over = true;
        match answer {
            Ok(Event::Hello) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(false),
            Ok(_) => Err(io::Error::other("the agent answers nonsense")),
            Err(error) => Err(error),
        }
    }

    /// Starts a command.
    pub fn start(self: &Arc<Self>, run: &Run) -> io::Result<Process> {
        let process = self.listen()?;
        self.send(&Frame::json(process.id, Kind::Run, run)?)?;
        Ok(process)
    }

    fn listen(self: &Arc<Self>) -> io::Result<Process> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, events) = channel();
        lock(&self.listeners)
            .as_mut()
            .ok_or(io::ErrorKind::BrokenPipe)?
            .insert(id, sender);
        Ok(Process {
            id,
            channel: Arc::clone(self),
            events,
            over: false,
        })
    }

    fn send(&self, frame: &Frame) -> io::Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        frame.write_to(&mut *stream)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Ends the reading thread, which holds a stream of its own.
        let stream = self
            .stream
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}

/// What a command tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The agent is there.
    Hello,
    /// Standard output, or the terminal.
    Stdout(Vec<u8>),
    /// Standard error.
    Stderr(Vec<u8>),
    /// The end; nothing follows.
    Exit(Exit),
}

/// A command that runs in the lab host; dropping it kills its process group.
#[derive(Debug)]
pub struct Process {
    id: u32,
    channel: Arc<Channel>,
    events: Receiver<Frame>,
    over: bool,
}

impl Process {
    /// Waits for the next event: `TimedOut` at the deadline, `BrokenPipe` when the lab is gone.
    pub fn next(&mut self, deadline: Option<Instant>) -> io::Result<Event> {
        let patience = deadline.map_or(Duration::from_secs(1 << 20), |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        let frame = self
            .events
            .recv_timeout(patience)
            .map_err(|error| match error {
                RecvTimeoutError::Timeout => io::Error::from(io::ErrorKind::TimedOut),
                RecvTimeoutError::Disconnected => io::Error::from(io::ErrorKind::BrokenPipe),
            })?;
        Ok(match frame.kind {
            Kind::Stdout => Event::Stdout(frame.data),
            Kind::Stderr => Event::Stderr(frame.data),
            Kind::Exit => {
                self.over = true;
                Event::Exit(frame.parse()?)
            }
            _ => Event::Hello,
        })
    }

    /// What sends input and signals to the command, from any thread.
    pub fn control(&self) -> Control {
        Control {
            id: self.id,
            channel: Arc::clone(&self.channel),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.over {
            // Fails only when the lab is gone, and the command with it.
            let _ = self.control().signal(Signal::SIGKILL);
        }
        if let Some(map) = lock(&self.channel.listeners).as_mut() {
            map.remove(&self.id);
        }
    }
}

/// The input side of a running command.
#[derive(Debug, Clone)]
pub struct Control {
    id: u32,
    channel: Arc<Channel>,
}

impl Control {
    /// Feeds its standard input.
    pub fn write(&self, data: &[u8]) -> io::Result<()> {
        for chunk in data.chunks(CHUNK) {
            self.channel
                .send(&Frame::bytes(self.id, Kind::Stdin, chunk))?;
        }
        Ok(())
    }

    /// Closes its standard input.
    pub fn close(&self) -> io::Result<()> {
        self.channel.send(&Frame::bytes(self.id, Kind::Stdin, []))
    }

    /// Sends a signal to its process group.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        self.channel
            .send(&Frame::json(self.id, Kind::Signal, &(signal as i32))?)
    }

    /// Tells its terminal's new size.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        self.channel
            .send(&Frame::json(self.id, Kind::Resize, &size)?)
    }
}

fn lock(listeners: &Listeners) -> MutexGuard<'_, Option<HashMap<u32, Sender<Frame>>>> {
    listeners.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_do_not_mix_and_the_end_is_seen() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let channel = Channel::new(ours).unwrap();
        let run = Run {
            argv: vec!["x".into()],
            env: Vec::new(),
            cwd: "/".into(),
            tty: None,
        };
        let mut first = channel.start(&run).unwrap();
        let mut second = channel.start(&run).unwrap();
        let ids: Vec<u32> = (0..2)
            .map(|_| Frame::read_from(&mut theirs).unwrap().id)
            .collect();
        for (id, text) in [(ids[1], "two"), (ids[0], "one")] {
            Frame::bytes(id, Kind::Stdout, text)
                .write_to(&mut theirs)
                .unwrap();
            Frame::json(id, Kind::Exit, &Exit::Code(0))
                .unwrap()
                .write_to(&mut theirs)
                .unwrap();
        }
        assert_eq!(first.next(None).unwrap(), Event::Stdout(b"one".into()));
        assert_eq!(first.next(None).unwrap(), Event::Exit(Exit::Code(0)));
        assert_eq!(second.next(None).unwrap(), Event::Stdout(b"two".into()));
        let mut third = channel.start(&run).unwrap();
        drop(theirs);
        let error = third.next(None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_dropped_command_is_killed() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let channel = Channel::new(ours).unwrap();
        let run = Run {
            argv: vec!["x".into()],
            env: Vec::new(),
            cwd: "/".into(),
            tty: None,
        };
        drop(channel.start(&run).unwrap());
        assert_eq!(Frame::read_from(&mut theirs).unwrap().kind, Kind::Run);
        let kill = Frame::read_from(&mut theirs).unwrap();
        assert_eq!(kill.kind, Kind::Signal);
        assert_eq!(kill.parse::<i32>().unwrap(), Signal::SIGKILL as i32);
    }
}
