//! Cases about resets, and about devices that do not come back.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use serde_json::json;

use crate::pool::{CARD_AUDIO, CARD_DISPLAY, Pool, VIRTIO_CARD, device, free, nothing_is_held};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

/// For a host with a card of two functions on a bus of its own, which have no resets of their own.
pub const CASES: &[Case] = cases![
    a_card_without_resets_of_its_own_is_reset_with_its_bus,
    what_must_not_be_reset_is_not_reset,
    a_device_that_reads_all_ones_is_set_aside_when_it_goes_back,
];

/// The wake register of the audio controller (Intel HDA 1.0a, 3.3.6), which a reset clears: says what is in it, and
/// sets a bit. `$audio` is the controller's directory.
const WAKE: &str = "echo 1 >$audio/enable
    wake=$(($(head -n 1 $audio/resource | cut -d' ' -f1) + 12))
    echo guest: wake=$(devmem $wake 16)
    devmem $wake 16 1
    echo guest: then=$(devmem $wake 16)";

/// A guest with the card at its shell. The file does not allow devices without a reset.
fn start(host: &Host) -> Result<Running> {
    let mut vm = Vm::new("shell").devices("display", 1);
    vm.file["devices"][0]["interrupts"] = json!("none");
    vm.file["hotplug"] = json!({"slots": 2});
    vm.start(host)
}

/// The guest finds the wake register cleared, and sets it.
fn finds_it_clear(running: &mut Running) -> Result<()> {
    let find =
        "for audio in /sys/bus/pci/devices/*; do grep -q 0x2668 $audio/device && break; done";
    let line = format!("{find}\n{WAKE}").replace("\n", "; ");
    running.types(&line)?;
    running.until("guest: wake=0x0000")?;
    running.until("guest: then=0x0001")
}

fn a_card_without_resets_of_its_own_is_reset_with_its_bus(host: &Host) -> Result<()> {
    // As the host's driver leaves it, unlike others it is not reset when VFIO opens it.
    let dirty = format!("audio=/sys/bus/pci/devices/{CARD_AUDIO}; {WAKE}; echo 0 >$audio/enable");
    let said = host.sh(&dirty).output()?.success()?.text();
    ensure!(said.contains("then=0x0001"), "{said}");
    let _pool = Pool::of(host, &[CARD_DISPLAY])?;
    let list = host.sh("gantry device list").output()?.success()?.text();
    for function in ["05:00.0", "05:00.1"] {
        let line = list.lines().find(|line| line.contains(function));
        ensure!(line.is_some_and(|line| line.contains("card")), "{list}");
    }
    let mut running = start(host)?;
    finds_it_clear(&mut running)?;
    // At a reboot, by the VMM; between two VMs, by the kernel when the last function is closed.
    running.types("reboot -f")?;
    running.until("guest: init")?;
    finds_it_clear(&mut running)?;
    let metrics = host.sh("gantry vm metrics vm").output()?.success()?.text();
    // One function stands for the bus each time.
    let resets = metrics.lines().filter_map(|line| {
        let line = line.strip_prefix("gantry_device_resets_total{")?;
        line.rsplit(' ').next()?.parse::<u32>().ok()
    });
    ensure!(resets.sum::<u32>() == 2, "{metrics}");
    running.types("poweroff -f")?;
    running.end()?.powered_off()?;
    let mut running = start(host)?;
    finds_it_clear(&mut running)?;
    running.types("poweroff -f")?;
    running.end()?.powered_off()?;
    nothing_is_held(host)
}

fn what_must_not_be_reset_is_not_reset(host: &Host) -> Result<()> {
    let entry = json!({"vendor": "1af4", "device": "1041", "reason": "it never comes back", "source": "the lab"});
    let list = json!({"devices": [entry]});
    host.write("/etc/gantry/no-reset.json", list.to_string())?;
    let methods = format!("/sys/bus/pci/devices/{VIRTIO_CARD}/reset_method");
    let _default = Undo(host, format!("echo default >{methods}"));
    let _pool = Pool::of(host, &[VIRTIO_CARD])?;
    let left = host.sh(&format!("cat {methods}")).output()?.success()?;
    ensure!(
        left.text().trim().is_empty(),
        "the kernel resets it: {left}"
    );
    let table = host.sh("gantry device list").output()?.success()?.text();
    let line = table.lines().find(|line| line.contains("04:00.0"));
    ensure!(line.is_some_and(|line| line.contains(" never ")), "{table}");
    let mut vm = Vm::new("shell");
    let path = format!("/sys/bus/pci/devices/{VIRTIO_CARD}");
    vm.file["devices"] = json!([{"path": path}]);
    let refused = vm.run(host)?.exits(1)?;
    for words in ["it never comes back (the lab)", "\"allow_no_reset\": true"] {
        ensure!(refused.errors.contains(words), "{refused}");
    }
    vm.file["devices"][0]["allow_no_reset"] = json!(true);
    let mut running = vm.start(host)?;
    running.types("reboot -f")?;
    running.until("guest: init")?;
    running.types("echo guest: lives=$((1 + 1))")?;
    running.until("guest: lives=2")?;
    let metrics = host.sh("gantry vm metrics vm").output()?.success()?.text();
    let mut resets = metrics
        .lines()
        .filter(|line| line.starts_with("gantry_device_resets_total{"));
    ensure!(resets.all(|line| line.ends_with(" 0")), "{metrics}");
    // Somebody else gave it resets again.
    host.sh(&format!("echo default >{methods}"))
        .output()?
        .success()?;
    running.types("poweroff -f")?;
    running.end()?.exits(0)?;
    let refused = vm.run(host)?.exits(1)?;
    let remedy = format!("`echo > {methods}`");
    ensure!(refused.errors.contains(&remedy), "{refused}");
    nothing_is_held(host)
}

/// A script that runs in the end.
struct Undo<'h>(&'h Host, String);

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        // If it fails, the next case sees it.
        let _ = self.0.sh(&self.1).output();
    }
}

/// Moves the bus below the card's root port elsewhere, and back: meanwhile its functions read all-ones.
fn off_the_bus(host: &Host, number: &str) -> Result<()> {
    let script = format!(
        "port=$(readlink -f /sys/bus/pci/devices/{CARD_DISPLAY}/..)
         printf '\\x{number}\\x{number}' | dd of=$port/config bs=1 seek=25 conv=notrunc 2>&1"
    );
    host.sh(&script).output()?.success()?;
    Ok(())
}

fn a_device_that_reads_all_ones_is_set_aside_when_it_goes_back(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[CARD_DISPLAY])?;
    let mut running = start(host)?;
    running.until("guest: init")?;
    let mut events = Running::of(host.sh("gantry vm events vm --json").start()?);
    events.until("\"Running\"")?;
    off_the_bus(host, "fe")?;
    let detach = format!("gantry vm detach vm {CARD_DISPLAY} --force-after 0 --no-wait");
    let detached = host.sh(&detach).output();
    let told = events.until("it reads all-ones");
    off_the_bus(host, "05")?;
    detached?.success()?;
    told?;
    events.until("\"detached\"")?;
    running.types("echo guest: lives=$((1 + 1))")?;
    running.until("guest: lives=2")?;
    running.types("poweroff -f")?;
    running.end()?.exits(0)?;
    events.end()?.exits(0)?;
    let aside = device(host, CARD_DISPLAY)?;
    ensure!(aside["state"] == "quarantined", "{aside:#}");
    ensure!(
        aside["reason"].to_string().contains("all-ones"),
        "{aside:#}"
    );
    ensure!(free(host, "display")? == 0, "it counts as free");
    for bdf in [CARD_DISPLAY, CARD_AUDIO] {
        let release = format!("gantry device release-quarantine {bdf}");
        host.sh(&release).output()?.success()?;
    }
    ensure!(free(host, "display")? == 1, "it is not free");
    nothing_is_held(host)
}
