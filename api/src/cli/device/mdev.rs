//! `gantry device mdev`: what makes mediated devices, and those there are.

use std::io::{self, Write};

use clap::Args;
use gantry_resources::base::HostPaths;
use gantry_resources::inventory::{DeviceState, MdevDevice, MdevParent, Mdevs};
use gantry_resources::pools::Groups;
use serde::Serialize;

use super::state_word;
use crate::output::{print, print_json};
use crate::report::Failure;
use crate::table::{self, Column, Shrink, Table, terminal_width};

#[derive(Debug, Args)]
#[command(after_help = "\
A VM gets a mediated device from a group of type \"vgpu\":
  {\"name\": \"vgpus\", \"type\": \"vgpu\", \"vgpu\": {\"type\": \"nvidia-222\"}}
It is made when the VM starts, and removed when it ends. With \"uuids\", `gantry group activate` makes \
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

const fn column(title: &'static str, shrink: Shrink) -> Column {
    Column { title, shrink }
}

const TYPES: [Column; 4] = [
    column("PARENT", Shrink::Never),
    column("TYPE", Shrink::Never),
    column("NAME", Shrink::Cut(12)),
    column("AVAILABLE", Shrink::Never),
];

const DEVICES: [Column; 7] = [
    column("UUID", Shrink::Never),
    column("TYPE", Shrink::Never),
    column("PARENT", Shrink::Drop(1)),
    column("IOMMU", Shrink::Drop(0)),
    column("STATE", Shrink::Never),
    column("GROUP", Shrink::Never),
    column("VM", Shrink::Never),
];

#[derive(Debug, Serialize)]
struct Shown<'a> {
    parents: &'a [MdevParent],
    devices: Vec<Row<'a>>,
}

/// A mediated device with what is known about it from elsewhere.
#[derive(Debug, Serialize)]
pub struct Row<'a> {
    #[serde(flatten)]
    device: &'a MdevDevice,
    #[serde(flatten)]
    state: DeviceState,
    group: Option<&'a str>,
}

pub fn show(args: &MdevArgs, paths: &HostPaths) -> Result<(), Failure> {
    let mdevs = Mdevs::read(paths).map_err(Failure::host)?;
    let groups = Groups::load(paths).map_err(Failure::host)?;
    let devices = rows(&mdevs, &groups);
    if args.json {
        return print_json(&Shown {
            parents: &mdevs.parents,
            devices,
        });
    }
    print(|out| {
        if mdevs.parents.is_empty() {
            return writeln!(out, "Nothing on this host makes mediated devices.");
        }
        write!(out, "{}", types(&mdevs.parents, args.sort.as_deref()))?;
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

/// A table of mediated devices that fits the terminal.
pub fn table(out: &mut dyn Write, devices: &[Row<'_>], sort: Option<&str>) -> io::Result<()> {
    let table = Table::new(&DEVICES, devices.iter().map(Row::cells).collect());
    write!(out, "{}", table.sorted(sort).fit(terminal_width()))
}

fn types(parents: &[MdevParent], sort: Option<&str>) -> Table {
    let of = |parent: &MdevParent| {
        let name = parent.name.clone();
        let cells = parent.types.iter().map(move |one| {
            let title = one.title.clone().unwrap_or_else(|| "-".to_owned());
            vec![
                name.clone(),
                one.id.clone(),
                title,
                one.available.to_string(),
            ]
        });
        cells.collect::<Vec<_>>()
    };
    let table = Table::new(&TYPES, parents.iter().flat_map(of).collect());
    table.sorted(sort).fit(terminal_width())
}

impl Row<'_> {
    fn cells(&self) -> Vec<String> {
        let text = |value: Option<&str>| value.unwrap_or("-").to_owned();
        let vm = match &self.state {
            DeviceState::Assigned { vm } => vm.as_deref(),
            _ => None,
        };
        let group = self.device.iommu_group;
        vec![
            self.device.uuid.to_string(),
            self.device.kind.clone(),
            self.device.parent.clone(),
            group.map_or("-".to_owned(), |group| group.to_string()),
            state_word(&self.state).to_owned(),
            text(self.group),
            text(vm),
        ]
    }
}
