//! The `gantry` binary: what people and programs touch.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    gantry_api::main()
}
