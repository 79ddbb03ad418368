//! The test bed: the lab that is up, the run of a case in it, and the check of what it left.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Result, anyhow, bail, ensure};
use gantry_tests::lab::images::HostKernel;
use gantry_tests::lab::parts::Options;
use gantry_tests::lab::qemu::Device;
use gantry_tests::lab::{Host, Parts, Setup};
use libtest_mimic::Failed;

use crate::is_soak;

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
        &[$($crate::bed::Case { name: stringify!($case), run: $case }),*]
    };
}
pub(crate) use cases;

/// What the cases share. A host that is there is clean.
#[derive(Default)]
pub struct Bed {
    parts: OnceLock<Result<Parts, String>>,
    host: Mutex<Option<(&'static str, Host)>>,
    /// The cases that lost a guest and passed in another lab, with what was seen first.
    lost: Mutex<Vec<String>>,
}

/// How many cases of a run may lose a guest to the emulator (see [`gantry_tests::lab`]) and be tried once
/// more: what kills guests more often than that is not the emulator.
const LOST_AT_MOST: usize = 3;

/// Whether a guest died in the middle of things or fell silent.
fn lost_a_guest(failure: &str) -> bool {
    let signs = ["had a triple fault", "it never said", "it does not say"];
    signs.iter().any(|sign| failure.contains(sign))
}

impl Bed {
    /// Runs one case in its suite's lab, booted if it is not up; once more in a fresh one if it loses a guest.
    pub fn run(&self, suite: &'static Suite, case: &Case) -> Result<(), Failed> {
        let run = || {
            let result = self.try_run(suite, case);
            result.map_err(|error| format!("{error:#}"))
        };
        let Err(first) = run() else {
            return Ok(());
        };
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        // A soak is there to find what happens rarely.
        if is_soak() || lost.len() == LOST_AT_MOST || !lost_a_guest(&first) {
            return Err(first.into());
        }
        *self.host() = None;
        run().map_err(|again| format!("{again}\n--- in another lab before\n{first}"))?;
        lost.push(format!("{}::{}\n{first}", suite.name, case.name));
        Ok(())
    }

    /// Ends the lab, and tells of the cases that passed at their second try.
    pub fn clear(&self) {
        *self.host() = None;
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        if !lost.is_empty() {
            eprintln!(
                "guests lost by cases that passed in another lab: {}",
                lost.len()
            );
        }
        lost.iter().for_each(|first| eprintln!("\n---- {first}"));
    }

    fn try_run(&self, suite: &'static Suite, case: &Case) -> Result<()> {
        let mut slot = self.host();
        if slot.as_ref().is_some_and(|(name, _)| *name != suite.name) {
            *slot = None;
        }
        let host = match slot.take() {
            Some((_, host)) => host,
            None => self.boot(suite)?,
        };
        // So that the kernel's log, and the console's, say which lines are whose. What is wanted and
        // remembered of devices is each case's own.
        let mark = format!("case {}", case.name);
        let begin = "echo $0 >/dev/kmsg; rm -rf /etc/gantry /var/lib/gantry";
        host.command(["sh", "-c", begin, &mark])
            .output()?
            .success()?;
        let result = catch_unwind(AssertUnwindSafe(|| (case.run)(&host)))
            .unwrap_or_else(|panic| Err(anyhow!("{}", panic_message(panic.as_ref()))));
        let clean = check_clean(&host);
        let result = result.map_err(|error| with_kernel_log(error, &host, &mark));
        if clean.is_ok() {
            *slot = Some((suite.name, host));
        }
        result.and(clean)
    }

    fn boot(&self, suite: &Suite) -> Result<Host> {
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
        Host::boot(parts, &setup)
    }

    fn host(&self) -> MutexGuard<'_, Option<(&'static str, Host)>> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
            [ $(cat $device/class) != 0x010802 ] || [ -e $device/driver ] ||
                echo ${device##*/}, an NVMe disk, has no driver
        done
        for card in /sys/bus/pci/devices/*/sriov_numvfs; do
            [ ! -e $card ] || [ $(cat $card) = 0 ] || echo ${card%/*} has virtual functions
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
