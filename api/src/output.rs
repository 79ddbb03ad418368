//! Standard output: buffered, without panics, quiet when the reader has gone.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

use clap::Args;
use serde::Serialize;

use crate::report::Failure;

/// A list of thousands of devices is written in few pieces.
const CHUNK: usize = 1 << 16;

/// Whether people or programs are told what a command did.
#[derive(Debug, Clone, Copy, Args)]
pub struct OutputArgs {
    /// Show the result as JSON
    #[arg(long)]
    json: bool,
}

impl OutputArgs {
    /// Shows `done` to a program, or has it said to people.
    pub fn tell(
        self,
        done: &impl Serialize,
        say: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), Failure> {
        match self.json {
            true => print_json(done),
            false => print(say),
        }
    }

    /// Says a part of it to people at once; a program is shown the whole later.
    pub fn say(self, say: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Failure> {
        match self.json {
            true => Ok(()),
            false => print(say),
        }
    }
}

/// Writes to standard output. A closed pipe (`gantry device list | head`) is a success; a full
/// disk is a failure.
pub fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Failure> {
    print_while_read(write).map(drop)
}

/// Writes to standard output as [`print`] does; `false` once nobody reads it any more.
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

/// Tells people, on standard error, what a command does. Who reads none of that misses nothing.
pub fn note(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Writes a value as indented JSON, which has no colours to take out for those who want none.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    print_to(io::stdout().lock(), |out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        writeln!(out)
    })
    .map(drop)
}
