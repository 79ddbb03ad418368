//! `cargo xtask`: the lab, the tests, and what else a developer runs.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use gantry_tests::bench::Bench;
use gantry_tests::lab::images::HostKernel;
use gantry_tests::lab::parts::Options;
use gantry_tests::lab::{Host, Parts, Setup, shell};
use gantry_tests::{checks, cleanup, demo, ui};

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

/// `cargo xtask lab`.
#[derive(Debug, clap::Args)]
struct LabArguments {
    /// The host's kernel.
    #[arg(long, value_enum, default_value = "stock")]
    kernel: HostKernel,
    /// Put this program there as gantry, instead of the one of this tree.
    #[arg(long, value_name = "FILE")]
    gantry: Option<PathBuf>,
    /// Added to the host kernel's command line.
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        hide_default_value = true
    )]
    append: String,
    /// Run this there instead of a shell, and exit with its status.
    #[arg(last = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let result = cleanup::on_signals()
        .context("cannot watch for signals")
        .and_then(|()| match Cli::parse().chore {
            Chore::Demo => demo::run(),
            Chore::Lab(arguments) => lab(arguments),
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

/// What a newcomer to the lab may want to do first.
const WELCOME: &str = "\
A shell in the lab host; `exit` or ^D ends it. To begin with:
  gantry device list
  gantry group create nvme --device 0000:01:00.0 --device 0000:02:00.0
  gantry device detach 0000:01:00.0 0000:02:00.0
  gantry run /lab/vm.json             a guest with a disk and a shell; ctrl-a x ends it
  gantry run /lab/vm.json &           the same beside this shell, for `gantry vm`; `fg` and Enter go to it
Kernels and an initramfs for guests are in /lab. You are root here, and there is no sudo.
";

/// What else there is to try, which depends on the host's kernel.
fn extras(kernel: HostKernel) -> &'static str {
    match kernel {
        HostKernel::Stock => {
            "The driver of the network cards 03:00.0 and 04:00.0 comes with `cargo xtask lab --kernel lab`."
        }
        HostKernel::Lab => {
            "The network cards 03:00.0 and 04:00.0 make virtual functions; after `modprobe mtty` there are \
             vGPUs to be made, in name: `gantry device mdev`."
        }
    }
}

fn lab(arguments: LabArguments) -> Result<i32> {
    if arguments.command.is_empty() && !io::stdin().is_terminal() {
        bail!("a shell needs a terminal; `cargo xtask lab -- COMMAND` runs one command");
    }
    let parts = Parts::prepare(&Options {
        gantry: arguments.gantry,
        lab_kernel: arguments.kernel == HostKernel::Lab,
    })?;
    let setup = Setup {
        kernel: arguments.kernel,
        append: arguments.append,
        ..Setup::default()
    };
    let step = ui::Step::begin("Booting the lab");
    let host = Host::boot(&parts, &setup)?;
    step.done();
    if arguments.command.is_empty() {
        eprintln!("{WELCOME}{}", extras(arguments.kernel));
        shell::interactive(&host, &["sh", "-l"])
    } else {
        shell::batch(&host, &arguments.command)
    }
}
