//! Standard error, for the log and the last error. A write neither waits for the reader nor fails.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use gantry_vmm::bounded_writer::{self, BoundedWriter};

/// Standard error, as the log and the last error use it: a write waits for no reader, and never fails.
/// It is opened once, before a VM confines the process.
#[derive(Clone)]
pub struct Stderr(Arc<Mutex<Option<BoundedWriter>>>);

impl Stderr {
    /// Opens standard error; a closed one discards all.
    pub fn open() -> Self {
        let bounded_writer = BoundedWriter::of_stream(&io::stderr(), bounded_writer::Kind::Log);
        Self(Arc::new(Mutex::new(bounded_writer.ok())))
    }
}

impl Write for Stderr {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut bounded_writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *bounded_writer {
            Some(bounded_writer) => bounded_writer.write(data),
            None => Ok(data.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
