//! The demo's steps, in the order in which they are told.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Logs;
use super::claims::{Facts, Pool};
use super::guest::{Said, Words};
use super::screen::Screen;
use super::vm::{Heard, Vm, in_words};
use crate::lab::device::Device;
use crate::lab::{Host, Parts, Setup, disk};
use crate::protocol::Exit;

/// The disk that the guest gets: the first device of the lab.
pub const DISK: &str = "0000:01:00.0";
/// Its serial number, as QEMU is told.
pub const SERIAL: &str = "GANTRY-NVME0001";
/// The other disk, which stays with the host.
const OTHER: &str = "GANTRY-NVME0002";

/// How long a host may take to show its log when something has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// The VM, which takes any one disk of the group.
const VM: &str = r#"{
  "payload": {
    "kernel": "/lab/bzImage-debian",
    "initramfs": "/lab/initramfs-guest",
    "cmdline": "console=ttyS0 quiet task=demo"
  },
  "cpus": {"boot_vcpus": 2},
  "memory": {"size": "512M"},
  "devices": [{"group": "nvme", "count": 1}]
}
"#;

/// The demo while it runs.
pub struct Story<'a> {
    screen: &'a mut Screen,
    logs: &'a Logs,
}

impl<'a> Story<'a> {
    /// It is told on `screen`.
    pub fn new(screen: &'a mut Screen, logs: &'a Logs) -> Self {
        Self { screen, logs }
    }

    /// Plays all steps; what came out, checked.
    pub fn tell(mut self, parts: &Parts) -> Result<Facts> {
        self.screen.title(
            "gantry gives a VM a disk of its own, and takes it back.",
            "The host is simulated: QEMU runs a stock Debian kernel with its real KVM, VFIO\n\
             and IOMMU code. Nothing of this machine is touched.",
        )?;
        let host = self.boot(parts)?;
        let outcome = self.play(&host);
        if outcome.is_err() {
            // A host that is gone has told its last words already.
            let log = host.command(["dmesg"]).within(PATIENCE).output();
            let _ = log.map(|log| fs::write(&self.logs.kernel, log.stdout));
        }
        outcome
    }

    fn play(&mut self, host: &Host) -> Result<Facts> {
        self.run(host, "gantry device list")?;
        let driver_before = driver(host)?;
        self.make_group(host)?;
        let before = self.detach(host)?;
        let mut vm = self.start_vm(host)?;
        let mut words = Words::default();
        self.listen(&mut vm, &mut words)?;
        let (during, locks_during) = self.look_meanwhile(host)?;
        let exit = self.power_off(&mut vm, &mut words)?;
        let (after, locks_after) = self.look_after(host)?;
        self.reattach(host)?;
        let facts = Facts {
            words,
            checksum: disk::checksum(SERIAL),
            exit,
            pools: [before, during, after],
            locks: [locks_during, locks_after],
            drivers: [driver_before, driver(host)?],
        };
        self.screen.step("Checked from outside")?;
        for (claim, finding) in facts.check()? {
            self.screen.holds(claim, &finding)?;
        }
        Ok(facts)
    }

    fn boot(&mut self, parts: &Parts) -> Result<Host> {
        self.screen
            .step("A host boots; its nvme driver has two disks")?;
        let setup = Setup {
            devices: vec![Device::nvme(SERIAL), Device::nvme(OTHER)],
            memory_mib: 4 << 10,
            ..Setup::default()
        };
        let wait = self.screen.wait("The host boots");
        let host = Host::boot(parts, &setup)?;
        drop(wait);
        let seconds = host.booted_in().as_secs_f64();
        self.screen.tell(&format!(
            "Linux {}, up after {seconds:.1} s",
            parts.stock.release
        ))?;
        Ok(host)
    }

    fn make_group(&mut self, host: &Host) -> Result<()> {
        self.screen
            .step("A group names devices that VMs may have; this one gets the first disk")?;
        self.run(
            host,
            &format!("gantry group create nvme --type nvme --device {DISK}"),
        )?;
        self.run(host, "gantry group show nvme")
    }

    fn detach(&mut self, host: &Host) -> Result<Pool> {
        self.screen
            .step("The disk leaves its host driver: it is free for VMs")?;
        self.run(host, &format!("gantry device detach {DISK}"))?;
        self.run(host, "gantry group list")?;
        pool(host)
    }

    fn start_vm<'h>(&mut self, host: &'h Host) -> Result<Vm<'h>> {
        self.screen
            .step("A VM asks for one device of that group, and boots")?;
        host.write("/root/vm.json", VM)?;
        self.run(host, "cat vm.json")?;
        self.screen.typed("lab#", "gantry run vm.json")?;
        Vm::start(host, &self.logs.console)
    }

    /// Shows what the guest says until it waits.
    fn listen(&mut self, vm: &mut Vm, words: &mut Words) -> Result<()> {
        let mut wait = Some(self.screen.wait("The guest boots"));
        loop {
            let line = match vm.next()? {
                Heard::Line(line) => line,
                Heard::Ended(exit) => {
                    let what = "the guest ended before it had said all";
                    return Err(vm.failure(&format!("{what}: {}", in_words(&exit))));
                }
            };
            let said = words.hear(&line);
            if said != Said::Nothing {
                drop(wait.take());
            }
            match said {
                Said::Init => self.screen.tell(&format!(
                    "The guest's init runs {:.2} s after gantry started. It says:",
                    words.boot_ms().unwrap_or_default() as f64 / 1000.0
                ))?,
                Said::Typed(command) => self.screen.typed("guest#", command)?,
                Said::Printed(text) => self.screen.printed(text)?,
                Said::Waits => return Ok(()),
                Said::Nothing => {}
            }
        }
    }

    fn look_meanwhile(&mut self, host: &Host) -> Result<(Pool, usize)> {
        self.screen
            .step("Meanwhile on the host: the disk is in use")?;
        self.run(host, "gantry group list")?;
        Ok((pool(host)?, locks(host)?))
    }

    fn power_off(&mut self, vm: &mut Vm, words: &mut Words) -> Result<Exit> {
        self.screen
            .step("The guest powers off: the disk is free again, then back with its host driver")?;
        vm.press_enter()?;
        let mut wait = Some(self.screen.wait("The guest powers off"));
        loop {
            match vm.next()? {
                Heard::Line(line) => {
                    if let Said::Typed(command) = words.hear(&line) {
                        drop(wait.take());
                        self.screen.typed("guest#", command)?;
                    }
                }
                Heard::Ended(exit) => return Ok(exit),
            }
        }
    }

    fn look_after(&mut self, host: &Host) -> Result<(Pool, usize)> {
        self.run(host, "gantry group list")?;
        Ok((pool(host)?, locks(host)?))
    }

    fn reattach(&mut self, host: &Host) -> Result<()> {
        self.run(host, &format!("gantry device reattach {DISK}"))
    }

    /// Runs a command in the host as its user would, on a terminal, and shows what it prints.
    fn run(&mut self, host: &Host, command: &str) -> Result<()> {
        self.screen.typed("lab#", command)?;
        let output = host
            .command(command.split(' '))
            .on_terminal(self.screen.size())
            .output()?;
        self.screen.printed(&output.text())?;
        ensure!(
            output.exit == Exit::Code(0),
            "`{command}` ended: {}; what it says is above",
            in_words(&output.exit)
        );
        Ok(())
    }
}

/// What gantry itself says about the pool.
fn pool(host: &Host) -> Result<Pool> {
    let output = host
        .command(["gantry", "group", "list", "--json"])
        .output()?;
    let [pool] = serde_json::from_slice(&output.success()?.stdout)
        .context("`gantry group list --json` does not tell of one group")?;
    Ok(pool)
}

/// How many leases the kernel knows of: locks of open file descriptions.
fn locks(host: &Host) -> Result<usize> {
    let locks = host.read_text("/proc/locks")?;
    Ok(locks.lines().filter(|lock| lock.contains("OFDLCK")).count())
}

/// The driver that the kernel says the disk has.
fn driver(host: &Host) -> Result<String> {
    let link = format!("/sys/bus/pci/devices/{DISK}/driver");
    let output = host.command(["readlink", &link]).output()?;
    let target = output.text();
    Ok(target.rsplit('/').next().unwrap_or_default().to_owned())
}
