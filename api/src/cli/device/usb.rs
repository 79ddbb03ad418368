//! `gantry device list --type usb`: the USB devices of the host.

use gantry_resources::base::HostPaths;
use gantry_resources::inventory::{UsbDevice, scan_usb};
use gantry_resources::pools::Groups;
use serde::Serialize;

use super::list::shown;
use crate::output::print_json;
use crate::report::Failure;
use crate::table::{Column, Shrink};

const fn full(title: &'static str) -> Column {
    let give = Shrink::Never;
    Column {
        title,
        shrink: give,
    }
}

pub const COLUMNS: [Column; 9] = [
    full("PORT"),
    full("ID"),
    Column {
        title: "NAME",
        shrink: Shrink::Cut(16),
    },
    Column {
        title: "SERIAL",
        shrink: Shrink::Drop(1),
    },
    full("BUS"),
    full("SPEED"),
    full("DRIVER"),
    Column {
        title: "CONTROLLER",
        shrink: Shrink::Drop(0),
    },
    full("GROUP"),
];

/// A device with what is known about it from elsewhere.
#[derive(Debug, Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    device: &'a UsbDevice,
    name: Option<String>,
    hub: bool,
    group: Option<&'a str>,
}

pub fn list(paths: &HostPaths, sort: Option<&str>, json: bool) -> Result<(), Failure> {
    let groups = Groups::load(paths).map_err(Failure::host)?;
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
    let mut devices = scan_usb(paths).map_err(Failure::host)?;
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
    shown(&COLUMNS, rows.iter().map(Row::cells).collect(), sort)
}

impl Row<'_> {
    fn cells(&self) -> Vec<String> {
        let device = self.device;
        let or_dash = |text: Option<&str>| text.unwrap_or("-").to_owned();
        let drivers = device.drivers.join(" ");
        vec![
            device.port.clone(),
            device.id.to_string(),
            or_dash(self.name.as_deref()),
            or_dash(device.serial.as_deref()),
            device.bus.to_string(),
            device
                .speed
                .map_or_else(|| "-".to_owned(), |speed| speed.to_string()),
            or_dash(Some(drivers.as_str()).filter(|text| !text.is_empty())),
            device
                .controller
                .map_or_else(|| "-".to_owned(), |bdf| bdf.to_string()),
            or_dash(self.group),
        ]
    }
}
