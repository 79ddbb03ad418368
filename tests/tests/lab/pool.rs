//! Pools of devices for the cases, and the proof that nobody holds any.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::{Host, disk};
use serde_json::{Value, json};

/// The first disk, in an IOMMU group of its own.
pub const FIRST: Disk = Disk {
    bdf: "0000:01:00.0",
    serial: "GANTRY-NVME0001",
};
/// The second disk, in an IOMMU group of its own.
pub const SECOND: Disk = Disk {
    bdf: "0000:02:00.0",
    serial: "GANTRY-NVME0002",
};
/// The first network card.
pub const NIC: &str = "0000:03:00.0";
/// The display, which shares its IOMMU group with [`AUDIO`].
pub const DISPLAY: &str = "0000:00:14.0";
/// The audio controller.
pub const AUDIO: &str = "0000:00:14.1";
/// The teaching device, which no group has.
pub const EDU: &str = "0000:00:15.0";
/// The device with a BAR of 8 GiB.
pub const BIG_BAR: &str = "0000:00:16.0";

/// What `gantry vm attach` is told for a device that has neither interrupts nor a reset.
pub const LACKING: &str = "--interrupts none --allow-no-reset";

/// The virtio network card of the lab that has nothing but cards.
pub const VIRTIO_CARD: &str = "0000:04:00.0";

/// The display of that lab, whose bus can be reset.
pub const CARD_DISPLAY: &str = "0000:05:00.0";
/// Its audio controller.
pub const CARD_AUDIO: &str = "0000:05:00.1";

/// A disk of the lab.
#[derive(Debug, Clone, Copy)]
pub struct Disk {
    /// Its address in the host.
    pub bdf: &'static str,
    /// Its serial number.
    pub serial: &'static str,
}

impl Disk {
    /// SHA-256 of its contents.
    pub fn checksum(&self) -> String {
        disk::checksum(self.serial)
    }
}

/// Devices in vfio-pci's hands; dropping it gives them back to their drivers.
pub struct Pool<'h> {
    host: &'h Host,
    devices: Vec<&'static str>,
}

impl<'h> Pool<'h> {
    /// Defines the groups `nvme`, `nic`, `display` (whose card has an audio function, too) and `big`, and
    /// detaches `devices`.
    pub fn of(host: &'h Host, devices: &[&'static str]) -> Result<Self> {
        let rule = |name: &str, rule: Value| json!({"name": name, "rules": [rule]});
        let groups = json!([
            rule("nvme", json!({"class": "0108"})),
            rule("nic", json!({"class": "0200"})),
            rule("display", json!({"class": "0380"})),
            rule("big", json!({"vendor": "1b36", "device": "0005"})),
        ]);
        Self::of_groups(host, &groups, devices)
    }

    /// Defines these groups, and detaches `devices`.
    pub fn of_groups(host: &'h Host, groups: &Value, devices: &[&'static str]) -> Result<Self> {
        let groups = json!({"groups": groups});
        host.write("/etc/gantry/groups.json", groups.to_string())?;
        let pool = Self {
            host,
            devices: devices.to_vec(),
        };
        pool.moved("detach")?;
        Ok(pool)
    }

    fn moved(&self, command: &str) -> Result<()> {
        if self.devices.is_empty() {
            return Ok(());
        }
        let command = ["gantry", "device", command];
        let words = command.iter().chain(&self.devices).copied();
        self.host.command(words).output()?.success()?;
        Ok(())
    }
}

impl Drop for Pool<'_> {
    fn drop(&mut self) {
        // If it fails, the runner sees the traces.
        let _ = self.moved("reattach");
    }
}

/// Fails if a gantry runs, a device is leased, or a VFIO group, a cdev or iommufd is open.
pub fn nothing_is_held(host: &Host) -> Result<()> {
    let script = "
        pidof gantry && echo runs
        grep OFDLCK /proc/locks
        ls -l /proc/[0-9]*/fd 2>/dev/null | grep -e /dev/vfio -e /dev/iommu
        true";
    let held = host.sh(script).output()?.success()?.text();
    ensure!(held.is_empty(), "this is left:\n{held}");
    Ok(())
}

/// Numbers of the processes whose command lines contain `words`.
pub fn processes(host: &Host, words: &str) -> Result<Vec<String>> {
    // The script's own command line must not contain them.
    let script = "for process in /proc/[0-9]*; do
            tr '\\0' ' ' <$process/cmdline 2>/dev/null | grep -q -- \"$WORDS\" && echo ${process##*/}
        done; true";
    let found = host.sh(script).env("WORDS", words).output()?.success()?;
    Ok(found.text().lines().map(str::to_owned).collect())
}

/// Fails unless `gantry device detach` refuses with these words, and the device stays as it is.
pub fn stays(host: &Host, bdf: &str, words: &[&str]) -> Result<()> {
    let before = device(host, bdf)?;
    let refused = host
        .command(["gantry", "device", "detach", bdf])
        .output()?
        .exits(1)?;
    for word in words {
        ensure!(refused.errors().contains(word), "no {word:?} in {refused}");
    }
    ensure!(refused.errors().lines().count() <= 20, "{refused}");
    ensure!(device(host, bdf)? == before, "it changed");
    Ok(())
}

/// What `gantry device list` says of a device.
pub fn device(host: &Host, bdf: &str) -> Result<Value> {
    let list = parsed(host, "gantry device list --json")?;
    let found = list.as_array().into_iter().flatten();
    let mut found = found.filter(|device| device["bdf"] == bdf);
    Ok(found.next().context("the device is not listed")?.clone())
}

/// What tells cards apart: functions share one if they share slot and IOMMU group, and are no virtual functions.
fn card(device: &Value) -> String {
    let bdf = device["bdf"].as_str().unwrap_or_default();
    match (&device["physfn"], bdf.split_once('.')) {
        (Value::Null, Some((slot, _))) => format!("{slot} {}", device["iommu_group"]),
        _ => bdf.to_owned(),
    }
}

/// The number of free cards of a group, on which both lists must agree.
pub fn free(host: &Host, group: &str) -> Result<usize> {
    let groups = parsed(host, "gantry group list --json")?;
    let devices = parsed(host, "gantry device list --json")?;
    let group = groups
        .as_array()
        .into_iter()
        .flatten()
        .find(|row| row["name"] == group)
        .with_context(|| format!("group {group} is not listed"))?;
    let of_group = devices.as_array().into_iter().flatten();
    let of_group: Vec<&Value> = of_group
        .filter(|device| device["group"] == group["name"])
        .collect();
    let cards = |state: Option<&str>| {
        let of_state = of_group
            .iter()
            .filter(|device| state.is_none_or(|state| device["state"] == state));
        let cards: BTreeSet<String> = of_state.map(|device| card(device)).collect();
        cards.len()
    };
    let (detached, assigned) = (cards(Some("detached")), cards(Some("assigned")));
    ensure!(
        group["total"] == cards(None) && group["used"] == assigned && group["free"] == detached,
        "the lists disagree: {group:#}\n{of_group:#?}"
    );
    Ok(detached)
}

/// What a command says in JSON.
pub fn parsed(host: &Host, command: &str) -> Result<Value> {
    let text = host.sh(command).output()?.success()?.text();
    serde_json::from_str(&text).with_context(|| format!("`{command}` says {text}"))
}
