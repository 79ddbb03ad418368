//! Cases about devices that the kernel does not let go of: they are kept from VMs, and come back.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use nix::sys::signal::Signal;

use crate::pool::{FIRST, Pool, device, free, processes};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

pub const CASES: &[Case] = cases![
    a_disk_that_hangs_when_it_is_moved_is_set_aside,
    a_disk_that_stays_busy_is_set_aside,
];

/// Somebody who has the disk and keeps to no lease of this host: it asks for them elsewhere.
fn stranger(host: &Host) -> Result<Running> {
    let mut vm = Vm::new("sleep").named("stranger").devices("nvme", 1);
    vm.flags = "--run-dir /tmp/elsewhere --state-dir /tmp/elsewhere";
    let mut running = vm.start(host)?;
    running.until("guest: init")?;
    // It does not even answer when the kernel asks for the disk.
    let all = processes(host, "run-dir /tmp/elsewhere")?;
    host.sh(&format!("kill -STOP {}", all.join(" ")))
        .output()?
        .success()?;
    Ok(running)
}

fn gone(running: Running) -> Result<()> {
    running.signal(Signal::SIGKILL)?;
    running.end()?;
    Ok(())
}

fn is_quarantined(host: &Host, words: &str) -> Result<()> {
    let disk = device(host, FIRST.bdf)?;
    ensure!(disk["state"] == "quarantined", "{disk:#}");
    ensure!(disk["reason"].to_string().contains(words), "{disk:#}");
    ensure!(free(host, "nvme")? == 0, "it counts as free");
    let way_out = format!("gantry device release-quarantine {}", FIRST.bdf);
    let refused = Vm::new("none").devices("nvme", 1).run(host)?.exits(1)?;
    ensure!(refused.errors.contains(words), "{refused}");
    ensure!(refused.errors.contains(&way_out), "{refused}");
    Ok(())
}

fn release(host: &Host) -> Result<()> {
    host.command(["gantry", "device", "release-quarantine", FIRST.bdf])
        .output()?
        .success()?;
    Ok(())
}

fn a_disk_that_hangs_when_it_is_moved_is_set_aside(host: &Host) -> Result<()> {
    let pool = Pool::of(host, &[FIRST.bdf])?;
    let stranger = stranger(host)?;
    // VFIO waits in the kernel until whoever has the disk lets go of it.
    let hung = host
        .command(["gantry", "device", "reattach", FIRST.bdf])
        .within(Duration::from_secs(200))
        .output()?
        .exits(1)?;
    ensure!(hung.errors().contains("did not return"), "{hung}");
    // Neither this nor any other command waits for it.
    is_quarantined(host, "it hung")?;
    gone(stranger)?;
    let deadline = Instant::now() + Duration::from_secs(120);
    while !processes(host, "__sysfs-write")?.is_empty() {
        ensure!(Instant::now() < deadline, "the write never ends");
        sleep(Duration::from_millis(100));
    }
    release(host)?;
    let state = device(host, FIRST.bdf)?;
    ensure!(state["state"] != "quarantined", "{state:#}");
    drop(pool);
    ensure!(
        device(host, FIRST.bdf)?["driver"] == "nvme",
        "it is not back"
    );
    Ok(())
}

fn a_disk_that_stays_busy_is_set_aside(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let stranger = stranger(host)?;
    let busy = Vm::new("none").devices("nvme", 1).run(host)?.exits(1)?;
    ensure!(busy.errors.contains("in use by another process"), "{busy}");
    is_quarantined(host, "in use by another process")?;
    gone(stranger)?;
    release(host)?;
    ensure!(free(host, "nvme")? == 1, "it is not free");
    let ended = Vm::new("nvme")
        .devices("nvme", 1)
        .run(host)?
        .powered_off()?;
    ensure!(ended.value("nvme0.sha256")? == FIRST.checksum(), "{ended}");
    Ok(())
}
