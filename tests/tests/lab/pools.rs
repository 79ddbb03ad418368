//! Cases about pools: who gets a device, who is told what, and what the host keeps.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use gantry_tests::protocol::Exit;
use nix::sys::signal::Signal;

use crate::bed::{Case, cases};
use crate::pool::{Disk, FIRST, NIC, Pool, SECOND, device, free, nothing_is_held};
use crate::vm::{Running, Vm};

/// For every host kernel.
pub const CASES: &[Case] = cases![of_eight_vms_two_get_a_disk];

/// For host kernels that can swap.
pub const SWAP: &[Case] = cases![a_swap_disk_stays_with_the_host];

/// For host kernels with ext4 and network cards.
pub const MORE: &[Case] = cases![
    a_mounted_disk_stays_with_the_host,
    the_card_of_the_default_route_stays_with_the_host,
];

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
            let refused = running.end()?.exits(1)?;
            let words = "1 of group \"nvme\" asked for, 0 free";
            ensure!(refused.errors.contains(words), "{refused}");
            ensure!(refused.errors.contains(FIRST.bdf), "{refused}");
            ensure!(refused.errors.contains("held by VM 'vm"), "{refused}");
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

/// Fails unless `gantry device detach` refuses with these words, and the device stays as it is.
fn stays(host: &Host, bdf: &str, words: &[&str]) -> Result<()> {
    let before = device(host, bdf)?;
    let refused = host
        .command(["gantry", "device", "detach", bdf])
        .output()?
        .exits(1)?;
    for word in words {
        ensure!(refused.errors().contains(word), "no {word:?} in {refused}");
    }
    ensure!(refused.errors().lines().count() <= 20, "{refused}");
    ensure!(device(host, bdf)? == before, "it changed");
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

/// The block device of a disk. It belongs to the controller, or to a subsystem of several.
fn block_device(host: &Host, disk: &Disk) -> Result<String> {
    let script = format!(
        "for try in $(seq 100); do
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

fn the_card_of_the_default_route_stays_with_the_host(host: &Host) -> Result<()> {
    let name = host
        .sh(&format!("ls /sys/bus/pci/devices/{NIC}/net"))
        .output()?;
    let name = name.success()?.text();
    let set_up = format!(
        "ip address add 10.9.1.1/24 dev {name} && ip link set {name} up &&
         ip route add default via 10.9.1.2"
    );
    host.sh(&set_up).output()?.success()?;
    let result = stays(host, NIC, &[NIC, &name, "default route", "--override"]);
    let clear =
        format!("ip route del default; ip link set {name} down; ip address flush dev {name}");
    host.sh(&clear).output()?.success()?;
    result
}
