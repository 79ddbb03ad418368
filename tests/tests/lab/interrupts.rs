//! Cases about interrupt modes: what a guest without messages, `pci=nomsi`, has of devices that have messages too.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use serde_json::json;

use crate::pool::{FIRST, Pool, nothing_is_held};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

/// For one host kernel.
pub const CASES: &[Case] = cases![
    a_disk_on_its_pin_comes_hot_and_survives_a_reboot,
    a_driver_switches_between_pin_and_messages,
];

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
