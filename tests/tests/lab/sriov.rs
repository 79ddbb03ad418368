//! Cases about virtual functions: made, set, given to a VM, kept while in use, destroyed.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use gantry_tests::protocol::Exit;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::pool::{NIC, device, nothing_is_held};
use crate::runner::{Case, cases};
use crate::tenants::{LIMIT, by, with_user};
use crate::vm::{Ended, Vm};

/// For host kernels with network cards.
pub const CASES: &[Case] = cases![
    functions_are_made_set_and_given_to_a_vm,
    functions_in_use_stay,
    a_vm_makes_the_functions_it_asks_for,
    one_function_goes_and_the_other_stays,
    what_a_vm_leaves_changed_is_put_back,
    the_address_that_a_guest_gives_itself_is_put_back,
    what_a_tenants_vm_leaves_changed_root_puts_back,
    a_setting_that_the_card_lacks_changes_nothing,
    a_killed_activation_is_healed_by_the_next,
    a_card_and_its_function_go_to_two_vms_with_a_token,
];

const FIRST: &str = "0000:03:10.0";

/// The card's functions; dropping it destroys them and takes the card down.
struct Card<'h> {
    host: &'h Host,
}

impl<'h> Card<'h> {
    /// Defines the group `vfs` of two functions and brings the card up.
    fn new(host: &'h Host, bind: &str, settings: Value) -> Result<Self> {
        let card = Self { host };
        card.group(bind, 2, settings)?;
        host.sh(&format!("ip link set {} up", card.name()?))
            .output()?
            .success()?;
        Ok(card)
    }

    fn group(&self, bind: &str, count: u16, settings: Value) -> Result<()> {
        let mut spec = json!({"pf": NIC, "id": "8086:10c9", "count": count});
        for (key, value) in settings.as_object().into_iter().flatten() {
            spec[key] = value.clone();
        }
        let group = json!({"name": "vfs", "type": "sriov-nic", "bind": bind, "sriov": spec});
        let groups = json!({"groups": [group]});
        self.host
            .write("/etc/gantry/groups.json", groups.to_string())
    }

    /// Name of its network interface.
    fn name(&self) -> Result<String> {
        let script = format!("ls /sys/bus/pci/devices/{NIC}/net");
        Ok(self.host.sh(&script).output()?.success()?.text())
    }

    /// What iproute2 says of its functions; busybox's shell would take its own `ip`.
    fn link(&self) -> Result<String> {
        let script = format!(
            "/bin/ip link show dev {} | grep 'vf ' || true",
            self.name()?
        );
        Ok(self.host.sh(&script).output()?.success()?.text())
    }

    fn command(&self, command: &str) -> Result<String> {
        let done = self.host.sh(&format!("gantry group {command}")).output()?;
        Ok(done.success()?.text())
    }

    /// What a command says that is refused.
    fn refused(&self, command: &str) -> Result<String> {
        let done = self.host.sh(&format!("gantry group {command}")).output()?;
        Ok(done.exits(1)?.errors())
    }

    fn count(&self) -> Result<u64> {
        let count = device(self.host, NIC)?["sriov"]["active"].as_u64();
        Ok(count.unwrap_or_default())
    }
}

impl Drop for Card<'_> {
    fn drop(&mut self) {
        // If it fails, the runner sees the functions.
        let _ = self.host.sh("gantry group deactivate vfs").output();
        if let Ok(name) = self.name() {
            let _ = self.host.sh(&format!("ip link set {name} down")).output();
        }
    }
}

fn functions_are_made_set_and_given_to_a_vm(host: &Host) -> Result<()> {
    let settings = json!({"mac": "52:54:00:00:01:00", "vlan": 100, "qos": 3,
        "spoof_check": false, "trust": true, "max_rate": 50});
    let card = Card::new(host, "manual", settings)?;
    let before = card.link()?;
    let dry = card.command("activate vfs --dry-run")?;
    for line in [
        "vf 1 mac 52:54:00:00:01:01",
        "vf 0 vlan 100 qos 3",
        "vf 0 min_tx_rate 0 max_tx_rate 50",
        "write \"2\" to /sys/bus/pci/devices/0000:03:00.0/sriov_numvfs",
        "write \"vfio-pci\" to /sys/bus/pci/devices/0000:03:10.0/driver_override",
    ] {
        ensure!(dry.contains(line), "no {line:?} in {dry}");
    }
    ensure!(
        card.link()? == before && card.count()? == 0,
        "a dry run changed it"
    );

    // A card takes no rate before its link is up.
    until(
        host,
        &format!("grep -q 1 /sys/class/net/{}/carrier", card.name()?),
    )?;
    card.command("activate vfs")?;
    let link = card.link()?;
    let one = "vf 1     link/ether 52:54:00:00:01:01 brd ff:ff:ff:ff:ff:ff, vlan 100, qos 3, tx rate 50 (Mbps), \
        max_tx_rate 50Mbps, spoof checking off, link-state auto, trust on";
    ensure!(link.contains(one), "{link}");
    let function = device(host, FIRST)?;
    ensure!(
        function["state"] == "detached" && function["group"] == "vfs" && function["physfn"] == NIC,
        "{function:#}"
    );
    let ended = Vm::new("net").devices("vfs", 1).run(host)?.powered_off()?;
    ensure!(ended.value("eth0.driver")? == "igbvf", "{ended}");
    ensure!(card.link()? == link, "the VM changed it: {}", card.link()?);
    ensure!(
        card.command("activate vfs")?.contains("already"),
        "twice is once"
    );
    card.command("deactivate vfs")?;
    ensure!(
        card.count()? == 0 && !card.link()?.contains("vf 0"),
        "they are gone"
    );
    nothing_is_held(host)
}

/// Waits up to half a minute for a condition of the shell.
fn until(host: &Host, condition: &str) -> Result<()> {
    let script = format!("for try in $(seq 300); do {condition} && exit; sleep 0.1; done; exit 1");
    host.sh(&script).output()?.success()?;
    Ok(())
}

fn functions_in_use_stay(host: &Host) -> Result<()> {
    let card = Card::new(host, "manual", json!({}))?;
    card.command("activate vfs")?;
    let mut running = Vm::new("sleep")
        .named("owner")
        .devices("vfs", 1)
        .start(host)?;
    running.until("guest: init")?;
    card.group("manual", 4, json!({}))?;
    for command in ["activate vfs", "deactivate vfs", "deactivate vfs --dry-run"] {
        let said = card.refused(command)?;
        ensure!(
            said.contains("03:10.0: held by VM \"owner\" (pid"),
            "{command}: {said}"
        );
        ensure!(card.count()? == 2, "it resized");
    }
    running.signal(Signal::SIGKILL)?;
    // At once: the kernel closes the device after it has let go of the lock.
    card.command("activate vfs")?;
    let ended = running.end()?;
    ensure!(ended.exit == Exit::Signal(9), "{ended}");
    ensure!(card.count()? == 4, "it is free now");
    // A function of the host that is up is as good as one of a VM.
    let up =
        "gantry device reattach 03:10.2 && ip link set $(ls /sys/bus/pci/devices/0000:03:10.2/net)";
    host.sh(&format!("{up} up")).output()?.success()?;
    let said = card.refused("deactivate vfs")?;
    ensure!(said.contains("03:10.2: the host's eth"), "{said}");
    let down = "ip link set $(ls /sys/bus/pci/devices/0000:03:10.2/net) down";
    host.sh(down).output()?.success()?;
    card.command("deactivate vfs")?;
    ensure!(card.count()? == 0, "they are gone");
    Ok(())
}

fn a_vm_makes_the_functions_it_asks_for(host: &Host) -> Result<()> {
    let card = Card::new(host, "demand", json!({"mac": "52:54:00:00:02:00"}))?;
    let mut running = Vm::new("sleep").devices("vfs", 2).start(host)?;
    running.until("guest: init")?;
    ensure!(card.count()? == 2, "the VM made them");
    ensure!(device(host, FIRST)?["state"] == "assigned", "and has them");
    running.signal(Signal::SIGKILL)?;
    running.end()?;
    // The helper that outlives it takes them from vfio-pci.
    until(host, "[ ! -e /sys/bus/pci/devices/0000:03:10.0/driver ]")?;
    ensure!(
        device(host, FIRST)?["state"] == "unbound",
        "it went to a driver that it did not have"
    );
    let again = Vm::new("net").devices("vfs", 1).run(host)?;
    again.powered_off()?;
    card.command("deactivate vfs")?;
    ensure!(card.count()? == 0, "they are gone");
    Ok(())
}

fn one_function_goes_and_the_other_stays(host: &Host) -> Result<()> {
    let card = Card::new(host, "manual", json!({}))?;
    card.command("activate vfs")?;
    let mut vm = Vm::new("shell").devices("vfs", 2);
    vm.file["hotplug"] = json!({"slots": 2});
    let mut running = vm.start(host)?;
    running.until("guest: init")?;
    let gantry = |words: &str| -> Result<String> {
        let done = host.sh(&format!("gantry vm {words}")).output()?;
        Ok(done.success()?.text())
    };
    let said = gantry("detach vm 03:10.0")?;
    ensure!(said == format!("{FIRST} is given back"), "{said}");
    let info = gantry("info vm")?;
    ensure!(
        info.contains("0000:03:10.2") && !info.contains(FIRST),
        "{info}"
    );
    // Neither does one that comes take the other's slot.
    gantry("attach vm --group vfs")?;
    gantry("detach vm 03:10.2")?;
    let info = gantry("info vm")?;
    ensure!(
        info.contains(FIRST) && !info.contains("0000:03:10.2"),
        "{info}"
    );
    running.types("poweroff -f")?;
    running.end()?.powered_off()?;
    card.command("deactivate vfs")?;
    nothing_is_held(host)
}

fn what_a_vm_leaves_changed_is_put_back(host: &Host) -> Result<()> {
    let card = Card::new(host, "manual", json!({"trust": true}))?;
    card.command("activate vfs")?;
    let before = card.link()?;
    // As a trusted guest could.
    let change = format!(
        "/bin/ip link set {} vf 0 mac 02:00:00:00:00:99 vlan 7",
        card.name()?
    );
    for with_helper in [false, true] {
        let mut running = Vm::new("sleep").devices("vfs", 1).start(host)?;
        running.until("guest: init")?;
        host.sh(&change).output()?.success()?;
        ensure!(card.link()?.contains("02:00:00:00:00:99"), "it is changed");
        if with_helper {
            // Then the next VM gets it as it was.
            host.sh("kill -9 $(pidof gantry)").output()?.success()?;
            running.end()?;
            ensure!(card.link()? != before, "nobody is left who could");
            let ended = Vm::new("net").devices("vfs", 1).run(host)?.powered_off()?;
            ensure!(ended.value("eth0.driver")? == "igbvf", "{ended}");
        } else {
            running.signal(Signal::SIGKILL)?;
            running.end()?;
        }
        until(
            host,
            "[ ! -e /run/gantry/restore/vf-settings/0000:03:10.0 ]",
        )?;
        ensure!(card.link()? == before, "{}\nnot\n{before}", card.link()?);
    }
    Ok(())
}

fn the_address_that_a_guest_gives_itself_is_put_back(host: &Host) -> Result<()> {
    let settings = json!({"trust": true, "mac": "52:54:00:00:01:00"});
    let card = Card::new(host, "manual", settings)?;
    card.command("activate vfs")?;
    let before = card.link()?;
    let mut running = Vm::new("shell").devices("vfs", 1).start(host)?;
    running.types(
        "while [ ! -e /sys/class/net/eth0 ]; do sleep 0.1; done; echo guest: mac=$(cat /sys/class/net/eth0/address)",
    )?;
    running.until("guest: mac=52:54:00:00:01:0")?;
    running.types(
        "ip link set eth0 address 02:00:00:00:00:98; ip link set eth0 up; echo guest: set=$?",
    )?;
    running.until("guest: set=0")?;
    let changed = card.link()?;
    ensure!(changed.contains("02:00:00:00:00:98"), "{changed}");
    running.types("poweroff -f")?;
    running.end()?.exits(0)?;
    until(
        host,
        "[ ! -e /run/gantry/restore/vf-settings/0000:03:10.0 ]",
    )?;
    ensure!(card.link()? == before, "{}\nnot\n{before}", card.link()?);
    let ended = Vm::new("net").devices("vfs", 1).run(host)?.powered_off()?;
    let mac = ended.value("eth0.mac")?;
    ensure!(mac.starts_with("52:54:00:00:01:0"), "{ended}");
    Ok(())
}

fn what_a_tenants_vm_leaves_changed_root_puts_back(host: &Host) -> Result<()> {
    let card = Card::new(host, "manual", json!({"trust": true}))?;
    card.command("activate vfs")?;
    let before = card.link()?;
    with_user(host, "alice")?;
    let grant = format!("gantry tenant create alice && gantry tenant grant alice {FIRST}");
    host.sh(&grant).output()?.success()?;
    let change = format!(
        "/bin/ip link set {} vf 0 mac 02:00:00:00:00:99",
        card.name()?
    );
    host.sh(&change).output()?.success()?;
    ensure!(card.link()? != before, "it is changed");
    let run = Vm::new("net").devices("alice", 1).command(host)?;
    let run = format!("{} </dev/null", by("alice", LIMIT, &run));
    let ended = Ended::of(host.sh(&run).output()?).exits(0)?;
    let warned = ended.errors.contains(&format!(
        "{FIRST} has other settings than it was granted with"
    ));
    ensure!(warned && ended.errors.contains("`gantry boot`"), "{ended}");
    ensure!(card.link()? != before, "nobody could put it back");
    host.sh("gantry boot").output()?.success()?;
    ensure!(card.link()? == before, "{}\nnot\n{before}", card.link()?);
    let ended = Ended::of(host.sh(&run).output()?).powered_off()?;
    ensure!(!ended.errors.contains("granted"), "{ended}");
    // Nor does it stay when the device goes back.
    host.sh(&change).output()?.success()?;
    let clear =
        "gantry tenant revoke alice --all && gantry tenant delete alice; chmod 600 /dev/kvm";
    host.sh(clear).output()?.success()?;
    // The host's driver gives it an address of its own.
    let link = card.link()?;
    ensure!(!link.contains("02:00:00:00:00:99"), "{link}");
    nothing_is_held(host)
}

fn a_setting_that_the_card_lacks_changes_nothing(host: &Host) -> Result<()> {
    let card = Card::new(
        host,
        "manual",
        json!({"trust": true, "link_state": "enable"}),
    )?;
    let said = card.refused("activate vfs")?;
    for words in [
        "everything is as it was before",
        "vf 0 state enable",
        "take \"link_state\" out of the group",
    ] {
        ensure!(said.contains(words), "no {words:?} in {said}");
    }
    ensure!(card.count()? == 0, "functions are left");
    Ok(())
}

fn a_killed_activation_is_healed_by_the_next(host: &Host) -> Result<()> {
    let card = Card::new(
        host,
        "manual",
        json!({"mac": "52:54:00:00:03:00", "trust": true}),
    )?;
    let rounds = crate::rounds(6);
    for round in 0..rounds {
        let activation = host.sh("exec gantry group activate vfs").start()?;
        sleep(Duration::from_millis(400 * round / rounds));
        activation.control().signal(Signal::SIGKILL)?;
        host.sh("while pidof gantry; do sleep 0.1; done")
            .output()?
            .success()?;
        card.command("activate vfs")?;
        let probes = format!("cat /sys/bus/pci/devices/{NIC}/sriov_drivers_autoprobe");
        ensure!(
            host.sh(&probes).output()?.success()?.text() == "1",
            "round {round}"
        );
        let link = card.link()?;
        ensure!(
            link.contains("52:54:00:00:03:01") && link.contains("trust on"),
            "{link}"
        );
        ensure!(device(host, FIRST)?["state"] == "detached", "round {round}");
        card.command("deactivate vfs")?;
    }
    nothing_is_held(host)
}

/// The card with vfio-pci, and functions of it; dropping it gives the card back to its driver.
struct Shared<'h> {
    host: &'h Host,
}

impl<'h> Shared<'h> {
    fn new(host: &'h Host) -> Result<Self> {
        let shared = Self { host };
        shared.groups(json!(false))?;
        let script = format!(
            "echo 1 >/sys/module/vfio_pci/parameters/enable_sriov &&
             gantry device detach {NIC} && gantry group activate vfs"
        );
        host.sh(&script).output()?.success()?;
        Ok(shared)
    }

    fn groups(&self, token: Value) -> Result<()> {
        let groups = json!({"groups": [
            {"name": "card", "rules": [{"slot": NIC}]},
            {"name": "vfs", "sriov": {"pf": NIC, "count": 1, "vf_token": token}},
        ]});
        self.host
            .write("/etc/gantry/groups.json", groups.to_string())
    }
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        // If it fails, the runner sees the traces.
        let script = format!(
            "gantry group deactivate vfs; gantry device reattach {NIC}
             echo 0 >/sys/module/vfio_pci/parameters/enable_sriov"
        );
        let _ = self.host.sh(&script).output();
    }
}

fn a_card_and_its_function_go_to_two_vms_with_a_token(host: &Host) -> Result<()> {
    let shared = Shared::new(host)?;
    let function = Vm::new("net").named("function").devices("vfs", 1);
    // Its kernel has no driver that would reset the card under its functions.
    let card = Vm::new("sleep")
        .of_debian()
        .named("card")
        .devices("card", 1);
    let refused = function.run(host)?.exits(1)?;
    let words = "VMs can have one each only with a VF token";
    ensure!(refused.errors.contains(words), "{refused}");
    shared.groups(json!(true))?;
    let refused = function.run(host)?.exits(1)?;
    ensure!(refused.errors.contains("it sets the VF token"), "{refused}");
    let mut running = card.start(host)?;
    running.until("guest: init")?;
    let ended = function.run(host)?.powered_off()?;
    ensure!(ended.value("eth0.driver")? == "igbvf", "{ended}");
    // The kernel itself lets nobody in without the token.
    shared.groups(json!("00000000-1111-2222-3333-444444444444"))?;
    let refused = function.run(host)?.exits(1)?;
    ensure!(refused.errors.contains("Permission denied"), "{refused}");
    running.signal(Signal::SIGTERM)?;
    running.end()?.exits(128 + Signal::SIGTERM as i32)?;
    nothing_is_held(host)
}
