//! `gantry device list --type usb`: the USB devices of the host.

use gantry_resources::base::HostPaths;
use gantry_resources::inventory::{UsbDevice, scan_usb};
use gantry_resources::pools::Groups;
use serde::Serialize;

use super::list::print_devices;
use crate::output::print_json;
use crate::report::Failure;
use crate::table::{Column, Shrink, cell};

pub const COLUMNS: [Column; 9] = [
    Column::full("port"),
    Column::full("id"),
    Column::new("name", Shrink::Cut(16)),
    Column::new("serial", Shrink::Drop(1)),
    Column::full("bus"),
    Column::full("speed"),
    Column::full("driver"),
    Column::new("controller", Shrink::Drop(0)),
    Column::full("group"),
];

/// A device with its name and group.
#[derive(Debug, Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    device: &'a UsbDevice,
    name: Option<String>,
    hub: bool,
    group: Option<&'a str>,
}

pub fn list(paths: &HostPaths, sort: Option<&str>, json: bool) -> Result<(), Failure> {
    let groups = Groups::load(paths)?;
    list_those(paths, &groups, |_| true, sort, json)
}

/// Lists the devices that are `meant`.
pub fn list_those(
    paths: &HostPaths,
    groups: &Groups,
    meant: impl Fn(&UsbDevice) -> bool,
    sort: Option<&str>,
    json: bool,
) -> Result<(), Failure> {
    let mut devices = scan_usb(paths)?;
    devices.retain(meant);
    let rows: Vec<Row> = devices
        .iter()
        .map(|device| Row {
            device,
            name: device.name(),
            hub: device.is_hub(),
            group: groups.group_of_usb(device).map(|group| group.name.as_str()),
        })
        .collect();
    if json {
        return print_json(&rows);
    }
    print_devices(&COLUMNS, rows.iter().map(Row::cells).collect(), sort)
}

impl Row<'_> {
    fn cells(&self) -> Vec<String> {
        let device = self.device;
        let drivers = device.drivers.join(" ");
        vec![
            device.port.clone(),
            device.id.to_string(),
            cell(self.name.as_deref()),
            cell(device.serial.as_deref()),
            device.bus.to_string(),
            cell(device.speed),
            cell(Some(drivers)),
            cell(device.controller),
            cell(self.group),
        ]
    }
}
