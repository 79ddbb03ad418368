//! `gantry group alias` and `gantry group device-spec`: OpenStack Nova's words for PCI devices.

use std::collections::BTreeSet;

use clap::Args;
use gantry_resources::allocation::fit;
use gantry_resources::base::HostPaths;
use gantry_resources::inventory::{HostDevice, scan};
use gantry_resources::pools::{
    Alias, DeviceRequest, DeviceSpec, Groups, Placement, change_aliases, change_device_specs,
};
use serde::Serialize;

use super::matching::{self, MatchedDevice, table};
use crate::output::{print, print_json};
use crate::report::Failure;
use crate::table::{Column, Shrink, cell, column, print_table};

#[derive(Debug, Args)]
#[command(after_help = "\
An alias takes devices that are in a group or that a device_spec takes. A VM asks for them with \
\"pci_passthrough:alias\": \"p2000:1\". Built in: qat-vf, qat-dh895xcc-vf, qat-c62x-vf.

Examples:
  gantry group alias
  gantry group alias \\
      '{\"name\": \"p2000\", \"vendor_id\": \"10de\", \"product_id\": \"1c30\"}'
  gantry group alias --remove p2000")]
pub struct AliasArgs {
    /// Aliases to define
    #[arg(value_name = "JSON", value_parser = super::from_json::<Alias>)]
    aliases: Vec<Alias>,
    /// Show the aliases as JSON
    #[arg(long)]
    json: bool,
    /// Remove the aliases of this name; may be given several times
    #[arg(long = "remove", value_name = "NAME")]
    remove: Vec<String>,
    /// Column to sort by
    #[arg(long, value_name = "COLUMN", value_parser = column(&COLUMNS))]
    sort: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry group device-spec
  gantry group device-spec '{\"vendor_id\": \"10de\", \"product_id\": \"1c30\"}'
  gantry group device-spec '{\"address\": \"*:3b:00.*\", \"one_time_use\": true}'
  gantry group device-spec --remove '{\"address\": \"*:3b:00.*\"}'")]
pub struct SpecArgs {
    /// Device specs to add
    #[arg(value_name = "JSON", value_parser = super::from_json::<DeviceSpec>)]
    specs: Vec<DeviceSpec>,
    /// Show the devices as JSON
    #[arg(long)]
    json: bool,
    /// Remove the device spec that says exactly this; may be given several times
    #[arg(long = "remove", value_name = "JSON", value_parser = super::from_json::<DeviceSpec>)]
    remove: Vec<DeviceSpec>,
    /// Column to sort by
    #[arg(long, value_name = "COLUMN", value_parser = column(&matching::COLUMNS))]
    sort: Option<String>,
}

/// An alias with the number of its free devices.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    alternatives: Vec<Alias>,
    free: usize,
}

const COLUMNS: [Column; 4] = [
    Column::full("alias"),
    Column::new("devices", Shrink::Cut(12)),
    Column::full("type"),
    Column::full("free"),
];

pub fn alias(args: AliasArgs, paths: &HostPaths) -> Result<(), Failure> {
    if !args.aliases.is_empty() || !args.remove.is_empty() {
        let added: BTreeSet<String> = args
            .aliases
            .iter()
            .map(|alias| alias.name.clone())
            .collect();
        let file = change_aliases(paths, args.aliases, &args.remove)?;
        let file = file.display();
        return print(|out| {
            for name in args.remove {
                writeln!(out, "alias {name}: removed (from {file})")?;
            }
            let mut added = added.iter();
            added.try_for_each(|name| writeln!(out, "alias {name}: added (in {file})"))
        });
    }
    let groups = Groups::load(paths)?;
    let names = groups.alias_names();
    let requests: Vec<DeviceRequest> = names
        .iter()
        .map(|name| DeviceRequest::alias(name, 0))
        .collect();
    let result = fit(paths, &requests, &Placement::default())?;
    let row = |(name, free): (String, usize)| Row {
        alternatives: groups.alias(&name),
        name,
        free,
    };
    let free = result.requests.iter().map(|request| request.free);
    let rows: Vec<Row> = names.into_iter().zip(free).map(row).collect();
    if args.json {
        return print_json(&rows);
    }
    let cells = rows.iter().map(Row::cells).collect();
    print_table(&COLUMNS, cells, args.sort.as_deref())
}

impl Row {
    fn cells(&self) -> Vec<String> {
        let ids = self.alternatives.iter().map(Alias::ids);
        let mut types = self
            .alternatives
            .iter()
            .filter_map(|alias| alias.device_type);
        vec![
            self.name.clone(),
            ids.collect::<Vec<_>>().join(" "),
            cell(types.next()),
            self.free.to_string(),
        ]
    }
}

pub fn device_spec(args: SpecArgs, paths: &HostPaths) -> Result<(), Failure> {
    if !args.specs.is_empty() || !args.remove.is_empty() {
        let (added, removed) = (args.specs.len(), args.remove.len());
        let file = change_device_specs(paths, args.specs, &args.remove)?;
        let done = [(added, "added"), (removed, "removed")];
        let done = done.iter().filter(|(count, _)| *count > 0);
        let done: Vec<String> = done
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        let file = file.display();
        return print(|out| writeln!(out, "device_spec: {} (in {file})", done.join(", ")));
    }
    let groups = Groups::load(paths)?;
    let devices = scan(paths)?;
    let taken = |device: &&HostDevice| groups.has_spec(device);
    let found = devices.iter().filter(taken);
    let found: Vec<MatchedDevice> = found
        .map(|device| MatchedDevice::new(device, &groups))
        .collect();
    if args.json {
        return print_json(&found);
    }
    print(|out| table(out, &found, args.sort.as_deref()))
}
