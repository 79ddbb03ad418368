//! Cases about errors that a device reports while a guest has it, which QEMU's monitor injects.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use serde_json::json;

use crate::pool::{Pool, VIRTIO_CARD, free, nothing_is_held};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

/// For a host with a virtio network card.
pub const CASES: &[Case] = cases![
    an_error_of_a_device_is_told_of_and_counted,
    an_error_ends_the_vm_or_the_device_where_its_entry_says_so,
];

/// Has the network card report an error (PCI Express base specification, 6.2), as QEMU calls it.
fn inject(host: &Host, error: &str) -> Result<()> {
    let line = format!("pcie_aer_inject_error dev3 {error}");
    let said = host.monitor("human-monitor-command", json!({"command-line": line}))?;
    // What goes wrong it says as well.
    ensure!(said.to_string().contains("OK id: dev3"), "{said}");
    Ok(())
}

fn an_error_of_a_device_is_told_of_and_counted(host: &Host) -> Result<()> {
    let pool = Pool::of(host, &[VIRTIO_CARD])?;
    let mut running = Vm::new("shell").devices("nic", 1).start(host)?;
    running.types("ip link set eth0 up; echo guest: up=$?")?;
    running.until("guest: up=0")?;
    let mut events = Running::of(host.sh("gantry vm events vm --json").start()?);
    events.until("\"Running\"")?;
    // One that the device survives, and one after which the host's kernel resets the link.
    for (count, error) in [(1, "COMP_ABORT"), (2, "MALF_TLP")] {
        inject(host, error)?;
        events.until("\"device-error\"")?;
        events.until(VIRTIO_CARD)?;
        events.until("cannot be corrected")?;
        let metrics = host.sh("gantry vm metrics vm").output()?.success()?;
        let counted = |line: &str| {
            line.starts_with("gantry_device_errors_total{")
                && line.contains(VIRTIO_CARD)
                && line.ends_with(&format!(" {count}"))
        };
        ensure!(metrics.text().lines().any(counted), "{error}: {metrics}");
        running.types(&format!("echo guest: lives=after-{count}"))?;
        running.until(&format!("\nguest: lives=after-{count}"))?;
    }
    running.types("poweroff -f")?;
    let ended = running.end()?.exits(0)?;
    ensure!(
        ended.errors.matches("cannot be corrected").count() == 2,
        "{ended}"
    );
    events.end()?.exits(0)?;
    drop(pool);
    // It works in the host's hands.
    let up = format!(
        "modprobe virtio_net; card=$(ls /sys/bus/pci/devices/{VIRTIO_CARD}/virtio*/net) &&
         ip link set $card up && cat /sys/class/net/$card/carrier && ip link set $card down"
    );
    host.sh(&up).output()?.success()?;
    nothing_is_held(host)
}

fn an_error_ends_the_vm_or_the_device_where_its_entry_says_so(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[VIRTIO_CARD])?;
    let start = |then: &str| {
        let mut vm = Vm::new("shell").devices("nic", 1);
        vm.file["devices"][0]["on_error"] = json!(then);
        vm.file["hotplug"] = json!({"slots": 2});
        vm.start(host)
    };
    let mut running = start("stop")?;
    running.until("guest: init")?;
    inject(host, "COMP_ABORT")?;
    let ended = running.end()?.exits(1)?;
    for words in [VIRTIO_CARD, "cannot be corrected", "\"on_error\": \"stop\""] {
        ensure!(ended.errors.contains(words), "{ended}");
    }
    let mut running = start("unplug")?;
    running.until("guest: init")?;
    let mut events = Running::of(host.sh("gantry vm events vm").start()?);
    events.until("the VM is running")?;
    inject(host, "COMP_ABORT")?;
    events.until("cannot be corrected")?;
    events.until("the guest is asked to release it")?;
    events.until("the guest has released it")?;
    ensure!(free(host, "nic")? == 1, "it is not free");
    running.types("echo guest: lives=$((1 + 1))")?;
    running.until("guest: lives=2")?;
    running.types("poweroff -f")?;
    running.end()?.exits(0)?;
    events.end()?.exits(0)?;
    nothing_is_held(host)
}
