//! Cases about interrupt modes: what a guest without messages, `pci=nomsi`, has of devices that have messages too.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use serde_json::json;

use crate::devices::Neighbour;
use crate::pool::{FIRST, Pool, SECOND, nothing_is_held};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

/// For one host kernel.
pub const CASES: &[Case] = cases![
    a_disk_on_its_pin_comes_hot_and_survives_a_reboot,
    a_driver_switches_between_pin_and_messages,
    two_disks_share_a_line,
];

/// For a lab of `Device::of_each_kind`.
pub const CARDS: &[Case] = cases![a_card_and_edu_share_a_line];

/// A guest that uses no messages, with slots for devices.
fn vm() -> Vm {
    let mut vm = Vm::new("shell").append("pci=nomsi");
    vm.file["hotplug"] = json!({"slots": 32, "groups": ["nvme"]});
    vm
}

fn gantry(host: &Host, words: &str) -> Result<()> {
    let output = host.sh(&format!("gantry vm {words}")).output()?;
    output.success().map(drop)
}

/// Has the guest say its interrupts of disks, and the sum of each disk, which are read at the same time.
fn says_sums(running: &mut Running, disks: &[&str]) -> Result<()> {
    for disk in disks {
        running.types(&format!("until [ -b /dev/{disk} ]; do sleep 0.1; done"))?;
        running.types(&format!(
            "(dd if=/dev/{disk} bs=16k iflag=direct 2>/dev/null | sha256sum >/{disk}) &"
        ))?;
    }
    running.types("wait; for sum in /nvme*; do echo guest: sum=$(cat $sum); done")?;
    running.types("grep nvme /proc/interrupts | sed 's/^/guest: irq=/'; echo guest: all")?;
    running.until("\nguest: all")
}

fn a_disk_on_its_pin_comes_hot_and_survives_a_reboot(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = vm().start(host)?;
    running.until("guest: init")?;
    gantry(host, "attach vm --group nvme --id disk")?;
    says_sums(&mut running, &["nvme0n1"])?;
    gantry(host, "reboot vm")?;
    running.until("guest: init")?;
    says_sums(&mut running, &["nvme0n1"])?;
    gantry(host, "detach vm disk")?;
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let sum = format!("{} -", FIRST.checksum());
    ensure!(ended.values("sum").eq([&*sum; 2]), "{ended}");
    ensure!(ended.values("irq").count() == 2, "{ended}");
    ensure!(
        ended.values("irq").all(|irq| irq.contains("-fasteoi")),
        "{ended}"
    );
    nothing_is_held(host)
}

/// The driver enables the function with its pin, then messages, and lets both go, each time that it is bound.
fn a_driver_switches_between_pin_and_messages(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = Vm::new("shell").devices("nvme", 1).start(host)?;
    running.types("DEVICE=/sys/bus/pci/devices/0000:01:00.0; DRIVER=/sys/bus/pci/drivers/nvme")?;
    let read = "until [ -b /dev/nvme0n1 ]; do sleep 0.1; done; \
         echo guest: sum=$(dd if=/dev/nvme0n1 bs=64k iflag=direct 2>/dev/null | sha256sum); \
         grep -m1 nvme /proc/interrupts | sed 's/^/guest: irq=/'; \
         echo 0000:01:00.0 >$DRIVER/unbind; echo guest: enabled=$(cat $DEVICE/enable)";
    for allowed in ["1", "0", "1"] {
        running.types(&format!("echo {allowed} >$DEVICE/msi_bus"))?;
        running.types("[ -e $DEVICE/driver ] || echo 0000:01:00.0 >$DRIVER/bind")?;
        running.types(read)?;
        running.until("\nguest: enabled=")?;
    }
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let sum = format!("{} -", FIRST.checksum());
    ensure!(ended.values("sum").eq([&*sum; 3]), "{ended}");
    let on_pin: Vec<bool> = ended
        .values("irq")
        .map(|irq| irq.contains("-fasteoi"))
        .collect();
    ensure!(on_pin == [false, true, false], "{ended}");
    nothing_is_held(host)
}

/// Ports side by side are functions of one device of the root bus, which has one line for its INTA#.
fn two_disks_share_a_line(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf, SECOND.bdf])?;
    let mut running = vm().start(host)?;
    running.until("guest: init")?;
    gantry(host, "attach vm --group nvme --id one")?;
    gantry(host, "attach vm --group nvme --id two")?;
    says_sums(&mut running, &["nvme0n1", "nvme1n1"])?;
    // One goes, and the line stays the other's.
    gantry(host, "detach vm one")?;
    running.types("DISK=$(cd /dev; ls nvme*n1); echo guest: left=$DISK")?;
    running.types(
        "echo guest: last=$(dd if=/dev/$DISK bs=64k iflag=direct 2>/dev/null | sha256sum)",
    )?;
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let mut sums: Vec<&str> = ended.values("sum").collect();
    sums.sort_unstable();
    let [first, second] = [FIRST, SECOND].map(|disk| format!("{} -", disk.checksum()));
    let mut expected = [&*first, &*second];
    expected.sort_unstable();
    ensure!(sums == expected, "{ended}");
    ensure!(expected.contains(&ended.value("last")?), "{ended}");
    let lines: Vec<&str> = ended.values("irq").collect();
    ensure!(
        matches!(*lines, [line] if line.contains("nvme0") && line.contains("nvme1")),
        "not one line: {ended}"
    );
    nothing_is_held(host)
}

/// A card that has nothing but its pin, and `edu`, whose MSI stays off, come hot and keep the line that they share over
/// a reboot. No driver serves `edu`: while its pin is raised, the line's interrupts are counted as the card's.
fn a_card_and_edu_share_a_line(host: &Host) -> Result<()> {
    const CARD: &str = "0000:00:15.0";
    const EDU: &str = "0000:00:19.0";
    let _neighbour = Neighbour::new(host)?;
    let group = |name: &str, slot: &str| json!({"name": name, "rules": [{"slot": slot}]});
    let groups = json!([group("card", CARD), group("edu", EDU)]);
    let _pool = Pool::of_groups(host, &groups, &[CARD, EDU])?;
    let sum = host.sh("sha256sum </tmp/www/data").output()?.success()?;
    let sum = sum.text();
    let nic = format!("drive nic 8086:100e {}", sum.trim_end_matches("  -"));
    let mut vm = Vm::new("shell");
    vm.file["hotplug"] = json!({"slots": 8, "groups": ["card", "edu"]});
    let mut running = vm.start(host)?;
    running.until("guest: init")?;
    gantry(host, "attach vm --group card --allow-no-reset")?;
    gantry(host, "attach vm --group edu --allow-no-reset --no-wait")?;
    for reboots in [true, false] {
        for command in [&nic, "drive pin 1234:11e8", &nic] {
            running.types(command)?;
            let said = running.line("guest: drive=")?;
            ensure!(said == "ok", "{command}: {said}: {running}");
        }
        if reboots {
            gantry(host, "reboot vm")?;
            running.until("guest: init")?;
        }
    }
    running.types("poweroff -f")?;
    // It warns that a reboot resets neither.
    running.end()?.exits(0)?;
    nothing_is_held(host)
}
