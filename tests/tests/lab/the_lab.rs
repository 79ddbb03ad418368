//! Cases about the lab itself: what every other case stands on.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::channel::{Event, Process};
use gantry_tests::lab::{Host, disk};
use gantry_tests::protocol::{Exit, Size};
use serde_json::json;

use crate::pool::processes;
use crate::runner::{Case, cases};

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
const PATIENCE: Duration = Duration::from_secs(120);
const FIRST_SERIAL: &str = "GANTRY-NVME0001";
const SECOND_SERIAL: &str = "GANTRY-NVME0002";

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
    let data: Vec<u8> = (0..3_000_000u32)
        .map(|n| (n.wrapping_mul(n) >> 7) as u8)
        .collect();
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
    // It dies some time after the signal.
    let deadline = Instant::now() + Duration::from_secs(60);
    while !processes(host, "sleep 54321")?.is_empty() {
        ensure!(Instant::now() < deadline, "it lives on");
    }
    Ok(())
}

fn terminals_have_job_control(host: &Host) -> Result<()> {
    let size = Size { rows: 33, cols: 99 };
    let mut shell = host.command(["sh"]).on_terminal(size).start()?;
    let control = shell.control();
    let mut seen = String::new();
    control.write(b"stty size; sleep 1000\n")?;
    read_until((&mut shell, &mut seen), "33 99", PATIENCE)?;
    // The sleep has to end by it, not the shell. A ^C before the sleep has begun ends nothing.
    for _ in 0..60 {
        control.write(b"\x03")?;
        control.write(b"echo al''ive\n")?;
        if read_until((&mut shell, &mut seen), "alive", Duration::from_secs(1)).is_ok() {
            break;
        }
    }
    ensure!(seen.contains("alive"), "^C does not end the sleep: {seen}");
    control.resize(Size { rows: 44, cols: 88 })?;
    control.write(b"until [ \"$(stty size)\" = '44 88' ]; do sleep 0.1; done; exit 5\n")?;
    let exit = read_until((&mut shell, &mut seen), "no such words", PATIENCE)?;
    ensure!(exit == Some(Exit::Code(5)), "{exit:?}: {seen}");
    Ok(())
}

/// Reads a command's output until it says `words` or ends.
fn read_until(
    (process, seen): (&mut Process, &mut String),
    words: &str,
    patience: Duration,
) -> Result<Option<Exit>> {
    let deadline = Instant::now() + patience;
    while !seen.contains(words) {
        match process.next(Some(deadline)).with_context(|| seen.clone())? {
            Event::Stdout(data) => seen.push_str(&String::from_utf8_lossy(&data)),
            Event::Exit(exit) => return Ok(Some(exit)),
            Event::Hello | Event::Stderr(_) => {}
        }
    }
    Ok(None)
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
    for serial in [FIRST_SERIAL, SECOND_SERIAL] {
        ensure!(
            checksum(host, serial)? == disk::checksum(serial),
            "{serial}"
        );
    }
    Ok(())
}

/// Checksum of a disk as the host reads it, once the disk is there.
fn checksum(host: &Host, serial: &str) -> Result<String> {
    // With multipath, a block device belongs to a subsystem, and has a hidden twin without a node.
    let script = "
        while true; do
            for disk in /sys/block/nvme*; do
                name=${disk##*/}
                [ -e /dev/$name ] && grep -q \"^$0\" $disk/device/serial && break 2
            done
            sleep 0.1
        done
        dd if=/dev/$name bs=1M iflag=direct 2>/dev/null | sha256sum";
    let output = host
        .command(["sh", "-c", script, serial])
        .within(Duration::from_secs(100))
        .output()?
        .success()?;
    let text = output.text();
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
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
         echo {FIRST} >/sys/bus/pci/drivers_probe"
    );
    let output = host.sh(&script).output()?.success()?;
    ensure!(output.text().contains("drivers/vfio-pci"), "{output}");
    ensure!(checksum(host, FIRST_SERIAL)? == disk::checksum(FIRST_SERIAL));
    Ok(())
}

fn a_disk_is_unplugged_and_plugged_in(host: &Host) -> Result<()> {
    host.monitor("device_del", json!({"id": "dev1"}))?;
    host.sh(&format!(
        "while [ -e /sys/bus/pci/devices/{SECOND} ]; do sleep 0.1; done"
    ))
    .within(Duration::from_secs(100))
    .output()?
    .success()?;
    let device = json!({
        "driver": "nvme", "id": "dev1", "bus": "port1", "drive": "disk1", "serial": SECOND_SERIAL,
    });
    // QEMU lets go of the disk some time after the slot is empty.
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Err(error) = host.monitor("device_add", device.clone()) {
        ensure!(Instant::now() < deadline, "{error:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
    ensure!(checksum(host, SECOND_SERIAL)? == disk::checksum(SECOND_SERIAL));
    Ok(())
}

fn guests_parts_are_there(host: &Host) -> Result<()> {
    host.sh("cd /lab && ls -l bzImage-debian bzImage-lab vmlinux initramfs-guest /bin/gantry")
        .output()?
        .success()?;
    Ok(())
}
