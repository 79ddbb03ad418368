//! `gantry device list --type nvme`: NVMe controllers with their model, firmware and disks.

use gantry_resources::facts::Nvme;
use gantry_resources::inventory::HostDevice;

use super::list::state_word;
use crate::table::{Column, Shrink, cell};

pub const COLUMNS: [Column; 9] = [
    Column::full("address"),
    Column::new("model", Shrink::Cut(16)),
    Column::full("serial"),
    Column::new("firmware", Shrink::Drop(0)),
    Column::full("gb"),
    Column::new("disks", Shrink::Drop(1)),
    Column::full("state"),
    Column::full("group"),
    Column::full("vm"),
];

/// The cells of a controller. A detached controller shows the model and firmware that its host driver read.
pub fn cells(device: &HostDevice, group: Option<&str>, vm: Option<&str>) -> Vec<String> {
    let nvme = device.nvme.as_ref();
    let disks = nvme.map(|nvme| {
        let names = nvme.namespaces.iter().map(|disk| disk.name.as_str());
        names.collect::<Vec<_>>().join(" ")
    });
    vec![
        device.bdf.to_string(),
        cell(nvme.map(|nvme| &nvme.model)),
        cell(device.serial.as_deref()),
        cell(nvme.map(|nvme| &nvme.firmware)),
        cell(nvme.map(Nvme::gigabytes)),
        cell(disks),
        state_word(&device.state()).to_owned(),
        cell(group),
        cell(vm),
    ]
}
