//! Cases about what makes devices go to vfio-pci at boot: modprobe and udev obey what `gantry device persist`
//! writes, and `gantry boot` does what a boot's unit runs.

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::Host;
use serde_json::json;

use crate::pool::{FIRST, SECOND, VIRTIO_CARD, device, free};
use crate::runner::{Case, cases};
use crate::vm::Vm;

/// For a host kernel with vfio-pci as a module.
pub const CASES: &[Case] = cases![
    options_for_modprobe_bind_by_ids,
    a_boot_binds_the_groups_that_say_so,
];

/// For a host with VMware's network cards and udev.
pub const UDEV: &[Case] = cases![
    a_driver_waits_for_vfio_pci,
    udev_gives_vfio_pci_what_the_rules_name,
];

fn sh(host: &Host, script: &str) -> Result<String> {
    Ok(host.sh(script).output()?.success()?.text())
}

fn driver(host: &Host, bdf: &str) -> Result<String> {
    Ok(device(host, bdf)?["driver"]
        .as_str()
        .unwrap_or("none")
        .to_owned())
}

/// Does `during` with vfio-pci not loaded, and loads it again without options.
fn without_vfio_pci(host: &Host, during: impl FnOnce() -> Result<()>) -> Result<()> {
    sh(host, "rmmod vfio_pci && [ ! -e /sys/module/vfio_pci ]")?;
    let result = during();
    sh(
        host,
        "rm -rf /etc/modprobe.d; rmmod vfio_pci; modprobe vfio_pci",
    )?;
    result
}

/// The disk without its driver, as it is before that is loaded; given back at the end.
fn options_for_modprobe_bind_by_ids(host: &Host) -> Result<()> {
    let bdf = FIRST.bdf;
    without_vfio_pci(host, || {
        let written = host
            .sh(&format!(
                "mkdir -p /etc/modprobe.d && gantry device persist {bdf} --by modprobe \
                 --output /etc/modprobe.d/gantry.conf"
            ))
            .output()?
            .success()?;
        let goes_along = format!("{} has the same ids and is bound too", SECOND.bdf);
        ensure!(written.errors().contains(&goes_along), "{written}");
        let too_early = "nvme is built into the kernel";
        ensure!(written.errors().contains(too_early), "{written}");
        sh(
            host,
            &format!("echo {bdf} >/sys/bus/pci/drivers/nvme/unbind && modprobe vfio_pci"),
        )?;
        let bound = driver(host, bdf);
        let back = format!(
            "rm /etc/modprobe.d/gantry.conf
             echo {bdf} >/sys/bus/pci/drivers/vfio-pci/unbind; echo {bdf} >/sys/bus/pci/drivers/nvme/bind"
        );
        sh(host, &back)?;
        ensure!(bound? == "vfio-pci", "the options bind nothing");
        Ok(())
    })
}

/// VMware's network cards. Their driver is a module, which nothing loads before udev does.
const CARDS: [&str; 3] = ["0000:01:00.0", "0000:02:00.0", "0000:03:00.0"];
/// That driver, and its module.
const CARDS_DRIVER: &str = "vmxnet3";

/// Does `during` with neither vfio-pci nor the cards' driver loaded, as a boot finds it, and leaves it so
/// that the cards are with their driver.
fn at_boot(host: &Host, during: impl FnOnce() -> Result<()>) -> Result<()> {
    sh(
        host,
        "rmmod vmxnet3; rmmod vfio_pci && [ ! -e /sys/module/vfio_pci ]",
    )?;
    let result = during();
    let mut clear = "rm -rf /etc/modprobe.d /etc/udev".to_owned();
    for bdf in CARDS {
        clear += &format!(
            "; cd /sys/bus/pci/devices/{bdf}; echo >driver_override
             [ -e /sys/bus/pci/drivers/vfio-pci/{bdf} ] && echo {bdf} >driver/unbind"
        );
    }
    clear += "; rmmod vfio_pci vmxnet3; modprobe vfio_pci && modprobe vmxnet3";
    sh(host, &clear)?;
    result
}

fn drivers(host: &Host) -> Result<[String; 3]> {
    let [first, second, third] = CARDS.map(|bdf| driver(host, bdf));
    Ok([first?, second?, third?])
}

fn a_driver_waits_for_vfio_pci(host: &Host) -> Result<()> {
    // Asked for while the driver has the card, and while vfio-pci has it already.
    for before in ["true", "gantry device detach 02:00.0"] {
        sh(host, "modprobe vmxnet3")?;
        sh(host, before)?;
        let persist = "mkdir -p /tmp/made; cd /tmp/made &&
             gantry device persist 02:00.0 --by modprobe --output gantry.conf 2>&1 && cat gantry.conf";
        let written = sh(host, persist)?;
        ensure!(
            written.contains("softdep vmxnet3 pre: vfio-pci"),
            "{before}: {written}"
        );
        ensure!(
            written.contains("0000:01:00.0 has the same ids and is bound too"),
            "{written}"
        );
        sh(host, "gantry device reattach 02:00.0")?;
        at_boot(host, || {
            // Busybox's shell would take its own, which knows of no softdep.
            let load = format!(
                "mkdir -p /etc/modprobe.d && mv /tmp/made/gantry.conf /etc/modprobe.d && /bin/modprobe {CARDS_DRIVER}"
            );
            sh(host, &load)?;
            let got = drivers(host)?;
            ensure!(got == ["vfio-pci"; 3], "{got:?} with\n{written}");
            Ok(())
        })?;
    }
    Ok(())
}

/// What a boot does: udev is started, with these flags, and the kernel tells it of every device.
fn udev_runs(host: &Host, flags: &str) -> Result<()> {
    let boot = format!(
        "/lib/systemd/systemd-udevd --daemon {flags} && udevadm trigger --action=add && udevadm settle
         status=$?; udevadm control --exit; exit $status"
    );
    sh(host, &boot)?;
    Ok(())
}

fn udev_gives_vfio_pci_what_the_rules_name(host: &Host) -> Result<()> {
    at_boot(host, || {
        let rules = "/etc/udev/rules.d/10-gantry.rules";
        sh(
            host,
            &format!(
                "mkdir -p /etc/udev/rules.d && gantry device persist 02:00.0 03:00.0 --output {rules}"
            ),
        )?;
        // With one at a time the first card's driver is loaded before the others' turn comes.
        udev_runs(host, "--children-max=1")?;
        let got = drivers(host)?;
        ensure!(
            got == [CARDS_DRIVER, "vfio-pci", "vfio-pci"],
            "{got:?} with\n{}",
            host.read_text(rules)?
        );
        let other = driver(host, VIRTIO_CARD)?;
        ensure!(other == "virtio-pci", "{other} has another device");
        Ok(())
    })
}

/// A boot leaves definitions and what the state directory holds; the run directory is empty.
fn a_boot_binds_the_groups_that_say_so(host: &Host) -> Result<()> {
    let groups = json!({"groups": [
        {"name": "boot", "bind": "boot", "rules": [{"slot": FIRST.bdf}]},
        {"name": "other", "rules": [{"slot": SECOND.bdf}]},
    ]});
    host.write("/etc/gantry/groups.json", groups.to_string())?;
    let hung = json!({"id": "1b36:0010", "reason": "it hung", "until": "boot", "boot": "before"});
    let record = format!("/var/lib/gantry/quarantine/{}.json", FIRST.bdf);
    host.write(&record, hung.to_string())?;
    sh(host, "rm -rf /run/gantry")?;
    let unit = sh(host, "gantry device persist --by systemd")?;
    let start = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="));
    let start = start.with_context(|| format!("no ExecStart: {unit}"))?;
    ensure!(start.ends_with("/gantry boot"), "{start}");
    let result = (|| {
        let said = sh(host, "gantry boot")?;
        ensure!(
            said.contains(&format!("{}: nvme -> vfio-pci", FIRST.bdf)),
            "{said}"
        );
        ensure!(
            free(host, "boot")? == 1 && free(host, "other")? == 0,
            "{said}"
        );
        // Again is no harm.
        sh(host, "gantry boot")?;
        let ended = Vm::new("nvme")
            .devices("boot", 1)
            .run(host)?
            .powered_off()?;
        ensure!(ended.value("nvme0.sha256")? == FIRST.checksum(), "{ended}");
        ensure!(free(host, "boot")? == 1, "a VM's end does not undo a boot");
        Ok(())
    })();
    sh(
        host,
        &format!("rm {record}; gantry device reattach {}", FIRST.bdf),
    )?;
    result
}
