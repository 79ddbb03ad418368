//! Why tenants could not be looked at or changed.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::base::config::ConfigError;
use crate::base::json::Place;
use crate::base::name::{DeviceName, NAME_RULE};
use crate::base::sysfs::if_denied;
use crate::holding::host_lock::LeaseError;
use crate::holding::maintenance::{MaintenanceError, RunningVm};
use crate::inventory::error::InventoryError;
use crate::inventory::unavailable::UnavailableDevice;
use crate::making::sriov::SriovError;
use crate::making::vgpu::VgpuError;
use crate::moving::bind::BindError;
use crate::pools::group::{EditError, GroupError};
use crate::pools::tenant::{OtherHardware, UnknownTenant};

/// A tenant could not be looked at or changed.
#[derive(Debug, Error)]
pub enum TenantError {
    /// There is no such tenant.
    #[error(transparent)]
    Unknown(#[from] UnknownTenant),
    /// There is one of that name.
    #[error("there is already a tenant named \"{name}\" ({path})", path = .path.display())]
    Duplicate {
        /// The name.
        name: String,
        /// Its definition.
        path: PathBuf,
    },
    /// A name that cannot be one.
    #[error("\"{0}\" cannot name a tenant or its group: {NAME_RULE}")]
    Name(String),
    /// The user is not known to this host.
    #[error(
        "{place}: `user`: there is no user \"{user}\" on this host: `getent passwd` lists them"
    )]
    User {
        /// The user.
        user: String,
        /// Where the tenant's definition says so.
        place: Place,
    },
    /// The tenant still owns devices.
    #[error(
        "tenant \"{name}\" still owns {devices}: `gantry tenant revoke {name} --all` takes them back"
    )]
    NotEmpty {
        /// The tenant.
        name: String,
        /// Its devices.
        devices: String,
    },
    /// One of the tenant's VMs runs, which would become invisible.
    #[error("{0} runs: end it first")]
    Running(RunningVm),
    /// A record in the tenant's own directory says that a VM runs, as a process that is not the tenant's user's.
    #[error(
        "tenant \"{name}\" says that its VM \"{vm}\" runs, but not as which process of {user}'s: try again \
         once none of {user}'s has its files open"
    )]
    SaysItRuns {
        /// The tenant.
        name: String,
        /// What the record names.
        vm: String,
        /// The tenant's user.
        user: String,
    },
    /// A device belongs to another tenant.
    #[error(
        "{device} belongs to tenant \"{owner}\": `gantry tenant revoke {owner} {device}` takes it back"
    )]
    Owned {
        /// The device.
        device: DeviceName,
        /// Its owner.
        owner: String,
    },
    /// A device is not the tenant's.
    #[error(
        "{device} does not belong to tenant \"{name}\": `gantry tenant show {name}` lists what does"
    )]
    NotOwned {
        /// The device.
        device: DeviceName,
        /// The tenant.
        name: String,
    },
    /// A host group has fewer free devices.
    #[error("group \"{group}\" has {} ({count} asked for)", free(.found))]
    NotFree {
        /// The group.
        group: String,
        /// How many are asked for.
        count: usize,
        /// How many there are.
        found: usize,
    },
    /// A VM has a device, or it is in quarantine.
    #[error("{0}{after}", after = .0.end_of_lease())]
    InUse(UnavailableDevice),
    /// A process has the device open, and would keep it open.
    #[error("{device} cannot get another owner: {by} has it open; end that process first")]
    Open {
        /// The device.
        device: DeviceName,
        /// The process, in words.
        by: String,
    },
    /// There is other hardware at a tenant's address, or beside it in its IOMMU group.
    #[error(transparent)]
    OtherHardware(#[from] OtherHardware),
    /// A tenant's group holds other things.
    #[error(
        "group \"{group}\" of the tenant is not of vGPUs of type \"{kind}\": name another one with --group"
    )]
    OtherKind {
        /// The group.
        group: String,
        /// The type of the device.
        kind: String,
    },
    /// Devices of both kinds are granted at once.
    #[error(
        "PCI functions and mediated devices do not go into one group of the tenant: grant them one kind after the \
         other, with a --group for each"
    )]
    MixedKinds,
    /// A mediated device is not there, or is held.
    #[error(transparent)]
    Vgpu(#[from] VgpuError),
    /// A virtual function's settings cannot be kept.
    #[error("cannot record the settings of {bdf} for the time after the tenant's guests")]
    Settings {
        /// The function.
        bdf: HostBdf,
        /// Why.
        #[source]
        source: Box<SriovError>,
    },
    /// Devices were taken from a tenant, but not given to the host's drivers.
    #[error(
        "{revoked} no longer of tenant \"{tenant}\", but {devices} not given back to the host's drivers; \
         `gantry device reattach {devices}` tries that again"
    )]
    NotReattached {
        /// The tenant.
        tenant: String,
        /// All that was taken from the tenant.
        revoked: String,
        /// Those of them that have a host driver to return to.
        devices: String,
        /// Why.
        #[source]
        source: Box<BindError>,
    },
    /// A file or directory cannot be changed.
    #[error("cannot change {path}{}", if_denied(.source, "run as root"), path = .path.display())]
    File {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A definition is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tenant's groups are wrong.
    #[error(transparent)]
    Groups(#[from] GroupError),
    /// The tenant's groups cannot be changed.
    #[error(transparent)]
    Edit(#[from] EditError),
    /// The host's devices cannot be read.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// A device could not be moved between the host and the tenant.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The running VMs cannot be listed.
    #[error(transparent)]
    Vms(#[from] MaintenanceError),
    /// The locks cannot be used.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

impl TenantError {
    /// Whether a definition or a name is wrong, rather than the host failing.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::Config(error) => error.is_mistake(),
            Self::Groups(error) | Self::Edit(EditError::Groups(error)) => error.is_mistake(),
            Self::Unknown(_) | Self::User { .. } | Self::Name(_) | Self::MixedKinds => true,
            _ => false,
        }
    }

    pub(super) fn settings(bdf: HostBdf) -> impl FnOnce(SriovError) -> Self {
        move |source| Self::Settings {
            bdf,
            source: Box::new(source),
        }
    }
}

fn free(found: &usize) -> String {
    match *found {
        0 => "no free device".to_owned(),
        1 => "only 1 free device".to_owned(),
        found => format!("only {found} free devices"),
    }
}
