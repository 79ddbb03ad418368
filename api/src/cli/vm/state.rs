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

/// A VM whose state is to change at once.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    #[command(flatten)]
    of: VmArgs,
    #[command(flatten)]
    tell: OutputArgs,
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
    tell: OutputArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry vm power-button web-1
  gantry vm power-button web-1 --wait 120")]
pub struct PowerButtonArgs {
    /// Name of the VM; `gantry vm list` shows them
    #[arg(value_name = "VM")]
    vm: String,
    /// Wait this many seconds for the guest to power off
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "60")]
    wait: Option<u32>,
    #[command(flatten)]
    tell: OutputArgs,
}

/// What became of a VM.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Done {
    Paused,
    Resumed,
    Rebooted,
    Ended,
    /// And its gantry with it.
    ProcessEnded,
    /// Its guest is to power off.
    Asked,
}

#[derive(Debug, Serialize)]
struct Changed<'a> {
    vm: &'a str,
    done: Done,
}

fn tell(vm: &str, done: Done, args: OutputArgs) -> Result<(), Failure> {
    args.tell(&Changed { vm, done }, |out| match done {
        Done::Paused => writeln!(out, "{vm} is paused"),
        Done::Resumed => writeln!(out, "{vm} runs again"),
        Done::Rebooted => writeln!(out, "{vm} boots again"),
        Done::Ended => writeln!(out, "{vm} has ended"),
        Done::ProcessEnded => writeln!(out, "{vm} has ended, and gantry with it"),
        Done::Asked => writeln!(out, "{vm}'s guest is asked to power off"),
    })
}

/// What is to be known of a VM whose guest is to do something: none unless it is paused.
pub fn asleep(client: &Client, vm: &str) -> Option<String> {
    let info: VmInfo = client.get("vm.info").ok()?;
    (info.state == VmState::Paused)
        .then(|| format!("{vm} is paused: its guest does nothing until `gantry vm resume {vm}`"))
}

/// Has `call` done, and says that the VM has `done` it.
pub fn change(args: &ChangeArgs, paths: &HostPaths, call: &str, done: Done) -> Result<(), Failure> {
    let vm = &args.of.vm;
    find::vm(vm, paths)?.put(call)?;
    tell(vm, done, args.tell)
}

pub fn shutdown(args: &ShutdownArgs, paths: &HostPaths) -> Result<(), Failure> {
    let vm = &args.vm;
    if args.process {
        find::vm(vm, paths)?.put("vmm.shutdown")?;
        return tell(vm, Done::ProcessEnded, args.tell);
    }
    match find::vm(vm, paths)?.put("vm.shutdown") {
        Ok(()) => tell(vm, Done::Ended, args.tell),
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
    if let Some(asleep) = asleep(&client, &args.vm) {
        note(asleep);
    }
    let Some(wait) = args.wait else {
        return tell(&args.vm, Done::Asked, args.tell);
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
                let deaf =
                    "it may ignore its power button; `gantry vm shutdown` ends the VM at once";
                let help = asleep(&client, &args.vm).unwrap_or_else(|| deaf.to_owned());
                return Err(Failure::host(what).help(help));
            }
            Err(error) => return Err(error.into()),
        }
    }
    tell(&args.vm, Done::Ended, args.tell)
}
