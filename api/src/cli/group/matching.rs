//! `gantry group match`: lists the devices that a rule or a group matches.

use std::io::{self, Write};

use clap::Args;
use clap::builder::PossibleValuesParser;
use gantry_resources::base::{HostBdf, HostPaths};
use gantry_resources::facts::{PciClass, PciId};
use gantry_resources::inventory::{DeviceState, HostDevice, UsbDevice, scan};
use gantry_resources::pools::{GroupType, Groups, Rule};
use serde::Serialize;

use crate::cli::device::{state_word, usb};
use crate::output::{print, print_json};
use crate::report::Failure;
use crate::table::{Column, Shrink, cell, column, has_column, write_table};

#[derive(Debug, Args)]
#[command(override_usage = "gantry group match [OPTIONS] <NAME|--rule <JSON>>")]
#[command(after_help = "\
All filters of a rule must hold. A filter is a value, or an object of equal, not, less, more, begins, \
ends, contains, regex. Fields: name, id, vendor, device, subsystem, class, slot, serial, driver, numa, \
iommu_group, pf, mdev_type; of NVMe disks also model, firmware, size (GB); of USB devices (--usb) \
name, id, vendor, device, serial, driver, bus, port, speed (Mbit/s). `gantry schema groups` lists all keys.

Examples:
  gantry group match gpus
  gantry group match --rule '{\"vendor\": \"10de\", \"class\": \"03\"}'
  gantry group match --rule '{\"name\": {\"contains\": \"Quadro\"}, \"numa\": 0}'
  gantry group match --rule '{\"slot\": \"3b:*\", \"driver\": {\"not\": \"nvme\"}}'")]
pub struct MatchArgs {
    /// A group, all of whose rules are tried
    #[arg(required_unless_present = "rule", conflicts_with = "rule")]
    name: Option<String>,
    /// A rule as a group's file would have it
    #[arg(long, value_name = "JSON", value_parser = super::from_json::<Rule>)]
    rule: Option<Rule>,
    /// Try the rule on USB devices
    #[arg(long, requires = "rule")]
    usb: bool,
    /// Show the result as JSON
    #[arg(long)]
    json: bool,
    /// Column to sort by
    #[arg(long, value_name = "COLUMN", value_parser = sort_by())]
    sort: Option<String>,
}

/// A device that a rule matches.
#[derive(Debug, Serialize)]
pub struct MatchedDevice {
    bdf: HostBdf,
    id: PciId,
    name: Option<&'static str>,
    class: PciClass,
    #[serde(flatten)]
    state: DeviceState,
    /// The group that the device belongs to.
    group: Option<String>,
}

/// The columns of PCI functions.
pub const COLUMNS: [Column; 6] = [
    Column::full("address"),
    Column::full("id"),
    Column::new("name", Shrink::Cut(12)),
    Column::new("class", Shrink::Drop(0)),
    Column::full("state"),
    Column::full("group"),
];

impl MatchedDevice {
    pub fn new(device: &HostDevice, groups: &Groups) -> Self {
        Self {
            bdf: device.bdf,
            id: device.id,
            name: device.device_name().or_else(|| device.vendor_name()),
            class: device.class,
            state: device.state(),
            group: groups.group_of(device).map(|group| group.name.clone()),
        }
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.bdf.to_string(),
            self.id.to_string(),
            cell(self.name),
            cell(self.class.name()),
            state_word(&self.state).to_owned(),
            cell(self.group.as_ref()),
        ]
    }
}

pub fn matching(args: &MatchArgs, paths: &HostPaths) -> Result<(), Failure> {
    let groups = Groups::load(paths)?;
    let group = args.name.as_deref().map(|name| groups.find(name));
    let group = group.transpose()?;
    let sort = args.sort.as_deref();
    if args.usb || group.is_some_and(|group| group.kind == GroupType::Usb) {
        let taken = |device: &UsbDevice| match (group, &args.rule) {
            (Some(group), _) => group.matches_usb(device),
            (None, rule) => {
                let mut rule = rule.iter();
                !device.is_hub() && rule.any(|rule| rule.matches_usb(device))
            }
        };
        return usb::list_those(paths, &groups, taken, sort, args.json);
    }
    let devices = scan(paths)?;
    let taken = |device: &&HostDevice| match (group, &args.rule) {
        (Some(group), _) => group.matches(device),
        (None, Some(rule)) => !device.is_bridge() && rule.matches(device),
        (None, None) => false,
    };
    let found = devices.iter().filter(taken);
    let found: Vec<MatchedDevice> = found
        .map(|device| MatchedDevice::new(device, &groups))
        .collect();
    if args.json {
        return print_json(&found);
    }
    has_column(&COLUMNS, sort)?;
    print(|out| table(out, &found, sort))
}

/// Takes a column of the tables of PCI and USB devices.
pub fn sort_by() -> PossibleValuesParser {
    column(&[COLUMNS.as_slice(), usb::COLUMNS.as_slice()].concat())
}

/// The devices in a table that fits the terminal, or a line that says that there are none.
pub fn table(out: &mut dyn Write, found: &[MatchedDevice], sort: Option<&str>) -> io::Result<()> {
    if found.is_empty() {
        return writeln!(out, "No device of this host matches.");
    }
    let rows = found.iter().map(MatchedDevice::cells).collect();
    write_table(out, &COLUMNS, rows, sort)
}
