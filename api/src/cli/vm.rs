//! `gantry vm`: what people do with VMs that run.

mod console;
mod devices;
mod disks;
mod find;
mod info;
mod list;
mod logs;
mod open;
mod state;
mod watch;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use gantry_resources::base::HostPaths;

use crate::http::client::ClientError;
use crate::http::wire::{VmInfo, VmmPing};
use crate::report::Failure;

#[derive(Debug, Subcommand)]
#[command(after_help = "\
VM is the name that `gantry run` gave the VM, or the path of its socket, with a slash in it.

Examples:
  gantry vm list
  gantry vm console web-1
  gantry vm attach web-1 --group gpu
  gantry vm detach web-1 0000:41:00.0
  gantry vm power-button web-1 --wait")]
pub enum VmCommand {
    /// List the VMs that run
    List(list::ListArgs),
    /// Show a VM and its devices
    Info(info::InfoArgs),
    /// Attach to the console of a VM
    Console(console::ConsoleArgs),
    /// Show what a VM in the background has said
    Logs(logs::LogsArgs),
    /// Give devices to a running VM
    Attach(devices::AttachArgs),
    /// Give a running VM a disk that is a file or a block device
    AttachDisk(disks::AttachDiskArgs),
    /// Make a disk of a running VM larger
    ResizeDisk(disks::ResizeDiskArgs),
    /// Take a device or a disk from a running VM
    Detach(devices::DetachArgs),
    /// Pause a VM
    #[command(after_help = "Example: gantry vm pause web-1")]
    Pause(state::ChangeArgs),
    /// Resume a paused VM
    #[command(after_help = "Example: gantry vm resume web-1")]
    Resume(state::ChangeArgs),
    /// Reset a VM at once, and boot it again
    #[command(after_help = "Example: gantry vm reboot web-1")]
    Reboot(state::ChangeArgs),
    /// End a VM at once, without asking its guest
    Shutdown(state::ShutdownArgs),
    /// Ask the guest to power off
    PowerButton(state::PowerButtonArgs),
    /// Show the events of a VM as they happen
    Events(watch::EventsArgs),
    /// Print metrics of a VM and its devices for Prometheus
    #[command(after_help = "Example: gantry vm metrics web-1 | grep interrupts")]
    Metrics(VmArgs),
}

/// Which VM.
#[derive(Debug, Args)]
pub struct VmArgs {
    /// Name of the VM; `gantry vm list` shows them
    #[arg(value_name = "VM")]
    vm: String,
}

pub fn vm(command: VmCommand, paths: &HostPaths) -> Result<(), Failure> {
    use {VmCommand as C, state::Action};
    match command {
        C::List(args) => list::list(&args, paths),
        C::Info(args) => info::info(&args, paths),
        C::Console(args) => console::console(&args, paths),
        C::Logs(args) => logs::logs(&args, paths),
        C::Attach(args) => devices::attach(args, paths),
        C::AttachDisk(args) => disks::attach(args, paths),
        C::ResizeDisk(args) => disks::resize(&args, paths),
        C::Detach(args) => devices::detach(&args, paths),
        C::Pause(args) => state::change(&args, paths, "vm.pause", Action::Paused),
        C::Resume(args) => state::change(&args, paths, "vm.resume", Action::Resumed),
        C::Reboot(args) => state::change(&args, paths, "vm.reboot", Action::Rebooted),
        C::Shutdown(args) => state::shutdown(&args, paths),
        C::PowerButton(args) => state::power_button(&args, paths),
        C::Events(args) => watch::events(&args, paths),
        C::Metrics(args) => watch::metrics(&args, paths),
    }
}

/// The running VMs by name, with their metrics; none for a VM that does not answer.
pub fn metrics_of_all(paths: &HostPaths) -> Vec<(String, Option<String>)> {
    let mut all: Vec<(String, Option<String>)> = Vec::new();
    for (name, metrics) in find::ask_all(paths, metrics_of).into_iter().flatten() {
        // Two VMs may claim the same name: the first one counts.
        if all.iter().all(|(other, _)| *other != name) {
            all.push((name, metrics));
        }
    }
    all
}

/// The name and the metrics of the VM behind a socket; none if no process listens.
fn metrics_of(socket: String, path: PathBuf) -> Option<(String, Option<String>)> {
    let client = find::connect(&path, find::LIST_TIMEOUT).ok()?;
    let name = match client.get::<VmmPing>("vmm.ping") {
        Err(ClientError::NotListening { .. }) => return None,
        Ok(ping) if !ping.name.is_empty() => ping.name,
        // A VM that did not answer once gets no second wait.
        Err(ClientError::TimedOut { .. }) => return Some((socket, None)),
        Ok(_) | Err(_) => socket,
    };
    Some((name, client.text("/metrics").ok()))
}

/// The slots of a VM: those that its file asks for, and those of the devices that it started with.
fn slots(info: &VmInfo) -> String {
    let taken = info.slots.saturating_sub(info.free_slots);
    format!("{} free, {taken} taken", info.free_slots)
}

/// A time for people, in its two largest units: `3d 4h`, `12m 5s`.
fn uptime(seconds: f64) -> String {
    // Whole seconds; a float beyond the range is the largest number.
    let seconds = seconds as u64;
    let units = [
        ("d", 86_400, u64::MAX),
        ("h", 3600, 24),
        ("m", 60, 60),
        ("s", 1, 60),
    ];
    let parts = units.map(|(unit, length, most)| (unit, seconds / length % most));
    let first = parts.iter().position(|(_, count)| *count > 0).unwrap_or(3);
    let shown = parts.iter().skip(first).take(2);
    let shown: Vec<String> = shown
        .map(|(unit, count)| format!("{count}{unit}"))
        .collect();
    shown.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uptime_has_its_two_largest_units() {
        for (seconds, shown) in [
            (0.4, "0s"),
            (59.9, "59s"),
            (725.0, "12m 5s"),
            (3600.0, "1h 0m"),
            (3.0 * 86_400.0 + 4.5 * 3600.0, "3d 4h"),
            (400.0 * 86_400.0, "400d 0h"),
        ] {
            assert_eq!(uptime(seconds), shown);
        }
    }
}
