//! `gantry vm events` and `gantry vm metrics`.

use clap::Args;
use gantry_resources::base::HostPaths;

use super::{VmArgs, find};
use crate::http::wire::{Device, Event};
use crate::output::{print, print_while_read};
use crate::report::Failure;

#[derive(Debug, Args)]
#[command(after_help = "\
The first column counts the seconds since the command began. It goes on until gantry ends, or ctrl-c. \
The last event is gantry's own end with its exit status; without that the exit status here is 1: gantry \
was killed.

Examples:
  gantry vm events web-1
  gantry vm events web-1 --json | jq 'select(.event == \"device-error\")'")]
pub struct EventsArgs {
    /// Name of the VM; `gantry vm list` shows them
    #[arg(value_name = "VM")]
    vm: String,
    /// Show each event as a line of JSON
    #[arg(long)]
    json: bool,
}

pub fn events(args: &EventsArgs, paths: &HostPaths) -> Result<(), Failure> {
    let client = find::vm(&args.vm, paths)?;
    let mut events = client.events()?;
    let began = std::time::Instant::now();
    let mut last = false;
    while let Some(line) = events.next(None)? {
        last = matches!(line.event, Event::Exit { .. });
        let text = if args.json {
            serde_json::to_string(&line)?
        } else {
            let since = began.elapsed().as_secs_f64();
            format!("{since:9.3} {}", words(&line.event))
        };
        if !print_while_read(|out| writeln!(out, "{text}"))? {
            return Ok(());
        }
    }
    match last {
        true => Ok(()),
        false => Err(Failure::host(format!(
            "the events of {} broke off: gantry was killed, or died",
            args.vm
        ))),
    }
}

pub fn metrics(args: &VmArgs, paths: &HostPaths) -> Result<(), Failure> {
    let text = find::vm(&args.vm, paths)?.text("/metrics")?;
    print(|out| out.write_all(text.as_bytes()))
}

/// A device by its name in the VM, and by what it is on the host where that is another.
pub fn named(device: &Device) -> String {
    let host = on_host(device);
    match device.id == host {
        true => host,
        false => format!("{} ({host})", device.id),
    }
}

/// What a device is on the host: its address there, or the disk's file.
pub fn on_host(device: &Device) -> String {
    match (&device.host, &device.path) {
        (Some(host), _) => host.to_string(),
        (None, Some(path)) => path.display().to_string(),
        (None, None) => device.id.clone(),
    }
}

/// `a`, `a and b`, `a, b and c`
pub fn list(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// An event for people.
fn words(event: &Event) -> String {
    match event {
        Event::State { state: None } => "there is no VM yet".to_owned(),
        Event::State { state: Some(state) } => format!("the VM is {state}"),
        Event::AttachStep {
            id, step, seconds, ..
        } => {
            format!("{id}: {step} took {:.1} ms", seconds * 1e3)
        }
        Event::Attached { device } => {
            format!(
                "{} is plugged in: guest address {}",
                named(device),
                device.pci_bdf
            )
        }
        // One event is one line.
        Event::AttachFailed { id, error } => {
            format!("{id}: not attached: {}", error.replace("\n  ", "; "))
        }
        Event::Enabled { id } => format!("{id}: enabled by the guest"),
        Event::DetachAsked { id } => format!("{id}: the guest is asked to release it"),
        Event::Detached { id, forced: false } => format!("{id}: the guest has released it"),
        Event::Detached { id, forced: true } => format!("{id}: it was taken from the guest"),
        Event::Wanted { id } => format!("{id}: the host wants it back"),
        Event::DeviceError { id, error } => format!("{id}: error: {error}"),
        Event::Reboot => "the guest boots again".to_owned(),
        Event::GuestPanic {
            crash_kernel: false,
        } => "the guest's kernel has panicked".to_owned(),
        Event::GuestPanic { crash_kernel: true } => {
            "the guest's kernel has panicked, and its crash kernel takes over".to_owned()
        }
        Event::GuestFault { error } => format!("the guest cannot go on: {error}"),
        Event::Ended { reason } => format!("the VM has ended: {}", reason.replace('\n', "; ")),
        Event::Exit { status } => format!("gantry ends with exit status {status}"),
        Event::Missed { events } => format!("{events} events came too fast to be shown"),
    }
}
