//! `gantry group activate|deactivate`: create and destroy the virtual functions or vGPUs of a group.

use std::io::{self, Write};

use clap::Args;
use gantry_resources::base::HostPaths;
use gantry_resources::making::{
    HostAccess, Netlink, SriovError, SriovReport, VgpuError, VgpuReport, activate, deactivate,
    make_ahead, unmake_ahead,
};
use gantry_resources::moving::{ChildWriter, SysfsWriter};
use gantry_resources::pools::{Bind, Groups, ResourceGroup};
use serde::Serialize;

use crate::output::{print, print_json};
use crate::report::{Failure, USAGE};
use crate::signals::SignalsHeld;

#[derive(Debug, Args)]
#[command(after_help = "\
A group's \"sriov\" says of which device, how many, and what each is set to:
  {\"name\": \"vfs\", \"type\": \"sriov-nic\",
    \"sriov\": {\"pf\": \"03:00.0\", \"count\": 4, \"mac\": \"52:54:00:00:01:00\",
      \"vlan\": 100, \"spoof_check\": true}}
`gantry schema groups` lists all keys. Functions in use keep their settings, and their number cannot change. \
In a group of type \"vgpu\", the devices of \"uuids\" are created.

Examples:
  gantry group activate vfs --dry-run
  gantry group activate vfs
  gantry group activate --boot")]
pub struct ActivateArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// All groups that say "bind": "boot"; for a unit that runs when the host boots
    #[arg(long, conflicts_with = "names")]
    boot: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Refused while a VM, the host or another program uses one of them.

Examples:
  gantry group deactivate vfs --dry-run
  gantry group deactivate vfs")]
pub struct DeactivateArgs {
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct CommonArgs {
    /// The groups
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Only show what would be done
    #[arg(long)]
    dry_run: bool,
    /// Show the result as JSON
    #[arg(long)]
    json: bool,
}

pub fn on(args: &ActivateArgs, paths: &HostPaths) -> Result<(), Failure> {
    let groups = Groups::load(paths)?;
    let ahead = |group: &ResourceGroup| {
        let spec = group.vgpu.as_ref();
        spec.is_some_and(|spec| !spec.uuids.is_empty())
    };
    let made = |group: &ResourceGroup| group.sriov.is_some() || ahead(group);
    let boot = |group: &&ResourceGroup| group.bind == Bind::Boot && made(group);
    let chosen = match args.boot {
        true => groups.iter().filter(boot).collect(),
        false => named(&groups, &args.common)?,
    };
    each(&chosen, &args.common, (activate, make_ahead), paths)
}

/// Activates the groups with `bind: boot`.
pub fn at_boot(paths: &HostPaths) -> Result<(), Failure> {
    let common = CommonArgs {
        names: Vec::new(),
        dry_run: false,
        json: false,
    };
    on(&ActivateArgs { common, boot: true }, paths)
}

pub fn off(args: &DeactivateArgs, paths: &HostPaths) -> Result<(), Failure> {
    let groups = Groups::load(paths)?;
    let chosen = named(&groups, &args.common)?;
    each(&chosen, &args.common, (deactivate, unmake_ahead), paths)
}

fn named<'g>(groups: &'g Groups, args: &CommonArgs) -> Result<Vec<&'g ResourceGroup>, Failure> {
    if args.names.is_empty() {
        let made = |group: &&ResourceGroup| group.sriov.is_some() || group.vgpu.is_some();
        let made: Vec<&str> = groups
            .iter()
            .filter(made)
            .map(|group| &*group.name)
            .collect();
        let help = match made.as_slice() {
            [] => "no group has virtual functions or vGPUs: see `gantry group create --help`"
                .to_owned(),
            made => format!("these have virtual functions or vGPUs: {}", made.join(", ")),
        };
        return Err(Failure::new(USAGE, "no group is named").help(help));
    }
    let find = |name: &String| groups.find(name).map_err(Failure::host);
    args.names.iter().map(find).collect()
}

type Change =
    fn(&HostPaths, HostAccess<'_>, &ResourceGroup, bool) -> Result<SriovReport, SriovError>;
type VgpuChange =
    fn(&HostPaths, &dyn SysfsWriter, &ResourceGroup, bool) -> Result<VgpuReport, VgpuError>;

/// The result for one group.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Report {
    Functions(SriovReport),
    Vgpus(VgpuReport),
}

fn each(
    groups: &[&ResourceGroup],
    args: &CommonArgs,
    (functions, vgpus): (Change, VgpuChange),
    paths: &HostPaths,
) -> Result<(), Failure> {
    let links = Netlink::new(paths);
    let host = HostAccess {
        writer: &ChildWriter::default(),
        links: &links,
    };
    // A ctrl-c between two writes would leave functions without settings.
    let _whole = SignalsHeld::new();
    if !args.dry_run {
        crate::cli::reap_or_warn(paths);
    }
    let mut reports = Vec::new();
    for group in groups {
        let dry_run = args.dry_run;
        let report = match group.vgpu {
            Some(_) => vgpus(paths, host.writer, group, dry_run).map(Report::Vgpus)?,
            None => functions(paths, host, group, dry_run).map(Report::Functions)?,
        };
        if !args.json {
            print(|out| match &report {
                Report::Functions(report) => show(out, report, dry_run),
                Report::Vgpus(report) => show_vgpus(out, report, dry_run),
            })?;
        }
        reports.push(report);
    }
    match args.json {
        true => print_json(&reports),
        false => Ok(()),
    }
}

fn show(out: &mut dyn Write, report: &SriovReport, dry_run: bool) -> io::Result<()> {
    let SriovReport {
        group,
        pf,
        interface,
        before,
        after,
        functions,
        left,
        writes,
    } = report;
    let name = interface
        .as_ref()
        .map(|interface| format!(" ({})", interface.name));
    let name = name.unwrap_or_default();
    write!(out, "{group}: {pf}{name} ")?;
    match (before == after, dry_run) {
        (true, _) if writes.is_empty() => writeln!(
            out,
            "has {after} virtual functions already, with the settings of the group"
        )?,
        (true, true) => writeln!(out, "has {after} virtual functions already; to change:")?,
        (true, false) => writeln!(out, "has {after} virtual functions already; changed:")?,
        (false, true) => writeln!(
            out,
            "would have {after} virtual functions instead of {before}"
        )?,
        (false, false) => writeln!(out, "has {after} virtual functions")?,
    }
    if dry_run || before == after {
        writes
            .iter()
            .try_for_each(|write| writeln!(out, "  {write}"))?;
    }
    if !dry_run {
        functions
            .iter()
            .try_for_each(|bdf| writeln!(out, "  {bdf}"))?;
    }
    left.iter()
        .try_for_each(|one| writeln!(out, "  {} is left as it is: {}", one.bdf, one.why))
}

fn show_vgpus(out: &mut dyn Write, report: &VgpuReport, dry_run: bool) -> io::Result<()> {
    let VgpuReport {
        group,
        devices,
        writes,
    } = report;
    let would = if dry_run { "would have" } else { "has" };
    writeln!(out, "{group}: {would} {} mediated devices", devices.len())?;
    if !dry_run {
        return devices
            .iter()
            .try_for_each(|uuid| writeln!(out, "  {uuid}"));
    }
    writes.iter().try_for_each(|write| {
        let path = write.path.display();
        writeln!(out, "  write {:?} to {path}", write.value)
    })
}
