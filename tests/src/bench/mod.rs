//! Benches: gantry measured in the lab, alone or in pairs with a peer.
//!
//! A bench runs the contenders one after another in one lab boot, round by round, so that what
//! disturbs one disturbs the other; a peer is judged by the ratios of its rounds, never by two
//! numbers taken at different times.
//!
//! | room | holds |
//! |---|---|
//! | [`rows`] | a figure with its peers' beside it: the JSON that every bench writes |
//! | [`pairs`] | who runs when, and the figures that come in |
//! | [`table`] | rows on a terminal |
//! | [`contender`] | gantry, its peers, and their command lines |
//! | [`inside`] | what runs in the lab host: starts a VMM, times and traces it |
//! | [`boot`] | `cargo xtask bench boot` |
//! | [`attach`] | `cargo xtask bench attach` |
//! | [`passthrough`] | `cargo xtask bench passthrough` |
//! | [`resources`] | `cargo xtask bench resources`, which needs no lab |
//! | [`recorded`] | the host of 4,096 functions that it looks at |

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;

pub mod attach;
pub mod boot;
pub mod contender;
pub mod inside;
pub mod pairs;
pub mod passthrough;
pub mod recorded;
pub mod resources;
pub mod rows;
pub mod table;

use contender::{Contender, Guest};
use inside::Job;

use crate::lab::device::Device;
use crate::lab::images::HostKernel;
use crate::lab::{Host, Parts, Setup};
use crate::ui;

/// A measurement that takes longer than this is stuck.
const PATIENCE: Duration = Duration::from_secs(300);

/// What every bench in pairs takes.
#[derive(Debug, clap::Args)]
pub struct Paired {
    /// Rounds, at least 5; in each, every contender runs once.
    #[arg(long, value_name = "N", default_value = "5",
          value_parser = clap::value_parser!(u16).range(5..=1000))]
    pairs: u16,
    /// Run this beside gantry: cloud-hypervisor=FILE, or gantry=FILE for another build of it.
    #[arg(long = "peer", value_name = "NAME=FILE", value_parser = Contender::peer)]
    peers: Vec<Contender>,
    /// Write the rows there, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure this program instead of the release build of this tree.
    #[arg(long, value_name = "FILE")]
    gantry: Option<PathBuf>,
}

impl Paired {
    /// Gantry first, then its peers.
    fn contenders(&self) -> Result<Vec<Contender>> {
        let peers = self.peers.iter().cloned();
        let all: Vec<Contender> = std::iter::once(Contender::gantry()).chain(peers).collect();
        let programs: BTreeSet<&str> = all.iter().map(|one| one.program.as_str()).collect();
        ensure!(programs.len() == all.len(), "the same peer is given twice");
        Ok(all)
    }
}

/// Boots a lab with these devices and the programs of the contenders.
fn boot_lab(
    parts: &Parts,
    kernel: HostKernel,
    devices: Vec<Device>,
    contenders: &[Contender],
) -> Result<Host> {
    let setup = Setup {
        kernel,
        devices,
        puts: contenders.iter().filter_map(Contender::to_bring).collect(),
        parallel: true,
        ..Setup::default()
    };
    let step = ui::Step::begin("Booting the lab");
    let host = Host::boot(parts, &setup)?;
    step.done();
    Ok(host)
}

/// What the job finds out about a contender with this guest.
fn measure<R: DeserializeOwned>(
    host: &Host,
    contender: &Contender,
    guest: &Guest,
    job: impl Fn(Vec<String>) -> Job,
) -> Result<R> {
    let job = job(contender.command(guest, host)?);
    let measure = host.command(["/bin/lab-agent", inside::ARGUMENT]);
    let measured = measure.input(serde_json::to_vec(&job)?).within(PATIENCE);
    let output = measured.output()?.success()?;
    serde_json::from_slice(&output.stdout).context("the report makes no sense")
}

/// Measure gantry in the lab, alone or beside a peer.
#[derive(Debug, clap::Subcommand)]
pub enum Bench {
    /// From the start of a VM to its init: time, CPU time, memory, exits to user space.
    Boot(boot::Arguments),
    /// Attaching a device to a running VM and detaching it: time; and what the API costs.
    Attach(Paired),
    /// Passed devices in use: exits to user space, interrupt vectors; and starts and attaches by VFIO group and by
    /// character device.
    Passthrough(Paired),
    /// Listing devices and fitting a request on a host of 4,096 PCI functions: time.
    Resources(resources::Arguments),
}

impl Bench {
    /// Runs the bench and prints what it found.
    pub fn run(self) -> Result<()> {
        match self {
            Self::Boot(arguments) => boot::run(&arguments),
            Self::Attach(arguments) => attach::run(&arguments),
            Self::Passthrough(arguments) => passthrough::run(&arguments),
            Self::Resources(arguments) => resources::run(&arguments),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Subcommand;

    #[test]
    fn the_command_line_is_sound() {
        let command = Bench::augment_subcommands(clap::Command::new("bench"));
        command.clone().debug_assert();
        let parse = |words: &str| command.clone().try_get_matches_from(words.split(' '));
        assert!(parse("bench boot --pairs 5 --kernel stock --json f").is_ok());
        assert!(parse("bench attach --pairs 5 --peer gantry=/bin/true").is_ok());
        assert!(parse("bench passthrough --pairs 5").is_ok());
        assert!(parse("bench resources --runs 5 --json f").is_ok());
        assert!(parse("bench boot --pairs 4").is_err());
        assert!(parse("bench boot --peer other=/bin/true").is_err());
    }
}
