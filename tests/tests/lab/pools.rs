//! Cases about pools: who gets a device, who is told what, and what the host keeps.

use std::time::Duration;

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use gantry_tests::protocol::Exit;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::pool::{Disk, FIRST, NIC, Pool, SECOND, device, free, nothing_is_held, stays};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

/// For every host kernel.
pub const CASES: &[Case] = cases![of_eight_vms_two_get_a_disk, of_fifty_vms_three_get_a_device,];

/// For host kernels that can swap.
pub const SWAP: &[Case] = cases![a_swap_disk_stays_with_the_host];

/// For host kernels with ext4 and network cards.
pub const MORE: &[Case] = cases![
    a_mounted_disk_stays_with_the_host,
    a_disk_below_a_mounted_loop_device_stays_with_the_host,
    a_disk_that_a_program_has_open_stays_with_the_host,
    the_card_of_the_default_route_stays_with_the_host,
    the_card_below_a_bridge_of_the_default_route_stays_with_the_host,
    the_card_in_a_bridge_with_a_tap_stays_with_the_host,
];

/// For a host with a display that the firmware started, in one IOMMU group with its audio.
pub const CONSOLE: &[Case] = cases![the_console_display_and_its_neighbour_stay_with_the_host];

/// Fifty at once, for two disks and a network card. Nobody waits for the guests of those who win.
fn of_fifty_vms_three_get_a_device(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf, SECOND.bdf, NIC])?;
    let group = json!({"name": "any", "rules": [
        {"slot": FIRST.bdf}, {"slot": SECOND.bdf}, {"slot": NIC},
    ]});
    host.write(
        "/etc/gantry/groups.json",
        json!({"groups": [group]}).to_string(),
    )?;
    (0..crate::rounds(1)).try_for_each(|_| fifty_vms_race_for_three_devices(host))
}

fn fifty_vms_race_for_three_devices(host: &Host) -> Result<()> {
    let file = Vm::new("sleep")
        .memory("128M")
        .devices("any", 1)
        .write(host)?;
    // One script starts them all, so that they start together, and waits for those that end.
    let script = format!(
        "rm -rf /tmp/fifty && mkdir /tmp/fifty && cd /tmp/fifty
         for n in $(seq 50); do
             (gantry run --name vm$n {file} </dev/null >$n.out 2>$n.err & echo $! >$n.pid
              wait $!; echo $? >$n.status) &
         done
         for try in $(seq 2000); do
             [ $(cat *.status 2>/dev/null | wc -l) -ge 47 ] && break
             sleep 0.1
         done
         sleep 1
         for n in $(seq 50); do
             [ -e $n.status ] && echo lost $(cat $n.status) $(tr '\\n' ' ' <$n.err) || echo won vm$n
         done"
    );
    let told = host
        .sh(&script)
        .within(Duration::from_secs(300))
        .output()?
        .success()?
        .text();
    let won: Vec<&str> = told
        .lines()
        .filter_map(|line| line.strip_prefix("won "))
        .collect();
    let kill = format!(
        "cd /tmp/fifty; for n in {}; do kill -9 $(cat $n.pid); done
         until [ $(ls *.status | wc -l) = 50 ]; do sleep 0.1; done",
        won.iter()
            .map(|name| name.trim_start_matches("vm"))
            .collect::<Vec<_>>()
            .join(" ")
    );
    let mut holders = Vec::new();
    for bdf in [FIRST.bdf, SECOND.bdf, NIC] {
        holders.push(
            device(host, bdf)?["vm"]
                .as_str()
                .unwrap_or("nobody")
                .to_owned(),
        );
    }
    host.sh(&kill).output()?.success()?;
    holders.sort_by_key(|name| won.iter().position(|winner| winner == name));
    ensure!(
        won.len() == 3 && holders == won,
        "{holders:?} hold, of\n{told}"
    );
    let refused =
        "lost 75 error: No valid host was found: group \"any\" has no free device (1 asked for)";
    let clear = told
        .lines()
        .filter(|line| line.starts_with(refused) && line.contains("held by VM \"vm"));
    ensure!(clear.count() == 47, "{told}");
    nothing_is_held(host)?;
    ensure!(free(host, "any")? == 3, "not all are free again");
    Ok(())
}

/// The display of [`gantry_tests::lab::device::Device::Console`], and its audio.
const CONSOLE_DISPLAY: [&str; 2] = ["0000:00:17.0", "0000:00:17.1"];

fn the_console_display_and_its_neighbour_stay_with_the_host(host: &Host) -> Result<()> {
    let [display, audio] = CONSOLE_DISPLAY;
    let way_out = format!("--override {display}");
    let words = [display, "the firmware started", &way_out];
    stays(host, display, &words)?;
    // Naming the neighbour does not make the console less of one.
    stays(host, audio, &words)?;
    let wrong = ["gantry", "device", "detach", audio, "--override", audio];
    host.command(wrong).output()?.exits(1)?;
    let exact = ["gantry", "device", "detach", audio, "--override", display];
    let moved = host.command(exact).output()?.success()?;
    ensure!(moved.text().contains(display), "{moved}");
    for bdf in CONSOLE_DISPLAY {
        ensure!(
            device(host, bdf)?["driver"] == "vfio-pci",
            "{bdf} was not moved"
        );
    }
    host.command(["gantry", "device", "reattach", display])
        .output()?
        .success()?;
    Ok(())
}

fn of_eight_vms_two_get_a_disk(host: &Host) -> Result<()> {
    let attached = Pool::of(host, &[])?;
    ensure!(free(host, "nvme")? == 0, "nothing is detached yet");
    drop(attached);
    let _pool = Pool::of(host, &[FIRST.bdf, SECOND.bdf])?;
    ensure!(free(host, "nvme")? == 2, "two are detached");
    (0..crate::rounds(1)).try_for_each(|_| eight_vms_race_for_two_disks(host))
}

fn eight_vms_race_for_two_disks(host: &Host) -> Result<()> {
    let vm = Vm::new("sleep").memory("128M").devices("nvme", 1);
    let names: Vec<String> = (0..8).map(|n| format!("vm{n}")).collect();
    let vms = names.iter().map(|name| vm.clone().named(name));
    // Their files are there before the first of them starts.
    let commands: Result<Vec<String>> = vms.map(|vm| vm.command(host)).collect();
    let start = |command: &String| -> Result<Running> {
        Ok(Running::of(host.sh(&format!("exec {command}")).start()?))
    };
    let running: Result<Vec<Running>> = commands?.iter().map(start).collect();
    let mut winners = Vec::new();
    for (name, mut running) in names.iter().zip(running?) {
        if running.says("guest: init")? {
            winners.push((name, running));
        } else {
            let refused = running.end()?.exits(75)?;
            let words = "group \"nvme\" has no free device (1 asked for)";
            ensure!(refused.errors.contains(words), "{refused}");
            ensure!(refused.errors.contains(FIRST.bdf), "{refused}");
            ensure!(refused.errors.contains("held by VM \"vm"), "{refused}");
        }
    }
    ensure!(winners.len() == 2, "{} have a disk", winners.len());
    ensure!(free(host, "nvme")? == 0, "both are assigned");
    let mut holders = Vec::new();
    for disk in [FIRST, SECOND] {
        holders.push(device(host, disk.bdf)?["vm"].clone());
    }
    holders.sort_by_key(ToString::to_string);
    let names: Vec<_> = winners.iter().map(|(name, _)| name.as_str()).collect();
    ensure!(holders == names, "{holders:?}, not {names:?}");
    for (_, winner) in winners {
        winner.signal(Signal::SIGKILL)?;
        let ended = winner.end()?;
        ensure!(ended.exit == Exit::Signal(9), "{ended}");
    }
    nothing_is_held(host)?;
    ensure!(free(host, "nvme")? == 2, "both are free again");
    Ok(())
}

/// Puts a disk to a use that changes its first MiB, and back as it was.
fn in_use(
    host: &Host,
    disk: &str,
    set_up: &str,
    clear: &str,
    case: impl Fn() -> Result<()>,
) -> Result<()> {
    let set_up = format!("dd if={disk} of=/tmp/saved bs=1M iflag=direct && {set_up}",);
    let put_back = format!(
        "{clear}; dd if=/tmp/saved of={disk} bs=1M oflag=direct conv=fsync && rm /tmp/saved"
    );
    host.sh(&set_up).output()?.success()?;
    let result = case();
    host.sh(&put_back).output()?.success()?;
    result
}

fn a_swap_disk_stays_with_the_host(host: &Host) -> Result<()> {
    let disk = block_device(host, &FIRST)?;
    let set_up = format!("mkswap {disk} && swapon {disk}");
    let case = || {
        stays(
            host,
            FIRST.bdf,
            &[FIRST.bdf, "which the host swaps to", "--override"],
        )
    };
    in_use(host, &disk, &set_up, &format!("swapoff {disk}"), case)
}

fn a_mounted_disk_stays_with_the_host(host: &Host) -> Result<()> {
    let disk = block_device(host, &FIRST)?;
    let set_up = format!("mke2fs {disk} && mkdir -p /mnt && mount -t ext4 {disk} /mnt");
    let case = || {
        stays(
            host,
            FIRST.bdf,
            &[FIRST.bdf, "mounted at /mnt", "--override"],
        )
    };
    in_use(host, &disk, &set_up, "umount /mnt", case)
}

fn a_disk_below_a_mounted_loop_device_stays_with_the_host(host: &Host) -> Result<()> {
    let disk = block_device(host, &FIRST)?;
    let set_up = format!(
        "modprobe loop; losetup /dev/loop0 {disk} && mke2fs -q /dev/loop0 4096 && mkdir -p /mnt &&
         mount -t ext4 /dev/loop0 /mnt"
    );
    let case = || stays(host, FIRST.bdf, &["backs loop0", "mounted at /mnt"]);
    let clear = "umount /mnt; losetup -d /dev/loop0";
    in_use(host, &disk, &set_up, clear, case)
}

fn a_disk_that_a_program_has_open_stays_with_the_host(host: &Host) -> Result<()> {
    let disk = block_device(host, &FIRST)?;
    let opens = format!("sleep 600 <{disk} >/dev/null 2>&1 & echo $!");
    let pid = host.sh(&opens).output()?.success()?.text();
    let words = format!("which process {pid} (sleep) has open");
    let result = stays(host, FIRST.bdf, &[&words, "--override"]);
    host.sh(&format!("kill {pid}")).output()?.success()?;
    result
}

/// The block device of a disk. It belongs to the controller, or to a subsystem of several.
fn block_device(host: &Host, disk: &Disk) -> Result<String> {
    let script = format!(
        "for try in $(seq 300); do
             for block in /sys/block/nvme*; do
                 name=/dev/${{block##*/}}
                 grep -q {} $block/device/serial && [ -b $name ] && echo $name && exit
             done
             sleep 0.1
         done
         exit 1",
        disk.serial
    );
    Ok(host.sh(&script).output()?.success()?.text())
}

/// The card's network interface.
fn interface(host: &Host) -> Result<String> {
    let script = format!("ls /sys/bus/pci/devices/{NIC}/net");
    Ok(host.sh(&script).output()?.success()?.text())
}

fn the_card_of_the_default_route_stays_with_the_host(host: &Host) -> Result<()> {
    let name = interface(host)?;
    let set_up = format!("ip address add 10.9.1.1/24 dev {name} && ip link set {name} up");
    host.sh(&set_up).output()?.success()?;
    let addressed = stays(host, NIC, &[NIC, &name, "10.9.1.1", "--override"]);
    let route = "ip route add default via 10.9.1.2";
    host.sh(route).output()?.success()?;
    let routed = stays(host, NIC, &[NIC, &name, "default route", "--override"]);
    let result = addressed.and(routed);
    let clear =
        format!("ip route del default; ip link set {name} down; ip address flush dev {name}");
    host.sh(&clear).output()?.success()?;
    result
}

fn the_card_below_a_bridge_of_the_default_route_stays_with_the_host(host: &Host) -> Result<()> {
    let name = interface(host)?;
    let set_up = format!(
        "/bin/ip link add br9 type bridge && /bin/ip link set {name} master br9 &&
         ip address add 10.9.1.1/24 dev br9 && ip link set {name} up && ip link set br9 up"
    );
    let route = || {
        host.sh("ip route add default via 10.9.1.2")
            .output()?
            .success()
    };
    let result = host
        .sh(&set_up)
        .output()?
        .success()
        .and_then(|_| stays(host, NIC, &[NIC, &name, "part of br9", "10.9.1.1"]))
        .and_then(|()| route())
        .and_then(|_| stays(host, NIC, &[NIC, &name, "default route", "--override"]));
    let clear = format!("ip link set {name} down; /bin/ip link delete br9");
    host.sh(&clear).output()?.success()?;
    result
}

fn the_card_in_a_bridge_with_a_tap_stays_with_the_host(host: &Host) -> Result<()> {
    let name = interface(host)?;
    let set_up = format!(
        "modprobe tun; /bin/ip link add br9 type bridge && /bin/ip link set {name} master br9 &&
         /bin/ip tuntap add tap9 mode tap && /bin/ip link set tap9 master br9"
    );
    let words = format!("is {name}, part of br9; tap9, connected to it, is a tap device");
    let set_up = host.sh(&set_up).output()?.success();
    let result = set_up.and_then(|_| stays(host, NIC, &[&words, "--override"]));
    let clear = "/bin/ip link delete tap9; /bin/ip link delete br9";
    host.sh(clear).output()?.success()?;
    result
}
