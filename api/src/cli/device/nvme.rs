//! `gantry device list --type nvme`: NVMe controllers with what they say of themselves and their disks.

use gantry_resources::facts::Nvme;
use gantry_resources::inventory::HostDevice;

use super::list::state_word;
use crate::table::{Column, Shrink};

const fn full(title: &'static str) -> Column {
    let give = Shrink::Never;
    Column {
        title,
        shrink: give,
    }
}

pub const COLUMNS: [Column; 9] = [
    full("ADDRESS"),
    Column {
        title: "MODEL",
        shrink: Shrink::Cut(16),
    },
    full("SERIAL"),
    Column {
        title: "FIRMWARE",
        shrink: Shrink::Drop(0),
    },
    full("GB"),
    Column {
        title: "DISKS",
        shrink: Shrink::Drop(1),
    },
    full("STATE"),
    full("GROUP"),
    full("VM"),
];

/// The cells of a controller. What only a driver of the host can ask for is remembered while the device
/// is detached.
pub fn cells(device: &HostDevice, group: Option<&str>, vm: Option<&str>) -> Vec<String> {
    let or_dash = |text: Option<&str>| text.unwrap_or("-").to_owned();
    let nvme = device.nvme.as_ref();
    let disks = nvme.map(|nvme| {
        let names = nvme.namespaces.iter().map(|disk| disk.name.as_str());
        names.collect::<Vec<_>>().join(" ")
    });
    vec![
        device.bdf.to_string(),
        or_dash(nvme.map(|nvme| nvme.model.as_str())),
        or_dash(device.serial.as_deref()),
        or_dash(nvme.map(|nvme| nvme.firmware.as_str())),
        or_dash(
            nvme.map(Nvme::gigabytes)
                .map(|size| size.to_string())
                .as_deref(),
        ),
        or_dash(disks.as_deref().filter(|disks| !disks.is_empty())),
        state_word(&device.state()).to_owned(),
        or_dash(group),
        or_dash(vm),
    ]
}
