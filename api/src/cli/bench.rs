//! `gantry bench`: what a device does on the host and in a guest.

use std::fs::{self, File};
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use gantry_resources::base::{DeviceName, HostPaths};
use gantry_resources::inventory::Allow;
use gantry_resources::pools::DeviceRequest;

use super::run::may_start;
use crate::bench::{self, Job, Results, Verdict};
use crate::output::print_json;
use crate::report::{FAILED, Failure, USAGE};

/// A command on what devices do.
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  gantry bench run 01:00.0 --json before.json --html before.html
  gantry bench compare before.json after.json")]
pub enum BenchCommand {
    /// Measure devices on the host and in a guest
    Run(RunArgs),
    /// Compare two results; fails if a test is worse in the later one
    Compare(CompareArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "\
The devices are taken from their group as for a VM, and measured by turns: on the host, from user space through \
VFIO, and in a small guest whose init is gantry itself, by the same code. The ratio is what passing them to a guest \
costs. Disks are only read.

The guest boots the host's kernel, /boot/vmlinuz-$(uname -r), unless --kernel names another. Interrupts are \
measured if it has VFIO without an IOMMU (CONFIG_VFIO_NOIOMMU).

Of any device: configuration space, registers, memory behind BARs, reset. Of NVMe disks: reads by depth and size, \
interrupts. Of network and display controllers only what any device has.

Examples:
  gantry bench run 01:00.0
  gantry bench run --group nvme --time 60s --html nvme.html
  gantry bench run 01:00.0 --kernel vmlinuz --modules lib/modules/6.12.0
  gantry bench run 01:00.0 --json before.json")]
pub struct RunArgs {
    /// Addresses of the devices
    #[arg(value_name = "DEVICE", required_unless_present = "group")]
    devices: Vec<DeviceName>,
    /// Group to take devices from; `gantry group list` shows them
    #[arg(long, conflicts_with = "devices")]
    group: Option<String>,
    /// How many devices of the group
    #[arg(long, value_name = "N", default_value_t = 1, requires = "group")]
    count: u32,
    /// What the devices must be [default: whatever they are]
    #[arg(long, value_enum)]
    kind: Option<bench::model::Kind>,
    /// How long all tests take together, beside the guest's boots: 30s, 2m
    #[arg(long, default_value = "30s", value_parser = duration)]
    time: Duration,
    /// How often the devices are measured on each side; one round has no interval
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// The guest's kernel [default: the host's]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Directory of the modules of the guest's kernel [default: the host's]
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// Write the results to a file as JSON; `gantry schema bench` is its schema
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the results to a file as an HTML page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Take devices that are in no group
    #[arg(long)]
    allow_ungrouped: bool,
    /// `none` takes devices without interrupts too
    #[arg(long, value_name = "KIND", value_parser = ["msix", "none"])]
    interrupts: Option<String>,
    /// Take devices too that nothing resets afterwards
    #[arg(long)]
    allow_no_reset: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Tests are compared on each side, of devices with the same ids. A test is worse, better or the same only if the \
whole 95% interval of the ratio says so; it is undecided if that is too wide: measure with more --rounds.

Exit status 1 says that a test is worse.

Examples:
  gantry bench compare before.json after.json
  gantry bench compare before.json after.json --threshold 10 --json")]
pub struct CompareArgs {
    /// The earlier results, of `gantry bench run --json`
    #[arg(value_name = "BEFORE")]
    before: PathBuf,
    /// The later results
    #[arg(value_name = "AFTER")]
    after: PathBuf,
    /// The difference that counts, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 5, value_parser = clap::value_parser!(u8).range(0..=100))]
    threshold: u8,
    /// Show the comparison as JSON
    #[arg(long)]
    json: bool,
}

/// A duration: `30s`, `2m`, `500ms`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("\"{text}\" is no duration: write 30s, 2m or 500ms");
    let at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(at);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => return Err(wrong()),
    };
    let duration = Duration::from_millis(number.saturating_mul(milliseconds));
    match (Duration::from_millis(1)..=Duration::from_secs(24 * 3600)).contains(&duration) {
        true => Ok(duration),
        false => Err(format!("{text} is not between 1ms and a day")),
    }
}

/// Runs a command. `arguments` are the global options.
pub fn bench(
    command: BenchCommand,
    paths: &HostPaths,
    arguments: Vec<String>,
) -> Result<ExitCode, Failure> {
    match command {
        BenchCommand::Run(args) => run(args, paths, arguments),
        BenchCommand::Compare(args) => compare(&args),
    }
}

fn run(args: RunArgs, paths: &HostPaths, arguments: Vec<String>) -> Result<ExitCode, Failure> {
    may_start(paths)?;
    let requests = match &args.group {
        Some(group) => vec![DeviceRequest::group(group, args.count)],
        None => args
            .devices
            .iter()
            .copied()
            .map(DeviceRequest::device)
            .collect(),
    };
    let requests = requests.into_iter().map(|request| DeviceRequest {
        allow: Allow {
            no_interrupts: args.interrupts.as_deref() == Some("none"),
            no_reset: args.allow_no_reset,
        },
        allow_ungrouped: args.allow_ungrouped,
        ..request
    });
    // Before anything is measured: a file that cannot be written costs no minutes.
    let json = args.json.as_deref().map(Output::open).transpose()?;
    let html = args.html.as_deref().map(Output::open).transpose()?;
    let results = bench::run(
        &Job {
            requests: requests.collect(),
            kind: args.kind,
            time: args.time,
            rounds: args.rounds,
            kernel: args.kernel,
            modules: args.modules,
            arguments,
        },
        paths,
    )?;
    if let Some(file) = json {
        let text = serde_json::to_string_pretty(&results)?;
        file.write(&format!("{text}\n"))?;
    }
    if let Some(file) = html {
        file.write(&bench::page(&results))?;
    }
    bench::print_results(&results)?;
    Ok(ExitCode::SUCCESS)
}

/// A file for results. What it holds stays until there are some.
struct Output<'a> {
    file: File,
    path: &'a Path,
}

impl<'a> Output<'a> {
    fn open(path: &'a Path) -> Result<Self, Failure> {
        let mut options = File::options();
        let opened = options.write(true).create(true).truncate(false).open(path);
        let file = opened.map_err(|error| unwritten(path, &error))?;
        Ok(Self { file, path })
    }

    fn write(mut self, text: &str) -> Result<(), Failure> {
        let written = self.file.set_len(0);
        let written = written.and_then(|()| self.file.write_all(text.as_bytes()));
        written.map_err(|error| unwritten(self.path, &error))
    }
}

fn unwritten(path: &Path, error: &std::io::Error) -> Failure {
    Failure::host(format!("cannot write {}: {error}", path.display()))
}

fn compare(args: &CompareArgs) -> Result<ExitCode, Failure> {
    let (before, after) = (read(&args.before)?, read(&args.after)?);
    let compared = bench::compare(&before, &after, f64::from(args.threshold) / 100.0);
    if compared.is_empty() {
        let what = format!(
            "{} and {} have no test of the same device in common",
            args.before.display(),
            args.after.display()
        );
        return Err(Failure::new(USAGE, what));
    }
    match args.json {
        true => print_json(&compared)?,
        false => bench::print_comparison(&compared)?,
    }
    let worse = compared
        .iter()
        .filter(|one| one.verdict == Verdict::Worse)
        .count();
    Ok(match worse {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::from(FAILED),
    })
}

fn read(path: &Path) -> Result<Results, Failure> {
    let wrong = |why: String| {
        let what = format!(
            "{} holds no results of `gantry bench run --json`: {why}",
            path.display()
        );
        Failure::new(USAGE, what)
    };
    if let Err(error) = fs::metadata(path) {
        return Err(Failure::new(
            USAGE,
            format!("cannot read {}: {error}", path.display()),
        ));
    }
    let file = BufReader::new(File::open(path)?);
    let results: Results =
        serde_json::from_reader(file).map_err(|error| wrong(error.to_string()))?;
    match results.format {
        bench::model::FORMAT => Ok(results),
        other => Err(wrong(format!("they are of form {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A status has no other form to compare by.
    fn status(before: &Path, after: &Path) -> Result<String, u8> {
        let args = CompareArgs {
            before: before.to_owned(),
            after: after.to_owned(),
            threshold: 5,
            json: true,
        };
        let done = compare(&args);
        done.map(|status| format!("{status:?}"))
            .map_err(|failure| failure.exit)
    }

    #[test]
    fn a_worse_test_is_a_status_for_programs_and_no_results_are_a_mistake() {
        let folder = tempfile::tempdir().unwrap();
        let written = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let results = |guest| serde_json::to_string(&bench::example([guest, guest + 1.0])).unwrap();
        let before = written("before", &results(2000.0));
        let after = written("after", &results(3000.0));
        let of = |code| format!("{:?}", ExitCode::from(code));
        assert_eq!(status(&before, &before), Ok(of(0)));
        assert_eq!(status(&before, &after), Ok(of(FAILED)));
        assert_eq!(status(&after, &before), Ok(of(0)));
        let other = written(
            "other",
            &results(1.0).replace("\"format\":1", "\"format\":2"),
        );
        for wrong in [other, written("text", "{}"), folder.path().join("none")] {
            assert_eq!(status(&before, &wrong), Err(USAGE), "{}", wrong.display());
        }
    }

    #[test]
    fn a_duration_has_a_unit() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        for wrong in [
            "30",
            "s",
            "0s",
            "1h",
            "-1s",
            "99999999999999999999s",
            "25000m",
        ] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
