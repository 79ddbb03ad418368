//! `cargo xtask bench attach`: a device attached to a running guest and detached, and the API's cost.

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::boot::{bind, with_kernel_log};
use super::contender::{Api, Contender, Guest};
use super::inside::Job;
use super::inside::attach::Attach;
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
/// The NVMe disk of the lab.
const DISK: &str = "0000:01:00.0";
/// Its group.
const GROUP: &str = "nvme";
/// Where the VMMs listen.
const SOCKET: &str = "/tmp/bench.sock";
/// The median of `vm.info` under load may take so long, ms.
const INFO_BAR: f64 = 1.0;
/// The API may take so much, MiB.
const MEMORY_BAR: f64 = 1.0;
/// What a declared group's device may take of the time that a peer's takes.
const DECLARED_BAR: f64 = 0.5;

/// Whether the VM's file names the group that the device will come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    Cold,
    Declared,
}

impl Case {
    fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Declared => "declared",
        }
    }
}

/// Runs the bench.
pub fn run(arguments: &Paired) -> Result<()> {
    let report = Report::new(arguments.json.as_deref())?;
    let bench = Bench::prepare(arguments)?;
    let rounds = usize::from(arguments.pairs);
    let mut samples = Samples::new(bench.contenders.len());
    bench.measure(rounds, &mut samples)?;
    let peers: Vec<String> = bench
        .contenders
        .iter()
        .skip(1)
        .map(|peer| peer.name.clone())
        .collect();
    let rows = samples.rows(&peers);
    report.give(&rows, &peers, &bench.notes(&rows))
}

/// A lab with contenders in it.
struct Bench {
    host: Host,
    kernel: String,
    contenders: Vec<Contender>,
}

impl Bench {
    fn prepare(arguments: &Paired) -> Result<Self> {
        let parts = Parts::prepare(&Options {
            gantry: arguments.gantry.clone(),
            lab_kernel: true,
        })?;
        let contenders = arguments.contenders()?;
        let host = boot_lab(
            &parts,
            HostKernel::Lab,
            vec![Device::nvme("GANTRY-NVME0001")],
            &contenders,
        )?;
        bind(&host, &[DISK])?;
        Ok(Self {
            host,
            kernel: HostKernel::Lab.of(&parts)?.release.clone(),
            contenders,
        })
    }

    fn measure(&self, rounds: usize, samples: &mut Samples) -> Result<()> {
        rows::warn_if_busy();
        // Whoever is first pays for the simulated host's memory: no page of it is there before its first use.
        let step = ui::Step::begin("Warming up");
        for contender in 0..self.contenders.len() {
            self.attach(contender, Case::Cold)?;
        }
        step.done();
        let step = ui::Step::items(
            format!("{rounds} rounds"),
            (rounds * self.contenders.len()) as u64,
        );
        let mut done = 0;
        for round in 0..rounds {
            step.say(&format!("round {} of {rounds}", round + 1));
            for contender in order(self.contenders.len(), round) {
                self.one(contender, samples)
                    .map_err(|error| with_kernel_log(error, &self.host))?;
                done += 1;
                step.at(done);
            }
        }
        step.done();
        Ok(())
    }

    /// All figures of one contender in one round.
    fn one(&self, contender: usize, samples: &mut Samples) -> Result<()> {
        let mut add = |row, case: &str, unit, figure| {
            let case = case.to_owned();
            samples.add(Subject { row, case, unit }, contender, figure);
        };
        for case in [Case::Cold, Case::Declared] {
            let Attach {
                reply,
                driver,
                gone,
                helpers,
                info,
                info_loaded,
            } = self.attach(contender, case)?;
            add("attach-to-reply", case.name(), "ms", reply);
            add("attach-to-driver", case.name(), "ms", driver);
            add("detach-to-gone", case.name(), "ms", gone);
            if case == Case::Cold {
                add("vm-info", "alone", "ms", info);
                add("vm-info", "4 others ask", "ms", info_loaded);
                add("helpers-memory", "a device attached", "MiB", helpers);
            }
        }
        let memory = self.memory(contender, true)? - self.memory(contender, false)?;
        add("api-memory", "after 1,000 requests", "MiB", memory.max(0.0));
        Ok(())
    }

    fn attach(&self, contender: usize, case: Case) -> Result<Attach> {
        // Where the file names no group, the disk is in none.
        let (declared, groups) = match case {
            Case::Cold => (Vec::new(), json!([])),
            Case::Declared => {
                let group = json!({"name": GROUP, "rules": [{"class": "0108"}]});
                (vec![GROUP.to_owned()], json!([group]))
            }
        };
        let groups = json!({"groups": groups});
        self.host
            .write("/etc/gantry/groups.json", groups.to_string())?;
        let api = Api::Socket {
            path: SOCKET.to_owned(),
            declared,
        };
        self.run(contender, api, |argv| Job::Attach {
            argv,
            socket: SOCKET.to_owned(),
            path: format!("/sys/bus/pci/devices/{DISK}"),
        })
        .with_context(|| case.name())
    }

    fn memory(&self, contender: usize, with: bool) -> Result<f64> {
        let socket = with.then(|| SOCKET.to_owned());
        let api = match &socket {
            Some(path) => Api::Bare { path: path.clone() },
            None => Api::None,
        };
        self.run(contender, api, |argv| Job::ApiMemory {
            argv,
            socket: socket.clone(),
            ram_mib: MEMORY_MIB,
        })
        .context("memory")
    }

    fn run<R: DeserializeOwned>(
        &self,
        contender: usize,
        api: Api,
        job: impl Fn(Vec<String>) -> Job,
    ) -> Result<R> {
        let guest = Guest {
            kernel: "/lab/vmlinux".to_owned(),
            initramfs: "/lab/initramfs-guest".to_owned(),
            cmdline: "console=ttyS0 quiet task=watch".to_owned(),
            memory_mib: MEMORY_MIB,
            devices: Vec::new(),
            api,
            backend: Backend::Group,
        };
        let contender = self
            .contenders
            .get(contender)
            .context("no such contender")?;
        measure(&self.host, contender, &guest, job).with_context(|| contender.name.clone())
    }

    /// What a reader of the table has to know.
    fn notes(&self, rows: &[Row]) -> Vec<String> {
        let row = |name: &str, case: &str| {
            let mut rows = rows.iter();
            rows.find(|row| row.row == name && row.case == case)
        };
        let met = |met: bool| if met { "met" } else { "NOT met" };
        let mut notes = vec![
            "median (min-max) of all rounds; less is better in every row".to_owned(),
            format!(
                "host and guests: Linux {}, 1 vCPU, {MEMORY_MIB} MiB, one NVMe disk, 5 s after the guest's \
                 boot; a simulated host: times compare contenders with each other",
                self.kernel
            ),
            "cold: the VM's file says nothing of devices to come; declared: it names their group, which \
             a peer cannot be told"
                .to_owned(),
            "driver: the guest's kernel says that the disk's queues are there; gone: the IOMMU group \
             can be opened by another process"
                .to_owned(),
        ];
        if let Some(row) = row("vm-info", "4 others ask") {
            let met = met(row.gantry.median < INFO_BAR);
            notes.push(format!(
                "bar: vm-info under load below {INFO_BAR} ms: {met}"
            ));
        }
        if let Some(row) = row("api-memory", "after 1,000 requests") {
            let met = met(row.gantry.median < MEMORY_BAR);
            notes.push(format!(
                "bar: the API's memory below {MEMORY_BAR} MiB: {met}"
            ));
        }
        if let Some(row) = row("attach-to-driver", "declared") {
            for (name, peer) in &row.peers {
                let met = met(peer.ratio.median <= DECLARED_BAR);
                notes.push(format!(
                    "bar: attach to driver, declared, at most {DECLARED_BAR} of {name}'s: {met}"
                ));
            }
        }
        notes
    }
}
