//! `gantry check`: what this host lacks to give devices to VMs, and the exact fix.
//!
//! Three steps: [`Facts`] are read from the trees of [`HostPaths`], pure functions turn them into [`Finding`]s, and
//! the caller prints the [`Report`]. No advice makes a host less safe: never `allow_unsafe_interrupts`, the
//! no-IOMMU mode or the ACS override.

mod binding;
mod boot;
mod cmdline;
mod cpu;
mod devices;
mod facts;
mod grub;
mod iommu;
mod lacking;
mod loader;
mod memory;
mod modprobe;
mod vfio;
mod vgpu;

use std::io;
use std::path::PathBuf;

use serde::Serialize;
use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::inventory::error::InventoryError;
use cmdline::Change;
use facts::Facts;

/// How bad a finding is. Ordered from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Good.
    Ok,
    /// It works, at a price or a risk, or a device is not ready.
    Warn,
    /// No VM with a device can start, or guests can attack the host.
    Fail,
}

/// A recommended action, or information.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Advice {
    /// The action and its reason, in one sentence.
    pub text: String,
    /// Lines to copy: commands, or the content of a file.
    pub lines: Vec<String>,
}

/// The answer to one question about the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The name of the check, for programs: `iommu`, `memlock`, ...
    pub check: &'static str,
    /// The name of the check, for people.
    pub title: &'static str,
    /// The level.
    pub level: Level,
    /// What was found.
    pub reason: String,
    /// The fixes; for a good result, optional improvements.
    pub fix: Vec<Advice>,
    /// Words to add to the kernel's command line, or to remove from it.
    #[serde(skip)]
    words: Change,
}

/// A change of the kernel's command line, and how to make it on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CommandLineChange {
    /// Words to add.
    pub add: Vec<String>,
    /// Words to remove.
    pub remove: Vec<String>,
    /// How to make it.
    pub how: Advice,
}

/// All that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The worst level of the findings.
    pub level: Level,
    /// The findings, from the processor up to the devices.
    pub findings: Vec<Finding>,
    /// The changes of the kernel's command line for all findings.
    pub command_line: Option<CommandLineChange>,
}

/// The check could not be done.
#[derive(Debug, Error)]
pub enum CheckError {
    /// The devices cannot be read, or a named one does not exist.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The note about a waiting reboot cannot be written.
    #[error(
        "cannot note in {path} that a reboot is waiting{}",
        sysfs::if_denied(.source, "run as a user who may write there")
    )]
    Note {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Checks the host. `wanted` are devices to check besides those of the groups.
pub fn check(paths: &HostPaths, wanted: &[HostBdf]) -> Result<Report, CheckError> {
    Ok(judge(&Facts::read(paths, wanted)?))
}

/// Records that the command line or the firmware was changed for `report`: later checks say until the next boot
/// that a reboot is pending, and afterwards whether the change took effect. Returns the file.
pub fn note_reboot(paths: &HostPaths, report: &Report) -> Result<PathBuf, CheckError> {
    boot::note(paths, report.command_line.as_ref())
        .map_err(|(path, source)| CheckError::Note { path, source })
}

fn judge(facts: &Facts) -> Report {
    let mut findings = vec![cpu::virtualisation(facts), cpu::kvm(facts)];
    findings.push(cpu::kernel(facts));
    findings.extend(iommu::judge(facts));
    findings.extend(vfio::judge(facts));
    findings.extend(devices::judge(facts));
    findings.extend(vgpu::judge(&facts.hanging));
    findings.extend(memory::judge(facts));
    let mut change = Change::default();
    for finding in &findings {
        change.merge(&finding.words);
    }
    let change = change.against(&facts.cmdline);
    findings.push(boot::reboot(facts, &change));
    findings.extend(facts.maintenance.as_ref().map(|reason| {
        let reason = format!("on, so that no VM starts: {reason}");
        Finding::new("maintenance", "Maintenance", Level::Fail, reason)
            .fix("`gantry maintenance off` ends it")
    }));
    let level = findings.iter().map(|finding| finding.level);
    Report {
        level: level.max().unwrap_or(Level::Ok),
        command_line: boot::how(facts, change),
        findings,
    }
}

impl Finding {
    fn new(
        check: &'static str,
        title: &'static str,
        level: Level,
        reason: impl Into<String>,
    ) -> Self {
        Self {
            check,
            title,
            level,
            reason: reason.into(),
            fix: Vec::new(),
            words: Change::default(),
        }
    }

    /// Adds an action.
    fn fix(mut self, text: impl Into<String>) -> Self {
        self.fix.push(Advice {
            text: text.into(),
            lines: Vec::new(),
        });
        self
    }

    /// Adds lines to copy.
    fn lines<T: Into<String>>(
        mut self,
        text: impl Into<String>,
        lines: impl IntoIterator<Item = T>,
    ) -> Self {
        self.fix.push(Advice {
            text: text.into(),
            lines: lines.into_iter().map(Into::into).collect(),
        });
        self
    }

    /// Adds words for the kernel's command line.
    fn add<T: Into<String>>(mut self, words: impl IntoIterator<Item = T>) -> Self {
        self.words.add.extend(words.into_iter().map(Into::into));
        self
    }

    /// Adds words to remove from the kernel's command line.
    fn remove<T: Into<String>>(mut self, words: impl IntoIterator<Item = T>) -> Self {
        self.words.remove.extend(words.into_iter().map(Into::into));
        self
    }
}

#[cfg(test)]
mod tests;
