//! `gantry vm pause`, `resume`, `reboot`, `shutdown` and `power-button`: one call each.

use std::time::Duration;

use clap::Args;
use gantry_resources::HostPaths;
use tokio::time::Instant;

use super::find;
use crate::http::client::{Client, ClientError, seconds};
use crate::http::wire::{Event, VmInfo, VmState};
use crate::output::print;
use crate::report::Failure;

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
    /// Wait until the guest has powered off, for so many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "60")]
    wait: Option<u32>,
}

/// What is to be known of a VM whose guest is to do something: none unless it is paused.
pub fn asleep(client: &Client, vm: &str) -> Option<String> {
    let info: VmInfo = client.get("vm.info").ok()?;
    (info.state == VmState::Paused)
        .then(|| format!("{vm} is paused: its guest does nothing until `gantry vm resume {vm}`"))
}

/// Has `call` done, and says that the VM `is` so now.
pub fn change(vm: &str, paths: &HostPaths, call: &str, is: &str) -> Result<(), Failure> {
    find::vm(vm, paths)?.put(call)?;
    print(|out| writeln!(out, "{vm} {is}"))
}

pub fn shutdown(args: &ShutdownArgs, paths: &HostPaths) -> Result<(), Failure> {
    let vm = &args.vm;
    if args.process {
        return change(vm, paths, "vmm.shutdown", "has ended, and gantry with it");
    }
    match find::vm(vm, paths)?.put("vm.shutdown") {
        Ok(()) => print(|out| writeln!(out, "{vm} has ended")),
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
        eprintln!("{asleep}");
    }
    let Some(wait) = args.wait else {
        return print(|out| writeln!(out, "{}'s guest is asked to power off", args.vm));
    };
    eprintln!("waiting for {}'s guest to power off", args.vm);
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
            Err(ClientError::Late { .. }) => {
                let what = format!("{}'s guest did not power off in {}", args.vm, seconds(wait));
                let deaf =
                    "it may not listen to its power button; `gantry vm shutdown` does not ask";
                let help = asleep(&client, &args.vm).unwrap_or_else(|| deaf.to_owned());
                return Err(Failure::host(what).help(help));
            }
            Err(error) => return Err(error.into()),
        }
    }
    print(|out| writeln!(out, "{} has ended", args.vm))
}
