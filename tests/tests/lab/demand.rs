//! Cases about groups that say `bind: demand`: a VM takes its device from the host when it starts, and
//! the host has it back when it ends, however that comes about.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::pool::{FIRST, SECOND, device, nothing_is_held, processes};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

pub const CASES: &[Case] = cases![
    a_vm_takes_a_disk_from_the_host_and_gives_it_back,
    a_killed_vms_disk_goes_back_by_its_helper,
    with_the_helper_killed_too_the_next_command_gives_it_back,
];

/// How long the host may take to have its disk again.
const PATIENCE: Duration = Duration::from_secs(100);

/// Defines the group `disks`, with the first disk only.
fn group(host: &Host) -> Result<Vm> {
    let groups = json!({"groups": [
        {"name": "disks", "bind": "demand", "rules": [{"slot": FIRST.bdf}]},
    ]});
    host.write("/etc/gantry/groups.json", groups.to_string())?;
    is_back(host)?;
    Ok(Vm::new("sleep").devices("disks", 1))
}

fn driver(host: &Host, bdf: &str) -> Result<String> {
    Ok(device(host, bdf)?["driver"]
        .as_str()
        .unwrap_or("none")
        .to_owned())
}

/// Waits until the host's driver has the disk, as it had before.
fn is_back(host: &Host) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while driver(host, FIRST.bdf)? != "nvme" {
        ensure!(Instant::now() < deadline, "{:#}", device(host, FIRST.bdf)?);
        std::thread::sleep(Duration::from_millis(100));
    }
    let disk = device(host, FIRST.bdf)?;
    ensure!(disk["driver_override"].is_null(), "{disk:#}");
    // The helper ends when its work is done.
    while !host.sh("pidof gantry").output()?.text().is_empty() {
        ensure!(Instant::now() < deadline, "a helper stays");
        std::thread::sleep(Duration::from_millis(100));
    }
    nothing_is_held(host)
}

fn runs(host: &Host, vm: &Vm) -> Result<Running> {
    let mut running = vm.start(host)?;
    running.until("guest: init")?;
    ensure!(driver(host, FIRST.bdf)? == "vfio-pci", "it was not bound");
    ensure!(driver(host, SECOND.bdf)? == "nvme", "the other one moved");
    Ok(running)
}

fn a_vm_takes_a_disk_from_the_host_and_gives_it_back(host: &Host) -> Result<()> {
    group(host)?;
    let vm = Vm::new("nvme").devices("disks", 1);
    let ended = vm.run(host)?.powered_off()?;
    ensure!(ended.value("nvme0.sha256")? == FIRST.checksum(), "{ended}");
    is_back(host)
}

fn a_killed_vms_disk_goes_back_by_its_helper(host: &Host) -> Result<()> {
    let vm = group(host)?;
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let running = runs(host, &vm)?;
        running.signal(signal)?;
        running.end()?;
        is_back(host)?;
    }
    Ok(())
}

fn with_the_helper_killed_too_the_next_command_gives_it_back(host: &Host) -> Result<()> {
    let vm = group(host)?;
    let running = runs(host, &vm)?;
    let helpers = processes(host, "__restore")?;
    ensure!(helpers.len() == 1, "{helpers:?}");
    host.sh(&format!("kill -9 {}", helpers.join(" ")))
        .output()?
        .success()?;
    running.signal(Signal::SIGKILL)?;
    running.end()?;
    ensure!(driver(host, FIRST.bdf)? == "vfio-pci", "who gave it back?");
    // Any VM will do, also one that wants no device.
    Vm::new("none").run(host)?.powered_off()?;
    is_back(host)
}
