//! `gantry group show`: one group with its rules and devices.

use std::io::{self, Write};

use clap::Args;
use gantry_resources::base::HostPaths;
use gantry_resources::inventory::{HostDevice, Mdevs, scan};
use gantry_resources::pools::{Bind, GroupType, Groups, ResourceGroup, SriovSpec, VgpuSpec};
use serde::Serialize;

use super::list::{Counts, counts_of};
use super::matching::{COLUMNS, MatchedDevice, sort_by, table};
use crate::cli::device::usb;
use crate::cli::group_change::lacking;
use crate::output::{print, print_json};
use crate::report::Failure;
use crate::table::has_column;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry group show gpus
  gantry group show gpus --json")]
pub struct ShowArgs {
    /// The group
    name: String,
    /// Show everything as JSON
    #[arg(long)]
    json: bool,
    /// Column to sort the devices by
    #[arg(long, value_name = "COLUMN", value_parser = sort_by())]
    sort: Option<String>,
}

#[derive(Debug, Serialize)]
struct GroupReport<'a> {
    #[serde(flatten)]
    group: &'a ResourceGroup,
    #[serde(flatten)]
    counts: Option<Counts>,
    file: String,
    devices: Vec<MatchedDevice>,
}

pub fn show(args: &ShowArgs, paths: &HostPaths) -> Result<(), Failure> {
    let groups = Groups::load(paths)?;
    let group = groups.find(&args.name)?;
    let sort = args.sort.as_deref();
    match group.kind {
        GroupType::Usb => has_column(&usb::COLUMNS, sort)?,
        _ => has_column(&COLUMNS, sort)?,
    }
    let devices = scan(paths)?;
    let matched = devices.iter().filter(|device| group.matches(device));
    let shown = GroupReport {
        group,
        counts: counts_of(group, &groups, paths)?,
        file: group.file.display().to_string(),
        devices: matched
            .map(|device| MatchedDevice::new(device, &groups))
            .collect(),
    };
    if args.json {
        return print_json(&shown);
    }
    let lacking = lacking(group, &groups, &devices);
    let mdevs = Mdevs::read(paths)?;
    print(|out| {
        tags(out, group)?;
        if let Some(spec) = &group.sriov {
            functions(out, spec, &devices)?;
        }
        if let Some(spec) = &group.vgpu {
            vgpus(out, spec)?;
        }
        if group.one_time_use {
            writeln!(
                out,
                "use          once: see `gantry device release-quarantine`"
            )?;
        }
        writeln!(out, "file         {}", shown.file)?;
        for (index, rule) in group.rules.iter().enumerate() {
            let text = serde_json::to_string(rule).unwrap_or_default();
            writeln!(out, "rule {:<7} {text}", index + 1)?;
        }
        writeln!(out)?;
        match (group.kind, to_come(group, &mdevs)) {
            (GroupType::Usb, _) => Ok(()),
            (_, Some(words)) if shown.devices.is_empty() => writeln!(out, "{words}"),
            _ => table(out, &shown.devices, sort),
        }?;
        lacking
            .iter()
            .try_for_each(|words| writeln!(out, "{words}"))
    })?;
    match group.kind {
        GroupType::Usb => usb::list_those(
            paths,
            &groups,
            |device| group.matches_usb(device),
            sort,
            false,
        ),
        _ => Ok(()),
    }
}

/// The properties of a group.
fn tags(out: &mut dyn Write, group: &ResourceGroup) -> io::Result<()> {
    writeln!(out, "name         {}", group.name)?;
    writeln!(out, "type         {}", group.kind.word())?;
    if let Some(class) = &group.class {
        writeln!(out, "class        {class}")?;
    }
    if !group.description.is_empty() {
        writeln!(out, "description  {}", group.description)?;
    }
    if let Some(traits) = &group.traits {
        let names: Vec<&str> = traits.names().collect();
        writeln!(out, "traits       {}", names.join(", "))?;
    }
    if let Some(class) = &group.resource_class {
        writeln!(out, "res. class   {class}")?;
    }
    if group.kind != GroupType::Usb {
        writeln!(out, "bind         {}", bind_word(group.bind))?;
    }
    Ok(())
}

fn bind_word(bind: Bind) -> &'static str {
    match bind {
        Bind::Manual => "manual: `gantry device detach`",
        Bind::Boot => "boot: `gantry device persist`",
        Bind::Demand => "demand: when a VM takes a device",
    }
}

/// The virtual functions that a group asks for: how many there are, and what each is set to.
fn functions(out: &mut dyn Write, spec: &SriovSpec, devices: &[HostDevice]) -> io::Result<()> {
    let pf = devices.iter().find(|device| device.bdf == spec.pf);
    let there = match pf.and_then(|pf| pf.sriov) {
        Some(sriov) => format!("{} of {} there", sriov.active, sriov.total),
        None => "which has no SR-IOV here".to_owned(),
    };
    writeln!(out, "functions    {} of {}, {there}", spec.count, spec.pf)?;
    for index in 0..spec.count {
        let wanted = spec.wanted(index);
        let settings = wanted.settings(&wanted);
        if settings.is_empty() {
            return Ok(());
        }
        let words: Vec<String> = settings.iter().map(ToString::to_string).collect();
        writeln!(out, "  vf {index:<8} {}", words.join(", "))?;
    }
    Ok(())
}

/// When the virtual functions or vGPUs of a group are created.
fn to_come(group: &ResourceGroup, mdevs: &Mdevs) -> Option<String> {
    let is_there = |uuid| mdevs.devices.iter().any(|device| device.uuid == uuid);
    let (name, on_demand) = (&group.name, group.bind == Bind::Demand);
    match (&group.sriov, &group.vgpu) {
        (Some(_), _) if on_demand => {
            Some("Its virtual functions are created when a VM asks for one.".to_owned())
        }
        (Some(_), _) => Some(format!(
            "Its virtual functions are not there: `gantry group activate {name}` makes them."
        )),
        (None, Some(spec)) if spec.uuids.is_empty() => Some(
            "A VM's vGPU is created when the VM starts: `gantry device mdev` shows how many can be."
                .to_owned(),
        ),
        (None, Some(spec)) if spec.uuids.iter().all(|&uuid| is_there(uuid)) => {
            Some("Its vGPUs are there: `gantry device mdev` shows them.".to_owned())
        }
        (None, Some(_)) => Some(format!(
            "Its vGPUs are not all there: `gantry group activate {name}` makes them."
        )),
        (None, None) => None,
    }
}

fn vgpus(out: &mut dyn Write, spec: &VgpuSpec) -> io::Result<()> {
    writeln!(out, "vgpu type    {}", spec.kind)?;
    if !spec.parents.is_empty() {
        writeln!(out, "parents      {}", spec.parents.join(" "))?;
    }
    let made = spec.uuids.iter();
    made.enumerate()
        .try_for_each(|(index, uuid)| writeln!(out, "  vgpu {index:<6} {uuid}"))
}
