//! Cases about passthrough: what a guest has of a device is what the host had of it.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use gantry_tests::lab::device::NIC_ROM;
use gantry_tests::lab::{Host, rom};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::pool::{AUDIO, BIG_BAR, DISPLAY, EDU, FIRST, NIC, Pool, SECOND, device};
use crate::runner::{Case, cases};
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
    a_device_that_comes_later_has_the_rom_that_the_file_names,
    a_bar_of_8_gib_has_its_size,
    a_disk_works_after_d3hot,
    a_bar_over_other_things_is_not_mapped,
    a_display_comes_with_its_audio,
    a_display_alone_reserves_its_audio,
    a_device_is_named_by_its_path,
];

/// For a lab with [`HUGE_BAR`].
pub const HUGE: &[Case] = cases![a_bar_of_64_gib_is_read_while_memory_is_enabled];

/// The device with a BAR of 64 GiB.
const HUGE_BAR: &str = "0000:00:13.0";

/// Of the guest's first device: its registers, a function that writes one byte of them, and the address of its
/// first memory BAR.
const REGISTERS: &str = "D=/sys/bus/pci/devices/0000:01:00.0; C=$D/config; \
    put() { printf \"$2\" | dd of=$C bs=1 seek=$1 conv=notrunc 2>/dev/null; }; \
    B=0x$(lspci -v -s 01:00.0 2>/dev/null | sed -n 's/.*Memory at \\([0-9a-f]*\\).*/\\1/p' | head -n 1)";

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

/// Neither by messages nor by the pin, which a guest without messages uses.
fn reading_a_disk_causes_no_exit_to_user_space(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    for (words, kind) in [("", "vfio-msix"), ("pci=nomsi", "vfio-intx")] {
        let vm = Vm::new("shell").append(words).devices("nvme", 1);
        let mut running = vm.start(host)?;
        count_exits(host, true)?;
        running.types("echo guest: seen")?;
        running.until("guest: seen\r\n")?;
        ensure!(count_exits(host, false)? > 0, "no exits are seen at all");
        // Nobody waits for a time at which it reads: it does so until it is interrupted.
        running.types(
            "echo guest: reads; sh -c 'while :; do dd if=/dev/nvme0n1 of=/dev/null bs=16k \
             count=20 iflag=direct 2>/dev/null; done'",
        )?;
        running.until("guest: reads\r\n")?;
        // Then the terminal, which is no part of what is counted, is quiet.
        until_interrupts(host, kind, 20)?;
        count_exits(host, true)?;
        until_interrupts(host, kind, 400)?;
        let exits = count_exits(host, false)?;
        ensure!(
            exits == 0,
            "{kind}: {exits} exits while 400 blocks were read"
        );
        running.keys("\x03")?;
        running.types("poweroff -f")?;
        running.end()?.powered_off()?;
    }
    Ok(())
}

/// Waits until the host has passed on so many interrupts more of this kind from the disk.
fn until_interrupts(host: &Host, kind: &str, more: u64) -> Result<()> {
    let done = interrupts(host, kind)? + more;
    let deadline = Instant::now() + Duration::from_secs(120);
    while interrupts(host, kind)? < done {
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

/// How many interrupts of a kind the host has passed on from the disk.
fn interrupts(host: &Host, kind: &str) -> Result<u64> {
    let script =
        format!("awk '/{kind}/ {{ n += $2 + $3 }} END {{ print n + 0 }}' /proc/interrupts");
    Ok(host.sh(&script).output()?.success()?.text().parse()?)
}

/// Switches the counting of exits to user space; how many there were since it was switched on.
pub fn count_exits(host: &Host, on: bool) -> Result<u64> {
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

fn a_device_that_comes_later_has_the_rom_that_the_file_names(host: &Host) -> Result<()> {
    const FILE: &str = "/tmp/other.rom";
    let _pool = Pool::of(host, &[NIC])?;
    host.write(FILE, rom::contents("other"))?;
    let mut vm = Vm::new("shell");
    vm.file["hotplug"] = json!({"slots": 1, "groups": ["nic"], "roms": [FILE]});
    let mut running = vm.start(host)?;
    running.until("guest: init")?;
    let attach = |file: &str| {
        let command = format!("gantry vm attach vm --group nic --rom {file}");
        host.sh(&command).output()
    };
    let refused = attach("/lab/vmlinux")?.exits(1)?;
    ensure!(refused.errors().contains("`hotplug.roms`"), "{refused}");
    attach(FILE)?.success()?;
    running.types("R=$(ls -d /sys/bus/pci/devices/*/rom); echo 1 >$R")?;
    running.types("echo guest: rom=$(sha256sum <$R); poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let expected = format!("{} -", rom::checksum("other"));
    ensure!(ended.value("rom")? == expected, "{ended}");
    Ok(())
}

fn a_disk_works_after_d3hot(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = Vm::new("shell").devices("nvme", 1).start(host)?;
    running.types(REGISTERS)?;
    running.types(
        "P=$((0x$(lspci -vv -s 01:00.0 2>/dev/null | sed -n 's/.*\\[\\(..\\)\\] Power.*/\\1/p') + 4))",
    )?;
    running.types("echo 0000:01:00.0 >/sys/bus/pci/drivers/nvme/unbind")?;
    let look = |key: &str| format!("echo guest: {key}=$(devmem $B 32) $(od -An -tx1 -j$P -N1 $C)");
    for (state, key) in [
        ("", "before"),
        ("put $P '\\003'; ", "off"),
        ("put $P '\\000'; ", "after"),
    ] {
        running.types(&format!("{state}{}", look(key)))?;
    }
    running.types("echo 0000:01:00.0 >/sys/bus/pci/drivers/nvme/bind")?;
    running.types("until [ -b /dev/nvme0n1 ]; do sleep 0.1; done")?;
    running.types("echo guest: sum=$(sha256sum </dev/nvme0n1); poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let [before, off, after] = ["before", "off", "after"].map(|key| ended.value(key));
    let (before, off, after) = (before?, off?, after?);
    ensure!(
        off.starts_with("0xFFFFFFFF ") && off.ends_with('b'),
        "D3hot: {ended}"
    );
    ensure!(
        before == after && !before.starts_with("0xFFFFFFFF"),
        "{ended}"
    );
    ensure!(
        ended.value("sum")? == format!("{} -", FIRST.checksum()),
        "{ended}"
    );
    Ok(())
}

/// RAM, the local APIC, configuration space and the BAR of another device stay as they are.
fn a_bar_over_other_things_is_not_mapped(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf, SECOND.bdf])?;
    let mut running = Vm::new("shell").devices("nvme", 2).start(host)?;
    running.types(REGISTERS)?;
    running.types("echo 0000:01:00.0 >/sys/bus/pci/drivers/nvme/unbind; F=/tmp/bar")?;
    running
        .types("O=$(od -An -tx4 -j16 -N4 /sys/bus/pci/devices/0000:02:00.0/config | tr -d ' ')")?;
    running.types(
        "word() { for at in 0 8 16 24; do printf \"\\\\x$(printf %02x $((($1 >> at) & 255)))\"; done >$F; \
         dd if=$F of=$2 bs=4 seek=$3 conv=notrunc 2>/dev/null; }",
    )?;
    // The port forwards all addresses below 4 GiB meanwhile.
    running
        .types("P=$(dirname $(readlink -f $D))/config; W=$(od -An -tx4 -j32 -N4 $P | tr -d ' ')")?;
    running.types("word 0xfff00000 $P 8")?;
    running.types("for over in 0x1000000 0xfee00000 0xe0000000 0x$O; do word $over $C 4; done")?;
    running.types("echo guest: other=$O; word 0x$W $P 8; word $B $C 4")?;
    running.types("echo 0000:01:00.0 >/sys/bus/pci/drivers/nvme/bind")?;
    running.types("until [ -b /dev/nvme0n1 ] && [ -b /dev/nvme1n1 ]; do sleep 0.1; done")?;
    running.types("cat /dev/nvme[01]n1 | wc -c | sed 's/^/guest: read=/'; poweroff -f")?;
    let ended = running.end()?.exits(0)?;
    ensure!(ended.number("read")? == 16 << 20, "{ended}");
    let other = u64::from_str_radix(ended.value("other")?, 16)?;
    let other = format!("base={:#x} ", other & !0xf);
    for base in [
        "base=0x1000000 ",
        "base=0xfee00000 ",
        "base=0xe0000000 ",
        &other,
    ] {
        let refused = |line: &str| line.contains("BAR stays unmapped") && line.contains(base);
        ensure!(ended.errors.lines().any(refused), "{base}: {ended}");
    }
    Ok(())
}

/// The device has no memory behind its BAR: it reads as 0, and where nothing answers as ones.
fn a_bar_of_64_gib_is_read_while_memory_is_enabled(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[HUGE_BAR])?;
    let mut running = Vm::new("shell").lacking("big", 1).start(host)?;
    running.types(REGISTERS)?;
    running.types("B=0x$(lspci -v -s 01:00.0 2>/dev/null | sed -n 's/.*at \\([0-9a-f]*\\).*size=64G.*/\\1/p')")?;
    for (command, key) in [("002", "on"), ("000", "off"), ("002", "again")] {
        running.types(&format!("put 4 '\\{command}'"))?;
        running.types(&format!(
            "echo guest: {key}=$(devmem $((B + (64 << 30) - 4)) 32)"
        ))?;
    }
    running.types("echo guest: bar=$B; poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let bar = u64::from_str_radix(ended.value("bar")?.trim_start_matches("0x"), 16)?;
    ensure!(bar >= 64 << 30 && bar.is_multiple_of(64 << 30), "{ended}");
    for (key, read) in [
        ("on", "0x00000000"),
        ("off", "0xFFFFFFFF"),
        ("again", "0x00000000"),
    ] {
        ensure!(ended.value(key)? == read, "{ended}");
    }
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
        running.types("D=/sys/bus/pci/devices/0000:01:00.0; R=$D/rom")?;
        running.types("[ -e $R ] && echo 1 >$R && echo guest: rom=$(sha256sum <$R)")?;
        running.types("echo guest: mac=$(cat $D/net/eth0/address); poweroff -f")?;
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
