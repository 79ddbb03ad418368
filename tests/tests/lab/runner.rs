//! Runs the cases: keeps the labs that are up, runs a case in one, and checks that it left no traces.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{ThreadId, available_parallelism, current};
use std::time::Instant;

use anyhow::{Result, anyhow, bail, ensure};
use gantry_tests::lab::device::Device;
use gantry_tests::lab::images::HostKernel;
use gantry_tests::lab::parts::Options;
use gantry_tests::lab::{Host, Parts, Setup};
use gantry_tests::times::Times;
use libtest_mimic::Failed;

use crate::{is_soak, vm};

/// A lab and the cases to run in it.
pub struct Suite {
    /// First word of its cases' names.
    pub name: &'static str,
    /// The lab host's kernel.
    pub kernel: HostKernel,
    /// Added to its command line.
    pub append: &'static str,
    /// The lab host's devices.
    pub devices: fn() -> Vec<Device>,
    /// Whether it has Debian's udev.
    pub udev: bool,
    /// `platform.iommufd` of its cases' VMs, if they say so.
    pub iommufd: Option<bool>,
    /// Modules with their cases.
    pub cases: &'static [(&'static str, &'static [Case])],
}

/// One test.
pub struct Case {
    /// Name of its function.
    pub name: &'static str,
    /// The test itself.
    pub run: fn(&Host) -> Result<()>,
}

/// A list of [`Case`]s out of the names of functions.
macro_rules! cases {
    ($($case:ident),* $(,)?) => {
        &[$($crate::runner::Case { name: stringify!($case), run: $case }),*]
    };
}
pub(crate) use cases;

/// What the cases share.
#[derive(Default)]
pub struct Runner {
    parts: OnceLock<Result<Parts, String>>,
    /// The lab of each thread that runs cases, clean, and its suite. No thread takes another's, as QEMU ends
    /// with the thread that started it.
    labs: Mutex<HashMap<ThreadId, (&'static str, Host)>>,
    again: Mutex<Again>,
    /// The failures, in short: the list of whole ones may be too long for the log that somebody reads.
    failed: Mutex<Vec<String>>,
    times: Mutex<Times>,
}

/// Cases that lost a guest.
#[derive(Default)]
struct Again {
    /// How many were tried once more.
    tries: usize,
    /// Those that passed then, with what was seen first.
    passed: Vec<String>,
}

/// What a lab takes of this machine's memory at most, in KiB: 4.4 GiB were measured, in the case with the
/// largest guest.
const LAB_MEMORY: usize = 5 << 20;

/// How many labs run side by side: one for each processor, as those of a lab take turns on one, and as many as
/// there is memory for.
pub fn labs_side_by_side() -> usize {
    let processors = available_parallelism().map_or(1, usize::from);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mut lines = memory.lines();
    let available = lines.find_map(|line| line.strip_prefix("MemAvailable:"));
    let available =
        available.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<usize>().ok());
    let fit = available.map_or(1, |available| available / LAB_MEMORY);
    processors.min(fit).max(1)
}

/// How many cases of a run may lose a guest to the emulator (see [`gantry_tests::lab`]) and be tried once
/// more: what kills guests more often than that is not the emulator.
const LOST_AT_MOST: usize = 3;

/// Whether a guest died in the middle of things or fell silent.
fn lost_a_guest(failure: &str) -> bool {
    let signs = ["had a triple fault", "it never said", "it does not say"];
    signs.iter().any(|sign| failure.contains(sign))
}

/// Tells of a failure as it happens, in short: the list of failures comes at the end of the run.
fn tell_at_once(what: &str, name: &str, failure: &str) {
    // The runner may have begun a line for the case.
    eprintln!("\n{what}: {name}: {}", in_short(failure));
}

/// The first line of `failure` that says something, and what gantry calls an error.
fn in_short(failure: &str) -> String {
    let mut lines = failure
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or("it says nothing");
    let errors = lines.filter(|line| line.starts_with("error: "));
    let all: Vec<&str> = std::iter::once(first).chain(errors).collect();
    all.join("; ")
}

impl Runner {
    /// Runs one case in its suite's lab, booted if it is not up; once more in a fresh one if it loses a guest.
    pub fn run(&self, suite: &'static Suite, case: &Case, name: &str) -> Result<(), Failed> {
        let run = || {
            let result = self.try_run(suite, case, name);
            result.map_err(|error| format!("{error:#}"))
        };
        let Err(first) = run() else {
            return Ok(());
        };
        if !lost_a_guest(&first) || !self.may_try_again() {
            return Err(self.failed(name, first));
        }
        tell_at_once("lost a guest, tried once more", name, &first);
        drop(self.take_lab());
        run().map_err(|again| {
            self.failed(name, format!("{again}\n--- in another lab before\n{first}"))
        })?;
        lock(&self.again).passed.push(format!("{name}\n{first}"));
        Ok(())
    }

    fn failed(&self, name: &str, failure: String) -> Failed {
        tell_at_once("FAILED", name, &failure);
        lock(&self.failed).push(format!("{name}: {}", in_short(&failure)));
        failure.into()
    }

    fn may_try_again(&self) -> bool {
        let mut again = lock(&self.again);
        // A soak is there to find what happens rarely.
        let may = !is_soak() && again.tries < LOST_AT_MOST;
        again.tries += usize::from(may);
        may
    }

    /// Ends the labs, and tells how long the suites took, which cases passed at their second try, and which failed.
    pub fn clear(&self) {
        lock(&self.labs).clear();
        eprint!("{}", lock(&self.times));
        let passed = &lock(&self.again).passed;
        if !passed.is_empty() {
            eprintln!(
                "guests lost by cases that passed in another lab: {}",
                passed.len()
            );
        }
        passed.iter().for_each(|first| eprintln!("\n---- {first}"));
        let failed = lock(&self.failed);
        failed.iter().for_each(|why| eprintln!("failed: {why}"));
    }

    fn try_run(&self, suite: &'static Suite, case: &Case, name: &str) -> Result<()> {
        let host = match self.take_lab() {
            Some((of, host)) if of == suite.name => host,
            other => {
                drop(other);
                self.boot(suite)?
            }
        };
        let began = Instant::now();
        vm::set_iommufd(suite.iommufd);
        let (result, clean) = run_in(&host, case)?;
        lock(&self.times).case(suite.name, name.to_owned(), began.elapsed());
        if clean.is_ok() {
            lock(&self.labs).insert(current().id(), (suite.name, host));
        }
        result.and(clean)
    }

    fn take_lab(&self) -> Option<(&'static str, Host)> {
        lock(&self.labs).remove(&current().id())
    }

    fn boot(&self, suite: &'static Suite) -> Result<Host> {
        let options = Options {
            gantry: std::env::var_os("GANTRY").map(PathBuf::from),
            lab_kernel: true,
        };
        let parts = self
            .parts
            .get_or_init(|| Parts::prepare(&options).map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow!("the lab cannot be made: {error}"))?;
        let setup = Setup {
            kernel: suite.kernel,
            append: suite.append.to_owned(),
            devices: (suite.devices)(),
            udev: suite.udev,
            parallel: std::env::var_os("GANTRY_PARALLEL").is_some(),
            ..Setup::default()
        };
        let began = Instant::now();
        let host = Host::boot(parts, &setup)?;
        lock(&self.times).boot(suite.name, began.elapsed());
        Ok(host)
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the case: its result, and whether it left the host clean.
fn run_in(host: &Host, case: &Case) -> Result<(Result<()>, Result<()>)> {
    // So that the kernel's log, and the console's, say which lines are whose. What is wanted and
    // remembered of devices is each case's own.
    let mark = format!("case {}", case.name);
    let begin = "echo $0 >/dev/kmsg; rm -rf /etc/gantry /var/lib/gantry";
    host.command(["sh", "-c", begin, &mark])
        .output()?
        .success()?;
    let result = catch_unwind(AssertUnwindSafe(|| (case.run)(host)))
        .unwrap_or_else(|panic| Err(anyhow!("{}", panic_message(panic.as_ref()))));
    let clean = check_clean(host);
    Ok((
        result.map_err(|error| with_kernel_log(error, host, &mark)),
        clean,
    ))
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "the case panicked".to_owned())
}

/// Adds what the host's kernel logged since the `mark` to an error, if the host still talks.
fn with_kernel_log(error: anyhow::Error, host: &Host, mark: &str) -> anyhow::Error {
    match host
        .command(["sh", "-c", "dmesg | sed \"1,/$0\\$/d\"", mark])
        .output()
    {
        Ok(log) if !log.stdout.is_empty() => {
            anyhow!("{error:#}\n--- the host's kernel log\n{}", log.text())
        }
        _ => error,
    }
}

/// Fails if a device is not with its host driver, a gantry runs, or a file is locked. Helpers that have done
/// what they were there for may take a moment to end.
fn check_clean(host: &Host) -> Result<()> {
    const TRACES: &str = r"
        for try in $(seq 50); do
            pidof gantry >/dev/null && sleep 0.1 || break
        done
        for device in /sys/bus/pci/drivers/vfio-pci/????:*; do
            [ -e $device ] && echo ${device##*/} is bound to vfio-pci
        done
        for device in /sys/bus/pci/devices/*; do
            read -r driver <$device/driver_override
            [ $driver = '(null)' ] || echo ${device##*/} has the driver override $driver
            read -r class <$device/class
            [ $class != 0x010802 ] || [ -e $device/driver ] ||
                echo ${device##*/}, an NVMe disk, has no driver
        done
        for card in /sys/bus/pci/devices/*/sriov_numvfs; do
            [ ! -e $card ] || read -r functions <$card
            [ ! -e $card ] || [ $functions = 0 ] || echo ${card%/*} has virtual functions
        done
        for process in $(pidof gantry); do
            echo gantry runs as process $process: $(tr '\0' ' ' <$process/cmdline)
        done
        grep OFDLCK /proc/locks && echo these files are locked
        true";
    let traces = match host.sh(TRACES).output() {
        Ok(output) => output.success()?.text(),
        Err(error) => bail!("the case left no working lab: {error:#}"),
    };
    ensure!(traces.is_empty(), "the case left traces:\n{traces}");
    Ok(())
}
