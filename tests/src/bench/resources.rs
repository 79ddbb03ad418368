//! `cargo xtask bench resources`: whole commands over a recorded host of 4,096 PCI functions.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use super::pairs::{Samples, Subject};
use super::recorded;
use super::rows::{self, Report};
use crate::cleanup::TempFolder;
use crate::lab::parts;
use crate::ui;

/// What each command may take, ms.
const BAR: f64 = 100.0;
/// Two GPUs of one node, and virtual functions of different cards near them.
const REQUEST: &str = r#"{"devices": [{"group": "gpus", "count": 2, "numa_policy": "required"},
    {"group": "vfs", "count": 4, "isolate": true}]}"#;

/// `cargo xtask bench resources`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Runs of each command, at least 5.
    #[arg(long, value_name = "N", default_value = "21",
          value_parser = clap::value_parser!(u16).range(5..=1000))]
    runs: u16,
    /// Write the rows there, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure this program instead of the release build of this tree.
    #[arg(long, value_name = "FILE")]
    gantry: Option<PathBuf>,
}

/// Runs the bench.
pub fn run(arguments: &Arguments) -> Result<()> {
    let report = Report::new(arguments.json.as_deref())?;
    let gantry = match &arguments.gantry {
        Some(path) => path.clone(),
        None => parts::gantry()?,
    };
    let step = ui::Step::begin("Writing a host of 4096 functions");
    let root = folder()?;
    recorded::write(root.path()).context("cannot write the recorded host")?;
    step.done();
    rows::warn_if_busy();
    let commands: [(&str, &[&str]); 2] = [
        ("device-list", &["device", "list", "--json"]),
        ("fit", &["group", "fit", REQUEST]),
    ];
    let mut samples = Samples::new(1);
    for run in 0..=arguments.runs {
        for (row, words) in commands {
            let (took, cpu) = time(&gantry, root.path(), words)?;
            // The first run reads what the others find in memory.
            for (what, figure) in [("", took), (", CPU time", cpu)].iter().filter(|_| run > 0) {
                let subject = Subject {
                    row,
                    case: format!("{} functions{what}", recorded::FUNCTIONS),
                    unit: "ms",
                };
                samples.add(subject, 0, *figure);
            }
        }
    }
    let rows = samples.rows(&[]);
    let whole = rows.iter().filter(|row| !row.case.contains("CPU"));
    let notes = whole.map(|row| {
        let met = if row.gantry.median < BAR {
            "met"
        } else {
            "NOT met"
        };
        format!("bar: {} under {BAR} ms: {met}", row.row)
    });
    let mut notes: Vec<String> = notes.collect();
    notes.push("median (min-max) of whole commands, from their start to their end".to_owned());
    report.give(&rows, &[], &notes)
}

/// In memory where that is possible, as sysfs is.
fn folder() -> Result<TempFolder> {
    let memory = Path::new("/dev/shm");
    TempFolder::new(memory, "gantry-bench.")
        .or_else(|_| TempFolder::new(&std::env::temp_dir(), "gantry-bench."))
        .context("cannot create a temporary folder for the recorded host")
}

/// How long a command takes, and how long a processor works for it, ms.
fn time(gantry: &Path, root: &Path, words: &[&str]) -> Result<(f64, f64)> {
    let mut command = Command::new(gantry);
    command
        .arg("--host-root")
        .arg(root)
        .args(words)
        .stdin(Stdio::null());
    let (began, used) = (Instant::now(), cpu_of_children()?);
    let output = command
        .output()
        .with_context(|| format!("cannot start {}", gantry.display()))?;
    let took = began.elapsed();
    ensure!(
        output.status.success() && output.stdout.len() > 100,
        "`gantry {}` failed: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok((took.as_secs_f64() * 1000.0, cpu_of_children()? - used))
}

/// Of those that have ended, ms.
fn cpu_of_children() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let times = [usage.user_time(), usage.system_time()];
    let micros: i64 = times.iter().map(TimeValLike::num_microseconds).sum();
    Ok(micros as f64 / 1000.0)
}
