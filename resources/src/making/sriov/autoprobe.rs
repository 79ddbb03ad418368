//! The record of a physical function whose new functions are being kept from the host's drivers: a
//! command that is killed meanwhile cannot allow them again.

use serde::{Deserialize, Serialize};

use super::error::SriovError;
use super::set_aside;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::holding::restore::{Change, RestoreRecord};
use crate::inventory::device::HostDevice;
use crate::moving::writer::SysfsWriter;

/// The record of a physical function: its `sriov_drivers_autoprobe` was 1.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct AutoprobeRecord {}

impl RestoreRecord for AutoprobeRecord {
    const CHANGE: Change = Change::Autoprobe;
}

/// Lets the host's drivers have new functions again, if they were kept from them. The device is locked.
pub(crate) fn restore(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    pf: HostBdf,
) -> Result<(), SriovError> {
    if !Change::Autoprobe.is_recorded(paths, pf) {
        return Ok(());
    }
    let attribute = paths.pci_device(pf).join("sriov_drivers_autoprobe");
    if attribute.exists() {
        let written = writer.write(&attribute, "1").map_err(SriovError::from);
        if let (Err(error), Ok(device)) = (&written, HostDevice::read(paths, pf))
            && error.is_hung()
        {
            set_aside(paths, &device, error);
        }
        written?;
    }
    Change::Autoprobe.forget(paths, pf);
    Ok(())
}
