//! Standard output: buffered, without panics, quiet when the reader has gone.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

use clap::Args;
use serde::Serialize;

use crate::report::Failure;

/// A list of thousands of devices is written in few pieces.
const CHUNK: usize = 1 << 16;

/// How a command prints its result: as text or as JSON.
#[derive(Debug, Clone, Copy, Args)]
pub struct OutputArgs {
    /// Show the result as JSON
    #[arg(long)]
    json: bool,
}

impl OutputArgs {
    /// As text.
    pub const TEXT: Self = Self { json: false };

    /// Prints `result` as JSON, or the text that `write` writes.
    pub fn print(
        self,
        result: &impl Serialize,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), Failure> {
        match self.json {
            true => print_json(result),
            false => print(write),
        }
    }

    /// Prints a part of the text at once; JSON is printed as a whole later.
    pub fn print_text(
        self,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), Failure> {
        match self.json {
            true => Ok(()),
            false => print(write),
        }
    }
}

/// Writes to standard output. A closed pipe (`gantry device list | head`) is a success; a full
/// disk is a failure.
pub fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Failure> {
    print_while_read(write).map(drop)
}

/// Writes to standard output as [`print`] does; `false` once the reader has closed it.
pub fn print_while_read(
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<bool, Failure> {
    print_to(anstream::stdout().lock(), write)
}

fn print_to(
    out: impl Write,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<bool, Failure> {
    let mut out = io::BufWriter::with_capacity(CHUNK, out);
    match write(&mut out).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::host(format!(
            "cannot write to standard output: {error}"
        ))),
    }
}

/// Writes a note to standard error. The output is complete without it.
pub fn note(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Writes a value as indented JSON, without colours.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    print_to(io::stdout().lock(), |out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        writeln!(out)
    })
    .map(drop)
}
