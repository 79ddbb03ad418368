//! Why nothing was allocated.

use std::io;

use thiserror::Error;

use super::fit::RequestFit;
use crate::base::bdf::HostBdf;
use crate::holding::host_lock::LeaseError;
use crate::holding::quarantine::QuarantineError;
use crate::inventory::error::InventoryError;
use crate::inventory::unavailable::UnavailableDevice;
use crate::making::sriov::SriovError;
use crate::making::vgpu::VgpuError;
use crate::moving::bind::BindError;
use crate::pools::group::{GroupError, NO_USB};

/// Nothing was allocated.
#[derive(Debug, Error)]
pub enum AllocateError {
    /// There is no such group.
    #[error("there is no group \"{name}\"{}", others(.near, .known))]
    UnknownGroup {
        /// The name asked for.
        name: String,
        /// The most similar name.
        near: Option<String>,
        /// All names.
        known: Vec<String>,
    },
    /// A group of devices that cannot be passed yet.
    #[error("group \"{name}\": {NO_USB}")]
    Usb {
        /// The group.
        name: String,
    },
    /// There is no such alias.
    #[error("there is no alias \"{name}\", nor a group of that name{}", others(.near, .known))]
    UnknownAlias {
        /// The name asked for.
        name: String,
        /// The most similar name.
        near: Option<String>,
        /// All names.
        known: Vec<String>,
    },
    /// A known alias that gantry refuses.
    #[error("alias \"{name}\" is refused: {reason}")]
    RefusedAlias {
        /// The name asked for.
        name: String,
        /// Why.
        reason: &'static str,
    },
    /// Fewer devices are free than the request asks for.
    #[error("No valid host was found: {0}")]
    NoFit(Box<RequestFit>),
    /// A device does not exist.
    #[error("there is no PCI device {bdf} on this host: `gantry device list` lists all")]
    NoSuchDevice {
        /// Its address.
        bdf: HostBdf,
    },
    /// A device is in no group.
    #[error(
        "{bdf} is in no group: add a rule such as {{\"slot\": \"{bdf}\"}} to a group, or give --allow-ungrouped"
    )]
    Ungrouped {
        /// Its address.
        bdf: HostBdf,
    },
    /// A device asked for by its address is not free.
    #[error("{0}")]
    Unavailable(Box<UnavailableDevice>),
    /// A device is asked for twice.
    #[error("{bdf} is asked for twice: name it once")]
    AskedTwice {
        /// Its address.
        bdf: HostBdf,
    },
    /// The VM has too few slots for the devices.
    #[error(
        "the devices need {needed} slots and this VM has {free} free: ask for fewer, or detach a device first{}",
        each_takes_one(.alone)
    )]
    NoSlots {
        /// How many they need.
        needed: usize,
        /// How many are free.
        free: usize,
        /// Functions that could share a slot with function 0 of their device.
        alone: Vec<HostBdf>,
    },
    /// The groups cannot be read.
    #[error(transparent)]
    Groups(#[from] GroupError),
    /// The inventory cannot be read.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// A device cannot be taken from the host.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The helper that gives devices back when a VM ends cannot be started.
    #[error("cannot start the process that gives devices back to the host when the VM ends")]
    Helper(#[source] io::Error),
    /// The use of a device for one use cannot be recorded.
    #[error(transparent)]
    Quarantine(#[from] QuarantineError),
    /// Virtual functions cannot be created, or given their settings.
    #[error(transparent)]
    Sriov(#[from] SriovError),
    /// Virtual GPUs cannot be created.
    #[error(transparent)]
    Vgpu(#[from] VgpuError),
    /// The locks cannot be used.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

impl AllocateError {
    /// Whether the same request may succeed later, since others hold the devices.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::NoFit(fit) => fit.is_temporary(),
            Self::Unavailable(blocked) => blocked.why.is_temporary(),
            Self::Sriov(error) => matches!(error, SriovError::Busy(_) | SriovError::Live { .. }),
            Self::Vgpu(error) => error.is_temporary(),
            _ => false,
        }
    }

    /// Whether it asks for an unknown name, or a definition is wrong.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::Groups(error) => error.is_mistake(),
            Self::UnknownGroup { .. } | Self::UnknownAlias { .. } | Self::RefusedAlias { .. } => {
                true
            }
            _ => false,
        }
    }

    /// Whether the devices are unavailable. Otherwise the host failed.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::UnknownGroup { .. }
            | Self::Usb { .. }
            | Self::UnknownAlias { .. }
            | Self::RefusedAlias { .. }
            | Self::NoFit(_)
            | Self::NoSuchDevice { .. }
            | Self::Ungrouped { .. }
            | Self::Unavailable(_)
            | Self::AskedTwice { .. }
            | Self::NoSlots { .. } => true,
            Self::Inventory(error) => matches!(error, InventoryError::NoSuchDevice { .. }),
            Self::Bind(error) => error.is_refusal(),
            Self::Sriov(error) => matches!(error, SriovError::Busy(_) | SriovError::Live { .. }),
            Self::Vgpu(error) => error.is_refusal(),
            Self::Groups(_) | Self::Quarantine(_) | Self::Lease(_) | Self::Helper(_) => false,
        }
    }
}

fn each_takes_one(functions: &[HostBdf]) -> String {
    let functions: Vec<String> = functions.iter().map(HostBdf::to_string).collect();
    match functions.is_empty() {
        true => String::new(),
        false => format!(
            "; without function 0 of their device, each of {} takes one",
            functions.join(", ")
        ),
    }
}

fn others(near: &Option<String>, known: &[String]) -> String {
    match near {
        _ if known.is_empty() => {
            ": no groups are defined; write them to groups.json, or see `gantry group`".to_owned()
        }
        Some(near) => format!(": did you mean \"{near}\"? There are: {}", known.join(", ")),
        None => format!(": there are: {}", known.join(", ")),
    }
}
