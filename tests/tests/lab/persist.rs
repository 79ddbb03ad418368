//! Cases about what makes devices go to vfio-pci at boot: what `gantry device persist` writes is played
//! back as modprobe and udev do it, and `gantry boot` does what a boot's unit runs.

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::Host;
use serde_json::json;

use crate::bed::{Case, cases};
use crate::pool::{BIG_BAR, EDU, FIRST, SECOND, device, free};
use crate::vm::Vm;

/// For a host kernel with vfio-pci as a module.
pub const CASES: &[Case] = cases![
    options_for_modprobe_bind_by_ids,
    udev_rules_bind_by_address,
    a_boot_binds_the_groups_that_say_so,
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
        let goes_along = format!("{} has the same ids and goes along", SECOND.bdf);
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

/// Two devices whose drivers come later than udev: the second comes when vfio-pci is there already.
fn udev_rules_bind_by_address(host: &Host) -> Result<()> {
    let made = sh(
        host,
        &format!("gantry device persist {EDU} {BIG_BAR} --json"),
    )?;
    let made: serde_json::Value = serde_json::from_str(&made)?;
    let rules = made["text"].as_str().context("no text")?.to_owned();
    without_vfio_pci(host, || {
        let result = [EDU, BIG_BAR].iter().try_for_each(|bdf| {
            device_is_added(host, &rules, bdf)?;
            ensure!(
                driver(host, bdf)? == "vfio-pci",
                "{bdf} is not bound by\n{rules}"
            );
            Ok(())
        });
        ensure!(
            driver(host, FIRST.bdf)? == "nvme",
            "others are bound as well"
        );
        let back = [EDU, BIG_BAR].map(|bdf| {
            format!("cd /sys/bus/pci/devices/{bdf} && echo >driver_override && echo {bdf} >driver/unbind;")
        });
        sh(host, &back.concat())?;
        result
    })
}

/// What udev does with rules when a device is added (udev(7)): comparisons first, then assignments, and
/// the programs when all rules have been read.
fn device_is_added(host: &Host, rules: &str, bdf: &str) -> Result<()> {
    let dir = format!("/sys/bus/pci/devices/{bdf}");
    let mut programs = Vec::new();
    for rule in rules.lines().filter(|line| !line.starts_with('#')) {
        let mut assigned = Vec::new();
        let mut holds = true;
        for term in rule.split(", ") {
            let (head, value) = term.split_once('"').with_context(|| term.to_owned())?;
            let value = value.strip_suffix('"').with_context(|| term.to_owned())?;
            let value = value.replace("$kernel", bdf);
            let attribute = |head: &str| {
                let name = head.strip_prefix("ATTR{")?;
                Some(name.split_once('}')?.0.to_owned())
            };
            match (head, attribute(head)) {
                ("ACTION==", _) => holds &= value == "add",
                ("SUBSYSTEM==", _) => holds &= value == "pci",
                ("KERNEL==", _) => holds &= value == bdf,
                (_, Some(name)) if head.ends_with("==") => {
                    holds &= host.read_text(&format!("{dir}/{name}"))? == value;
                }
                (_, Some(name)) => assigned.push(format!("echo {value} >{dir}/{name}")),
                ("RUN{builtin}+=", _) => {
                    let module = value
                        .strip_prefix("kmod load ")
                        .context("unknown builtin")?;
                    assigned.push(String::new());
                    programs.push((holds, format!("modprobe {module}")));
                }
                ("RUN+=", _) => programs.push((holds, value)),
                _ => anyhow::bail!("udev knows no {head}"),
            }
        }
        if holds {
            sh(host, &assigned.join("\n"))?;
        }
    }
    for (_, program) in programs.iter().filter(|(holds, _)| *holds) {
        sh(host, program)?;
    }
    Ok(())
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
