//! Cases about `gantry bench`: what a device does on the host and in a guest.

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::Host;
use serde_json::Value;

use crate::pool::{FIRST, Pool, nothing_is_held};
use crate::runner::{Case, cases};

/// For Debian's kernel, which has no VFIO without an IOMMU.
pub const CASES: &[Case] = cases![
    a_disk_is_measured_on_both_sides,
    what_cannot_be_measured_is_refused
];

/// Measures devices in two rounds; the results, after a look at what is printed.
fn measure(host: &Host, words: &str, kernel: &str) -> Result<Value> {
    let command = format!(
        "gantry bench run {words} --time 1s --rounds 2 --kernel {kernel} --json /tmp/bench.json --html /tmp/bench.html"
    );
    let printed = host.sh(&command).output()?.success()?;
    ensure!(
        printed
            .text()
            .starts_with("Simulated: the host is a virtual machine"),
        "{printed}"
    );
    let json = host
        .command(["cat", "/tmp/bench.json"])
        .output()?
        .success()?
        .text();
    let results: Value = serde_json::from_str(&json)?;
    ensure!(results["format"] == 1 && results["rounds"] == 2, "{json}");
    let page = host
        .command(["cat", "/tmp/bench.html"])
        .output()?
        .success()?
        .text();
    ensure!(
        page.contains("<strong>Simulated:</strong>") && page.contains("<svg"),
        "{page}"
    );
    Ok(results)
}

/// Fails unless a test of a device has samples of so many rounds on each side, and a ratio, of two rounds with an
/// interval.
fn is_measured(device: &Value, name: &str, least: usize) -> Result<()> {
    let tests = device["tests"].as_array().context("no tests")?;
    let test = tests.iter().find(|test| test["test"] == name);
    let test = test.with_context(|| format!("no {name} in {device}"))?;
    for side in ["host", "guest"] {
        let rounds = test[side].as_array().context("no rounds")?;
        let sampled = |round: &Value| {
            round["samples"].as_u64() > Some(0) && round["p50"].as_f64() > Some(0.0)
        };
        ensure!(
            rounds.len() >= least && rounds.iter().all(sampled),
            "{side}: {test}"
        );
    }
    let ratio = |key: &str| {
        test["ratio"][key]
            .as_f64()
            .with_context(|| format!("no {key}: {test}"))
    };
    let value = ratio("value")?;
    if least == 2 {
        ensure!(ratio("low")? <= value && value <= ratio("high")?, "{test}");
    }
    Ok(())
}

fn a_disk_is_measured_on_both_sides(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let results = measure(host, "--group nvme --kind nvme", "/lab/bzImage-debian")?;
    ensure!(results["host"]["guest_access"] == "sysfs", "{results}");
    let device = &results["devices"][0];
    ensure!(
        device["address"] == FIRST.bdf && device["kind"] == "nvme",
        "{device}"
    );
    // A round of many reads may end without a result where the lab has little of this machine.
    for (test, rounds) in [
        ("config read 4 B", 2),
        ("MMIO read 4 B", 2),
        ("MMIO write 4 B", 2),
        ("read 4 KiB, depth 1, polled", 1),
        ("read 4 KiB, depth 64", 1),
        ("read 128 KiB, depth 4", 1),
        ("reset", 2),
    ] {
        is_measured(device, test, rounds)?;
    }
    let compared = "gantry bench compare /tmp/bench.json /tmp/bench.json";
    let compared = host.sh(compared).output()?.success()?.text();
    ensure!(
        compared.contains("MMIO read 4 B") && !compared.contains("worse"),
        "{compared}"
    );
    nothing_is_held(host)
}

fn what_cannot_be_measured_is_refused(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let bench = format!("gantry bench run {}", FIRST.bdf);
    let kind = format!("{bench} --kind nic --kernel /lab/bzImage-debian");
    let kind = host.sh(&kind).output()?.exits(2)?;
    let words = "is not a network controller: it is an NVMe controller";
    ensure!(kind.errors().contains(words), "{kind}");
    let kernel = host.sh(&bench).output()?.exits(1)?;
    ensure!(
        kernel.errors().contains("--kernel names another"),
        "{kernel}"
    );
    nothing_is_held(host)
}
