//! Cases about what only the lab kernel has: iommufd, VFIO cdevs, virtual functions, mdev.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;

use crate::runner::{Case, cases};

pub const CASES: &[Case] = cases![
    iommufd_and_cdevs_are_there,
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
