//! `cargo xtask`: the lab, the tests, and what else a developer runs.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use gantry_tests::bench::Bench;
use gantry_tests::lab::cli::LabArguments;
use gantry_tests::{checks, cleanup, demo};

/// Chores of the gantry source tree.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
#[command(after_help = "\
Examples:
  cargo xtask demo
  cargo xtask lab
  cargo xtask lab --kernel lab -- gantry device list
  cargo test -p gantry-tests --test lab -- api::    some cases of the lab alone")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// A VM takes a disk out of a pool, uses it and gives it back; shown, and checked.
    Demo,
    /// A shell in a simulated VFIO host, with gantry on the PATH.
    Lab(LabArguments),
    /// Format, lints, unit, property and lab tests: all that has to pass.
    Test,
    /// What takes too long for a test: the cases that repeat something, many more times.
    Soak {
        /// Rounds of each case.
        #[arg(long, default_value = "50")]
        rounds: u32,
    },
    /// Measure gantry in the lab, alone or beside a peer.
    #[command(subcommand)]
    Bench(Bench),
}

fn main() -> ExitCode {
    let result = cleanup::on_signals()
        .context("cannot watch for signals")
        .and_then(|()| match Cli::parse().chore {
            Chore::Demo => demo::run(),
            Chore::Lab(arguments) => arguments.run(),
            Chore::Test => checks::run().map(|()| 0),
            Chore::Soak { rounds } => checks::soak(rounds).map(|()| 0),
            Chore::Bench(bench) => bench.run().map(|()| 0),
        });
    match result {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            cleanup::wait_if_ending();
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
