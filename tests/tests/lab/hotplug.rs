//! Cases about devices that come and go while the guest runs.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::Host;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::pool::{AUDIO, BIG_BAR, DISPLAY, FIRST, LACKING, Pool, SECOND, free, nothing_is_held};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

/// For every host kernel.
pub const CASES: &[Case] = cases![
    a_running_debian_gets_a_disk_and_lets_it_go,
    a_guest_that_does_not_answer_keeps_nothing,
];

/// For one host kernel.
pub const MORE: &[Case] = cases![
    devices_come_beside_those_that_are_there,
    a_whole_device_comes_with_its_functions,
    a_bar_of_8_gib_finds_a_slot,
    cycles_leave_nothing_behind,
    a_reboot_ends_what_was_pending,
    a_reboot_stops_a_device_that_is_leaving,
    what_was_taken_by_force_can_come_again,
    what_the_host_wants_back_goes_back,
    a_vm_without_slots_gives_back_what_the_host_wants,
    one_that_is_in_no_group_comes_if_the_file_says_so,
];

/// For host kernels that can audit.
pub const AUDITED: &[Case] = cases![nothing_of_it_is_outside_the_filters];

/// A guest with a shell, and slots for devices.
fn vm() -> Vm {
    let mut vm = Vm::new("shell");
    let groups = ["nvme", "display", "big"];
    vm.file["hotplug"] = json!({"slots": 32, "groups": groups});
    vm
}

/// The same with a kernel that knows of no ACPI hot-plug.
fn deaf() -> Vm {
    vm().append("acpiphp.disable=1")
}

fn gantry(host: &Host, words: &str) -> Result<String> {
    let output = host.sh(&format!("gantry vm {words}")).output()?;
    Ok(output.success()?.text())
}

fn devices(host: &Host) -> Result<Vec<Value>> {
    let info: Value = serde_json::from_str(&gantry(host, "info vm --json")?)?;
    let devices = info["devices"]
        .as_array()
        .or(info["host_devices"].as_array());
    Ok(devices.context("it does not list its devices")?.clone())
}

/// Waits until a group has so many free devices.
fn until_free(host: &Host, group: &str, count: usize) -> Result<()> {
    for _ in 0..300 {
        if free(host, group)? == count {
            return Ok(());
        }
        sleep(Duration::from_millis(100));
    }
    ensure!(free(host, group)? == count, "not {count} free in {group}");
    Ok(())
}

/// What the guest and gantry have to say of devices that do not come or go: for a failure's report. A guest
/// that is silent says where it is when it is sent an NMI, if its command line has `unknown_nmi_panic`.
fn state_of(host: &Host, running: &mut Running) -> String {
    let script = "cat /proc/interrupts; lspci; dmesg | tail -20; echo guest: all";
    let nmi = r"printf 'PUT /api/v1/vm.nmi HTTP/1.1\r\nhost: x\r\n\r\n' |
        timeout 10 lab-agent relay /run/gantry/vm.sock";
    let asked = running.types(script);
    if asked.and_then(|()| running.until("guest: all\r")).is_err() {
        let sent = host.sh(nmi).output();
        let told = running.until("end Kernel panic");
        eprintln!("{:?} {:?}", sent.map(|sent| sent.text()), told.err());
    }
    let ours = host.sh("gantry vm info vm; gantry vm metrics vm").output();
    let ours = ours.map_or_else(|error| error.to_string(), |ours| ours.text());
    format!("{running}\n--- gantry\n{ours}")
}

/// Has the guest say the sum of a disk that it has, or will have soon.
fn says_sum(running: &mut Running, disk: &str) -> Result<()> {
    running.types(&format!(
        "until [ -b /dev/{disk} ]; do sleep 0.1; done; echo guest: sum=$(dd if=/dev/{disk} bs=1M iflag=direct 2>/dev/null | sha256sum)"
    ))?;
    running.until("\nguest: sum=")
}

fn a_running_debian_gets_a_disk_and_lets_it_go(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = vm().of_debian().cpus(2).memory("512M").start(host)?;
    running.types("ls /sys/bus/pci/slots | wc -l | sed 's/^/guest: slots=/'")?;
    for round in 0..2 {
        gantry(host, "attach vm --group nvme --id disk")?;
        ensure!(free(host, "nvme")? == 0);
        let list = devices(host)?;
        ensure!(list.len() == 1 && list[0]["id"] == "disk", "{list:?}");
        says_sum(&mut running, "nvme0n1")?;
        gantry(host, "detach vm disk")?;
        ensure!(free(host, "nvme")? == 1, "round {round}");
        running.types("echo guest: disks=$(ls /dev/nvme* 2>/dev/null | wc -l)")?;
        running.until("\nguest: disks=")?;
    }
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    ended.no_warnings()?;
    ensure!(ended.number("slots")? == 32, "{ended}");
    let sums: Vec<&str> = ended.values("sum").collect();
    let expected = format!("{} -", FIRST.checksum());
    ensure!(sums == [&*expected; 2], "{sums:?}: {ended}");
    ensure!(ended.values("disks").all(|left| left == "0"), "{ended}");
    nothing_is_held(host)
}

fn a_guest_that_does_not_answer_keeps_nothing(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = deaf().start(host)?;
    running.until("guest: init")?;
    gantry(host, "attach vm --group nvme --no-wait")?;
    // It can be asked again, and is not waited for for ever.
    for _ in 0..2 {
        gantry(host, &format!("detach vm {} --no-wait", FIRST.bdf))?;
    }
    sleep(Duration::from_secs(1));
    ensure!(free(host, "nvme")? == 0, "it was taken from the guest");
    let list = devices(host)?;
    ensure!(list.len() == 1, "{list:?}");
    gantry(host, &format!("detach vm {} --force-after 1", FIRST.bdf))?;
    ensure!(free(host, "nvme")? == 1);
    gantry(host, "attach vm --group nvme --no-wait")?;
    gantry(host, &format!("detach vm {} --force-after 0", FIRST.bdf))?;
    ensure!(free(host, "nvme")? == 1);
    running.types("poweroff -f")?;
    running.end()?.powered_off()?;
    nothing_is_held(host)
}

fn what_the_host_wants_back_goes_back(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let driver = "/sys/bus/pci/drivers/vfio-pci";
    for (vm, words) in [
        (vm(), "released it"),
        (deaf(), "it was taken from the guest"),
    ] {
        let mut running = vm.devices("nvme", 1).start(host)?;
        running.until("guest: init")?;
        let mut events = Running::of(host.sh("gantry vm events vm").start()?);
        events.until("the VM is running")?;
        // What a client has patience for is not the host's. A guest with ears lets go before it is asked.
        if words.contains("taken") {
            gantry(
                host,
                &format!("detach vm {} --force-after 3600 --no-wait", FIRST.bdf),
            )?;
        }
        // The kernel has the command wait until the VM has closed the device.
        let unbind = format!("echo {} > {driver}/unbind", FIRST.bdf);
        host.sh(&unbind)
            .within(Duration::from_secs(150))
            .output()?
            .success()?;
        events.until("the host wants it back")?;
        events.until(words)?;
        ensure!(devices(host)?.is_empty(), "it still has the device");
        let bind = format!("echo {} > {driver}/bind", FIRST.bdf);
        host.sh(&bind).output()?.success()?;
        until_free(host, "nvme", 1)?;
        running.types("poweroff -f")?;
        running.end()?.powered_off()?;
        events.end()?.exits(0)?;
    }
    let log = host.sh("dmesg").output()?.success()?.text();
    ensure!(!log.contains("No device request channel"), "{log}");
    nothing_is_held(host)
}

fn a_vm_without_slots_gives_back_what_the_host_wants(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let driver = "/sys/bus/pci/drivers/vfio-pci";
    let mut running = Vm::new("shell").devices("nvme", 1).start(host)?;
    running.until("guest: init")?;
    let mut events = Running::of(host.sh("gantry vm events vm").start()?);
    events.until("the VM is running")?;
    let unbind = format!("echo {} > {driver}/unbind", FIRST.bdf);
    let unbind = host.sh(&unbind).within(Duration::from_secs(150));
    unbind.output()?.success()?;
    events.until("the host wants it back")?;
    events.until("it was taken from the guest")?;
    running.types("echo guest: lives=$((1 + 1))")?;
    running.until("guest: lives=2")?;
    let bind = format!("echo {} > {driver}/bind", FIRST.bdf);
    host.sh(&bind).output()?.success()?;
    until_free(host, "nvme", 1)?;
    running.types("poweroff -f")?;
    running.end()?.exits(0)?;
    events.end()?.exits(0)?;
    nothing_is_held(host)
}

fn devices_come_beside_those_that_are_there(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf, SECOND.bdf, DISPLAY])?;
    let mut running = vm().devices("nvme", 1).lacking_path(DISPLAY).start(host)?;
    running.until("guest: init")?;
    gantry(host, "attach vm --group nvme")?;
    says_sum(&mut running, "nvme1n1")?;
    // Its IOMMU group is the VM's already.
    gantry(
        host,
        &format!("attach vm --device {AUDIO} {LACKING} --no-wait"),
    )?;
    ensure!(devices(host)?.len() == 4);
    // What was there from the start can go as well, and its slot be used again.
    gantry(host, &format!("detach vm {}", FIRST.bdf))?;
    ensure!(free(host, "nvme")? == 1);
    gantry(host, "attach vm --group nvme")?;
    says_sum(&mut running, "nvme0n1")?;
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let sums: Vec<&str> = ended.values("sum").collect();
    let expected = [SECOND.checksum(), FIRST.checksum()].map(|sum| format!("{sum} -"));
    ensure!(sums == expected, "{sums:?}: {ended}");
    nothing_is_held(host)
}

fn a_whole_device_comes_with_its_functions(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[DISPLAY])?;
    let gpu = json!({"groups": [{"name": "gpu", "rules": [{"slot": "0000:00:14.*"}]}]});
    host.write("/etc/gantry/groups.json", gpu.to_string())?;
    let mut vm = vm();
    vm.file["hotplug"]["groups"] = json!(["gpu"]);
    let mut running = vm.start(host)?;
    running.until("guest: init")?;
    // Nothing drives the audio here.
    let refused = host
        .sh("gantry vm attach vm --group gpu")
        .output()?
        .exits(1)?;
    ensure!(refused.errors().contains("has no interrupts"), "{refused}");
    ensure!(free(host, "gpu")? == 1, "a card is one");
    gantry(
        host,
        &format!("attach vm --group gpu --id gpu {LACKING} --no-wait"),
    )?;
    until_listed(&mut running)?;
    let list = devices(host)?;
    ensure!(list.len() == 2, "{list:?}");
    // The functions of one device go together.
    gantry(host, "detach vm gpu")?;
    ensure!(free(host, "gpu")? == 1);
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let has = |words: &str| ended.said.contains(words);
    ensure!(has("01:00.0 0380: 1234:1111"), "{ended}");
    ensure!(has("01:00.1 0403: 8086:2668"), "{ended}");
    ensure!(AUDIO.ends_with(".1"));
    nothing_is_held(host)
}

/// Waits until the guest has found two functions, and lists all it has.
fn until_listed(running: &mut Running) -> Result<()> {
    running.types(
        "until [ -e /sys/bus/pci/devices/0000:01:00.1 ]; do sleep 0.1; done; lspci -n | sed 's/^0/guest: 0/'; echo guest: listed",
    )?;
    running.until("\nguest: listed")
}

fn a_bar_of_8_gib_finds_a_slot(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[BIG_BAR])?;
    let mut running = vm().start(host)?;
    running.until("guest: init")?;
    // No driver switches it on.
    gantry(host, &format!("attach vm --group big {LACKING} --no-wait"))?;
    // Its I/O BAR takes it to a slot that has ports.
    running.types("until lspci -n | grep 1b36:0005; do sleep 0.1; done; lspci -v -d 1b36:0005 2>/dev/null | sed 's/^.[MI]/guest: &/'; poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    for bar in ["[size=8G]", "I/O ports at"] {
        ensure!(ended.said.contains(bar), "no {bar}: {ended}");
    }
    let mut small = vm();
    small.file["hotplug"]["window"] = json!("1G");
    let mut running = small.start(host)?;
    running.until("guest: init")?;
    let refused = host
        .sh(&format!("gantry vm attach vm --group big {LACKING}"))
        .output()?
        .exits(1)?;
    ensure!(refused.errors().contains("hotplug.window"), "{refused}");
    until_free(host, "big", 1)?;
    running.signal(Signal::SIGTERM)?;
    running.end()?.exits(143)?;
    nothing_is_held(host)
}

/// What the VM's process has open and mapped, by kind, and that of its helper.
fn possessions(host: &Host) -> Result<String> {
    let script = r#"for process in $(pidof gantry | tr ' ' '\n' | sort -n); do
            ls -l /proc/$process/fd | sed -n 's/.*-> //p' | sed 's/[0-9][0-9]*//g' | sort | uniq -c
            wc -l </proc/$process/maps
            ls /proc/$process/task | wc -l
            grep -e VmLck -e VmPin /proc/$process/status
        done"#;
    Ok(host.sh(script).output()?.success()?.text())
}

/// What they have as soon as it `has_settled`, told by the last look and this one; or at last.
fn settled(host: &Host, has_settled: impl Fn(&str, &str) -> bool) -> Result<String> {
    let mut last = String::new();
    for _ in 0..20 {
        // What took part in the last cycle goes a little later.
        sleep(Duration::from_millis(500));
        let now = possessions(host)?;
        if has_settled(&last, &now) {
            return Ok(now);
        }
        last = now;
    }
    Ok(last)
}

fn cycles_leave_nothing_behind(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = vm().append("unknown_nmi_panic").start(host)?;
    running.until("guest: init")?;
    let cycle = format!(
        "gantry vm attach vm --group nvme >/dev/null && gantry vm detach vm {} >/dev/null",
        FIRST.bdf
    );
    let mut cycles = |count: u64| -> Result<()> {
        for round in 0..count {
            if let Err(error) = host.sh(&cycle).output()?.success() {
                let state = state_of(host, &mut running);
                return Err(error.context(format!("round {round}; then the guest said {state}")));
            }
        }
        Ok(())
    };
    cycles(2)?;
    let before = settled(host, |last, now| last == now)?;
    cycles(crate::rounds(50))?;
    let after = settled(host, |_, now| now == before)?;
    ensure!(before == after, "before:\n{before}\nafter:\n{after}");
    // RAM is pinned while there is a device, and not a moment longer.
    for pinned in ["VmLck", "VmPin"] {
        let none = format!("{pinned}:\t       0 kB");
        ensure!(before.contains(&none), "{before}");
    }
    gantry(host, "attach vm --group nvme")?;
    says_sum(&mut running, "nvme0n1")?;
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let sum = format!("{} -", FIRST.checksum());
    ensure!(ended.value("sum")? == sum, "{ended}");
    nothing_is_held(host)
}

fn a_reboot_ends_what_was_pending(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf, SECOND.bdf])?;
    let mut running = deaf().append("panic=-1").start(host)?;
    running.until("guest: init")?;
    gantry(host, "attach vm --group nvme --count 2 --id disk --no-wait")?;
    gantry(host, "detach vm disk --no-wait")?;
    gantry(host, "reboot vm")?;
    running.until("guest: init")?;
    until_free(host, "nvme", 1)?;
    // The other one is found like any that is there at boot. It is asked for, and the guest dies.
    says_sum(&mut running, "nvme0n1")?;
    gantry(host, "detach vm disk-1 --no-wait")?;
    running.types("echo c >/proc/sysrq-trigger")?;
    running.until("guest: init")?;
    until_free(host, "nvme", 2)?;
    ensure!(devices(host)?.is_empty());
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let sum = format!("{} -", SECOND.checksum());
    ensure!(ended.value("sum")? == sum, "{ended}");
    nothing_is_held(host)
}

fn a_reboot_stops_a_device_that_is_leaving(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = deaf().devices("nvme", 1).start(host)?;
    running.until("guest: init")?;
    // It writes to the guest's memory all the time.
    running.types("until [ -b /dev/nvme0n1 ]; do sleep 0.1; done; (while dd if=/dev/nvme0n1 of=/dev/null bs=1M iflag=direct 2>/dev/null; do :; done) & echo guest: busy")?;
    running.until("\nguest: busy")?;
    gantry(host, &format!("detach vm {} --no-wait", FIRST.bdf))?;
    gantry(host, "reboot vm")?;
    running.until("guest: init")?;
    until_free(host, "nvme", 1)?;
    ensure!(devices(host)?.is_empty());
    running.types("echo guest: disks=$(ls /dev/nvme* 2>/dev/null | wc -l); poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    ensure!(ended.number("disks")? == 0, "{ended}");
    nothing_is_held(host)
}

fn what_was_taken_by_force_can_come_again(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut vm = vm();
    vm.file["hotplug"]["slots"] = json!(1);
    let mut running = vm.start(host)?;
    running.until("guest: init")?;
    for round in 0..3 {
        // The slot is the same, and so would the driver be if the guest had kept it.
        gantry(host, "attach vm --group nvme")?;
        running.types("until [ -b /dev/nvme?n1 ]; do sleep 0.1; done; echo guest: sum=$(dd if=$(echo /dev/nvme?n1) bs=1M iflag=direct 2>/dev/null | sha256sum)")?;
        running.until("\nguest: sum=")?;
        gantry(host, &format!("detach vm {} --force-after 0", FIRST.bdf))?;
        ensure!(free(host, "nvme")? == 1, "round {round}");
        running.types("until [ ! -e /sys/bus/pci/devices/0000:01:00.0 ]; do sleep 0.1; done; echo guest: gone")?;
        running.until("\nguest: gone")?;
    }
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let sums: Vec<&str> = ended.values("sum").collect();
    let expected = format!("{} -", FIRST.checksum());
    ensure!(sums == [&*expected; 3], "{sums:?}: {ended}");
    nothing_is_held(host)
}

fn one_that_is_in_no_group_comes_if_the_file_says_so(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    host.write("/etc/gantry/groups.json", json!({"groups": []}).to_string())?;
    let mut vm = Vm::new("shell");
    for (says, hotplug) in [
        (false, json!({"slots": 1})),
        (true, json!({"slots": 1, "ungrouped": true})),
    ] {
        vm.file["hotplug"] = hotplug;
        let mut running = vm.start(host)?;
        running.until("guest: init")?;
        let attach = format!("gantry vm attach vm --device {}", FIRST.bdf);
        let output = host.sh(&attach).output()?;
        match says {
            false => {
                let output = output.exits(1)?;
                ensure!(output.errors().contains("\"ungrouped\": true"), "{output}");
            }
            true => {
                output.success()?;
                let list = devices(host)?;
                ensure!(list.len() == 1, "{list:?}");
            }
        }
        running.types("poweroff -f")?;
        let ended = running.end()?.exits(0)?;
        // That nothing can be attached at all is said at the start.
        let warned = ended.errors.contains("hotplug.groups");
        ensure!(warned != says, "{ended}");
    }
    nothing_is_held(host)
}

fn nothing_of_it_is_outside_the_filters(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf, SECOND.bdf])?;
    let mut vm = vm().devices("nvme", 1);
    vm.file["hotplug"]["groups"] = json!(["nvme"]);
    vm.flags = "--seccomp log";
    let mut running = vm.start(host)?;
    running.until("guest: init")?;
    gantry(host, "attach vm --group nvme")?;
    gantry(host, "pause vm")?;
    gantry(host, "resume vm")?;
    gantry(host, "metrics vm")?;
    gantry(host, &format!("detach vm {}", FIRST.bdf))?;
    gantry(host, &format!("detach vm {}", SECOND.bdf))?;
    gantry(host, "attach vm --group nvme")?;
    gantry(host, "reboot vm")?;
    running.until("guest: init")?;
    gantry(host, "shutdown vm")?;
    running.end()?.powered_off()?;
    let log = host.sh("dmesg | sed '1,/case nothing_of_it/d' | grep type=1326 || true");
    let log = log.output()?.success()?;
    ensure!(log.text().is_empty(), "{log}");
    nothing_is_held(host)
}
