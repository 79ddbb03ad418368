//! Cases about what only the lab kernel has: iommufd, VFIO cdevs, virtual functions, mdev.

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::Host;
use serde_json::json;

use crate::pool::{FIRST, Pool, SECOND, nothing_is_held};
use crate::runner::{Case, cases};
use crate::vm::Vm;

pub const CASES: &[Case] = cases![
    iommufd_and_cdevs_are_there,
    the_file_chooses_the_back_end,
    a_back_end_is_closed_when_the_last_device_goes,
    network_cards_have_virtual_functions,
    mdev_devices_come_and_go,
    exits_and_entries_can_be_traced,
];

fn iommufd_and_cdevs_are_there(host: &Host) -> Result<()> {
    let output = host
        .sh("cd /sys/bus/pci/devices/0000:00:15.0 &&
             echo vfio-pci >driver_override && echo 0000:00:15.0 >/sys/bus/pci/drivers_probe &&
             ls vfio-dev && test -c /dev/vfio/devices/$(ls vfio-dev) && test -c /dev/iommu
             result=$?
             echo >driver_override; echo 0000:00:15.0 >driver/unbind; exit $result")
        .output()?
        .success()?;
    ensure!(output.text().starts_with("vfio"), "{output}");
    Ok(())
}

/// The nodes of VFIO and iommufd that gantry's processes have open, and the MiB that they have pinned.
fn open_nodes(host: &Host) -> Result<(String, u64)> {
    let script = "
        for process in $(pidof gantry); do ls -l /proc/$process/fd; done |
            sed -n 's/.*-> \\(.dev.*\\)/\\1/p' | grep -e /dev/vfio -e /dev/iommu | sort -u | tr '\\n' ' '
        echo
        for process in $(pidof gantry); do cat /proc/$process/status; done |
            awk '/VmLck|VmPin/ { sum += $2 } END { print int(sum / 1024) }'";
    let told = host.sh(script).output()?.success()?.text();
    let (nodes, pinned) = told.rsplit_once('\n').context("two lines")?;
    Ok((nodes.trim().to_owned(), pinned.trim().parse()?))
}

fn the_file_chooses_the_back_end(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    for (iommufd, expected, not) in [
        (true, "/dev/iommu /dev/vfio/devices/vfio", "/dev/vfio/vfio"),
        (false, "/dev/vfio/vfio", "/dev/iommu"),
    ] {
        let mut vm = Vm::new("shell").devices("nvme", 1);
        vm.file["platform"] = json!({"iommufd": iommufd});
        let mut running = vm.start(host)?;
        running.until("guest: init")?;
        let (nodes, pinned) = open_nodes(host)?;
        let chosen = nodes.contains(expected) && !nodes.contains(not);
        ensure!(chosen, "{iommufd}: {nodes}");
        ensure!((256..300).contains(&pinned), "{pinned} MiB");
        running.types("poweroff -f")?;
        running.end()?.powered_off()?;
        nothing_is_held(host)?;
    }
    Ok(())
}

fn a_back_end_is_closed_when_the_last_device_goes(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf, SECOND.bdf])?;
    let mut vm = Vm::new("shell");
    vm.file["hotplug"] = json!({"slots": 2, "groups": ["nvme"]});
    vm.file["platform"] = json!({"iommufd": true});
    let mut running = vm.start(host)?;
    running.until("guest: init")?;
    let gantry = |words: &str| host.sh(&format!("gantry vm {words}")).output()?.success();
    for round in 0..2 {
        for count in 1..=2 {
            gantry("attach vm --group nvme")?;
            let (nodes, pinned) = open_nodes(host)?;
            let cdevs = nodes.matches("/dev/vfio/devices/").count();
            ensure!(cdevs == count, "round {round}: {nodes}");
            ensure!((256..300).contains(&pinned), "{pinned} MiB");
        }
        for disk in [FIRST, SECOND] {
            gantry(&format!("detach vm {}", disk.bdf))?;
        }
        let left = open_nodes(host)?;
        ensure!(left == (String::new(), 0), "round {round}: {left:?}");
    }
    running.types("poweroff -f")?;
    running.end()?.powered_off()?;
    nothing_is_held(host)
}

fn network_cards_have_virtual_functions(host: &Host) -> Result<()> {
    let output = host
        .sh(
            "cd /sys/bus/pci/devices/0000:03:00.0 && cat sriov_totalvfs &&
             echo 2 >sriov_numvfs &&
             for function in virtfn0 virtfn1; do
                 ls $function/iommu_group/devices | wc -l
             done
             result=$?
             echo 0 >sriov_numvfs; exit $result",
        )
        .output()?
        .success()?;
    ensure!(output.text() == "7\n1\n1", "{output}");
    Ok(())
}

fn mdev_devices_come_and_go(host: &Host) -> Result<()> {
    let id = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    let output = host
        .sh(&format!(
            "modprobe mtty &&
             echo {id} >/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-2/create &&
             ls /sys/bus/mdev/devices && test -e /sys/bus/mdev/devices/{id}/iommu_group &&
             echo 1 >/sys/bus/mdev/devices/{id}/remove && rmmod mtty mdev"
        ))
        .output()?
        .success()?;
    ensure!(output.text() == id, "{output}");
    Ok(())
}

fn exits_and_entries_can_be_traced(host: &Host) -> Result<()> {
    host.sh("ls /sys/kernel/tracing/events/kvm/kvm_entry /sys/kernel/tracing/events/kvm/kvm_userspace_exit")
        .output()?
        .success()?;
    Ok(())
}
