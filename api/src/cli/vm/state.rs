//! `gantry vm pause`, `resume`, `reboot`, `shutdown` and `power-button`: one call each.

use std::time::Duration;

use clap::Args;
use gantry_resources::base::HostPaths;
use serde::Serialize;
use tokio::time::Instant;

use super::{VmArgs, find};
use crate::http::client::{Client, ClientError, seconds};
use crate::http::wire::{Event, VmInfo, VmState};
use crate::output::{OutputArgs, note};
use crate::report::Failure;

/// A VM whose state changes at once.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    #[command(flatten)]
    of: VmArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The guest is not asked: `gantry vm power-button` does. A gantry that was started without a file stays \
for the next VM: --process ends it too.

Examples:
  gantry vm shutdown web-1
  gantry vm shutdown web-1 --process")]
pub struct ShutdownArgs {
    /// Name of the VM; `gantry vm list` shows them
    #[arg(value_name = "VM")]
    vm: String,
    /// End the gantry process, whether it has a VM or not
    #[arg(long)]
    process: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry vm power-button web-1
  gantry vm power-button web-1 --wait=120")]
pub struct PowerButtonArgs {
    /// Name of the VM; `gantry vm list` shows them
    #[arg(value_name = "VM")]
    vm: String,
    /// Wait for the guest to power off, for this many seconds at most; 60 if no number is given
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "60")]
    wait: Option<u32>,
    #[command(flatten)]
    output: OutputArgs,
}

/// What a command did to a VM.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    Paused,
    Resumed,
    Rebooted,
    Ended,
    /// Its gantry process has ended too.
    ProcessEnded,
    /// Its guest was asked to power off.
    Asked,
}

#[derive(Debug, Serialize)]
struct ChangeReport<'a> {
    vm: &'a str,
    done: Action,
}

fn print_change(vm: &str, done: Action, args: OutputArgs) -> Result<(), Failure> {
    args.print(&ChangeReport { vm, done }, |out| match done {
        Action::Paused => writeln!(out, "{vm} is paused"),
        Action::Resumed => writeln!(out, "{vm} runs again"),
        Action::Rebooted => writeln!(out, "{vm} boots again"),
        Action::Ended => writeln!(out, "{vm} has ended"),
        Action::ProcessEnded => writeln!(out, "{vm} has ended, and gantry with it"),
        Action::Asked => writeln!(out, "{vm}'s guest is asked to power off"),
    })
}

/// A note that a VM is paused, so that its guest does nothing; none if it is not paused.
pub fn paused_note(client: &Client, vm: &str) -> Option<String> {
    let info: VmInfo = client.get("vm.info").ok()?;
    (info.state == VmState::Paused)
        .then(|| format!("{vm} is paused: its guest does nothing until `gantry vm resume {vm}`"))
}

/// Sends `call` and prints `done`.
pub fn change(
    args: &ChangeArgs,
    paths: &HostPaths,
    call: &str,
    done: Action,
) -> Result<(), Failure> {
    let vm = &args.of.vm;
    find::vm(vm, paths)?.put(call)?;
    print_change(vm, done, args.output)
}

pub fn shutdown(args: &ShutdownArgs, paths: &HostPaths) -> Result<(), Failure> {
    let vm = &args.vm;
    if args.process {
        find::vm(vm, paths)?.put("vmm.shutdown")?;
        return print_change(vm, Action::ProcessEnded, args.output);
    }
    match find::vm(vm, paths)?.put("vm.shutdown") {
        Ok(()) => print_change(vm, Action::Ended, args.output),
        // No VM is created, or it does not run.
        Err(
            error @ ClientError::Refused {
                status: 404 | 405, ..
            },
        ) => {
            let help = format!("`gantry vm shutdown {vm} --process` ends gantry itself");
            Err(Failure::from(error).help(help))
        }
        Err(error) => Err(error.into()),
    }
}

pub fn power_button(args: &PowerButtonArgs, paths: &HostPaths) -> Result<(), Failure> {
    let client = find::vm(&args.vm, paths)?;
    let mut events = client.events()?;
    client.put("vm.power-button")?;
    if let Some(paused) = paused_note(&client, &args.vm) {
        note(paused);
    }
    let Some(wait) = args.wait else {
        return print_change(&args.vm, Action::Asked, args.output);
    };
    note(format_args!("waiting for {}'s guest to power off", args.vm));
    let wait = Duration::from_secs(wait.into());
    let deadline = Instant::now() + wait;
    loop {
        match events.next(Some(deadline)) {
            Ok(Some(line)) => match line.event {
                Event::State {
                    state: Some(VmState::Shutdown),
                } => break,
                _ => continue,
            },
            Ok(None) => break,
            Err(ClientError::TimedOut { .. }) => {
                let what = format!("{}'s guest did not power off in {}", args.vm, seconds(wait));
                let ignored =
                    "it may ignore its power button; `gantry vm shutdown` ends the VM at once";
                let help = paused_note(&client, &args.vm).unwrap_or_else(|| ignored.to_owned());
                return Err(Failure::host(what).help(help));
            }
            Err(error) => return Err(error.into()),
        }
    }
    print_change(&args.vm, Action::Ended, args.output)
}
