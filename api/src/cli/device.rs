//! `gantry device`: lists the host's devices and moves them between the host and VMs.

mod list;
mod mdev;
mod nvme;
mod persist;
mod tree;
pub mod usb;

pub use list::state_word;

use std::fmt;

use clap::{Args, Subcommand};
use gantry_resources::base::{HostBdf, HostPaths};
use gantry_resources::inventory::{HostDevice, NoDriver, release_quarantine, scan};
use gantry_resources::moving::{
    self, BindError, BindReport, BindRequest, ChildWriter, SysfsWrite, SysfsWriter,
};
use gantry_resources::pools::{GroupFiles, ResourceGroup};
use serde::Serialize;

use super::group_change::{ChangeReport, GroupSnapshot, Hardware};
use crate::output::OutputArgs;
use crate::report::Failure;
use crate::signals::SignalsHeld;

#[derive(Debug, Subcommand)]
#[command(after_help = "Example: gantry device list")]
pub enum DeviceCommand {
    /// List every PCI device of the host, or its NVMe or USB devices with their own fields
    List(list::ListArgs),
    /// Take devices from the host's drivers and give them to vfio-pci, ready for VMs
    ///
    /// The devices of one IOMMU group move together; bridges stay. All of them move or none does. A
    /// device that the host itself needs is refused.
    Detach(DetachArgs),
    /// Give devices back to the drivers they had
    ///
    /// The devices of one IOMMU group move together. A device that a VM has is refused.
    Reattach(ReattachArgs),
    /// Show which PCI functions are behind which ports, with IOMMU groups, NUMA nodes, groups and VMs
    Tree(tree::TreeArgs),
    /// List mediated devices (vGPUs), and the devices that can make them
    Mdev(mdev::MdevArgs),
    /// Print udev rules, modprobe options or a systemd unit that bind devices at boot
    Persist(persist::PersistArgs),
    /// Release a device from quarantine: one that hung, or that was for one use
    ReleaseQuarantine(ReleaseArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry device release-quarantine 0000:01:00.0")]
pub struct ReleaseArgs {
    /// PCI addresses, such as 0000:01:00.0 or 01:00.0
    #[arg(value_name = "BDF", required = true)]
    devices: Vec<HostBdf>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Devices that were released from quarantine.
#[derive(Debug, Serialize)]
struct ReleaseReport {
    done: &'static str,
    devices: Vec<HostBdf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry device detach 0000:01:00.0
  gantry device detach 01:00.0 02:00.0 --dry-run
  gantry device detach 0b:00.0 0c:00.0 --group gpus")]
pub struct DetachArgs {
    #[command(flatten)]
    common: MoveArgs,
    /// Detach this device even if the host uses it; whatever uses it loses it
    #[arg(long = "override", value_name = "BDF")]
    overrides: Vec<HostBdf>,
    /// Also add the devices to this group, with a rule for each; the group is created if it does not exist
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry device reattach 0000:01:00.0
  gantry device reattach 01:00.0 02:00.0 --dry-run")]
pub struct ReattachArgs {
    #[command(flatten)]
    common: MoveArgs,
}

#[derive(Debug, Args)]
struct MoveArgs {
    /// PCI addresses, such as 0000:01:00.0 or 01:00.0
    #[arg(value_name = "BDF", required = true)]
    devices: Vec<HostBdf>,
    /// Only show what would be done
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn device(command: DeviceCommand, paths: &HostPaths) -> Result<(), Failure> {
    match command {
        DeviceCommand::List(args) => list::list(&args, paths),
        DeviceCommand::Detach(args) => detach(&args, paths),
        DeviceCommand::Tree(args) => tree::show(&args, paths),
        DeviceCommand::Mdev(args) => mdev::show(&args, paths),
        DeviceCommand::Persist(args) => persist::show(&args, paths),
        DeviceCommand::ReleaseQuarantine(args) => release(&args, paths),
        DeviceCommand::Reattach(args) => {
            let report = move_devices(&args.common, &[], moving::reattach, paths)?;
            let output = args.common.output;
            output.print(&report, |out| write!(out, "{report}"))
        }
    }
}

fn release(args: &ReleaseArgs, paths: &HostPaths) -> Result<(), Failure> {
    let mut devices = Vec::new();
    let all = args.devices.iter().try_for_each(|&bdf| {
        release_quarantine(paths, bdf)?;
        devices.push(bdf);
        args.output
            .print_text(|out| writeln!(out, "{bdf}: released"))
    });
    // Devices before the one that failed are released.
    if devices.is_empty() {
        return all;
    }
    let done = "released";
    let told = args
        .output
        .print(&ReleaseReport { done, devices }, |_| Ok(()));
    all.and(told)
}

/// Detaches devices and adds their rules to a group. The rules are checked before a device is touched.
fn detach(args: &DetachArgs, paths: &HostPaths) -> Result<(), Failure> {
    let DetachArgs {
        common,
        overrides,
        group,
    } = args;
    if let Some(group) = group {
        drop(with_rules(paths, group, &common.devices)?);
    }
    let mut report = move_devices(common, overrides, moving::detach, paths)?;
    common.output.print_text(|out| write!(out, "{report}"))?;
    let group = group.as_ref().filter(|_| !common.dry_run);
    let ruled = group.map_or(Ok(()), |group| {
        let (files, changed) = with_rules(paths, group, &common.devices)?;
        let changed = changed.saved(files.save()?);
        common.output.print_text(|out| writeln!(out, "{changed}"))?;
        report.group = Some(changed);
        Ok(())
    });
    // The devices have moved even if the group could not be changed.
    let told = common.output.print(&report, |_| Ok(()));
    ruled.and(told)
}

/// Detaches devices and puts them into a group, as `gantry device detach` does.
pub fn detach_into(
    devices: &[HostBdf],
    group: Option<&str>,
    paths: &HostPaths,
) -> Result<(), Failure> {
    let args = DetachArgs {
        common: MoveArgs {
            devices: devices.to_vec(),
            dry_run: false,
            output: OutputArgs::TEXT,
        },
        overrides: Vec::new(),
        group: group.map(str::to_owned),
    };
    detach(&args, paths)
}

/// Shows which devices would leave which drivers.
pub fn would_detach(devices: &[HostBdf], paths: &HostPaths) -> Result<(), Failure> {
    let args = MoveArgs {
        devices: devices.to_vec(),
        dry_run: true,
        output: OutputArgs::TEXT,
    };
    let report = move_devices(&args, &[], moving::detach, paths)?;
    let moves = MoveReport {
        // The writes are for those who ask for them.
        writes: Vec::new(),
        ..report
    };
    crate::output::print(|out| write!(out, "{moves}"))
}

/// The group files with a rule for each device in this group, not yet written, and what that changes.
fn with_rules(
    paths: &HostPaths,
    group: &str,
    devices: &[HostBdf],
) -> Result<(GroupFiles, ChangeReport), Failure> {
    let read = |bdf: &HostBdf| HostDevice::read(paths, *bdf).map_err(Failure::host);
    let devices: Vec<HostDevice> = devices.iter().map(read).collect::<Result<_, _>>()?;
    let hardware = Hardware::read(paths)?;
    let mut files = GroupFiles::open(paths)?;
    let before = GroupSnapshot::of(group, &files, &hardware)?;
    if files.groups()?.get(group).is_none() {
        let new = ResourceGroup::named(group);
        files.create(new)?;
    }
    files.add(group, &devices)?;
    // This checks the group as it would be read back.
    let changed = before.changed(group, &files, &hardware)?;
    Ok((files, changed))
}

type Bind = fn(&HostPaths, &dyn SysfsWriter, &BindRequest) -> Result<BindReport, BindError>;

fn move_devices(
    args: &MoveArgs,
    overrides: &[HostBdf],
    bind: Bind,
    paths: &HostPaths,
) -> Result<MoveReport, Failure> {
    let MoveArgs {
        devices, dry_run, ..
    } = args;
    let request = BindRequest {
        devices,
        overrides,
        dry_run: *dry_run,
    };
    // A ctrl-c between two writes would leave a device with no driver.
    let _whole = SignalsHeld::new();
    if !dry_run {
        super::reap_or_warn(paths);
    }
    let before = scan(paths)?;
    let report = bind(paths, &ChildWriter::default(), &request)?;
    Ok(MoveReport {
        dry_run: *dry_run,
        devices: moves(&report, *dry_run, &before, paths)?,
        writes: report.writes,
        group: None,
    })
}

/// What a detach or reattach did, or would do in a dry run.
#[derive(Debug, Serialize)]
struct MoveReport {
    dry_run: bool,
    devices: Vec<Move>,
    writes: Vec<SysfsWrite>,
    /// The group that the devices were added to.
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<ChangeReport>,
}

/// What happened to one device.
#[derive(Debug, Serialize)]
struct Move {
    bdf: HostBdf,
    iommu_group: Option<u32>,
    /// The driver before.
    from: Option<String>,
    /// The driver now; in a dry run, as it was.
    to: Option<String>,
    moved: bool,
    /// Why it has no driver now.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// Why a device has no driver.
fn problem(paths: &HostPaths, device: &HostDevice) -> String {
    match NoDriver::of(paths, device) {
        NoDriver::NotLoaded(module) => format!("`modprobe {module}` loads one that takes it"),
        NoDriver::Loaded => "its driver does not take it: see dmesg".to_owned(),
        NoDriver::NoModule => "no driver that is loaded takes it".to_owned(),
    }
}

/// The moves of all devices. Their drivers are read again afterwards, since the kernel chooses them.
fn moves(
    report: &BindReport,
    dry_run: bool,
    before: &[HostDevice],
    paths: &HostPaths,
) -> Result<Vec<Move>, Failure> {
    let moved = report.moved.iter().map(|bdf| (*bdf, true));
    let all = moved.chain(report.unchanged.iter().map(|bdf| (*bdf, false)));
    let one = |(bdf, moved)| {
        let was = before.iter().find(|device| device.bdf == bdf);
        let from = was.and_then(|device| device.driver.clone());
        let now = match moved && !dry_run {
            true => Some(HostDevice::read(paths, bdf)?),
            false => None,
        };
        let bare = now.as_ref().filter(|device| device.driver.is_none());
        let problem = bare.map(|device| problem(paths, device));
        let to = now.map_or_else(|| from.clone(), |device| device.driver);
        let iommu_group = was.and_then(|device| device.iommu_group);
        Ok(Move {
            bdf,
            iommu_group,
            from,
            to,
            moved,
            problem,
        })
    };
    all.map(one).collect()
}

impl fmt::Display for MoveReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for Move {
            bdf,
            iommu_group,
            from,
            to,
            moved,
            problem,
        } in &self.devices
        {
            let same = from == to;
            let from = from.as_deref().unwrap_or("no driver");
            let to = to.as_deref().unwrap_or("no driver");
            match (moved, self.dry_run) {
                (true, true) => write!(f, "{bdf}: would leave {from}")?,
                (true, false) if same => write!(f, "{bdf}: still with {to}")?,
                (true, false) => write!(f, "{bdf}: {from} -> {to}")?,
                (false, _) => write!(f, "{bdf}: already with {from}")?,
            }
            match iommu_group {
                Some(group) => writeln!(f, " (IOMMU group {group})")?,
                None => writeln!(f)?,
            }
            if let Some(problem) = problem {
                writeln!(f, "  {problem}")?;
            }
        }
        for write in self.writes.iter().filter(|_| self.dry_run) {
            writeln!(f, "  write {:?} to {}", write.value, write.path.display())?;
        }
        Ok(())
    }
}
