//! `gantry device`: what the host has, and moving it between the host and the pools.

mod list;

use clap::{Args, Subcommand};
use gantry_resources::{
    BindReport, BindRequest, ChildWriter, HostBdf, HostDevice, HostPaths, detach, reattach, scan,
};
use serde::Serialize;

use crate::output::{print, print_json};
use crate::report::Failure;

#[derive(Debug, Subcommand)]
#[command(after_help = "Example: gantry device list")]
pub enum DeviceCommand {
    /// List every PCI device of the host
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
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry device detach 0000:01:00.0
  gantry device detach 01:00.0 02:00.0 --dry-run")]
pub struct DetachArgs {
    #[command(flatten)]
    common: MoveArgs,
    /// Detach this device although the host uses it; whatever uses it loses it
    #[arg(long, value_name = "BDF")]
    force_host_device: Vec<HostBdf>,
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
    /// Show the result as JSON
    #[arg(long)]
    json: bool,
}

pub fn device(command: DeviceCommand, paths: &HostPaths) -> Result<(), Failure> {
    let writer = ChildWriter::default();
    match command {
        DeviceCommand::List(args) => list::list(&args, paths),
        DeviceCommand::Detach(DetachArgs {
            common,
            force_host_device,
        }) => {
            let before = scan(paths).map_err(Failure::host)?;
            let request = request(&common, &force_host_device);
            let report = detach(paths, &writer, &request).map_err(Failure::host)?;
            show(&common, &report, &moves(&common, &report, &before, paths)?)
        }
        DeviceCommand::Reattach(ReattachArgs { common }) => {
            let before = scan(paths).map_err(Failure::host)?;
            let request = request(&common, &[]);
            let report = reattach(paths, &writer, &request).map_err(Failure::host)?;
            show(&common, &report, &moves(&common, &report, &before, paths)?)
        }
    }
}

fn request<'a>(common: &'a MoveArgs, despite_guard: &'a [HostBdf]) -> BindRequest<'a> {
    BindRequest {
        devices: &common.devices,
        despite_guard,
        dry_run: common.dry_run,
    }
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
}

/// Drivers are read again afterwards: what counts is what the kernel did.
fn moves(
    common: &MoveArgs,
    report: &BindReport,
    before: &[HostDevice],
    paths: &HostPaths,
) -> Result<Vec<Move>, Failure> {
    let moved = report.moved.iter().map(|bdf| (*bdf, true));
    let all = moved.chain(report.unchanged.iter().map(|bdf| (*bdf, false)));
    all.map(|(bdf, moved)| {
        let was = before.iter().find(|device| device.bdf == bdf);
        let from = was.and_then(|device| device.driver.clone());
        let to = if moved && !common.dry_run {
            HostDevice::read(paths, bdf).map_err(Failure::host)?.driver
        } else {
            from.clone()
        };
        let iommu_group = was.and_then(|device| device.iommu_group);
        Ok(Move {
            bdf,
            iommu_group,
            from,
            to,
            moved,
        })
    })
    .collect()
}

fn show(common: &MoveArgs, report: &BindReport, moves: &[Move]) -> Result<(), Failure> {
    if common.json {
        return print_json(&json(common, report, moves));
    }
    print(|out| {
        for device in moves {
            writeln!(out, "{}", sentence(device, common.dry_run))?;
        }
        let writes = report.writes.iter().filter(|_| common.dry_run);
        for write in writes {
            writeln!(out, "  write {:?} to {}", write.value, write.path.display())?;
        }
        Ok(())
    })
}

fn sentence(device: &Move, dry_run: bool) -> String {
    let Move {
        bdf,
        iommu_group,
        from,
        to,
        moved,
    } = device;
    let driver = |name: &Option<String>| name.clone().unwrap_or_else(|| "no driver".to_owned());
    let group = match iommu_group {
        Some(group) => format!("IOMMU group {group}"),
        None => "no IOMMU group".to_owned(),
    };
    match (moved, dry_run) {
        (true, true) => format!("{bdf}: would leave {} ({group})", driver(from)),
        (true, false) => format!("{bdf}: {} -> {} ({group})", driver(from), driver(to)),
        (false, _) => format!("{bdf}: already with {} ({group})", driver(from)),
    }
}

fn json(common: &MoveArgs, report: &BindReport, moves: &[Move]) -> serde_json::Value {
    let writes = report.writes.iter();
    let writes = writes.map(|write| serde_json::json!({"path": write.path, "value": write.value}));
    serde_json::json!({
        "dry_run": common.dry_run,
        "devices": moves,
        "writes": writes.collect::<Vec<_>>(),
    })
}
