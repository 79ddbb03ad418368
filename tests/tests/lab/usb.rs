//! Cases about USB devices: what a real kernel says of them, and groups that take them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::Host;
use serde_json::{Value, json};

use crate::pool::{Disk, Pool};
use crate::runner::{Case, cases};
use crate::vm::Vm;

/// For a host with three USB sticks and a keyboard.
pub const CASES: &[Case] = cases![
    a_stick_and_a_keyboard_are_listed,
    a_controller_with_msi_serves_its_stick,
    a_controller_with_intx_only_serves_its_stick,
];

/// The controller with MSI and INTx, and its stick.
const MSI: Disk = Disk {
    bdf: "0000:00:11.0",
    serial: "GANTRY-USB0002",
};
/// The controller with INTx only, and its stick.
const INTX: Disk = Disk {
    bdf: "0000:00:12.0",
    serial: "GANTRY-USB0003",
};

fn list(host: &Host) -> Result<Vec<Value>> {
    let text = host
        .sh("gantry device list --type usb --json")
        .output()?
        .success()?;
    Ok(serde_json::from_str(&text.text())?)
}

fn a_stick_and_a_keyboard_are_listed(host: &Host) -> Result<()> {
    let groups = json!({"groups": [
        {"name": "sticks", "type": "usb", "rules": [{"driver": "usb-storage", "port": {"begins": "2-"}}]},
        {"name": "slow", "type": "usb", "rules": [{"speed": {"less": 481}, "port": {"begins": "1-"}}]},
    ]});
    host.write("/etc/gantry/groups.json", groups.to_string())?;
    let deadline = Instant::now() + Duration::from_secs(90);
    let all = loop {
        let all = list(host)?;
        let ready = all.iter().filter(|device| device["group"].is_string());
        let has = |stick: &Disk| all.iter().any(|one| one["serial"] == stick.serial);
        if ready.count() == 2 && has(&MSI) && has(&INTX) {
            break all;
        }
        ensure!(Instant::now() < deadline, "{all:#?}");
        std::thread::sleep(Duration::from_millis(200));
    };
    let in_group = |name: &str| all.iter().find(|device| device["group"] == name);
    let (Some(stick), Some(keyboard)) = (in_group("sticks"), in_group("slow")) else {
        anyhow::bail!("{all:#?}");
    };
    ensure!(
        stick["serial"] == "GANTRY-USB0001" && stick["speed"] == 5000,
        "{stick:#}"
    );
    ensure!(stick["controller"] == "0000:00:10.0", "{stick:#}");
    ensure!(
        keyboard["product"].to_string().contains("Keyboard"),
        "{keyboard:#}"
    );
    ensure!(keyboard["drivers"] == json!(["usbhid"]), "{keyboard:#}");
    let port = stick["port"].as_str().unwrap_or_default();
    let script = format!(
        "gantry group create own --type usb &&
         gantry group delete sticks && gantry group add own {port} && gantry group show own"
    );
    let own = host.sh(&script).output()?.success()?;
    ensure!(own.text().contains(port), "{own}");
    ensure!(
        all.iter().any(|device| device["hub"] == true),
        "no root hub: {all:#?}"
    );
    let table = host
        .sh("gantry device list --type usb --sort speed")
        .output()?
        .success()?;
    ensure!(table.text().lines().count() == all.len() + 1, "{table}");
    Ok(())
}

fn a_controller_with_msi_serves_its_stick(host: &Host) -> Result<()> {
    let said = serve(host, &MSI, "PCI-MSI-")?;
    ensure!(said.contains("MSI: Enable+"), "{said}");
    Ok(())
}

fn a_controller_with_intx_only_serves_its_stick(host: &Host) -> Result<()> {
    let said = serve(host, &INTX, "IO-APIC")?;
    ensure!(
        said.contains("-fasteoi") && !said.contains("MSI: Enable"),
        "{said}"
    );
    Ok(())
}

/// A guest reads the stick of a controller while the interrupt, which its `chip` delivers, is on each of two
/// processors. Returns what the guest said.
fn serve(host: &Host, controller: &Disk, chip: &str) -> Result<String> {
    let _pool = Pool::of(host, &[controller.bdf])?;
    let mut vm = Vm::new("shell").cpus(2);
    let path = format!("/sys/bus/pci/devices/{}", controller.bdf);
    vm.file["devices"] = json!([{"path": path, "allow_no_reset": true}]);
    vm.flags = "--allow-ungrouped";
    let mut running = vm.start(host)?;
    running.types("for try in $(seq 200); do [ -b /dev/sda ] && break; sleep 0.1; done")?;
    running.types("IRQ=$(grep xhci /proc/interrupts | head -n1 | cut -d: -f1 | tr -d ' ')")?;
    running
        .types("COUNT='grep xhci /proc/interrupts'; READ='dd if=/dev/sda bs=64k iflag=direct'")?;
    running.types(
        "for mask in 1 2; do echo $mask >/proc/irq/$IRQ/smp_affinity; \
         echo guest: before=$($COUNT); echo guest: sum=$($READ | sha256sum); \
         echo guest: after=$($COUNT); done",
    )?;
    running.types("lspci -vv | grep MSI:; poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let sum = format!("{} -", controller.checksum());
    ensure!(ended.values("sum").eq([&*sum, &*sum]), "{ended}");
    for (processor, (before, after)) in ended
        .values("before")
        .zip(ended.values("after"))
        .enumerate()
    {
        ensure!(after.contains(chip), "{after}");
        let count = |line: &str| -> Result<u64> {
            let word = line.split_whitespace().nth(1 + processor);
            Ok(word.context("no such processor")?.parse()?)
        };
        // The first read is also the first use; the second has moved.
        ensure!(count(after)? > count(before)?, "{before}\n{after}");
    }
    Ok(ended.said)
}
