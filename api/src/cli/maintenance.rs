//! `gantry maintenance`: keeps new VMs from starting, and lists those that run.

use clap::{Args, Subcommand};
use gantry_resources::base::HostPaths;
use gantry_resources::holding::{
    Maintenance, RunningVm, begin_maintenance, end_maintenance, maintenance, running_vms,
};
use serde::Serialize;

use crate::output::OutputArgs;
use crate::report::Failure;

#[derive(Debug, Subcommand)]
#[command(after_help = "Example: gantry maintenance on --reason 'new GPUs'")]
pub enum MaintenanceCommand {
    /// Keep new VMs from starting, also after a reboot; VMs that run are not touched
    On(OnArgs),
    /// Let VMs start again
    #[command(after_help = "Example: gantry maintenance off")]
    Off(OutputArgs),
    /// Show whether VMs may start, and which run
    #[command(after_help = "Example: gantry maintenance status --json")]
    Status(OutputArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry maintenance on --reason 'new GPUs'")]
pub struct OnArgs {
    /// Reason, shown to users who start a VM [default: the former reason]
    #[arg(long)]
    reason: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Serialize)]
struct Status {
    maintenance: Option<Maintenance>,
    running: Vec<RunningVm>,
}

pub fn switch(command: MaintenanceCommand, paths: &HostPaths) -> Result<(), Failure> {
    let output = match command {
        MaintenanceCommand::On(args) => {
            begin_maintenance(paths, args.reason.as_deref())?;
            args.output
        }
        MaintenanceCommand::Off(output) => {
            end_maintenance(paths)?;
            output
        }
        MaintenanceCommand::Status(output) => output,
    };
    let status = Status {
        maintenance: maintenance(paths)?,
        running: running_vms(paths)?,
    };
    output.print(&status, |out| {
        match &status.maintenance {
            Some(state) => writeln!(out, "maintenance is on: {}", state.reason)?,
            None => writeln!(out, "maintenance is off")?,
        }
        match status.running.as_slice() {
            [] => writeln!(out, "no VM runs"),
            running => running.iter().try_for_each(|vm| writeln!(out, "{vm} runs")),
        }
    })
}
