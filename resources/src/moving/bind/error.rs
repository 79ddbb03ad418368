//! Why devices were not moved between the host and VMs.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io;

use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::holding::host_lock::LeaseError;
use crate::holding::passing::InTheWay;
use crate::inventory::error::InventoryError;
use crate::inventory::guard::Guarded;
use crate::inventory::unavailable::UnavailableDevice;
use crate::moving::moves::MoveError;
use crate::pools::group::GroupError;

/// A move was refused, or failed and was undone.
#[derive(Debug, Error)]
pub enum BindError {
    /// The inventory cannot be read, or a device does not exist.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The locks cannot be used.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A device is a bridge, is held, or is in no IOMMU group.
    #[error("{0}{after}", after = .0.end_of_lease())]
    Unavailable(UnavailableDevice),
    /// The host needs a device, or one of its IOMMU group.
    #[error(
        "the host uses this:{}\nnothing was changed; to take it anyway, give{}",
        list("\n  ", .0),
        list(" --override ", .0.iter().map(|guarded| guarded.bdf).collect::<BTreeSet<_>>())
    )]
    Guarded(Vec<Guarded>),
    /// The owners of devices cannot be read.
    #[error(transparent)]
    Tenants(GroupError),
    /// The host's use of devices cannot be read.
    #[error("cannot tell whether the host needs these devices")]
    Guard(#[source] io::Error),
    /// A bridge that the host drives is in the IOMMU group.
    #[error(
        "IOMMU group {group} holds the host's bridge {bridge} ({driver}): its devices cannot be detached"
    )]
    HostBridge {
        /// The IOMMU group.
        group: u32,
        /// The bridge.
        bridge: HostBdf,
        /// Its driver.
        driver: String,
    },
    /// A physical function has virtual functions, which would vanish with its driver.
    #[error(
        "{bdf} has {count} virtual functions, which would be destroyed: run `gantry group deactivate` for their group, or write 0 to its sriov_numvfs"
    )]
    HasVirtualFunctions {
        /// The physical function.
        bdf: HostBdf,
        /// How many.
        count: u16,
    },
    /// The kernel has no vfio-pci.
    #[error("the kernel has no driver vfio-pci: `modprobe vfio-pci`")]
    NoVfioPci,
    /// A device did not get its driver. It and the devices moved before it were put back.
    #[error("{bdf} was not moved{}", aftermath(.left))]
    Failed {
        /// The device.
        bdf: HostBdf,
        /// Devices that could not be put back where they were.
        left: Vec<HostBdf>,
        /// Why.
        #[source]
        source: MoveError,
    },
}

impl BindError {
    /// Whether the devices are unavailable. Otherwise the host failed.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Unavailable(_)
                | Self::Guarded(_)
                | Self::HostBridge { .. }
                | Self::HasVirtualFunctions { .. }
        )
    }
}

impl BindError {
    /// The held devices that caused the failure, with their holders.
    pub(crate) fn in_the_way(&self) -> Vec<InTheWay> {
        match self {
            Self::Unavailable(blocked) => blocked.in_the_way(),
            _ => Vec::new(),
        }
    }
}

fn list(separator: &str, items: impl IntoIterator<Item = impl Display>) -> String {
    items
        .into_iter()
        .map(|item| format!("{separator}{item}"))
        .collect()
}

fn aftermath(left: &[HostBdf]) -> String {
    match left {
        [] => ": each device has the driver that it had before".to_owned(),
        left => format!(
            ": these do not have the driver that they had before:{}",
            list(" ", left)
        ),
    }
}
