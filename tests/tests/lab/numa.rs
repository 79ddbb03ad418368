//! Cases about VMs and devices on two NUMA nodes, each with a disk and a processor.

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::Host;
use serde_json::json;

use crate::pool::{Disk, nothing_is_held, parsed};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

/// For a host with two nodes.
pub const CASES: &[Case] = cases![
    a_vm_is_where_its_devices_are,
    a_vm_is_where_its_file_says,
    a_place_that_is_not_to_be_had_is_refused,
    later_devices_come_from_the_vms_node,
];

/// The disk on node 0.
const NEAR: Disk = Disk {
    bdf: "0000:21:00.0",
    serial: "GANTRY-NVME0001",
};
/// The disk on node 1.
const FAR: Disk = Disk {
    bdf: "0000:41:00.0",
    serial: "GANTRY-NVME0002",
};

/// Both disks in vfio-pci's hands, in the groups `near` and `far`; dropping it gives them back.
struct Disks<'h>(&'h Host);

impl<'h> Disks<'h> {
    fn new(host: &'h Host) -> Result<Self> {
        let group = |name: &str, bdf: &str| json!({"name": name, "rules": [{"slot": bdf}]});
        let groups = json!({"groups": [group("near", NEAR.bdf), group("far", FAR.bdf)]});
        host.write("/etc/gantry/groups.json", groups.to_string())?;
        let disks = Self(host);
        disks.moved("detach")?;
        Ok(disks)
    }

    fn moved(&self, verb: &str) -> Result<()> {
        let words = ["gantry", "device", verb, NEAR.bdf, FAR.bdf];
        self.0.command(words).output()?.success()?;
        Ok(())
    }
}

impl Drop for Disks<'_> {
    fn drop(&mut self) {
        // If it fails, the runner sees the traces.
        let _ = self.moved("reattach");
    }
}

/// A VM whose guest has started.
fn started(host: &Host, vm: &Vm) -> Result<Running> {
    let mut running = vm.start(host)?;
    running.until("guest: init")?;
    Ok(running)
}

/// Where the VM is: the processors of its first vCPU, the policy of its RAM, and which nodes its pages
/// are on.
fn seat(host: &Host) -> Result<(String, String, Vec<bool>)> {
    let script = "
        # A VM with slots has a helper, which is gantry too.
        vcpu=$(grep -lx vcpu0 /proc/[0-9]*/task/*/comm)
        awk '/Cpus_allowed_list/ { print $2 }' ${vcpu%comm}status
        # The largest mapping is RAM.
        awk '{ n0 = n1 = 0
               for (i = 3; i <= NF; i++) { split($i, f, \"=\")
                   if (f[1] == \"N0\") n0 = f[2]; if (f[1] == \"N1\") n1 = f[2] }
               if (n0 + n1 > most) { most = n0 + n1; best = $2 \" \" n0 \" \" n1 } }
             END { print best }' ${vcpu%comm}numa_maps";
    let text = host.sh(script).output()?.success()?.text();
    let mut words = text.split_whitespace().map(str::to_owned);
    let mut word = || {
        words
            .next()
            .with_context(|| format!("too little in {text:?}"))
    };
    let (cpus, policy) = (word()?, word()?);
    let pages = [word()?, word()?].map(|pages| pages != "0").to_vec();
    Ok((cpus, policy, pages))
}

fn checksum(running: &mut Running, disk: Disk) -> Result<()> {
    running.types("until [ -b /dev/nvme0n1 ]; do sleep 0.1; done; echo guest: sum=$(dd if=/dev/nvme0n1 bs=1M iflag=direct 2>/dev/null | sha256sum)")?;
    running.until(&format!("guest: sum={}", disk.checksum()))
}

fn a_vm_is_where_its_devices_are(host: &Host) -> Result<()> {
    let _disks = Disks::new(host)?;
    let on = |cpus: &str, policy: &str, pages: [bool; 2]| {
        (cpus.to_owned(), policy.to_owned(), pages.to_vec())
    };
    let vm = Vm::new("shell");
    for (group, disk, expected) in [
        ("far", FAR, on("1", "prefer:1", [false, true])),
        ("near", NEAR, on("0", "prefer:0", [true, false])),
    ] {
        let mut running = started(host, &vm.clone().devices(group, 1))?;
        let seat = seat(host)?;
        ensure!(seat == expected, "{group}: {seat:?}");
        let info = host.sh("gantry vm info vm").output()?.success()?.text();
        let line = format!("numa     node {0}, CPUs {0}", expected.0);
        ensure!(info.contains(&line), "{info}");
        checksum(&mut running, disk)?;
        running.types("poweroff -f")?;
        running.end()?.powered_off()?;
    }
    // It has none yet, and its file says where they will come from.
    let mut later = vm.clone();
    later.file["hotplug"] = json!({"slots": 1, "groups": ["far"]});
    let running = started(host, &later)?;
    let (cpus, policy, _) = seat(host)?;
    ensure!(
        (cpus.as_str(), policy.as_str()) == ("1", "prefer:1"),
        "{cpus} {policy}"
    );
    host.sh("gantry vm shutdown vm").output()?.success()?;
    running.end()?.powered_off()?;
    // More vCPUs than the node has processors: only memory is kept there.
    let running = started(host, &vm.clone().cpus(2).devices("far", 1))?;
    let (cpus, policy, _) = seat(host)?;
    ensure!(
        (cpus.as_str(), policy.as_str()) == ("0-1", "prefer:1"),
        "{cpus} {policy}"
    );
    host.sh("gantry vm shutdown vm").output()?.success()?;
    running.end()?.powered_off()?;
    nothing_is_held(host)
}

fn a_vm_is_where_its_file_says(host: &Host) -> Result<()> {
    let _disks = Disks::new(host)?;
    let mut vm = Vm::new("shell").devices("far", 1);
    vm.file["numa_nodes"] = json!([0]);
    let mut running = started(host, &vm)?;
    let at = seat(host)?;
    let expected = ("0".to_owned(), "bind:0".to_owned(), vec![true, false]);
    ensure!(at == expected, "{at:?}");
    checksum(&mut running, FAR)?;
    running.types("poweroff -f")?;
    running.end()?.powered_off()?;
    // One vCPU elsewhere, and memory wherever the kernel likes.
    vm.file["numa_nodes"] = json!([]);
    vm.file["cpus"]["affinity"] = json!([{"vcpu": 0, "host_cpus": [1]}]);
    let running = started(host, &vm)?;
    let (cpus, policy, _) = seat(host)?;
    ensure!(
        (cpus.as_str(), policy.as_str()) == ("1", "default"),
        "{cpus} {policy}"
    );
    let info = parsed(host, "gantry vm info vm --json")?;
    ensure!(info["placement"].is_null(), "{info}");
    ensure!(
        info["config"]["cpus"]["affinity"][0]["host_cpus"] == json!([1]),
        "{info}"
    );
    host.sh("gantry vm shutdown vm").output()?.success()?;
    running.end()?.powered_off()?;
    nothing_is_held(host)
}

fn a_place_that_is_not_to_be_had_is_refused(host: &Host) -> Result<()> {
    let _disks = Disks::new(host)?;
    let refused = |vm: &Vm, under: &str, words: &[&str]| -> Result<()> {
        let command = format!("{under} {}", vm.command(host)?);
        let said = host.sh(&command).output()?;
        ensure!(said.exit != gantry_tests::protocol::Exit::Code(0), "{said}");
        let text = said.errors();
        for word in words {
            ensure!(text.contains(word), "no {word:?} in {text}");
        }
        nothing_is_held(host)
    };
    let mut vm = Vm::new("none").devices("near", 1);
    vm.file["numa_nodes"] = json!([0, 7]);
    refused(&vm, "", &["this host has no NUMA node 7, only 0-1"])?;
    vm.file["numa_nodes"] = json!([1]);
    refused(
        &vm,
        "taskset 1",
        &["may use no CPU of NUMA node 1", "only CPUs 0"],
    )?;
    vm.file["devices"][0]["numa_policy"] = json!("required");
    refused(&vm, "", &["No valid host was found"])?;
    vm.file["numa_nodes"] = json!([]);
    vm.file["cpus"]["affinity"] = json!([{"vcpu": 0, "host_cpus": [2]}]);
    refused(
        &vm,
        "",
        &["vCPU 0 is pinned to CPU 2", "may use only CPUs 0-1"],
    )
}

fn later_devices_come_from_the_vms_node(host: &Host) -> Result<()> {
    let _disks = Disks::new(host)?;
    let both = json!({"groups": [{"name": "both", "rules": [{"class": "0108"}]}]});
    host.write("/etc/gantry/groups.json", both.to_string())?;
    let mut vm = Vm::new("shell");
    vm.file["numa_nodes"] = json!([1]);
    vm.file["hotplug"] = json!({"slots": 2, "groups": ["both"]});
    let mut running = started(host, &vm)?;
    let attach = "gantry vm attach vm --group both";
    let said = host.sh(attach).output()?.success()?.text();
    ensure!(said.contains(FAR.bdf), "{said}");
    let said = host
        .sh(&format!("{attach} --numa-policy required"))
        .output()?;
    ensure!(said.errors().contains("No valid host was found"), "{said}");
    // What is left will do where nothing is said.
    let said = host.sh(attach).output()?.success()?.text();
    ensure!(said.contains(NEAR.bdf), "{said}");
    running.types("poweroff -f")?;
    running.end()?.powered_off()?;
    nothing_is_held(host)
}
