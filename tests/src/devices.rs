//! `cargo xtask devices`: which devices guests drive, at boot and hot, by VFIO group and by character device.
//!
//! The lab's cases `devices` drive them, and record what they find where [`FILE`] says.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::bench::table::align;
use crate::lab::parts::workspace;

/// The environment variable with the name of the file that cells are recorded in.
const FILE: &str = "GANTRY_DEVICES";

/// When a device comes to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum When {
    /// It is there when the guest boots.
    Boot,
    /// It is attached to the running guest.
    Hot,
}

impl When {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Boot, Self::Hot];
}

impl std::fmt::Display for When {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Boot => "at boot",
            Self::Hot => "hot",
        })
    }
}

/// What VFIO opens a device by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Its group, with a type1 container.
    Group,
    /// Its character device, with iommufd.
    Cdev,
}

impl Backend {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Group, Self::Cdev];

    /// As tables have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Group => "group",
            Self::Cdev => "cdev",
        }
    }
}

/// A cell of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    /// Name of the device.
    pub device: String,
    /// When it came.
    pub when: When,
    /// What opened it.
    pub backend: Backend,
    /// Why the guest could not drive it; none if it could.
    pub reason: Option<String>,
}

impl Cell {
    /// Writes it to where `cargo xtask devices` reads it, if that runs.
    pub fn record(&self) -> Result<()> {
        let Some(path) = std::env::var_os(FILE) else {
            return Ok(());
        };
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        let file = File::options().append(true).open(&path);
        let written = file.and_then(|mut file| file.write_all(&line));
        written.with_context(|| format!("cannot write {}", PathBuf::from(path).display()))
    }
}

/// `cargo xtask devices`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print the cells as JSON.
    #[arg(long)]
    json: bool,
    /// Try this program instead of the release build of this tree.
    #[arg(long, value_name = "FILE")]
    gantry: Option<PathBuf>,
}

/// Runs the cases and prints the table: 1 if a cell is not ok, or a case failed otherwise.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let file = tempfile::NamedTempFile::new().context("cannot create a temporary file")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["test", "-p", "gantry-tests", "--test", "lab"])
        .args(["--", "devices::devices::"])
        .current_dir(workspace())
        .env(FILE, file.path());
    if let Some(gantry) = &arguments.gantry {
        let gantry = fs::canonicalize(gantry);
        command.env("GANTRY", gantry.context("there is no such gantry")?);
    }
    // Standard output is for the table.
    command.stdout(std::io::stderr());
    let status = command.status().context("cannot start cargo")?;
    let text = fs::read_to_string(file.path())?;
    let cells: Result<Vec<Cell>, _> = text.lines().map(serde_json::from_str).collect();
    let cells = cells.context("the cases recorded something else than cells")?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&cells)?);
    } else {
        print!("{}", table(&cells));
    }
    Ok(i32::from(!status.success()))
}

/// The cells as text: a line for each device, and the reasons below.
fn table(cells: &[Cell]) -> String {
    let columns = When::BOTH.map(|when| Backend::BOTH.map(|backend| (when, backend)));
    let columns = columns.concat();
    let head = ["boot, group", "boot, cdev", "hot, group", "hot, cdev"];
    let mut lines = vec![
        ["device"]
            .iter()
            .chain(&head)
            .map(|&word| word.to_owned())
            .collect(),
    ];
    let mut reasons: Vec<&str> = Vec::new();
    let mut devices: Vec<&str> = Vec::new();
    for cell in cells {
        if !devices.contains(&&*cell.device) {
            devices.push(&cell.device);
        }
    }
    for device in devices {
        let mut line = vec![device.to_owned()];
        for (when, backend) in &columns {
            // A case that loses a guest is tried once more: the last word counts.
            let cell = cells.iter().rfind(|cell| {
                cell.device == device && cell.when == *when && cell.backend == *backend
            });
            line.push(match cell.map(|cell| &cell.reason) {
                None => "not tried".to_owned(),
                Some(None) => "ok".to_owned(),
                Some(Some(reason)) => {
                    let known = reasons.iter().position(|known| known == reason);
                    let number = known.unwrap_or_else(|| {
                        reasons.push(reason);
                        reasons.len() - 1
                    });
                    format!("no ({})", number + 1)
                }
            });
        }
        lines.push(line);
    }
    let mut text = align(&lines);
    for (number, reason) in reasons.iter().enumerate() {
        text.push_str(&format!("({}) {reason}\n", number + 1));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cell_is_ok_or_has_a_reason() {
        let cell = |device: &str, when, backend, reason: Option<&str>| Cell {
            device: device.to_owned(),
            when,
            backend,
            reason: reason.map(str::to_owned),
        };
        let cells = [
            cell("nvme", When::Boot, Backend::Group, Some("no disk")),
            cell("nvme", When::Boot, Backend::Group, None),
            cell("nvme", When::Hot, Backend::Group, Some("no disk")),
            cell("edu", When::Hot, Backend::Cdev, Some("no disk")),
        ];
        let wanted = "\
device  boot, group  boot, cdev  hot, group  hot, cdev
nvme    ok           not tried   no (1)      not tried
edu     not tried    not tried   not tried   no (1)
(1) no disk
";
        assert_eq!(table(&cells), wanted);
    }
}
