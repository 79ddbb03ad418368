//! Cases about the lab itself: what every other case stands on.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use gantry_tests::lab::channel::Event;
use gantry_tests::lab::{Host, disk};
use gantry_tests::protocol::{Exit, Size};
use serde_json::json;

use crate::bed::{Case, cases};

pub const CASES: &[Case] = cases![
    commands_end_as_they_say,
    big_streams_pass_whole,
    overlong_commands_are_killed,
    terminals_have_job_control,
    kvm_has_nested_paging,
    interrupts_are_remapped,
    disks_are_alone_in_their_groups,
    the_display_shares_its_group_with_its_audio,
    disks_hold_known_bytes,
    vfio_pci_takes_a_disk_and_gives_it_back,
    a_disk_is_unplugged_and_plugged_in,
    guests_parts_are_there,
];

const FIRST: &str = "0000:01:00.0";
const SECOND: &str = "0000:02:00.0";

fn commands_end_as_they_say(host: &Host) -> Result<()> {
    let output = host
        .sh("echo out; echo err >&2; exit 7")
        .output()?
        .exits(7)?;
    ensure!(
        output.text() == "out" && output.errors() == "err",
        "{output}"
    );
    let output = host.sh("kill -9 $$").output()?;
    ensure!(output.exit == Exit::Signal(9), "{output}");
    let output = host.sh("echo $A").env("A", "1 2").output()?.success()?;
    ensure!(output.text() == "1 2", "{output}");
    let missing = host.command(["/no/such/program"]).output();
    ensure!(missing.is_err(), "a missing program started");
    ensure!(
        host.sh("exit 1").output()?.success().is_err(),
        "1 is success"
    );
    Ok(())
}

fn big_streams_pass_whole(host: &Host) -> Result<()> {
    let data: Vec<u8> = (0..3_000_000u32).map(|n| (n * n >> 7) as u8).collect();
    host.write("/tmp/some/where/data", data.clone())?;
    ensure!(
        host.read("/tmp/some/where/data")? == data,
        "the bytes differ"
    );
    // A command that reads nothing stops no other one.
    let deaf = host.command(["sleep", "100"]).start()?;
    deaf.control().write(&data)?;
    host.sh("rm -r /tmp/some").output()?.success()?;
    Ok(())
}

fn overlong_commands_are_killed(host: &Host) -> Result<()> {
    let began = Instant::now();
    let endless = host
        .sh("sleep 54321 & wait")
        .within(Duration::from_millis(500))
        .output();
    ensure!(endless.is_err() && began.elapsed() < Duration::from_secs(30));
    let left = host.sh("pgrep -f 'sleep 5432[1]'").output()?;
    ensure!(left.text().is_empty(), "it lives on: {left}");
    Ok(())
}

fn terminals_have_job_control(host: &Host) -> Result<()> {
    let size = Size { rows: 33, cols: 99 };
    let mut shell = host.command(["sh"]).on_terminal(size).start()?;
    let control = shell.control();
    // ^C has to end the sleep, not the shell.
    control.write(b"stty size; sleep 1000\n\x03")?;
    std::thread::sleep(Duration::from_secs(1));
    control.write(b"\x03")?;
    control.resize(Size { rows: 44, cols: 88 })?;
    control.write(b"sleep 1; stty size; exit 5\n")?;
    let mut seen = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(60);
    let exit = loop {
        match shell.next(Some(deadline))? {
            Event::Stdout(data) => seen.extend(data),
            Event::Exit(exit) => break exit,
            Event::Hello | Event::Stderr(_) => {}
        }
    };
    let seen = String::from_utf8_lossy(&seen);
    ensure!(exit == Exit::Code(5), "{exit:?}: {seen}");
    ensure!(seen.contains("33 99") && seen.contains("44 88"), "{seen}");
    Ok(())
}

fn kvm_has_nested_paging(host: &Host) -> Result<()> {
    host.sh("test -c /dev/kvm").output()?.success()?;
    let npt = host.read_text("/sys/module/kvm_amd/parameters/npt")?;
    ensure!(["1", "Y"].contains(&npt.as_str()), "npt={npt}");
    Ok(())
}

fn interrupts_are_remapped(host: &Host) -> Result<()> {
    let log = host.sh("dmesg | grep -i remapping").output()?;
    ensure!(log.text().contains("Enabled IRQ remapping"), "{log}");
    host.sh("test -c /dev/vfio/vfio").output()?.success()?;
    Ok(())
}

fn disks_are_alone_in_their_groups(host: &Host) -> Result<()> {
    for disk in [FIRST, SECOND] {
        ensure!(group(host, disk)? == [disk], "{disk} has company");
    }
    Ok(())
}

fn the_display_shares_its_group_with_its_audio(host: &Host) -> Result<()> {
    let members = group(host, "0000:00:14.0")?;
    ensure!(members == ["0000:00:14.0", "0000:00:14.1"], "{members:?}");
    Ok(())
}

/// Members of a device's IOMMU group, sorted.
fn group(host: &Host, device: &str) -> Result<Vec<String>> {
    let list = host
        .sh(&format!(
            "ls /sys/bus/pci/devices/{device}/iommu_group/devices"
        ))
        .output()?
        .success()?;
    Ok(list.text().lines().map(str::to_owned).collect())
}

fn disks_hold_known_bytes(host: &Host) -> Result<()> {
    for (device, serial) in [(FIRST, "GANTRY-NVME0001"), (SECOND, "GANTRY-NVME0002")] {
        ensure!(
            checksum(host, device)? == disk::checksum(serial),
            "{serial} differs"
        );
        let found = host.read_text(&format!("/sys/bus/pci/devices/{device}/nvme/nvme0/serial"));
        let found = found.or_else(|_| {
            host.read_text(&format!("/sys/bus/pci/devices/{device}/nvme/nvme1/serial"))
        })?;
        ensure!(found.trim() == serial, "{device} is {found}");
    }
    Ok(())
}

/// Checksum of a disk as the host reads it.
fn checksum(host: &Host, device: &str) -> Result<String> {
    let script = format!(
        "dd if=/dev/$(ls /sys/bus/pci/devices/{device}/nvme/*/ | grep -o 'nvme.*n1') bs=1M \
         iflag=direct 2>/dev/null | sha256sum"
    );
    let output = host.sh(&script).output()?.success()?;
    Ok(output
        .text()
        .split(' ')
        .next()
        .unwrap_or_default()
        .to_owned())
}

fn vfio_pci_takes_a_disk_and_gives_it_back(host: &Host) -> Result<()> {
    let script = format!(
        "cd /sys/bus/pci/devices/{FIRST} &&
         echo vfio-pci >driver_override &&
         echo {FIRST} >driver/unbind &&
         echo {FIRST} >/sys/bus/pci/drivers_probe &&
         ls -l driver && stat /dev/vfio/$(basename $(readlink iommu_group)) &&
         echo >driver_override &&
         echo {FIRST} >driver/unbind &&
         echo {FIRST} >/sys/bus/pci/drivers_probe &&
         while [ ! -e nvme/*/nvme*n1 ]; do sleep 0.1; done"
    );
    let output = host.sh(&script).output()?.success()?;
    ensure!(output.text().contains("drivers/vfio-pci"), "{output}");
    ensure!(checksum(host, FIRST)? == disk::checksum("GANTRY-NVME0001"));
    Ok(())
}

fn a_disk_is_unplugged_and_plugged_in(host: &Host) -> Result<()> {
    host.monitor("device_del", json!({"id": "dev1"}))?;
    host.sh(&format!(
        "while [ -e /sys/bus/pci/devices/{SECOND} ]; do sleep 0.1; done"
    ))
    .within(Duration::from_secs(40))
    .output()?
    .success()?;
    let device = json!({
        "driver": "nvme", "id": "dev1", "bus": "port1", "drive": "disk1",
        "serial": "GANTRY-NVME0002",
    });
    host.monitor("device_add", device)?;
    host.sh(&format!(
        "while [ ! -e /sys/bus/pci/devices/{SECOND}/nvme/*/nvme*n1 ]; do sleep 0.1; done"
    ))
    .within(Duration::from_secs(40))
    .output()?
    .success()?;
    ensure!(checksum(host, SECOND)? == disk::checksum("GANTRY-NVME0002"));
    Ok(())
}

fn guests_parts_are_there(host: &Host) -> Result<()> {
    host.sh("cd /lab && ls -l bzImage-debian bzImage-lab vmlinux initramfs-guest /bin/gantry")
        .output()?
        .success()?;
    Ok(())
}
