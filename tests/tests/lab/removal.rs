//! Cases about devices that are pulled out of the host while a guest uses them, which QEMU's monitor does.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use serde_json::json;

use crate::pool::{Pool, SECOND, free, nothing_is_held, parsed};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

pub const CASES: &[Case] = cases![a_disk_is_pulled_out_while_a_guest_reads_it];

/// Plugs the second disk in again, once QEMU has let go of it, and waits for the host's driver.
fn plug_in(host: &Host) -> Result<()> {
    let device = json!({
        "driver": "nvme", "id": "dev1", "bus": "port1", "drive": "disk1", "serial": SECOND.serial,
    });
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Err(error) = host.monitor("device_add", device.clone()) {
        ensure!(Instant::now() < deadline, "{error:#}");
        sleep(Duration::from_millis(100));
    }
    wait(
        host,
        &format!("[ -e /sys/bus/pci/drivers/nvme/{} ]", SECOND.bdf),
    )
}

fn wait(host: &Host, until: &str) -> Result<()> {
    let script = format!("until {until}; do sleep 0.1; done");
    let waited = host.sh(&script).within(Duration::from_secs(150));
    waited.output()?.success().map(drop)
}

/// In a VM with slots the guest lets go of it first; in one without it is taken from the guest.
fn a_disk_is_pulled_out_while_a_guest_reads_it(host: &Host) -> Result<()> {
    for (slots, how) in [(4, "released it"), (0, "it was taken from the guest")] {
        let pool = Pool::of(host, &[SECOND.bdf])?;
        let mut vm = Vm::new("shell").devices("nvme", 1);
        if slots > 0 {
            vm.file["hotplug"] = json!({"slots": slots});
        }
        let mut running = vm.start(host)?;
        running.types("until [ -b /dev/nvme0n1 ]; do sleep 0.1; done; echo guest: reads")?;
        running.until("\nguest: reads")?;
        running.types(
            "while dd if=/dev/nvme0n1 of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done; \
             echo guest: lost=$?",
        )?;
        let mut events = Running::of(host.sh("gantry vm events vm").start()?);
        events.until("the VM is running")?;
        host.monitor("device_del", json!({"id": "dev1"}))?;
        events.until("the host wants it back")?;
        events.until(how)?;
        wait(
            host,
            &format!("[ ! -e /sys/bus/pci/devices/{} ]", SECOND.bdf),
        )?;
        running.until("\nguest: lost=0")?;
        // The VM lives, has no device and no lease, and the host has one device less.
        let info = parsed(host, "gantry vm info vm --json")?;
        ensure!(info["devices"] == json!([]), "{info:#}");
        ensure!(free(host, "nvme")? == 0, "it counts as free");
        let list = host.sh("gantry device list").output()?.success()?.text();
        ensure!(!list.contains(SECOND.bdf), "{list}");
        running.types("echo guest: lives=$((1 + 1))")?;
        running.until("guest: lives=2")?;
        running.types("poweroff -f")?;
        running.end()?.exits(0)?;
        events.end()?.exits(0)?;
        nothing_is_held(host)?;
        plug_in(host)?;
        drop(pool);
        // It was not put into quarantine: the next VM gets it.
        let _pool = Pool::of(host, &[SECOND.bdf])?;
        let next = Vm::new("nvme")
            .devices("nvme", 1)
            .run(host)?
            .powered_off()?;
        ensure!(next.value("nvme0.sha256")? == SECOND.checksum(), "{next}");
    }
    nothing_is_held(host)
}
