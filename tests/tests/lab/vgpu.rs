//! Cases about mediated devices, for which the kernel's samples stand: made for a VM and removed after it,
//! made ahead, counted.

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::Host;
use gantry_tests::protocol::Exit;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::pool::nothing_is_held;
use crate::runner::{Case, cases};
use crate::tenants::{LIMIT, by, with_user};
use crate::vm::{Running, Vm};

/// For host kernels with the samples.
pub const CASES: &[Case] = cases![
    a_vm_gets_a_new_device_and_it_goes_with_it,
    a_killed_vms_device_goes_too,
    one_with_io_ports_comes_to_a_running_vm,
    devices_made_ahead_stay,
    a_tenant_runs_a_vm_with_a_device_made_ahead,
];

const ONE: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
const TWO: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";

/// The sample driver, and a group of its type; dropping it removes both.
struct Sample<'h> {
    host: &'h Host,
    module: &'static str,
}

impl<'h> Sample<'h> {
    fn new(host: &'h Host, module: &'static str, vgpu: Value) -> Result<Self> {
        let sample = Self { host, module };
        host.sh(&format!("modprobe {module}")).output()?.success()?;
        let groups = json!({"groups": [{"name": "vgpus", "type": "vgpu", "vgpu": vgpu}]});
        host.write("/etc/gantry/groups.json", groups.to_string())?;
        Ok(sample)
    }

    fn devices(&self) -> Result<Vec<Value>> {
        let text = self.host.sh("gantry device mdev --json").output()?;
        let shown: Value = serde_json::from_str(&text.success()?.text())?;
        let devices = shown["devices"].as_array();
        Ok(devices.context("no devices")?.clone())
    }

    /// Waits until there is no device.
    fn until_none(&self) -> Result<()> {
        let script = "for try in $(seq 300); do
                 [ -z \"$(ls /sys/bus/mdev/devices)$(ls /run/gantry/restore/vgpu)\" ] && exit
                 sleep 0.1
             done; exit 1";
        self.host.sh(script).output()?.success()?;
        Ok(())
    }

    /// The same after a VM's end, and until the helper that removes it has ended.
    fn until_over(&self) -> Result<()> {
        self.until_none()?;
        let script = "for try in $(seq 300); do pidof gantry || exit 0; sleep 0.1; done; exit 1";
        self.host.sh(script).output()?.success()?;
        Ok(())
    }
}

impl Drop for Sample<'_> {
    fn drop(&mut self) {
        let script = format!(
            "for device in /sys/bus/mdev/devices/*/remove; do echo 1 >$device; done
             rmmod {} mdev",
            self.module
        );
        let _ = self.host.sh(&script).output();
    }
}

fn a_vm_gets_a_new_device_and_it_goes_with_it(host: &Host) -> Result<()> {
    let sample = Sample::new(host, "mdpy", json!({"type": "mdpy-vga"}))?;
    let refused = Vm::new("none").devices("vgpus", 1).run(host)?.exits(1)?;
    ensure!(refused.errors.contains("has no interrupts"), "{refused}");
    sample.until_over()?;
    let mut running = Vm::new("shell").lacking("vgpus", 1).start(host)?;
    running.until("guest: init")?;
    let devices = sample.devices()?;
    ensure!(
        devices.len() == 1 && devices[0]["state"] == "assigned" && devices[0]["group"] == "vgpus",
        "{devices:#?}"
    );
    running
        .types("cat /sys/bus/pci/devices/*/vendor /sys/bus/pci/devices/*/device; poweroff -f")?;
    let ended = running.end()?.exits(0)?;
    // MDPY_PCI_VENDOR_ID and MDPY_PCI_DEVICE_ID of samples/vfio-mdev/mdpy-defs.h.
    ensure!(
        ended.said.contains("0x1b36") && ended.said.contains("0x000f"),
        "{ended}"
    );
    sample.until_over()?;
    nothing_is_held(host)
}

fn a_killed_vms_device_goes_too(host: &Host) -> Result<()> {
    let sample = Sample::new(host, "mdpy", json!({"type": "mdpy-vga"}))?;
    for with_helper in [false, true] {
        let mut running = Vm::new("sleep").lacking("vgpus", 1).start(host)?;
        running.until("guest: init")?;
        if with_helper {
            host.sh("kill -9 $(pidof gantry)").output()?.success()?;
            running.end()?;
            ensure!(sample.devices()?.len() == 1, "nobody is left who could");
            // The next command that may.
            host.sh("gantry device detach 01:00.0 && gantry device reattach 01:00.0")
                .output()?
                .success()?;
        } else {
            running.signal(Signal::SIGKILL)?;
            ensure!(running.end()?.exit == Exit::Signal(9));
        }
        sample.until_over()?;
    }
    nothing_is_held(host)
}

fn one_with_io_ports_comes_to_a_running_vm(host: &Host) -> Result<()> {
    let sample = Sample::new(host, "mtty", json!({"type": "mtty-2"}))?;
    let mut vm = Vm::new("shell");
    vm.file["hotplug"] = json!({"slots": 32, "groups": ["vgpus"]});
    let mut running = vm.start(host)?;
    running.until("guest: init")?;
    let attach = "gantry vm attach vm --group vgpus --interrupts none --id tty --no-wait";
    host.sh(attach).output()?.success()?;
    // Linux enables no device that has a BAR without an address.
    running.types("until grep -qs 4348 /sys/bus/pci/devices/*/vendor; do sleep 0.1; done; cd $(dirname $(grep -l 4348 /sys/bus/pci/devices/*/vendor)); head -1 resource | sed 's/^/guest: bar=/'; echo 1 >enable && echo guest: enabled=$(cat enable); cd /; echo guest: done")?;
    running.until("\nguest: done")?;
    host.sh("gantry vm detach vm tty").output()?.success()?;
    sample.until_none()?;
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    ensure!(ended.number("enabled")? >= 1, "{ended}");
    let bar = ended.value("bar")?;
    ensure!(!bar.starts_with("0x0000000000000000"), "{ended}");
    nothing_is_held(host)
}

fn devices_made_ahead_stay(host: &Host) -> Result<()> {
    let sample = Sample::new(host, "mdpy", json!({"type": "mdpy-vga", "uuids": [ONE]}))?;
    let dry = host.sh("gantry group activate vgpus --dry-run").output()?;
    let dry = dry.success()?.text();
    let words = "/sys/class/mdev_bus/mdpy/mdev_supported_types/mdpy-vga/create";
    ensure!(dry.contains(words) && sample.devices()?.is_empty(), "{dry}");
    host.sh("gantry group activate vgpus").output()?.success()?;
    let mut running = Vm::new("sleep")
        .named("owner")
        .lacking("vgpus", 1)
        .start(host)?;
    running.until("guest: init")?;
    let second = Vm::new("sleep").lacking("vgpus", 1).run(host)?.exits(1)?;
    ensure!(
        second.errors.contains("No valid host was found"),
        "{second}"
    );
    let refused = host
        .sh("gantry group deactivate vgpus")
        .output()?
        .exits(1)?;
    ensure!(
        refused.errors().contains("is held by VM \"owner\""),
        "{refused}"
    );
    running.signal(Signal::SIGTERM)?;
    running.end()?.exits(128 + Signal::SIGTERM as i32)?;
    ensure!(sample.devices()?.len() == 1, "it is not the VM's");
    let mut killed = Vm::new("sleep").lacking("vgpus", 1).start(host)?;
    killed.until("guest: init")?;
    killed.signal(Signal::SIGKILL)?;
    // At once: the kernel closes the device after it has let go of the lock.
    host.sh("gantry group deactivate vgpus")
        .output()?
        .success()?;
    ensure!(killed.end()?.exit == Exit::Signal(9));
    ensure!(sample.devices()?.is_empty(), "it is gone");
    nothing_is_held(host)
}

/// The user needs no rights but its own; the serial card of the kernel's samples stands for a vGPU.
fn a_tenant_runs_a_vm_with_a_device_made_ahead(host: &Host) -> Result<()> {
    let sample = Sample::new(host, "mtty", json!({"type": "mtty-2", "uuids": [ONE, TWO]}))?;
    let set_up = format!(
        "gantry group activate vgpus && gantry tenant create alice && gantry tenant grant alice {ONE}"
    );
    with_user(host, "alice")?;
    let result = host.sh(&set_up).output()?.success().and_then(|_| {
        let vm = Vm::new("shell").lacking("alice", 1);
        let run = by("alice", LIMIT, &vm.command(host)?);
        let mut running = Running::of(host.sh(&run).start()?);
        running.types(
            "cat /sys/bus/pci/devices/*/vendor /sys/bus/pci/devices/*/device; poweroff -f",
        )?;
        let ended = running.end()?.exits(0)?;
        // The ids of samples/vfio-mdev/mtty.c.
        ensure!(
            ended.said.contains("0x4348") && ended.said.contains("0x3253"),
            "{ended}"
        );
        let refused = host
            .sh("gantry group deactivate vgpus")
            .output()?
            .exits(1)?;
        let words = "belongs to tenant \"alice\"";
        ensure!(refused.errors().contains(words), "{refused}");
        // The other one is the host's.
        let seen = host
            .sh(&by("alice", LIMIT, "gantry device mdev --json"))
            .output()?;
        let seen = seen.success()?.text();
        ensure!(seen.contains(ONE) && !seen.contains(TWO), "{seen}");
        Ok(())
    });
    let clear = "gantry tenant revoke alice --all; gantry tenant delete alice; chmod 600 /dev/kvm
         gantry group deactivate vgpus";
    let cleared = host.sh(clear).output()?.success();
    result?;
    cleared?;
    ensure!(sample.devices()?.is_empty(), "they are gone");
    nothing_is_held(host)
}
