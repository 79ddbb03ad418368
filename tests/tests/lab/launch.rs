//! Cases about launching: both kinds of kernel, vCPUs, memory, serial port, command line, reboot.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use serde_json::json;

use crate::pool::{FIRST, Pool};
use crate::runner::{Case, cases};
use crate::vm::{Ended, Vm};

/// For every host kernel.
pub const CASES: &[Case] = cases![
    debian_boots_without_a_warning,
    a_vmlinux_boots_without_a_warning,
    a_guest_reboots_in_place,
];

/// For one host kernel.
pub const MORE: &[Case] = cases![
    vcpus_and_memory_are_seen,
    ram_goes_on_above_4_gib,
    the_serial_port_leads_where_the_file_says,
    streams_that_are_closed_do_no_harm,
    a_long_command_line_arrives_whole,
    debian_reboots_in_place,
];

fn debian_boots_without_a_warning(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let vm = Vm::new("nvme").of_debian().loud().cpus(2);
    let ended = vm.memory("512M").devices("nvme", 1).run(host)?;
    saw_its_machine(ended, 2, 512)
}

fn a_vmlinux_boots_without_a_warning(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let vm = Vm::new("nvme").loud().cpus(4).devices("nvme", 1);
    saw_its_machine(vm.run(host)?, 4, 256)
}

fn saw_its_machine(ended: Ended, cpus: u64, mib: u64) -> Result<()> {
    let ended = ended.powered_off()?;
    ended.no_warnings()?;
    has(&ended, cpus, mib)?;
    ensure!(ended.value("nvme0.serial")? == FIRST.serial, "{ended}");
    ensure!(ended.value("nvme0.sha256")? == FIRST.checksum(), "{ended}");
    ensure!(ended.number("nvme0.msix")? > 0, "{ended}");
    Ok(())
}

/// Fails unless the guest has so many processors and about so much memory: its kernel keeps some.
fn has(ended: &Ended, cpus: u64, mib: u64) -> Result<()> {
    ensure!(ended.number("cpus")? == cpus, "not {cpus} cpus: {ended}");
    let seen = ended.number("memory_kib")? / 1024;
    let expected = mib * 8 / 10..=mib;
    ensure!(expected.contains(&seen), "{seen} MiB of {mib}: {ended}");
    Ok(())
}

fn vcpus_and_memory_are_seen(host: &Host) -> Result<()> {
    for (cpus, mib) in [(1, 128), (2, 1024)] {
        let vm = Vm::new("none").cpus(cpus).memory(&format!("{mib}M"));
        has(&vm.run(host)?.powered_off()?, cpus.into(), mib)?;
    }
    Ok(())
}

fn ram_goes_on_above_4_gib(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    // Linux takes its memory from the top: the disk's queues and data are beyond 4 GiB.
    let vm = Vm::new("nvme").memory("2304M").devices("nvme", 1);
    let ended = vm.run(host)?.powered_off()?;
    has(&ended, 1, 2304)?;
    ensure!(ended.value("nvme0.sha256")? == FIRST.checksum(), "{ended}");
    Ok(())
}

fn the_serial_port_leads_where_the_file_says(host: &Host) -> Result<()> {
    let mut vm = Vm::new("none");
    vm.file["serial"] = json!({"mode": "File", "file": "console.log"});
    let ended = vm.run(host)?.powered_off()?;
    ensure!(ended.said.is_empty(), "{ended}");
    let log = host.read_text("/tmp/vms/console.log")?;
    ensure!(log.contains("guest: done"), "the file has {log:?}");
    for mode in ["Null", "Off"] {
        vm.file["serial"] = json!({"mode": mode});
        let ended = vm.run(host)?.powered_off()?;
        ensure!(ended.said.is_empty(), "{mode}: {ended}");
    }
    Ok(())
}

fn streams_that_are_closed_do_no_harm(host: &Host) -> Result<()> {
    let command = Vm::new("none").command(host)?;
    let none = host.sh(&format!("exec {command} <&- >&- 2>&-")).output()?;
    Ended::of(none).powered_off()?;
    // Its reader goes after the first line.
    let script = format!("{{ {command} </dev/null; echo status=$? >&2; }} | head -n 1");
    let ended = Ended::of(host.sh(&script).output()?);
    ensure!(ended.said.lines().count() == 1, "{ended}");
    ensure!(ended.errors.contains("status=0"), "{ended}");
    // Nobody reads its log, and the pipe is full.
    let script = format!(
        "mkfifo /tmp/log; exec 3<>/tmp/log; timeout 2 dd if=/dev/zero bs=4k count=64 >&3 2>/dev/null;
         rm /tmp/log; exec {command} -vv </dev/null 2>&3"
    );
    Ended::of(host.sh(&script).output()?).powered_off()?;
    Ok(())
}

fn a_long_command_line_arrives_whole(host: &Host) -> Result<()> {
    // With a dot it is no word for init, which takes few.
    let word = format!("lab.pad={}", "x".repeat(1900));
    let mut running = Vm::new("shell").append(&word).start(host)?;
    running.types("echo guest: length=$(grep -o x.* /proc/cmdline | wc -c); poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    ensure!(ended.number("length")? == 1901, "{ended}");
    Ok(())
}

fn a_guest_reboots_in_place(host: &Host) -> Result<()> {
    reboots_twice(host, Vm::new("shell").cpus(2))
}

fn debian_reboots_in_place(host: &Host) -> Result<()> {
    reboots_twice(host, Vm::new("shell").of_debian().cpus(2))
}

/// Has the guest, whose task is `shell`, reboot twice; each time it has its processors, its disk
/// with interrupts, and no warning.
fn reboots_twice(host: &Host, vm: Vm) -> Result<()> {
    const DISK: &str = "echo guest: sum=$(dd if=/dev/nvme0n1 bs=1M iflag=direct | sha256sum)";
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = vm.devices("nvme", 1).start(host)?;
    for last in ["reboot -f", "reboot -f", "poweroff -f"] {
        running.until("guest: init")?;
        running.types(DISK)?;
        running.types(last)?;
    }
    let ended = running.end()?.powered_off()?;
    ended.no_warnings()?;
    ensure!(ended.said.matches("guest: cpus=2").count() == 3, "{ended}");
    let sums: Vec<&str> = ended.values("sum").collect();
    let expected = format!("{} -", FIRST.checksum());
    ensure!(sums == [&*expected; 3], "{sums:?}: {ended}");
    Ok(())
}
