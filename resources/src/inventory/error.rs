//! Why the inventory could not be read.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::base::config::ConfigError;
use crate::holding::host_lock::LeaseError;

/// The inventory could not be read.
#[derive(Debug, Error)]
pub enum InventoryError {
    /// A required path of sysfs cannot be read.
    #[error("cannot read {path}: is sysfs mounted there?")]
    Sysfs {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A device does not exist.
    #[error("there is no PCI device {bdf} on this host: `gantry device list` lists all")]
    NoSuchDevice {
        /// Its address.
        bdf: HostBdf,
    },
    /// The holder of a device cannot be read.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The list of devices that must not be reset cannot be used.
    #[error(transparent)]
    NoReset(#[from] ConfigError),
}
