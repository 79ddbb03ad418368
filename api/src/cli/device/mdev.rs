//! `gantry device mdev`: lists mediated devices and their parents.

use std::io::{self, Write};

use clap::Args;
use gantry_resources::base::HostPaths;
use gantry_resources::inventory::{DeviceState, MdevDevice, MdevParent, Mdevs};
use gantry_resources::pools::Groups;
use serde::Serialize;

use super::state_word;
use crate::output::{print, print_json};
use crate::report::Failure;
use crate::table::{self, Column, Shrink, cell, write_table};

#[derive(Debug, Args)]
#[command(after_help = "\
A VM gets a mediated device from a group of type \"vgpu\":
  {\"name\": \"vgpus\", \"type\": \"vgpu\", \"vgpu\": {\"type\": \"nvidia-222\"}}
It is created when the VM starts, and removed when it ends. With \"uuids\", `gantry group activate` creates \
them ahead, and they stay.

Examples:
  gantry device mdev
  gantry device mdev --sort state
  gantry device mdev --json")]
pub struct MdevArgs {
    /// Show everything as JSON
    #[arg(long)]
    json: bool,
    /// Column to sort by; a table without it stays as it is
    #[arg(long, value_name = "COLUMN")]
    #[arg(value_parser = table::column(&[TYPES.as_slice(), DEVICES.as_slice()].concat()))]
    sort: Option<String>,
}

const TYPES: [Column; 4] = [
    Column::full("parent"),
    Column::full("type"),
    Column::new("name", Shrink::Cut(12)),
    Column::full("available"),
];

pub const DEVICES: [Column; 7] = [
    Column::full("uuid"),
    Column::full("type"),
    Column::new("parent", Shrink::Drop(1)),
    Column::new("iommu", Shrink::Drop(0)),
    Column::full("state"),
    Column::full("group"),
    Column::full("vm"),
];

#[derive(Debug, Serialize)]
struct MdevList<'a> {
    parents: &'a [MdevParent],
    devices: Vec<Row<'a>>,
}

/// A mediated device with its state and group.
#[derive(Debug, Serialize)]
pub struct Row<'a> {
    #[serde(flatten)]
    device: &'a MdevDevice,
    #[serde(flatten)]
    state: DeviceState,
    group: Option<&'a str>,
}

pub fn show(args: &MdevArgs, paths: &HostPaths) -> Result<(), Failure> {
    let mdevs = Mdevs::read(paths)?;
    let groups = Groups::load(paths)?;
    let devices = rows(&mdevs, &groups);
    if args.json {
        return print_json(&MdevList {
            parents: &mdevs.parents,
            devices,
        });
    }
    print(|out| {
        if mdevs.parents.is_empty() {
            return writeln!(out, "Nothing on this host makes mediated devices.");
        }
        let types = mdevs.parents.iter().flat_map(types).collect();
        write_table(out, &TYPES, types, args.sort.as_deref())?;
        writeln!(out)?;
        match devices.as_slice() {
            [] => writeln!(out, "There are no mediated devices."),
            devices => table(out, devices, args.sort.as_deref()),
        }
    })
}

/// The mediated devices of the host.
pub fn rows<'a>(mdevs: &'a Mdevs, groups: &'a Groups) -> Vec<Row<'a>> {
    let row = |device: &'a MdevDevice| Row {
        device,
        state: device.state(),
        group: groups
            .group_of_mdev(device)
            .map(|group| group.name.as_str()),
    };
    mdevs.devices.iter().map(row).collect()
}

/// Writes mediated devices as a table.
pub fn table(out: &mut dyn Write, devices: &[Row<'_>], sort: Option<&str>) -> io::Result<()> {
    write_table(
        out,
        &DEVICES,
        devices.iter().map(Row::cells).collect(),
        sort,
    )
}

/// The cells of each type that a parent can make.
fn types(parent: &MdevParent) -> impl Iterator<Item = Vec<String>> {
    parent.types.iter().map(|one| {
        let (parent, available) = (parent.name.clone(), one.available.to_string());
        vec![parent, one.id.clone(), cell(one.title.as_ref()), available]
    })
}

impl Row<'_> {
    fn cells(&self) -> Vec<String> {
        let vm = match &self.state {
            DeviceState::Assigned { vm } => vm.as_deref(),
            _ => None,
        };
        vec![
            self.device.uuid.to_string(),
            self.device.kind.clone(),
            self.device.parent.clone(),
            cell(self.device.iommu_group),
            state_word(&self.state).to_owned(),
            cell(self.group),
            cell(vm),
        ]
    }
}
