//! The record of a physical function whose new functions are being kept from the host's drivers: a
//! command that is killed meanwhile cannot allow them again.

use serde::{Deserialize, Serialize};

use super::error::SriovError;
use super::set_aside;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::holding::device_lock::DeviceLock;
use crate::holding::host_lock::{ALLOCATION_DEADLINE, AllocationLock};
use crate::holding::quarantine::hung;
use crate::holding::record::LeaseRecord;
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
pub(super) fn restore(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    pf: HostBdf,
) -> Result<(), SriovError> {
    if !Change::Autoprobe.is_recorded(paths, pf) {
        return Ok(());
    }
    let attribute = paths.pci_device(pf).join("sriov_drivers_autoprobe");
    if attribute.exists() {
        writer.write(&attribute, "1")?;
    }
    Change::Autoprobe.forget(paths, pf);
    Ok(())
}

/// Does so for every device that no command is at work on.
pub(crate) fn reap(paths: &HostPaths, writer: &dyn SysfsWriter) -> Result<(), SriovError> {
    let marked = Change::Autoprobe.recorded(paths).into_iter();
    let marked: Vec<HostBdf> = marked.filter_map(DeviceName::pci).collect();
    if marked.is_empty() {
        return Ok(());
    }
    let record = LeaseRecord::restore();
    let mut locked = Vec::new();
    let choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
    for pf in marked {
        locked.extend(DeviceLock::take(paths, pf, &record)?.map(|lock| (pf, lock)));
    }
    // A card that hangs stops nobody else.
    drop(choosing);
    for (pf, _lock) in locked {
        let there = match HostDevice::read(paths, pf) {
            Ok(device) if hung(paths, device.bdf, device.id).is_some() => continue,
            Ok(device) => Some(device),
            Err(_) => None,
        };
        let restored = restore(paths, writer, pf);
        if let (Err(error), Some(device)) = (&restored, there)
            && error.is_hung()
        {
            set_aside(paths, &device, error);
        }
        restored?;
    }
    Ok(())
}
