//! Releases devices from quarantine.

use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::facts::alive::ConfigSpace;
use crate::holding::device_lock::DeviceLock;
use crate::holding::quarantine::{self, QuarantineError};
use crate::holding::record::LeaseRecord;
use crate::inventory::device::HostDevice;
use crate::inventory::error::InventoryError;

/// A device stays in quarantine.
#[derive(Debug, Error)]
pub enum ReleaseError {
    /// The records cannot be used.
    #[error(transparent)]
    Record(#[from] QuarantineError),
    /// The device does not exist, or cannot be read.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The device is not in quarantine.
    #[error("{bdf} is not in quarantine: `gantry device list` shows the states")]
    NotThere {
        /// The device.
        bdf: HostBdf,
    },
    /// It is in quarantine with its card.
    #[error(
        "{bdf} is kept out because {first}, the first function of its card, is in quarantine: \
         `gantry device release-quarantine {first}`"
    )]
    OfCard {
        /// The device.
        bdf: HostBdf,
        /// The first function of its card.
        first: HostBdf,
    },
    /// The device is held.
    #[error(
        "{bdf} is held by {}: release it when that has ended",
        holder.as_ref().map_or_else(|| "an unknown process".to_owned(), ToString::to_string)
    )]
    Held {
        /// The device.
        bdf: HostBdf,
        /// The holder.
        holder: Option<LeaseRecord>,
    },
    /// The device still does not answer.
    #[error(
        "{bdf} does not answer (it reads all-ones): reset or power-cycle it, or reboot the host, then release it"
    )]
    Dead {
        /// The device.
        bdf: HostBdf,
    },
}

/// Releases a device from quarantine, if it answers.
pub fn release_quarantine(paths: &HostPaths, bdf: HostBdf) -> Result<(), ReleaseError> {
    let device = HostDevice::read(paths, bdf)?;
    if device.quarantine.is_none() {
        let first = device.first_function().bdf;
        return Err(match device.quarantine_reason() {
            Some(_) => ReleaseError::OfCard { bdf, first },
            None => ReleaseError::NotThere { bdf },
        });
    }
    if ConfigSpace::open(paths, bdf).is_some_and(|config| config.is_dead()) {
        return Err(ReleaseError::Dead { bdf });
    }
    // Taking the lock stores the note that the last holder left, so it comes first.
    let record = LeaseRecord::task("gantry device release-quarantine");
    let lock = DeviceLock::take(paths, bdf, &record).map_err(InventoryError::from)?;
    if lock.is_none() {
        let holder = device.lease.record().cloned();
        return Err(ReleaseError::Held { bdf, holder });
    }
    Ok(quarantine::forget(paths, bdf)?)
}
