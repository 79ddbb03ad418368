//! Output to a pipe, socket or terminal that nobody may be reading.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long one write waits for a reader.
const PATIENCE: Duration = Duration::from_millis(100);

/// A file whose reader may stop reading: a write never waits longer than a tenth of a second.
///
/// Once a write has waited in vain, output is dropped until there is room again. How much that was
/// is told then and not before: the log may well be stuck in the same pipe.
pub struct Outlet {
    file: File,
    /// Bytes dropped since the reader stopped; `None` while it reads.
    dropped: Option<u64>,
}

impl Outlet {
    /// Writes to `file`. Where it is not non-blocking itself, a terminal should have room for a
    /// whole line when it says that it has any, and nobody else should write to a pipe.
    pub fn new(file: File) -> Self {
        Self {
            file,
            dropped: None,
        }
    }

    /// Waits for room until `deadline`.
    fn wait_for_room(&self, deadline: Instant) -> io::Result<bool> {
        let mut files = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that the last part of a millisecond is not waited for in a loop.
            let left = left.as_micros().div_ceil(1000);
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            match poll(&mut files, timeout) {
                // A signal is meant for whoever waits for this thread: time goes on all the same.
                Err(Errno::EINTR) => {}
                polled => return Ok(polled? > 0),
            }
        }
    }

    /// Writes as much of `data` as there is room for before `deadline`; returns how much is left.
    fn write_until(&mut self, data: &[u8], deadline: Instant) -> io::Result<usize> {
        let mut left = data;
        while !left.is_empty() && self.wait_for_room(deadline)? {
            match self.file.write(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => left = left.get(written..).unwrap_or(&[]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Room for something smaller only.
                    if Instant::now() >= deadline {
                        break;
                    }
                    std::thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(left.len())
    }
}

impl Write for Outlet {
    /// Takes all of `data`, be it written or dropped.
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let now = Instant::now();
        let deadline = match self.dropped {
            Some(_) => now,
            None => now + PATIENCE,
        };
        let left = self.write_until(data, deadline)? as u64;
        match (self.dropped, left) {
            (None, 0) => {}
            (Some(dropped), 0) => {
                self.dropped = None;
                crate::warn_limited!(dropped, "nobody read the output: bytes were dropped");
            }
            (dropped, left) => self.dropped = Some(dropped.unwrap_or(0) + left),
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    /// A pipe and the outlet to it.
    fn pipe() -> (File, Outlet) {
        let (reader, writer) = io::pipe().unwrap();
        let file = |end: OwnedFd| File::from(end);
        (file(reader.into()), Outlet::new(file(writer.into())))
    }

    #[test]
    fn what_is_read_arrives_whole() {
        let (mut reader, mut outlet) = pipe();
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        let line: Vec<u8> = (0..=255).cycle().take(1000).collect();
        for _ in 0..1000 {
            assert_eq!(outlet.write(&line).unwrap(), line.len());
        }
        drop(outlet);
        assert_eq!(reading.join().unwrap(), line.repeat(1000));
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_waited_for_once() {
        let (mut reader, mut outlet) = pipe();
        let line = [b'x'; 1000];
        let start = Instant::now();
        for _ in 0..1000 {
            outlet.write_all(&line).unwrap();
        }
        assert!(outlet.dropped.is_some());
        // One wait in all; the rest is for a busy machine.
        assert!(start.elapsed() < 20 * PATIENCE, "{:?}", start.elapsed());

        // Less than there is, or the read would wait for more.
        reader.read_exact(&mut [0; 32 << 10]).unwrap();
        outlet.write_all(b"again\n").unwrap();
        assert_eq!(outlet.dropped, None);
        drop(outlet);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        assert!(rest.ends_with(b"again\n"), "{rest:?}");
    }

    #[test]
    fn a_pipe_without_a_reader_is_an_error() {
        let (reader, mut outlet) = pipe();
        drop(reader);
        assert!(outlet.write(b"lost").is_err());
    }
}
