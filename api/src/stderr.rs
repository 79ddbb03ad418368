//! Standard error, for the log and the last error. A write neither waits for the reader nor fails.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gantry_vmm::BoundedFile;
use gantry_vmm::bounded_writer::{self, BoundedWriter};
use gantry_vmm::is_journal;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// The most that the log of a VM in the background holds: it lies in memory where the run directory does.
const MAX_LOG: u64 = 1 << 20;

/// Standard error, as the log and the last error use it: a write waits for no reader, and never fails.
/// It is opened once, before a VM confines the process.
#[derive(Clone)]
pub struct Stderr {
    target: Arc<Mutex<Target>>,
    is_journal: bool,
}

enum Target {
    Closed,
    Stream(BoundedWriter),
    Log(BoundedFile),
}

impl Stderr {
    /// Opens standard error; a closed one discards all.
    pub fn open() -> Self {
        let bounded_writer = BoundedWriter::of_stream(&io::stderr(), bounded_writer::Kind::Log);
        let target = bounded_writer.map_or(Target::Closed, Target::Stream);
        Self {
            target: Arc::new(Mutex::new(target)),
            is_journal: is_journal(&io::stderr()),
        }
    }

    /// Whether systemd's journal reads it, which takes the level from the begin of each line.
    pub fn is_journal(&self) -> bool {
        self.is_journal
    }

    /// Keeps the file that standard error is, a VM's log of its own, within bounds from now on.
    ///
    /// # Errors
    /// It cannot be opened once more.
    pub fn bound(&self) -> io::Result<()> {
        let append = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let mut options = File::options();
        let file = options.read(true).write(true).open("/proc/self/fd/2")?;
        *self.target() = Target::Log(BoundedFile::shared(file, append, MAX_LOG));
        Ok(())
    }

    /// Writes whole lines of a level.
    pub fn say(&self, level: Level, text: &[u8]) {
        let lines = match self.is_journal {
            false => text.to_vec(),
            true => with_priority(level, text),
        };
        let _ = self.clone().write_all(&lines);
    }

    fn target(&self) -> MutexGuard<'_, Target> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Stderr {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match &mut *self.target() {
            Target::Closed => Ok(data.len()),
            Target::Stream(stream) => stream.write(data),
            // A full disk must not fail the VM.
            Target::Log(file) => match file.write(data) {
                Ok(0) | Err(_) => Ok(data.len()),
                written => written,
            },
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes the lines of one event.
pub struct EventWriter<'a> {
    stderr: &'a Stderr,
    level: Level,
}

impl Write for EventWriter<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.stderr.say(self.level, data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = EventWriter<'a>;

    fn make_writer(&'a self) -> EventWriter<'a> {
        EventWriter {
            stderr: self,
            level: Level::INFO,
        }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> EventWriter<'a> {
        EventWriter {
            stderr: self,
            level: *event.level(),
        }
    }
}

/// Lines with their priority in front (sd-daemon(3)).
fn with_priority(level: Level, text: &[u8]) -> Vec<u8> {
    let priority = match level {
        Level::ERROR => b"<3>",
        Level::WARN => b"<4>",
        Level::INFO => b"<6>",
        _ => b"<7>",
    };
    let lines = text.split_inclusive(|byte| *byte == b'\n');
    lines.flat_map(|line| [priority, line].concat()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_gets_the_priority_of_each_line() {
        let lines = with_priority(Level::WARN, b"no reset\n  try again\n");
        assert_eq!(lines, b"<4>no reset\n<4>  try again\n");
        assert_eq!(with_priority(Level::ERROR, b"x"), b"<3>x");
    }
}
