//! Output to a pipe, socket or terminal whose reader may have stopped.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long one write waits for a reader.
const WRITE_TIMEOUT: Duration = Duration::from_millis(100);

/// The largest write to a blocking file: a pipe with any room has room for so much
/// (POSIX's PIPE_BUF, on Linux a page).
const BLOCKING_CHUNK: usize = 4096;
/// Standard output and standard error may be the same pipe: only one thread at a time may see that a
/// blocking file has room and use that room.
static BLOCKING: Mutex<()> = Mutex::new(());

/// A file whose reader may stop reading: a write never waits longer than a tenth of a second.
///
/// Once a write has timed out, output is dropped until there is room again. Only then is the number of
/// dropped bytes reported: the log may go to the same pipe.
pub struct BoundedWriter {
    file: File,
    kind: Kind,
    /// A write may block: another writer can take the room that poll(2) reported.
    blocking: bool,
    /// Bytes dropped since output was last lost; `None` while all of it is written.
    dropped: Option<u64>,
}

/// What a [`BoundedWriter`] writes, which decides where it reports a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A guest's output. Nothing is added to it: gaps are reported in the log.
    Guest,
    /// The log: gaps are reported in place. A write that fails is such a gap too, as an error can be
    /// reported nowhere else.
    Log,
}

impl BoundedWriter {
    /// Writes to `file`, which may be in blocking mode. A terminal is expected to have room for a whole
    /// line if it has any, and a pipe to have no other writer.
    pub fn new(file: File, kind: Kind) -> Self {
        Self {
            file,
            kind,
            blocking: true,
            dropped: None,
        }
    }

    /// Writes to the file behind a standard stream of this process.
    ///
    /// # Errors
    /// The stream is closed.
    pub fn of_stream(stream: &(impl AsFd + AsRawFd), kind: Kind) -> io::Result<Self> {
        let file = File::from(stream.as_fd().try_clone_to_owned()?);
        if file.metadata()?.is_file() {
            return Ok(Self::new(file, kind));
        }
        // A pipe or terminal that is opened again is non-blocking for this process and not for its shell.
        // That is impossible for a socket, and for the pipe of another user.
        let anew = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", stream.as_raw_fd()));
        Ok(match anew {
            Ok(anew) => Self {
                blocking: false,
                ..Self::new(anew, kind)
            },
            Err(_) => Self::new(file, kind),
        })
    }

    /// Reports a gap of the log in the log.
    fn tell_gap(&mut self, deadline: Instant) -> io::Result<()> {
        let Some(dropped) = self.dropped.filter(|_| self.kind == Kind::Log) else {
            return Ok(());
        };
        let note = format!("[{dropped} bytes of the log could not be written here]\n");
        if self.write_until(note.as_bytes(), deadline)? == 0 {
            self.dropped = None;
        }
        Ok(())
    }

    /// Waits for room until `deadline`.
    fn wait_for_room(&self, deadline: Instant) -> io::Result<bool> {
        let mut files = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that the last part of a millisecond is no busy loop.
            let left = left.as_micros().div_ceil(1000);
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            match poll(&mut files, timeout) {
                // The signal is for the code that waits for this thread; the deadline stays.
                Err(Errno::EINTR) => {}
                polled => return Ok(polled? > 0),
            }
        }
    }

    /// Writes as much as there is room for now.
    fn write_some(&mut self, data: &[u8]) -> io::Result<usize> {
        if !self.blocking {
            return self.file.write(data);
        }
        let _alone = BLOCKING.lock().unwrap_or_else(PoisonError::into_inner);
        match self.wait_for_room(Instant::now())? {
            true => self.file.write(data.get(..BLOCKING_CHUNK).unwrap_or(data)),
            false => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Writes as much of `data` as there is room for before `deadline`; returns how much is left.
    fn write_until(&mut self, data: &[u8], deadline: Instant) -> io::Result<usize> {
        let mut left = data;
        while !left.is_empty() && self.wait_for_room(deadline)? {
            match self.write_some(left) {
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

impl Write for BoundedWriter {
    /// Writes or drops all of `data`. A write to the log never fails.
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let now = Instant::now();
        let deadline = match self.dropped {
            Some(_) => now,
            None => now + WRITE_TIMEOUT,
        };
        let left = self
            .tell_gap(deadline)
            .and_then(|()| self.write_until(data, deadline));
        let left = match left {
            Err(_) if self.kind == Kind::Log => data.len(),
            left => left?,
        } as u64;
        match (self.dropped, left) {
            (None, 0) => {}
            // Reported before the next line: this may be the log's own writer.
            (Some(_), 0) if self.kind == Kind::Log => {}
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

    /// A pipe and the writer to it.
    fn pipe_of(kind: Kind) -> (File, BoundedWriter) {
        let (reader, writer) = io::pipe().unwrap();
        let file = |end: OwnedFd| File::from(end);
        (
            file(reader.into()),
            BoundedWriter::new(file(writer.into()), kind),
        )
    }

    fn pipe() -> (File, BoundedWriter) {
        pipe_of(Kind::Guest)
    }

    #[test]
    fn the_log_tells_its_own_gaps() {
        let (mut reader, mut writer) = pipe_of(Kind::Log);
        let line = [b'x'; 1000];
        while writer.dropped.is_none() {
            writer.write_all(&line).unwrap();
        }
        let dropped = writer.dropped.unwrap();
        reader.read_exact(&mut [0; 32 << 10]).unwrap();
        writer.write_all(b"again\n").unwrap();
        assert_eq!(writer.dropped, None);
        drop(writer);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        let note = format!("[{dropped} bytes of the log could not be written here]\nagain\n");
        assert!(
            rest.ends_with(note.as_bytes()),
            "{:?}",
            &rest[rest.len() - 100..]
        );
    }

    #[test]
    fn a_stream_is_reached_whatever_it_is() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut writer = BoundedWriter::of_stream(&writer, Kind::Guest).unwrap();
        let flags = nix::fcntl::fcntl(&writer.file, nix::fcntl::FcntlArg::F_GETFL).unwrap();
        assert!(flags & libc::O_NONBLOCK != 0);
        writer.write_all(b"a").unwrap();
        let mut data = [0];
        reader.read_exact(&mut data).unwrap();

        let mut file = tempfile();
        file.write_all(b"before ").unwrap();
        let mut writer = BoundedWriter::of_stream(&file, Kind::Log).unwrap();
        writer.write_all(b"after").unwrap();
        let mut text = String::new();
        io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "before after");
    }

    /// A file without a name.
    fn tempfile() -> File {
        let memory =
            nix::sys::memfd::memfd_create("output", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        File::from(memory.unwrap())
    }

    #[test]
    fn what_is_read_arrives_whole() {
        let (mut reader, mut writer) = pipe();
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        let line: Vec<u8> = (0..=255).cycle().take(1000).collect();
        for _ in 0..1000 {
            assert_eq!(writer.write(&line).unwrap(), line.len());
        }
        drop(writer);
        assert_eq!(reading.join().unwrap(), line.repeat(1000));
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_waited_for_once() {
        let (mut reader, mut writer) = pipe();
        let line = [b'x'; 1000];
        let start = Instant::now();
        for _ in 0..1000 {
            writer.write_all(&line).unwrap();
        }
        assert!(writer.dropped.is_some());
        // One wait in all; the rest is for a busy machine.
        assert!(
            start.elapsed() < 20 * WRITE_TIMEOUT,
            "{:?}",
            start.elapsed()
        );

        // Less than there is, or the read would wait for more.
        reader.read_exact(&mut [0; 32 << 10]).unwrap();
        writer.write_all(b"again\n").unwrap();
        assert_eq!(writer.dropped, None);
        drop(writer);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        assert!(rest.ends_with(b"again\n"), "{rest:?}");
    }

    #[test]
    fn a_pipe_without_a_reader_is_an_error_for_a_guest_and_a_gap_for_the_log() {
        let (reader, mut writer) = pipe();
        drop(reader);
        assert!(writer.write(b"lost").is_err());
        let (reader, mut log) = pipe_of(Kind::Log);
        drop(reader);
        for _ in 0..3 {
            log.write_all(b"lost").unwrap();
        }
        assert_eq!(log.dropped, Some(12));
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut log = BoundedWriter::of_stream(&full, Kind::Log).unwrap();
        log.write_all(b"lost").unwrap();
        assert_eq!(log.dropped, Some(4));
    }

    #[test]
    fn writers_to_one_blocking_pipe_never_wait_for_its_reader() {
        let (mut reader, writer) = io::pipe().unwrap();
        let writers = [Kind::Guest, Kind::Log].map(|kind| {
            let writer = File::from(OwnedFd::from(writer.try_clone().unwrap()));
            std::thread::spawn(move || {
                let mut writer = BoundedWriter::new(writer, kind);
                // More than a pipe holds, and of a length that fits no page.
                (0..300).for_each(|_| writer.write_all(&[b'x'; 1001]).unwrap());
                writer.dropped
            })
        });
        // Joined before anybody reads: a write that waited would wait for ever.
        for writer in writers {
            assert!(writer.join().unwrap().is_some());
        }
        drop(writer);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert!(!all.is_empty());
    }
}
