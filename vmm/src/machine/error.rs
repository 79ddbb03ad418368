//! Why a machine cannot be built.

use gantry_devices::pci::firmware::FirmwareError;
use gantry_devices::pci::{BarSpaceError, SegmentError};

use crate::host::files::FileError;
use crate::process::error::HostError;

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Something does not fit where the plan has it.
    #[error("cannot place {what} in the guest's address space")]
    Place {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: BarSpaceError,
    },
    /// The PCI windows do not hold all BARs.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// There are more devices than root ports.
    #[error(transparent)]
    Ports(#[from] SegmentError),
    /// A file named in the VM's file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The host's kernel refused something.
    #[error(transparent)]
    Host(#[from] HostError),
}

impl MachineError {
    /// Makes an error of a failure to place `what`.
    pub(super) fn place(what: &'static str) -> impl FnOnce(BarSpaceError) -> Self {
        move |source| Self::Place { what, source }
    }
}
