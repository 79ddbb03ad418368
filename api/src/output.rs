//! Standard output: buffered, without panics, quiet when the reader has gone.

use std::io::{self, ErrorKind, Write};

use serde::Serialize;

use crate::report::Failure;

/// Writes to standard output. A closed pipe (`gantry device list | head`) is a success; a full
/// disk is a failure.
pub fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Failure> {
    let mut out = io::BufWriter::new(anstream::stdout().lock());
    match write(&mut out).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::host(format!(
            "cannot write to standard output: {error}"
        ))),
        _ => Ok(()),
    }
}

/// Writes a value as indented JSON.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    print(|out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        writeln!(out)
    })
}
