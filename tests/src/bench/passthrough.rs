//! `cargo xtask bench passthrough`: what passed devices cost while a guest uses them, and their two ways in.

use std::collections::BTreeSet;

use anyhow::Result;

use super::boot::{bind, with_kernel_log};
use super::contender::{Api, Contender, Guest};
use super::inside::attach::Attach;
use super::inside::{Busy, Job, Timing};
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
/// Where the VMMs listen.
const SOCKET: &str = "/tmp/bench.sock";
/// The disk that starts and attaches are measured with.
const NVME: &str = "0000:01:00.0";
/// The card that stays with the host, and answers the others.
const NEIGHBOUR: &str = "0000:03:00.0";
/// What the exits are counted of: interrupts and operations come in so many.
const OF: f64 = 10_000.0;

/// A device that a guest keeps busy.
struct Subjected {
    bdf: &'static str,
    /// Case of the rows about interrupts.
    interrupts: &'static str,
    /// Row about its operations.
    operations: Option<(&'static str, &'static str)>,
}

const DEVICES: [Subjected; 4] = [
    Subjected {
        bdf: NVME,
        interrupts: "MSI-X, nvme",
        operations: Some(("exits-per-10k-reads", "nvme, 4 KiB each")),
    },
    Subjected {
        bdf: "0000:02:00.0",
        interrupts: "MSI-X, igb",
        operations: Some(("exits-per-10k-packets", "igb, echoes")),
    },
    Subjected {
        bdf: "0000:00:14.0",
        interrupts: "MSI, ahci",
        operations: None,
    },
    Subjected {
        bdf: "0000:00:13.0",
        interrupts: "INTx, e1000",
        operations: None,
    },
];

/// A guest to be measured.
struct Trial<'a> {
    case: &'a str,
    backend: Backend,
    task: &'a str,
    devices: &'a [&'a str],
}

fn devices() -> Vec<Device> {
    vec![
        Device::nvme("GANTRY-NVME0001"),
        Device::Igb { hub: 0 },
        Device::Igb { hub: 0 },
        Device::E1000 { hub: 0 },
        Device::Ahci {
            serial: "GANTRY-DISK0001".to_owned(),
        },
    ]
}

/// Runs the bench.
pub fn run(arguments: &Paired) -> Result<()> {
    let report = Report::new(arguments.json.as_deref())?;
    let mut bench = Bench::prepare(arguments)?;
    bench.measure_all(usize::from(arguments.pairs));
    let peers = bench.contenders.iter().skip(1);
    let peers: Vec<String> = peers.map(|peer| peer.name.clone()).collect();
    let rows = bench.samples.rows(&peers);
    report.give(&rows, &peers, &bench.notes(&rows))
}

/// A lab with contenders in it.
struct Bench {
    host: Host,
    kernel: String,
    contenders: Vec<Contender>,
    samples: Samples,
    /// What could not be measured, and why.
    refused: BTreeSet<String>,
}

impl Bench {
    fn prepare(arguments: &Paired) -> Result<Self> {
        let parts = Parts::prepare(&Options {
            gantry: arguments.gantry.clone(),
            lab_kernel: true,
        })?;
        let contenders = arguments.contenders()?;
        let host = boot_lab(&parts, HostKernel::Lab, devices(), &contenders)?;
        bind(&host, &DEVICES.map(|device| device.bdf))?;
        let neighbour = format!(
            "cd /sys/bus/pci/devices/{NEIGHBOUR}/net && ip address add 10.9.0.1/24 dev * && ip link set * up"
        );
        host.sh(&neighbour).output()?.success()?;
        Ok(Self {
            host,
            kernel: HostKernel::Lab.of(&parts)?.release.clone(),
            samples: Samples::new(contenders.len()),
            contenders,
            refused: BTreeSet::new(),
        })
    }

    fn measure_all(&mut self, rounds: usize) {
        rows::warn_if_busy();
        let steps = rounds * self.contenders.len();
        let step = ui::Step::items(format!("{rounds} rounds"), steps as u64);
        for round in 0..rounds {
            step.say(&format!("round {} of {rounds}", round + 1));
            for (done, contender) in order(self.contenders.len(), round).enumerate() {
                self.one(contender);
                step.at((round * self.contenders.len() + done + 1) as u64);
            }
        }
        step.done();
    }

    /// All figures of one contender in one round.
    fn one(&mut self, contender: usize) {
        for device in &DEVICES {
            let trial = Trial {
                case: device.interrupts,
                backend: Backend::Group,
                task: "busy",
                devices: &[device.bdf],
            };
            let counted = self.run::<Busy>(contender, &trial, |argv| Job::Busy { argv });
            if let Some(busy) = counted {
                self.busy(contender, device, &busy);
            }
        }
        for backend in Backend::BOTH {
            let case = backend.name();
            let trial = |task, devices| Trial {
                case,
                backend,
                task,
                devices,
            };
            let time = |argv| Job::Time {
                argv,
                ram_mib: MEMORY_MIB,
            };
            let timed = self.run::<Timing>(contender, &trial("sleep", &[NVME]), time);
            if let Some(timing) = timed {
                self.add("start-to-init", case, "ms", contender, timing.init);
            }
            let attach = |argv| Job::Attach {
                argv,
                socket: SOCKET.to_owned(),
                path: format!("/sys/bus/pci/devices/{NVME}"),
            };
            let attached = self.run::<Attach>(contender, &trial("watch", &[]), attach);
            if let Some(attach) = attached {
                self.add("attach-to-driver", case, "ms", contender, attach.driver);
            }
        }
    }

    fn busy(&mut self, contender: usize, device: &Subjected, busy: &Busy) {
        let exits = busy.exits.values().sum::<u64>() as f64;
        let per = |count: u64| exits * OF / count as f64;
        let case = device.interrupts;
        self.add("irq-exits", case, "exits", contender, per(busy.interrupts));
        let unused = busy.armed as f64 - busy.vectors as f64;
        self.add(
            "vectors-armed-minus-used",
            case,
            "vectors",
            contender,
            unused,
        );
        if let Some((row, case)) = device.operations {
            self.add(row, case, "exits", contender, per(busy.operations));
        }
    }

    fn add(
        &mut self,
        row: &'static str,
        case: &str,
        unit: &'static str,
        contender: usize,
        figure: f64,
    ) {
        let case = case.to_owned();
        self.samples
            .add(Subject { row, case, unit }, contender, figure);
    }

    /// What a contender answers; nothing if it cannot do it, which is noted.
    fn run<R: serde::de::DeserializeOwned>(
        &mut self,
        contender: usize,
        trial: &Trial<'_>,
        job: impl Fn(Vec<String>) -> Job,
    ) -> Option<R> {
        let contender = self.contenders.get(contender)?;
        let &Trial {
            case,
            backend,
            task,
            devices,
        } = trial;
        // A peer is measured as it is without a word about it.
        if backend == Backend::Cdev && !contender.is_gantry() {
            return None;
        }
        let guest = Guest {
            kernel: "/lab/vmlinux".to_owned(),
            initramfs: "/lab/initramfs-guest".to_owned(),
            cmdline: format!("console=ttyS0 quiet task={task}"),
            memory_mib: MEMORY_MIB,
            devices: devices.iter().map(|&bdf| bdf.to_owned()).collect(),
            api: match devices {
                [] => Api::Socket {
                    path: SOCKET.to_owned(),
                    declared: Vec::new(),
                },
                _ => Api::Usual,
            },
            backend,
        };
        match measure(&self.host, contender, &guest, job) {
            Ok(answer) => Some(answer),
            Err(error) => {
                let error = with_kernel_log(error, &self.host);
                let name = &contender.name;
                self.refused
                    .insert(format!("{name}, {case}, {task}: not measured: {error:#}"));
                None
            }
        }
    }

    /// What a reader of the table has to know.
    fn notes(&self, rows: &[Row]) -> Vec<String> {
        let mut notes = vec![
            "median (min-max) of all rounds; less is better in every row".to_owned(),
            format!(
                "host and guests: Linux {}, 1 vCPU, {MEMORY_MIB} MiB, one device; a simulated host: times compare \
                 contenders with each other, exits and vectors do not depend on it",
                self.kernel
            ),
            "irq-exits: exits to user space per 10,000 interrupts that the guest counts; vectors: those that the host \
             has for VFIO, less those that the guest's driver asked for"
                .to_owned(),
        ];
        for name in [
            "irq-exits",
            "vectors-armed-minus-used",
            "exits-per-10k-reads",
            "exits-per-10k-packets",
        ] {
            let worst = rows.iter().filter(|row| row.row == name);
            let worst = worst.map(|row| row.gantry.max).reduce(f64::max);
            let met = match worst {
                Some(worst) if worst <= 0.0 => "met",
                Some(_) => "NOT met",
                None => "not measured",
            };
            notes.push(format!("bar: {name} 0: {met}"));
        }
        notes.extend(self.refused.iter().cloned());
        notes
    }
}
