//! `cargo xtask`: the lab, the tests, and what else a developer runs.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use gantry_tests::bench::Bench;
use gantry_tests::lab::cli::LabArguments;
use gantry_tests::{checks, cleanup, demo, devices, package};

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
    /// Show and check how a VM takes a disk from a group, uses it and gives it back.
    Demo,
    /// Open a shell on a simulated VFIO host, with gantry on its PATH.
    Lab(LabArguments),
    /// Make a Debian package, and print where it is.
    Package,
    /// Run all tests: format, lints, unit, property and lab tests.
    Test,
    /// Repeat the cases that race or kill, many more times than a test can.
    Soak {
        /// Rounds of each case.
        #[arg(long, default_value = "50")]
        rounds: u32,
    },
    /// Print which devices guests drive, at boot and hot, by VFIO group and by character device.
    Devices(devices::Arguments),
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
            Chore::Package => package::run().map(|()| 0),
            Chore::Test => checks::run().map(|()| 0),
            Chore::Soak { rounds } => checks::soak(rounds).map(|()| 0),
            Chore::Devices(arguments) => devices::run(&arguments),
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
