//! The record of a physical function whose new functions are kept from the host's drivers for a moment: a command
//! that is killed meanwhile cannot allow them again.

use serde::{Deserialize, Serialize};

use super::error::SriovError;
use super::set_aside;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::holding::restore::{Change, RestoreRecord};
use crate::inventory::device::HostDevice;
use crate::inventory::error::InventoryError;
use crate::moving::writer::SysfsWriter;

/// The record of a physical function: its `sriov_drivers_autoprobe` was 1.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct AutoprobeRecord {
    /// Vendor and device id at that time, as they are shown.
    id: String,
}

impl RestoreRecord for AutoprobeRecord {
    const CHANGE: Change = Change::Autoprobe;
}

impl AutoprobeRecord {
    pub(super) fn of(pf: &HostDevice) -> Self {
        let id = pf.id.to_string();
        Self { id }
    }

    fn is_of(&self, device: &HostDevice) -> bool {
        self.id == device.id.to_string()
    }
}

/// Lets the host's drivers bind new functions again, if they were kept from them. The device is locked. Removes the
/// record if the device is gone, or was replaced by other hardware.
pub(crate) fn restore(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    pf: HostBdf,
) -> Result<(), SriovError> {
    let device = match HostDevice::read(paths, pf) {
        Err(InventoryError::NoSuchDevice { .. }) => None,
        read => Some(read?),
    };
    let record = AutoprobeRecord::load(paths, pf);
    let same = |device: &HostDevice| record.is_some_and(|record| record.is_of(device));
    let attribute = paths.pci_device(pf).join("sriov_drivers_autoprobe");
    if let Some(device) = device.filter(same)
        && attribute.exists()
    {
        let written = writer.write(&attribute, "1").map_err(SriovError::from);
        written.inspect_err(|error| {
            if error.is_hung() {
                set_aside(paths, &device, error);
            }
        })?;
    }
    Change::Autoprobe.forget(paths, pf);
    Ok(())
}
