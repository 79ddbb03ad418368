//! Cases about `gantry check`, on the lab host as it is and with its IOMMU switched off in several ways.

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::Host;
use serde_json::Value;

use crate::pool::{BIG_BAR, FIRST, SECOND};
use crate::runner::{Case, cases};

/// For the usual host.
pub const CASES: &[Case] = cases![a_host_that_lacks_nothing];
/// For one with `intel_iommu=off`.
pub const IOMMU_OFF: &[Case] = cases![an_iommu_that_is_switched_off];
/// For one with `intremap=off iommu=pt`.
pub const NO_REMAPPING: &[Case] = cases![interrupt_remapping_that_is_switched_off];
/// For one with `iommu=off`.
pub const NO_IOMMU: &[Case] = cases![all_iommus_that_are_switched_off];

/// Exit status where a finding is a failure.
const FAIL: i32 = 6;

fn a_host_that_lacks_nothing(host: &Host) -> Result<()> {
    let text = host.sh("gantry check").output()?.success()?.text();
    ensure!(text.contains("0 warn, 0 fail"), "{text}");
    let report = report(host, 0)?;
    for what in [
        "CPU virtualisation",
        "IOMMU",
        "Interrupt remapping",
        "VFIO modules",
    ] {
        ensure!(
            finding(&report, what)?["level"] == "ok",
            "{what}: {report:#}"
        );
    }
    // A disk that is to be given away, and is still with the host.
    let asked = host.command(["gantry", "check", FIRST.bdf]).output()?;
    ensure!(asked.text().contains(FIRST.bdf), "{asked}");
    // The other disk has the same ids.
    let words = format!("cannot tell these devices from {}", SECOND.bdf);
    ensure!(asked.text().contains(&words), "{asked}");
    let alone = host
        .command(["gantry", "check", BIG_BAR])
        .output()?
        .exits(5)?;
    ensure!(alone.text().contains("vfio-pci.ids=1b36:0005"), "{alone}");
    Ok(())
}

fn an_iommu_that_is_switched_off(host: &Host) -> Result<()> {
    names_the_word(host, "IOMMU", "intel_iommu=off")
}

fn interrupt_remapping_that_is_switched_off(host: &Host) -> Result<()> {
    names_the_word(host, "Interrupt remapping", "intremap=off")?;
    let past = host.sh("gantry check").output()?.text();
    ensure!(past.contains("bypass the IOMMU (iommu=pt)"), "{past}");
    Ok(())
}

fn all_iommus_that_are_switched_off(host: &Host) -> Result<()> {
    names_the_word(host, "IOMMU", "iommu=off")
}

/// Fails unless the only failure is `what`, and its fix is to take `word` off the command line.
fn names_the_word(host: &Host, what: &str, word: &str) -> Result<()> {
    let report = report(host, FAIL)?;
    let failures = findings(&report).filter(|one| one["level"] == "fail");
    let failures: Vec<&Value> = failures.collect();
    ensure!(
        failures.len() == 1 && failures[0]["title"] == what,
        "{report:#}"
    );
    let text = host.sh("gantry check").output()?.exits(FAIL)?.text();
    ensure!(text.contains(&format!("remove  {word}")), "{text}");
    Ok(())
}

fn report(host: &Host, exit: i32) -> Result<Value> {
    let output = host.sh("gantry check --json").output()?.exits(exit)?;
    serde_json::from_str(&output.text()).with_context(|| output.to_string())
}

fn findings(report: &Value) -> impl Iterator<Item = &Value> {
    report["findings"].as_array().into_iter().flatten()
}

fn finding<'a>(report: &'a Value, what: &str) -> Result<&'a Value> {
    let found = findings(report).find(|one| one["title"] == what);
    found.with_context(|| format!("no finding about {what}: {report:#}"))
}
