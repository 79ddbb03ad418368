//! Cases about passthrough: what a guest has of a device is what the host had of it.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use gantry_tests::lab::qemu::NIC_ROM;
use gantry_tests::lab::{Host, rom};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::bed::{Case, cases};
use crate::pool::{AUDIO, BIG_BAR, DISPLAY, EDU, FIRST, NIC, Pool, SECOND, device};
use crate::vm::Vm;

/// For every host kernel.
pub const CASES: &[Case] = cases![
    a_disk_is_the_hosts_own,
    reading_a_disk_causes_no_exit_to_user_space,
];

/// For one host kernel.
pub const MORE: &[Case] = cases![
    a_boot_takes_few_exits,
    two_disks_share_one_mapping_of_ram,
    a_network_card_talks_to_its_neighbour,
    a_rom_is_the_devices_a_files_or_none,
    a_bar_of_8_gib_has_its_size,
    a_display_comes_with_its_audio,
    a_display_alone_reserves_its_audio,
    a_device_is_named_by_its_path,
];

fn a_disk_is_the_hosts_own(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = Vm::new("shell").cpus(2).devices("nvme", 1).start(host)?;
    // Each processor reads through a queue of its own.
    running.types("READ='dd if=/dev/nvme0n1 bs=64k iflag=direct'")?;
    running
        .types("for mask in 1 2; do echo guest: sum=$(taskset $mask $READ | sha256sum); done")?;
    running.types("echo guest: disk=$(cd /sys/class/nvme/nvme0; cat model serial)")?;
    running.types("grep nvme0q /proc/interrupts | sed 's/^/guest: irq=/'")?;
    running.types("lspci -vv | grep MSI-X; poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let sum = format!("{} -", FIRST.checksum());
    ensure!(ended.values("sum").eq([&*sum, &*sum]), "{ended}");
    let disk = format!("QEMU NVMe Ctrl {}", FIRST.serial);
    ensure!(ended.value("disk")? == disk, "{ended}");
    // One vector for the admin queue, one for the queue of each processor, each used.
    let vectors: Vec<&str> = ended.values("irq").collect();
    ensure!(vectors.len() == 3, "{ended}");
    for (queue, vector) in vectors.iter().enumerate() {
        let words: Vec<&str> = vector.split_whitespace().collect();
        let name = format!("nvme0q{queue}");
        ensure!(words.last() == Some(&&*name), "{vector}");
        ensure!(vector.contains(&format!(" {queue}-edge")), "{vector}");
        let counts = words.get(1..3).unwrap_or_default();
        let used = counts.iter().any(|count| *count != "0");
        ensure!(used, "not used: {vector}");
    }
    let enabled = "MSI-X: Enable+ Count=65 Masked-";
    ensure!(ended.said.contains(enabled), "{ended}");
    Ok(())
}

fn two_disks_share_one_mapping_of_ram(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf, SECOND.bdf])?;
    let mut running = Vm::new("shell").devices("nvme", 2).start(host)?;
    let sum = |n: u8| {
        format!("echo guest: sum{n}=$(dd if=/dev/nvme{n}n1 bs=1M iflag=direct | sha256sum)")
    };
    running.types(&sum(0))?;
    running.types(&sum(1))?;
    running.types("echo now")?;
    running.until("now\r\n")?;
    // The kernel counts what it pins, as locked in a container and as pinned in iommufd; 256 MiB are the guest's RAM.
    let pinned = host.sh("awk '/VmLck|VmPin/ { sum += $2 } END { print sum }' /proc/$(pidof gantry | tr ' ' '\\n' | sort -n | head -n1)/status");
    let pinned: u64 = pinned.output()?.success()?.text().parse()?;
    ensure!((256 << 10..300 << 10).contains(&pinned), "{pinned} KiB");
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let mut sums = [ended.value("sum0")?, ended.value("sum1")?];
    let mut expected = [FIRST, SECOND].map(|disk| format!("{} -", disk.checksum()));
    sums.sort_unstable();
    expected.sort_unstable();
    ensure!(sums == expected.each_ref().map(String::as_str), "{ended}");
    Ok(())
}

fn reading_a_disk_causes_no_exit_to_user_space(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = Vm::new("shell").devices("nvme", 1).start(host)?;
    count_exits(host, true)?;
    running.types("echo guest: seen")?;
    running.until("guest: seen\r\n")?;
    ensure!(count_exits(host, false)? > 0, "no exits are seen at all");
    // Nobody waits for a time at which it reads: it does so until it is interrupted.
    running.types(
        "echo guest: reads; sh -c 'while :; do dd if=/dev/nvme0n1 of=/dev/null bs=16k count=20 \
         iflag=direct 2>/dev/null; done'",
    )?;
    running.until("guest: reads\r\n")?;
    // Then the terminal, which is no part of what is counted, is quiet.
    until_interrupts(host, 20)?;
    count_exits(host, true)?;
    until_interrupts(host, 400)?;
    let exits = count_exits(host, false)?;
    ensure!(exits == 0, "{exits} exits while 400 blocks were read");
    running.keys("\x03")?;
    running.types("poweroff -f")?;
    running.end()?.powered_off()?;
    Ok(())
}

/// Waits until the host has passed on so many interrupts more from the disk.
fn until_interrupts(host: &Host, more: u64) -> Result<()> {
    let done = interrupts(host)? + more;
    let deadline = Instant::now() + Duration::from_secs(120);
    while interrupts(host)? < done {
        ensure!(Instant::now() < deadline, "the disk is not read");
        sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// More than gantry needs to boot a guest and to power it off, by a tenth. 78 of them are a line of the guest's
/// kernel on its console: that its processor has no SVM.
const EXITS_BARE: u64 = 650;
/// The same for what a disk adds, root port and driver included.
const EXITS_OF_A_DISK: u64 = 760;

/// From the first instruction to power-off: what the guest's kernel asks of its machine does not vary,
/// but for how often it looks at the serial port.
fn a_boot_takes_few_exits(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut counts = Vec::new();
    for vm in [Vm::new("none"), Vm::new("none").devices("nvme", 1)] {
        count_exits(host, true)?;
        vm.run(host)?.powered_off()?;
        counts.push(count_exits(host, false)?);
    }
    let &[bare, with_disk] = counts.as_slice() else {
        bail!("{counts:?}");
    };
    ensure!((100..EXITS_BARE).contains(&bare), "{bare} exits");
    let disk = with_disk.saturating_sub(bare);
    ensure!((100..EXITS_OF_A_DISK).contains(&disk), "{disk} exits more");
    Ok(())
}

/// How many interrupts the host has passed on from the disk.
fn interrupts(host: &Host) -> Result<u64> {
    let script = "awk '/vfio-msix/ { n += $2 + $3 } END { print n + 0 }' /proc/interrupts";
    Ok(host.sh(script).output()?.success()?.text().parse()?)
}

/// Switches the counting of exits to user space; how many there were since it was switched on.
fn count_exits(host: &Host, on: bool) -> Result<u64> {
    let script = format!(
        "cd /sys/kernel/tracing && echo {} >events/kvm/kvm_userspace_exit/enable &&
         {{ grep -c kvm_userspace_exit: trace; echo >trace; }}",
        u8::from(on)
    );
    Ok(host.sh(&script).output()?.success()?.text().parse()?)
}

fn a_network_card_talks_to_its_neighbour(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[NIC])?;
    let neighbour = host
        .sh("ls /sys/bus/pci/devices/0000:04:00.0/net")
        .output()?;
    let neighbour = neighbour.success()?.text();
    host.sh(&format!(
        "ip address add 10.9.0.1/24 dev {neighbour} && ip link set {neighbour} up"
    ))
    .output()?
    .success()?;
    let mut running = Vm::new("shell").cpus(2).devices("nic", 1).start(host)?;
    running.types("ip address add 10.9.0.2/24 dev eth0; ip link set eth0 up")?;
    running
        .types("until ping -c 1 -W 1 10.9.0.1; do :; done; ping -c 5 -i 0.2 -s 1400 10.9.0.1")?;
    running
        .types("for n in $(grep -o 'eth0.*' /proc/interrupts); do echo guest: vector=$n; done")?;
    running.types("poweroff -f")?;
    let ended = running.end();
    host.sh(&format!(
        "ip link set {neighbour} down; ip address flush dev {neighbour}"
    ))
    .output()?
    .success()?;
    let ended = ended?.powered_off()?;
    ensure!(ended.said.contains("5 packets received"), "{ended}");
    // One vector for the link, and one for each pair of queues.
    ensure!(ended.values("vector").count() >= 3, "{ended}");
    Ok(())
}

/// The guest's kernel reads it through the BAR, which it enables for that.
fn a_rom_is_the_devices_a_files_or_none(host: &Host) -> Result<()> {
    const FILE: &str = "/tmp/other.rom";
    let _pool = Pool::of(host, &[NIC])?;
    host.write(FILE, rom::contents("other"))?;
    let own = Some(rom::checksum(NIC_ROM));
    let other = Some(rom::checksum("other"));
    for (key, expected) in [
        (json!(true), own),
        (json!(FILE), other),
        (json!(false), None),
    ] {
        let mut vm = Vm::new("shell").devices("nic", 1);
        vm.file["devices"][0]["rom"] = key;
        let mut running = vm.start(host)?;
        running.types("cd /sys/bus/pci/devices/0000:01:00.0")?;
        running.types("[ -e rom ] && echo 1 >rom && echo guest: rom=$(sha256sum <rom)")?;
        running.types("echo guest: mac=$(cat net/eth0/address); poweroff -f")?;
        let ended = running.end()?.powered_off()?;
        let read = ended.values("rom").next().map(str::to_owned);
        let expected = expected.map(|sum| format!("{sum} -"));
        ensure!(read == expected, "{expected:?}: {ended}");
        ensure!(ended.value("mac")?.contains(':'), "{ended}");
    }
    let mut vm = Vm::new("none").devices("nic", 1);
    vm.file["devices"][0]["rom"] = json!("/lab/vmlinux");
    let refused = vm.run(host)?.exits(1)?;
    ensure!(
        refused.errors.contains("devices[0].rom: /lab/vmlinux"),
        "{refused}"
    );
    ensure!(refused.errors.contains("55 AA"), "{refused}");
    Ok(())
}

fn a_bar_of_8_gib_has_its_size(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[BIG_BAR])?;
    let mut running = Vm::new("shell").lacking("big", 1).start(host)?;
    running.types("lspci -v -s 01:00.0 | sed 's/^.Region/guest: Region/;s/^.Memory/guest: Memory/'; poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let bar = ended.said.lines().find(|line| line.contains("[size=8G]"));
    let bar = bar.with_context(|| format!("it has no such BAR: {ended}"))?;
    ensure!(bar.contains("64-bit, prefetchable"), "{bar}");
    let address = bar
        .split(" at ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    let address = u64::from_str_radix(address.unwrap_or_default(), 16)?;
    ensure!(
        address >= 4 << 30 && address.is_multiple_of(8 << 30),
        "{bar}"
    );
    Ok(())
}

fn a_display_comes_with_its_audio(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[DISPLAY])?;
    let refused = Vm::new("none").devices("display", 1).run(host)?.exits(1)?;
    ensure!(refused.errors.contains(DISPLAY), "{refused}");
    ensure!(
        refused.errors.contains("\"interrupts\": \"none\""),
        "{refused}"
    );
    let two = Vm::new("none").lacking("display", 2).run(host)?.exits(1)?;
    ensure!(
        two.errors
            .contains("group \"display\" has only 1 free device (2 asked for)"),
        "{two}"
    );
    let vm = Vm::new("shell").lacking("display", 1);
    let mut running = vm.start(host)?;
    running.types("lspci -nnk | sed 's/^0/guest: 0/'; poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let has = |words: &str| ended.said.contains(words);
    ensure!(has("[1234:1111]") && has("[8086:2668]"), "{ended}");
    ensure!(has("Kernel driver in use: bochs-drm"), "{ended}");
    Ok(())
}

fn a_display_alone_reserves_its_audio(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[DISPLAY])?;
    let mut running = Vm::new("sleep")
        .named("one")
        .lacking_path(DISPLAY)
        .start(host)?;
    running.until("guest: init")?;
    for member in [DISPLAY, AUDIO] {
        let member = device(host, member)?;
        ensure!(
            member["state"] == "assigned" && member["vm"] == "one",
            "{member:#}"
        );
    }
    let refused = Vm::new("none")
        .named("two")
        .lacking_path(AUDIO)
        .run(host)?
        .exits(75)?;
    ensure!(refused.errors.contains(AUDIO), "{refused}");
    ensure!(refused.errors.contains("\"one\""), "{refused}");
    running.signal(Signal::SIGTERM)?;
    running.end()?.exits(143)?;
    Ok(())
}

fn a_device_is_named_by_its_path(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[EDU])?;
    let mut vm = Vm::new("shell");
    vm.file["devices"] = json!([{"path": format!("/sys/bus/pci/devices/{EDU}")}]);
    let refused = vm.run(host)?.exits(1)?;
    ensure!(refused.errors.contains(EDU), "{refused}");
    ensure!(refused.errors.contains("--allow-ungrouped"), "{refused}");
    vm.flags = "--allow-ungrouped";
    let refused = vm.run(host)?.exits(1)?;
    // It has MSI, which needs no leave.
    ensure!(!refused.errors.contains("MSI"), "{refused}");
    ensure!(
        refused.errors.contains(&format!("{EDU} has no reset")),
        "{refused}"
    );
    vm.file["devices"][0]["allow_no_reset"] = json!(true);
    let mut running = vm.start(host)?;
    running.types("lspci -n | sed 's/^0/guest: 0/'; poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    ensure!(ended.said.contains("1234:11e8"), "{ended}");
    Ok(())
}
