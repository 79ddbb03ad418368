//! Cases about USB devices: what a real kernel says of them, and groups that take them.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use serde_json::{Value, json};

use crate::bed::{Case, cases};

/// For a host with a USB stick and a keyboard.
pub const CASES: &[Case] = cases![a_stick_and_a_keyboard_are_listed];

fn list(host: &Host) -> Result<Vec<Value>> {
    let text = host
        .sh("gantry device list --type usb --json")
        .output()?
        .success()?;
    Ok(serde_json::from_str(&text.text())?)
}

fn a_stick_and_a_keyboard_are_listed(host: &Host) -> Result<()> {
    let groups = json!({"groups": [
        {"name": "sticks", "type": "usb", "rules": [{"driver": "usb-storage"}]},
        {"name": "slow", "type": "usb", "rules": [{"speed": {"less": 481}, "port": {"begins": "1-"}}]},
    ]});
    host.write("/etc/gantry/groups.json", groups.to_string())?;
    let deadline = Instant::now() + Duration::from_secs(90);
    let all = loop {
        let all = list(host)?;
        let ready = all.iter().filter(|device| device["group"].is_string());
        if ready.count() == 2 {
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
