//! What runs in the lab host: one measurement of one VMM, asked for and answered in JSON.
//!
//! It runs there, not at the far end of the wire, so that its clocks are the VMM's. Rooms:
//! [`vmm`] starts and watches a VMM, [`trace`] reads the kernel's tracepoints, [`memory`] reads
//! what a process has mapped, [`api`] asks a VMM for something, [`attach`] for a device.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

pub mod api;
pub mod attach;
pub mod memory;
pub mod trace;
pub mod vmm;

use trace::{Hit, Tracer};
use vmm::Vmm;

/// The agent's argument that asks for a measurement; the [`Job`] comes on its standard input, the
/// report goes to its standard output.
pub const ARGUMENT: &str = "measure";

/// The guest prints this when its init begins.
pub const INIT: &str = "guest: init";

/// The guest prints this, is silent for a second, reads its first disk, is silent for a second...
const READING: &str = "guest: reading";
/// ... and prints this.
const READ: &str = "guest: read";
/// The guest prints this, is silent for a second, keeps its device busy, is silent for a second...
const BEGINS: &str = "guest: begins";
/// ... and prints this, with numbers.
const DID: &str = "guest: did";
/// How long the device may be kept busy.
const LONG: Duration = Duration::from_secs(200);
/// This much of the silence on either side still belongs to the lines around it.
const GUARD: Duration = Duration::from_millis(500);

/// How long a guest may take to say the next thing.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a guest idles before its memory is looked at.
const IDLE: Duration = Duration::from_millis(500);

/// One measurement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Job {
    /// Answered by [`Timing`].
    Time {
        /// The VMM with its arguments; the guest's serial port is its terminal.
        argv: Vec<String>,
        /// The guest's RAM.
        ram_mib: u64,
    },
    /// Answered by [`Exits`].
    CountExits {
        /// As above.
        argv: Vec<String>,
        /// Whether the guest will read its disk in silence (`task=read-silently`).
        reads: bool,
    },
    /// Answered by [`Busy`]; the guest's task is `busy`.
    Busy {
        /// As above.
        argv: Vec<String>,
    },
    /// Answered by [`attach::Attach`]; the guest's task is `watch`.
    Attach {
        /// As above.
        argv: Vec<String>,
        /// The VMM's socket.
        socket: String,
        /// The device's folder in sysfs.
        path: String,
    },
    /// Answered by a number of MiB; the guest's task is `watch`.
    ApiMemory {
        /// As above.
        argv: Vec<String>,
        /// The VMM's socket, if it has one.
        socket: Option<String>,
        /// The guest's RAM.
        ram_mib: u64,
    },
}

/// From the start of a VMM to its guest's init.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Until the first instruction of the guest, ms.
    pub first_instruction: f64,
    /// Until the guest's init has said so on its console, ms.
    pub init: f64,
    /// Processor time of the VMM and its children until then, user and system, ms.
    pub cpu: f64,
    /// PSS of the VMM and its children without the guest's RAM, while the guest idles, MiB.
    pub memory: f64,
}

/// Exits to user space (tracepoint `kvm_userspace_exit`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exits {
    /// From the start of the VMM to its guest's init, by reason.
    pub to_init: BTreeMap<String, u64>,
    /// While the guest read its disk.
    pub reading: Option<BTreeMap<String, u64>>,
}

/// What a guest and the host count while the guest keeps its device busy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Busy {
    /// Exits to user space, by reason.
    pub exits: BTreeMap<String, u64>,
    /// Blocks that were read, or packets that went to and fro.
    pub operations: u64,
    /// Interrupts of the device.
    pub interrupts: u64,
    /// Interrupt vectors that the guest's driver has asked for.
    pub vectors: u64,
    /// Interrupts that VFIO has asked for on the host.
    pub armed: u64,
}

/// Runs the job on standard input.
pub fn run() -> Result<()> {
    let job: Job = serde_json::from_reader(io::stdin()).context("this is no measurement")?;
    let report = match job {
        Job::Time { argv, ram_mib } => serde_json::to_vec(&time(&argv, ram_mib)?)?,
        Job::CountExits { argv, reads } => serde_json::to_vec(&count_exits(&argv, reads)?)?,
        Job::Busy { argv } => serde_json::to_vec(&busy(&argv)?)?,
        Job::Attach { argv, socket, path } => {
            serde_json::to_vec(&attach::attach(&argv, &socket, &path)?)?
        }
        Job::ApiMemory {
            argv,
            socket,
            ram_mib,
        } => serde_json::to_vec(&attach::memory(&argv, socket.as_deref(), ram_mib)?)?,
    };
    io::stdout().write_all(&report)?;
    Ok(())
}

fn time(argv: &[String], ram_mib: u64) -> Result<Timing> {
    let tracer = Tracer::first_entry()?;
    let mut vmm = Vmm::start(argv)?;
    let init = vmm.wait_for(INIT, PATIENCE)?;
    let cpu = vmm.cpu_time()?;
    std::thread::sleep(IDLE);
    let memory = vmm.memory_beyond(ram_mib << 10)?;
    let entries = tracer.stop()?;
    let started = vmm.started();
    vmm.end()?;
    let first = entries
        .first()
        .context("the guest ran, but no kvm_entry was traced")?;
    Ok(Timing {
        first_instruction: ms(first.at.saturating_sub(started)),
        init: ms(init.saturating_sub(started)),
        cpu: ms(cpu),
        memory: memory as f64 / 1024.0,
    })
}

fn count_exits(argv: &[String], reads: bool) -> Result<Exits> {
    let tracer = Tracer::exits()?;
    let mut vmm = Vmm::start(argv)?;
    let init = vmm.wait_for(INIT, PATIENCE)?;
    let window = if reads {
        let from = vmm.wait_for(READING, PATIENCE)? + GUARD;
        Some((from, vmm.wait_for(READ, PATIENCE)? - GUARD))
    } else {
        None
    };
    let exits = tracer.stop()?;
    vmm.end()?;
    Ok(Exits {
        to_init: count(&exits, Duration::ZERO, init),
        reading: window.map(|(from, to)| count(&exits, from, to)),
    })
}

/// The exits of a stretch of time, by reason.
fn count(exits: &[Hit], from: Duration, to: Duration) -> BTreeMap<String, u64> {
    let mut reasons = BTreeMap::new();
    for exit in exits.iter().filter(|exit| (from..to).contains(&exit.at)) {
        *reasons.entry(trace::reason(&exit.text)).or_insert(0) += 1;
    }
    reasons
}

fn busy(argv: &[String]) -> Result<Busy> {
    let tracer = Tracer::exits()?;
    let mut vmm = Vmm::start(argv)?;
    let from = vmm.wait_for(BEGINS, PATIENCE)? + GUARD;
    let to = vmm.wait_for(DID, LONG)? - GUARD;
    let number = |key: &str| -> Result<u64> {
        let line = vmm.last_line();
        let mut words = line.split_whitespace();
        let word = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        let word = word.with_context(|| format!("no {key} in {line:?}"))?;
        word.parse().with_context(|| format!("{key} in {line:?}"))
    };
    let (operations, interrupts) = (number("operations")?, number("interrupts")?);
    let vectors = number("vectors")?;
    let interrupts_of_host = fs::read_to_string("/proc/interrupts")?;
    let armed = interrupts_of_host
        .lines()
        .filter(|line| line.contains("vfio-"));
    let armed = armed.count() as u64;
    let exits = tracer.stop()?;
    vmm.end()?;
    ensure!(
        operations > 0 && interrupts > 0,
        "the device was not busy: {operations} operations, {interrupts} interrupts"
    );
    Ok(Busy {
        exits: count(&exits, from, to),
        operations,
        interrupts,
        vectors,
        armed,
    })
}

/// The clock of all timestamps here, and of the traces.
fn now() -> Result<Duration> {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).context("cannot read the clock")?;
    Ok(Duration::from(time))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
