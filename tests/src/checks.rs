//! `cargo xtask test`: everything that has to pass before a change goes in, one part after another.

use std::fs;
use std::num::NonZero;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::lab::Parts;
use crate::lab::parts::{Options, workspace};
use crate::published;

/// What a cold machine may take, downloads and the lab kernel's build included.
const BUDGET: Duration = Duration::from_secs(30 * 60);

/// Cargo's part of the checks before the lab: what is said, and the arguments.
const CARGO: &[(&str, &[&str])] = &[
    ("format", &["fmt", "--all", "--check"]),
    (
        "lints",
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ],
    ),
    // It is no target of a plain test, and so none of all targets.
    (
        "lints of the lab's tests",
        &[
            "clippy",
            "-p",
            "gantry-tests",
            "--test",
            "lab",
            "--",
            "-D",
            "warnings",
        ],
    ),
    ("unit and property tests", &["test", "--workspace"]),
];

/// Runs all parts, stops at the first that fails, and says how long each took.
pub fn run() -> Result<()> {
    eprintln!(
        "Time budget: {} minutes on a cold machine",
        BUDGET.as_secs() / 60
    );
    let mut clock = Clock::default();
    clock.note(format!("machine before: {}", load()));
    let outcome = run_parts(&mut clock);
    let total = clock.report();
    if total > BUDGET {
        eprintln!("That is over the budget: move long repetitions to `cargo xtask soak`.");
    }
    outcome
}

fn run_parts(clock: &mut Clock) -> Result<()> {
    for (name, arguments) in CARGO {
        clock.time(name, || cargo(arguments))?;
    }
    let parts = clock.time("the lab's parts", || {
        Parts::prepare(&Options {
            gantry: None,
            lab_kernel: true,
        })
    })?;
    clock.note(format!("lab: {}", parts.versions()));
    clock.time("published documents", || published::validate(&parts.gantry))?;
    clock.time("lab tests", || {
        cargo(&["test", "-p", "gantry-tests", "--test", "lab"])
    })
}

/// A lab case that repeats something.
struct Repeating {
    /// A part of its name.
    case: &'static str,
    /// How often in a round.
    often: u32,
    /// Whether it looks for races, for which the lab's processors run beside each other.
    races: bool,
}

const fn race(case: &'static str) -> Repeating {
    Repeating {
        case,
        often: 1,
        races: true,
    }
}

const REPEATING: &[Repeating] = &[
    race("lab-kernel::endings::killed_while_booting"),
    race("lab-kernel::pools::of_eight_vms"),
    race("lab-kernel::pools::of_fifty_vms"),
    race("lab-kernel::sriov::a_killed_activation"),
    Repeating {
        case: "lab-kernel::hotplug::cycles_leave_nothing",
        often: 20,
        races: false,
    },
];

/// Runs the cases that repeat something, for so many rounds: what no test has the time for.
pub fn soak(rounds: u32) -> Result<()> {
    let mut clock = Clock::default();
    let outcome = REPEATING.iter().try_for_each(|one| {
        let rounds = rounds.max(2).saturating_mul(one.often).to_string();
        let mut environment = vec![("GANTRY_ROUNDS", rounds.as_str())];
        if one.races {
            environment.push(("GANTRY_PARALLEL", "1"));
        }
        clock.time(one.case, || {
            let arguments = [
                "test",
                "-p",
                "gantry-tests",
                "--test",
                "lab",
                "--",
                one.case,
            ];
            cargo_with(&arguments, &environment)
        })
    });
    clock.report();
    outcome
}

fn cargo(arguments: &[&str]) -> Result<()> {
    cargo_with(arguments, &[])
}

fn cargo_with(arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    eprintln!("\n=== cargo {}", arguments.join(" "));
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(program)
        .args(arguments)
        .envs(environment.iter().copied())
        .current_dir::<&Path>(workspace())
        .stdin(Stdio::null())
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!(
            "`cargo {}` failed; its messages are above",
            arguments.join(" ")
        );
    }
    Ok(())
}

/// How busy the machine is and was of late.
fn load() -> String {
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: Vec<&str> = load.split(' ').take(3).collect();
    format!("{processors} processors, load {}", load.join(" "))
}

/// How long each part took, and what to know beside that.
#[derive(Debug, Default)]
struct Clock {
    parts: Vec<(String, Duration)>,
    notes: Vec<String>,
}

impl Clock {
    fn time<T>(&mut self, name: &str, part: impl FnOnce() -> Result<T>) -> Result<T> {
        let began = Instant::now();
        let outcome = part();
        self.parts.push((name.to_owned(), began.elapsed()));
        outcome.with_context(|| format!("{name}: failed"))
    }

    fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    fn report(&self) -> Duration {
        eprintln!();
        self.notes.iter().for_each(|note| eprintln!("{note}"));
        eprintln!("machine after: {}", load());
        for (name, time) in &self.parts {
            eprintln!("{name:25} {:7.1} s", time.as_secs_f64());
        }
        let total: Duration = self.parts.iter().map(|(_, time)| *time).sum();
        eprintln!("{:25} {:7.1} s", "total", total.as_secs_f64());
        total
    }
}
