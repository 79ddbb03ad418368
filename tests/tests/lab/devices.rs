//! Devices of each kind, driven by guests: at boot and hot, opened by their VFIO group and by their character
//! device. `cargo xtask devices` prints what these cases find as a table.

use anyhow::{Result, bail, ensure};
use gantry_tests::devices::{Backend, Cell, When};
use gantry_tests::lab::{Host, disk};
use serde_json::{Value, json};

use crate::pool::Pool;
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

/// For a lab of `Device::of_each_kind`.
pub const CASES: &[Case] = cases![
    disks_by_group,
    disks_by_cdev,
    cards_by_group,
    cards_by_cdev,
    others_by_group,
    others_by_cdev,
    mediated_devices_by_group,
    mediated_devices_by_cdev,
];

/// A device and the way to drive it: a row of the table.
struct Row {
    /// Its name in the table, which is also that of its group and its id in the VM.
    name: &'static str,
    from: From,
    lacks: Lacks,
    /// Arguments of the guest's command `drive`.
    drive: &'static str,
    /// The checksum that the command is told last.
    sum: Sum,
}

/// Where a device comes from.
enum From {
    /// These functions of the host, which are one card.
    Host(&'static [&'static str]),
    /// A virtual function of this card, made when a VM asks for it.
    Card(&'static str),
    /// A mediated device of this module and type, made when a VM asks for it.
    Module(&'static str, &'static str),
}

/// What the VM's file and `vm attach` have to put up with.
#[derive(PartialEq)]
enum Lacks {
    Nothing,
    Reset,
    ResetAndInterrupts,
}

/// A checksum that the host knows.
enum Sum {
    None,
    /// Of the disk with this serial number.
    Disk(&'static str),
    /// Of the file that the neighbour serves.
    Served,
    /// Of the monitor's EDID.
    Edid,
}

const fn row(name: &'static str, from: From, lacks: Lacks, drive: &'static str, sum: Sum) -> Row {
    Row {
        name,
        from,
        lacks,
        drive,
        sum,
    }
}

const DISKS: &[Row] = &[
    row(
        "nvme",
        From::Host(&["0000:01:00.0"]),
        Lacks::Nothing,
        "disk 1b36:0010",
        Sum::Disk("GANTRY-DISK0001"),
    ),
    row(
        "ahci",
        From::Host(&["0000:00:16.0"]),
        Lacks::Reset,
        "disk 8086:2922",
        Sum::Disk("GANTRY-DISK0003"),
    ),
    row(
        "xhci",
        From::Host(&["0000:00:17.0"]),
        Lacks::Reset,
        "disk 1033:0194",
        Sum::Disk("GANTRY-DISK0004"),
    ),
];

/// The card that stays with the host: the neighbour of all others.
const NEIGHBOUR: &str = "0000:03:00.0";

const CARDS: &[Row] = &[
    row(
        "igb",
        From::Host(&["0000:02:00.0"]),
        Lacks::Nothing,
        "nic 8086:10c9",
        Sum::Served,
    ),
    row(
        "igb-vf",
        From::Card(NEIGHBOUR),
        Lacks::Nothing,
        "nic 8086:10ca",
        Sum::Served,
    ),
    row(
        "e1000",
        From::Host(&["0000:00:15.0"]),
        Lacks::Reset,
        "nic 8086:100e",
        Sum::Served,
    ),
    row(
        "virtio-net",
        From::Host(&["0000:04:00.0"]),
        Lacks::Nothing,
        "nic 1af4:1041",
        Sum::Served,
    ),
];

/// Memory of the guests, and how much of it their kernels use: `edu` is given some of the rest.
const MEMORY: &str = "512M";
const USED: &str = "mem=448M";

const OTHERS: &[Row] = &[
    row(
        "nvme-behind-switch",
        From::Host(&["0000:07:00.0"]),
        Lacks::Nothing,
        "disk 1b36:0010",
        Sum::Disk("GANTRY-DISK0002"),
    ),
    row(
        "display-and-audio",
        From::Host(&["0000:00:18.0", "0000:00:18.1"]),
        Lacks::ResetAndInterrupts,
        "display 1234:1111",
        Sum::Edid,
    ),
    row(
        "edu",
        From::Host(&["0000:00:19.0"]),
        Lacks::Reset,
        "edu 1234:11e8 0x1d000000",
        Sum::None,
    ),
    row(
        "bar-of-8-gib",
        From::Host(&["0000:00:1a.0"]),
        Lacks::ResetAndInterrupts,
        "testdev 1b36:0005 8",
        Sum::None,
    ),
];

const HUGE: &[Row] = &[row(
    "bar-of-64-gib",
    From::Host(&["0000:00:1b.0"]),
    Lacks::ResetAndInterrupts,
    "testdev 1b36:0005 64",
    Sum::None,
)];

const MEDIATED: &[Row] = &[
    row(
        "mtty",
        From::Module("mtty", "mtty-2"),
        // Its INTx takes no eventfd that unmasks it.
        Lacks::ResetAndInterrupts,
        "mtty 4348:3253",
        Sum::None,
    ),
    row(
        "mdpy",
        From::Module("mdpy", "mdpy-vga"),
        Lacks::ResetAndInterrupts,
        "mdpy 1b36:000f",
        Sum::None,
    ),
];

fn disks_by_group(host: &Host) -> Result<()> {
    drive(host, &[DISKS], Backend::Group)
}

fn disks_by_cdev(host: &Host) -> Result<()> {
    drive(host, &[DISKS], Backend::Cdev)
}

fn cards_by_group(host: &Host) -> Result<()> {
    let _neighbour = Neighbour::new(host)?;
    drive(host, &[CARDS], Backend::Group)
}

fn cards_by_cdev(host: &Host) -> Result<()> {
    let _neighbour = Neighbour::new(host)?;
    drive(host, &[CARDS], Backend::Cdev)
}

fn others_by_group(host: &Host) -> Result<()> {
    drive(host, &[OTHERS, HUGE], Backend::Group)
}

fn others_by_cdev(host: &Host) -> Result<()> {
    drive(host, &[OTHERS, HUGE], Backend::Cdev)
}

fn mediated_devices_by_group(host: &Host) -> Result<()> {
    let _modules = Modules::new(host)?;
    drive(host, &[MEDIATED], Backend::Group)
}

fn mediated_devices_by_cdev(host: &Host) -> Result<()> {
    let _modules = Modules::new(host)?;
    drive(host, &[MEDIATED], Backend::Cdev)
}

impl Row {
    /// Its group, as `/etc/gantry/groups.json` has it.
    fn group(&self) -> Value {
        let name = self.name;
        match self.from {
            From::Host(functions) => {
                let rules = functions.iter().map(|slot| json!({"slot": slot}));
                json!({"name": name, "rules": rules.collect::<Vec<_>>()})
            }
            From::Card(card) => {
                let sriov = json!({"pf": card, "count": 1});
                json!({"name": name, "type": "sriov-nic", "bind": "demand", "sriov": sriov})
            }
            From::Module(_, kind) => {
                json!({"name": name, "type": "vgpu", "vgpu": {"type": kind}})
            }
        }
    }

    /// Its entry in the VM's file.
    fn entry(&self) -> Value {
        let mut entry = json!({"group": self.name, "id": self.name});
        if self.lacks != Lacks::Nothing {
            entry["allow_no_reset"] = json!(true);
        }
        if self.lacks == Lacks::ResetAndInterrupts {
            entry["interrupts"] = json!("none");
        }
        entry
    }

    /// The same as flags of `gantry vm attach`.
    fn flags(&self) -> &'static str {
        match self.lacks {
            Lacks::Nothing => "",
            Lacks::Reset => "--allow-no-reset",
            Lacks::ResetAndInterrupts => crate::pool::LACKING,
        }
    }

    fn sum(&self, host: &Host) -> Result<String> {
        let script = match self.sum {
            Sum::None => return Ok(String::new()),
            Sum::Disk(serial) => return Ok(disk::checksum(serial)),
            Sum::Served => "sha256sum </tmp/www/data",
            Sum::Edid => "sha256sum </tmp/edid",
        };
        let sum = host.sh(script).output()?.success()?.text();
        Ok(sum.split(' ').next().unwrap_or_default().to_owned())
    }
}

/// A guest has the devices at boot, drives them, gives each back, gets it again, and drives it again.
fn drive(host: &Host, rows: &[&[Row]], backend: Backend) -> Result<()> {
    let rows: Vec<&Row> = rows.iter().copied().flatten().collect();
    let mut table = Table {
        backend,
        failed: Vec::new(),
    };
    for row in &rows {
        if let Sum::Edid = row.sum {
            let edid = "cat /sys/class/drm/card*-*/edid >/tmp/edid && [ -s /tmp/edid ]";
            host.sh(edid).output()?.success()?;
        }
    }
    let groups: Vec<Value> = rows.iter().map(|row| row.group()).collect();
    let functions = rows.iter().filter_map(|row| match row.from {
        From::Host(functions) => Some(functions),
        _ => None,
    });
    let functions: Vec<&str> = functions.flatten().copied().collect();
    let _pool = Pool::of_groups(host, &json!(groups), &functions)?;
    let mut vm = Vm::new("shell").memory(MEMORY).append(USED);
    vm.file["devices"] = rows.iter().map(|row| row.entry()).collect();
    let names: Vec<&str> = rows.iter().map(|row| row.name).collect();
    vm.file["hotplug"] = json!({"slots": 16, "groups": names});
    vm.file["platform"]["iommufd"] = json!(backend == Backend::Cdev);
    let mut running = vm.start(host)?;
    if !running.says("guest: init")? {
        let reason = running.end()?.errors;
        for (row, when) in rows
            .iter()
            .flat_map(|row| When::BOTH.map(|when| (row, when)))
        {
            table.cell(row, when, Err(reason.clone()))?;
        }
        return table.check();
    }
    for row in &rows {
        let result = driven(host, &mut running, row)?;
        table.cell(row, When::Boot, result)?;
    }
    for row in &rows {
        let again = format!(
            "gantry vm detach vm {0} && gantry vm attach vm --group {0} --id {0} --no-wait {1}",
            row.name,
            row.flags()
        );
        let output = host.sh(&again).output()?;
        let result = match output.clone().success() {
            Ok(_) => driven(host, &mut running, row)?,
            Err(_) => Err(output.errors()),
        };
        table.cell(row, When::Hot, result)?;
    }
    running.types("poweroff -f")?;
    running.end()?.powered_off()?;
    table.check()
}

/// What the guest says of a device that it has driven.
fn driven(host: &Host, running: &mut Running, row: &Row) -> Result<Result<(), String>> {
    running.types(&format!("drive {} {}", row.drive, row.sum(host)?))?;
    let said = running.line("guest: drive=")?;
    Ok(if said == "ok" { Ok(()) } else { Err(said) })
}

/// The cells of one backend.
struct Table {
    backend: Backend,
    failed: Vec<String>,
}

impl Table {
    fn cell(&mut self, row: &Row, when: When, result: Result<(), String>) -> Result<()> {
        let reason = result.err().map(|reason| reason.trim().to_owned());
        if let Some(reason) = &reason {
            self.failed.push(format!("{} {when}: {reason}", row.name));
        }
        Cell {
            device: row.name.to_owned(),
            when,
            backend: self.backend,
            reason,
        }
        .record()
    }

    fn check(self) -> Result<()> {
        ensure!(self.failed.is_empty(), "{}", self.failed.join("\n"));
        Ok(())
    }
}

/// The host's card on the hub of all others, with a file that it serves; dropping it takes it down, and its virtual
/// function away.
pub struct Neighbour<'h>(&'h Host);

impl<'h> Neighbour<'h> {
    /// Sets it up.
    pub fn new(host: &'h Host) -> Result<Self> {
        let neighbour = Self(host);
        let script = format!(
            "mkdir -p /tmp/www && head -c 2097152 /dev/urandom >/tmp/www/data && httpd -h /tmp/www &&
             cd /sys/bus/pci/devices/{NEIGHBOUR}/net && ip address add 10.9.0.1/24 dev * && ip link set * up"
        );
        host.sh(&script).output()?.success()?;
        Ok(neighbour)
    }
}

impl Drop for Neighbour<'_> {
    fn drop(&mut self) {
        let script = format!(
            "gantry group deactivate igb-vf; kill $(pidof httpd); cd /sys/bus/pci/devices/{NEIGHBOUR}/net && ip link set * down &&
             ip address flush dev *"
        );
        let _ = self.0.sh(&script).output();
    }
}

/// The modules of mediated devices; dropping it removes them.
struct Modules<'h>(&'h Host);

impl<'h> Modules<'h> {
    fn new(host: &'h Host) -> Result<Self> {
        let modules = Self(host);
        for row in MEDIATED {
            let From::Module(module, _) = row.from else {
                bail!("{} is no mediated device", row.name);
            };
            let load = format!("modprobe {module}");
            host.sh(&load).output()?.success()?;
        }
        Ok(modules)
    }
}

impl Drop for Modules<'_> {
    fn drop(&mut self) {
        let script = "for try in $(seq 100); do
                rmmod mtty mdpy mdev 2>/dev/null; [ ! -e /sys/module/mdev ] && exit; sleep 0.1
            done";
        let _ = self.0.sh(script).output();
    }
}
