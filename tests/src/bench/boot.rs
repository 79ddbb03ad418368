//! `cargo xtask bench boot`: from the start of a VM to its guest's init.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use super::contender::{Api, Contender, Guest};
use super::inside::{Exits, Job, Timing};
use super::pairs::{Samples, Subject, order};
use super::rows::{self, Report, Row};
use super::{Paired, boot_lab, measure};
use crate::devices::Backend;
use crate::lab::device::Device;
use crate::lab::images::HostKernel;
use crate::lab::parts::Options;
use crate::lab::{Host, Parts};
use crate::ui;

/// The guests' RAM.
const MEMORY_MIB: u64 = 512;
/// The NVMe disks of the lab.
const DISKS: [&str; 2] = ["0000:01:00.0", "0000:02:00.0"];
/// Guests' kernels say nothing but what goes wrong: a chatty one measures its serial port.
const CMDLINE: &str = "console=ttyS0 quiet";
/// What gantry may use beyond the guest's RAM, MiB.
const MEMORY_BAR: f64 = 5.0;

/// `cargo xtask bench boot`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    paired: Paired,
    /// Kernel of the host and of the guests [default: the lab's if it is built, else the stock one]
    #[arg(long, value_enum)]
    kernel: Option<HostKernel>,
}

/// Runs the bench.
pub fn run(arguments: &Arguments) -> Result<()> {
    let report = Report::new(arguments.paired.json.as_deref())?;
    let bench = Bench::prepare(arguments)?;
    let rounds = usize::from(arguments.paired.pairs);
    let mut found = Found::new(bench.contenders.len());
    bench.measure(rounds, &mut found)?;
    let peers: Vec<String> = bench
        .contenders
        .iter()
        .skip(1)
        .map(|peer| peer.name.clone())
        .collect();
    let rows = found.samples.rows(&peers);
    report.give(&rows, &peers, &bench.notes(&found, &rows))
}

/// A lab with contenders in it.
struct Bench {
    host: Host,
    kernel: String,
    guest_kernel: &'static str,
    contenders: Vec<Contender>,
}

/// What the rounds found.
struct Found {
    samples: Samples,
    /// Exits to init of the last round, by contender, number of disks, and reason.
    reasons: BTreeMap<(usize, usize), BTreeMap<String, u64>>,
}

impl Found {
    fn new(contenders: usize) -> Self {
        Self {
            samples: Samples::new(contenders),
            reasons: BTreeMap::new(),
        }
    }
}

impl Bench {
    fn prepare(arguments: &Arguments) -> Result<Self> {
        let parts = Parts::prepare(&Options {
            gantry: arguments.paired.gantry.clone(),
            lab_kernel: arguments.kernel == Some(HostKernel::Lab),
        })?;
        let kernel = arguments.kernel.unwrap_or(match parts.lab {
            Some(_) => HostKernel::Lab,
            None => HostKernel::Stock,
        });
        let contenders = arguments.paired.contenders()?;
        let devices = ["GANTRY-NVME0001", "GANTRY-NVME0002"].map(Device::nvme);
        let host = boot_lab(&parts, kernel, devices.into(), &contenders)?;
        bind(&host, &DISKS)?;
        Ok(Self {
            host,
            kernel: kernel.of(&parts)?.release.clone(),
            guest_kernel: match kernel {
                HostKernel::Stock => "/lab/bzImage-debian",
                HostKernel::Lab => "/lab/vmlinux",
            },
            contenders,
        })
    }

    /// All rounds of all cases; timed and traced runs are apart from each other.
    fn measure(&self, rounds: usize, found: &mut Found) -> Result<()> {
        rows::warn_if_busy();
        // The first runs are slower than all others, and tell how long it is going to take.
        let step = ui::Step::begin("Warming up");
        let began = Instant::now();
        for contender in 0..self.contenders.len() {
            self.time(contender, DISKS.len())?;
        }
        step.done();
        let runs = rounds * self.contenders.len() * (DISKS.len() + 1) * 2;
        let each = began.elapsed() / u32::try_from(self.contenders.len()).unwrap_or(1);
        let minutes = each.as_secs_f64() * runs as f64 / 60.0;
        let step = ui::Step::items(
            format!("{runs} runs, about {:.0} min", minutes.ceil()),
            runs as u64,
        );
        let mut done = 0;
        for round in 0..rounds {
            step.say(&format!("round {} of {rounds}", round + 1));
            for disks in 0..=DISKS.len() {
                for traced in [false, true] {
                    for contender in order(self.contenders.len(), round) {
                        if traced {
                            self.count_exits(contender, disks, found)?;
                        } else {
                            let timing = self.time(contender, disks)?;
                            found.timing(contender, disks, timing);
                        }
                        done += 1;
                        step.at(done);
                    }
                }
            }
        }
        step.done();
        Ok(())
    }

    fn time(&self, contender: usize, disks: usize) -> Result<Timing> {
        self.run(contender, disks, "sleep", |argv| Job::Time {
            argv,
            ram_mib: MEMORY_MIB,
        })
    }

    fn count_exits(&self, contender: usize, disks: usize, found: &mut Found) -> Result<()> {
        // One case is enough to see what reading costs.
        let reads = disks == 1;
        let task = if reads { "read-silently" } else { "sleep" };
        let exits: Exits = self.run(contender, disks, task, |argv| Job::CountExits {
            argv,
            reads,
        })?;
        found.exits(contender, disks, &exits);
        found.reasons.insert((contender, disks), exits.to_init);
        Ok(())
    }

    /// One run of a contender with a guest of so many disks and this task.
    fn run<R: serde::de::DeserializeOwned>(
        &self,
        contender: usize,
        disks: usize,
        task: &str,
        job: impl Fn(Vec<String>) -> Job,
    ) -> Result<R> {
        let guest = Guest {
            kernel: self.guest_kernel.to_owned(),
            initramfs: "/lab/initramfs-guest".to_owned(),
            cmdline: format!("{CMDLINE} task={task}"),
            memory_mib: MEMORY_MIB,
            devices: DISKS
                .iter()
                .take(disks)
                .map(|&disk| disk.to_owned())
                .collect(),
            api: Api::Usual,
            backend: Backend::Group,
        };
        let run = || {
            let contender = self
                .contenders
                .get(contender)
                .context("there is no such contender")?;
            measure(&self.host, contender, &guest, job)
        };
        run()
            .map_err(|error| with_kernel_log(error, &self.host))
            .with_context(|| format!("{}, {}", self.name(contender), case(disks)))
    }

    fn name(&self, contender: usize) -> &str {
        self.contenders
            .get(contender)
            .map_or("", |contender| &contender.name)
    }

    /// What a reader of the table has to know.
    fn notes(&self, found: &Found, rows: &[Row]) -> Vec<String> {
        let mut notes = vec![
            "median (min-max) of all rounds; less is better in every row".to_owned(),
            "ratio: gantry's figure over the peer's of the same round, median and the interval of \
             the median (sign test, at least 90 %); behind: wholly above 1.05, ahead: wholly below \
             1/1.05"
                .to_owned(),
            format!(
                "host and guests: Linux {} ({}), 1 vCPU, \"{CMDLINE}\"",
                self.kernel, self.guest_kernel
            ),
            "a simulated host: the CPU is emulated (TCG, SVM; no VMX, no posted interrupts, no real \
             PCIe timing). Times compare contenders with each other, hardware is far faster; exits \
             and memory do not depend on it"
                .to_owned(),
        ];
        for ((case, name), reasons) in &found.reasons {
            let list: Vec<String> = reasons
                .iter()
                .map(|(why, n)| format!("{why} {n}"))
                .collect();
            notes.push(format!(
                "exits-to-init, {case}, {name}: {}",
                list.join(", ")
            ));
        }
        let most = |name: &str| {
            let rows = rows.iter().filter(|row| row.row == name);
            rows.map(|row| row.gantry.median).fold(0.0, f64::max)
        };
        let met = |met: bool| if met { "met" } else { "NOT met" };
        notes.push(format!(
            "bar: gantry's memory beyond RAM at most {MEMORY_BAR} MiB: {}",
            met(most("memory-beyond-ram") <= MEMORY_BAR)
        ));
        notes.push(format!(
            "bar: reading 64 MiB of an NVMe causes gantry no exit to user space: {}",
            met(most("exits-reading-nvme") == 0.0)
        ));
        notes
    }
}

impl Found {
    fn timing(&mut self, contender: usize, disks: usize, timing: Timing) {
        let figures = [
            ("start-to-first-instruction", "ms", timing.first_instruction),
            ("start-to-init", "ms", timing.init),
            ("cpu-to-init", "ms", timing.cpu),
            ("memory-beyond-ram", "MiB", timing.memory),
        ];
        for (row, unit, figure) in figures {
            self.add(row, disks, unit, contender, figure);
        }
    }

    fn exits(&mut self, contender: usize, disks: usize, exits: &Exits) {
        let sum = |reasons: &BTreeMap<String, u64>| reasons.values().sum::<u64>() as f64;
        self.add(
            "exits-to-init",
            disks,
            "exits",
            contender,
            sum(&exits.to_init),
        );
        if let Some(reading) = &exits.reading {
            self.add(
                "exits-reading-nvme",
                disks,
                "exits",
                contender,
                sum(reading),
            );
        }
    }

    fn add(
        &mut self,
        row: &'static str,
        disks: usize,
        unit: &'static str,
        contender: usize,
        figure: f64,
    ) {
        let subject = Subject {
            row,
            case: case(disks),
            unit,
        };
        self.samples.add(subject, contender, figure);
    }
}

/// Adds the end of the host's kernel log, or of what a host that is gone has left.
pub(super) fn with_kernel_log(error: anyhow::Error, host: &Host) -> anyhow::Error {
    let log = match host.sh("dmesg | tail -n 12").output() {
        Ok(log) => log.text(),
        Err(_) => host.last_words(),
    };
    anyhow!("{error:#}\n--- the host's kernel log ends\n{log}")
}

fn case(disks: usize) -> String {
    format!("{disks} nvme, {MEMORY_MIB} MiB")
}

/// Gives disks to vfio-pci, by hand: what is measured is not part of the measuring.
pub(super) fn bind(host: &Host, disks: &[&str]) -> Result<()> {
    let script = format!(
        "for disk in {}; do
            device=/sys/bus/pci/devices/$disk
            echo vfio-pci >$device/driver_override
            [ ! -e $device/driver ] || echo $disk >$device/driver/unbind
            echo $disk >/sys/bus/pci/drivers_probe
            [ $(basename $(readlink $device/driver)) = vfio-pci ] || exit 1
        done",
        disks.join(" ")
    );
    host.sh(&script)
        .output()?
        .success()
        .context("cannot bind the disks to vfio-pci")?;
    Ok(())
}
