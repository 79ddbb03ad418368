//! Standard error: the log and the last error. Nothing waits for its reader, and no failure of it is an error.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use gantry_vmm::outlet::{self, Outlet};

/// Standard error, as the log and the last error use it: a write waits for no reader, and never fails.
/// It is opened once, before a VM confines the process.
#[derive(Clone)]
pub struct Stderr(Arc<Mutex<Option<Outlet>>>);

impl Stderr {
    /// What standard error leads to; nowhere if it is closed.
    pub fn open() -> Self {
        let outlet = Outlet::of_stream(&io::stderr(), outlet::Kind::Log);
        Self(Arc::new(Mutex::new(outlet.ok())))
    }
}

impl Write for Stderr {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut outlet = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *outlet {
            Some(outlet) => outlet.write(data),
            None => Ok(data.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
