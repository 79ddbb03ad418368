//! The `gantry` binary: what people and programs touch.

#![forbid(unsafe_code)]

mod cli;
mod config;
mod output;
mod report;
mod signals;
mod table;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
