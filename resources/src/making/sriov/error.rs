//! Why virtual functions were not made, set or destroyed.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::links::LinkError;
use super::pf::{Pf, VfInUse};
use crate::base::bdf::HostBdf;
use crate::holding::host_lock::LeaseError;
use crate::holding::passing::InTheWay;
use crate::inventory::device::is_vfio_driver;
use crate::inventory::error::InventoryError;
use crate::inventory::modules::NoDriver;
use crate::inventory::unavailable::UnavailableDevice;
use crate::moving::bind::BindError;
use crate::moving::writer::WriteError;
use crate::pools::group::GroupError;
use crate::pools::sriov::PfError;

/// Virtual functions were not made, set or destroyed.
#[derive(Debug, Error)]
pub enum SriovError {
    /// The group makes no functions.
    #[error(
        "group \"{0}\" makes no virtual functions: `gantry group edit {0} --sriov '{{\"pf\": \"0000:03:00.0\", \"count\": 4}}'` says of which device, and how many"
    )]
    NoSpec(String),
    /// The physical function is other hardware than the group names, or cannot have as many functions.
    #[error(transparent)]
    Pf(#[from] PfError),
    /// No driver makes its functions.
    #[error("{pf} has no driver, and only its driver can make virtual functions: {}", way(pf, .why))]
    NoDriver {
        /// The device.
        pf: HostBdf,
        /// Why not.
        why: NoDriver,
    },
    /// Its driver creates no functions.
    #[error(
        "{pf} is bound to {driver}, which makes no virtual functions: {} gives it back to its own driver",
        giving_back(pf, .driver)
    )]
    WrongDriver {
        /// The device.
        pf: HostBdf,
        /// Its driver.
        driver: String,
    },
    /// The settings need a network card.
    #[error(
        "{pf} has no network interface on the host, so its functions have no {key}: take it out of the group"
    )]
    NoInterface {
        /// The device.
        pf: HostBdf,
        /// A setting that is asked for.
        key: &'static str,
    },
    /// Functions in use would vanish.
    #[error(
        "{pf} has {now} virtual functions and cannot have {wanted} now, since these would be destroyed:{}",
        lines(.live)
    )]
    Live {
        /// The device.
        pf: HostBdf,
        /// How many it has.
        now: u16,
        /// How many were wanted.
        wanted: u16,
        /// Those in use.
        live: Vec<VfInUse>,
    },
    /// Another process works on the device.
    #[error("{0}{after}", after = .0.end_of_lease())]
    Busy(UnavailableDevice),
    /// The write succeeded, but the functions are not there.
    #[error("{pf} has {found} virtual functions after the write, not {wanted}: see dmesg")]
    Short {
        /// The device.
        pf: HostBdf,
        /// How many it has.
        found: usize,
        /// How many were wanted.
        wanted: u16,
    },
    /// A write failed. The writes before it were undone, except those in `left`.
    #[error("group \"{group}\" was not activated{}", if .left.is_empty() { ": everything is as it was before" } else { .left })]
    Failed {
        /// The group.
        group: String,
        /// What could not be undone; empty if everything was.
        left: String,
        /// Why.
        #[source]
        source: Box<SriovError>,
    },
    /// A write to sysfs failed.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// An interface could not be read or set.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The functions could not be given to vfio-pci.
    #[error(transparent)]
    Bind(Box<BindError>),
    /// The owners of functions cannot be read.
    #[error(transparent)]
    Tenants(#[from] GroupError),
    /// A device cannot be read.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The locks cannot be used.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The present state cannot be recorded, so nothing was changed.
    #[error("cannot record the former settings in {path}")]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// [`SriovError::Record`] of a record that could not be written.
pub(super) fn not_recorded((path, source): (PathBuf, io::Error)) -> SriovError {
    SriovError::Record { path, source }
}

fn lines(live: &[VfInUse]) -> String {
    let line = |VfInUse { bdf, why, .. }: &VfInUse| format!("\n{bdf}: {why}");
    live.iter().map(line).collect()
}

/// Advice to bind a physical function to its own driver.
fn giving_back(pf: &HostBdf, driver: &str) -> String {
    match is_vfio_driver(driver) {
        true => format!("`gantry device reattach {pf}`"),
        false => format!(
            "`echo {pf} > /sys/bus/pci/drivers/{driver}/unbind; echo {pf} > /sys/bus/pci/drivers_probe`"
        ),
    }
}

impl SriovError {
    /// The driver of a physical function creates no functions.
    pub(super) fn of_driver(pf: &Pf) -> Self {
        Self::WrongDriver {
            pf: pf.device.bdf,
            driver: pf.device.driver.clone().unwrap_or_default(),
        }
    }

    /// The holders of functions, if they alone are the failure.
    pub(super) fn in_the_way(&self) -> Vec<InTheWay> {
        let held = |one: &VfInUse| Some((one.bdf.into(), one.lease.as_ref()?.record().cloned()));
        match self {
            Self::Busy(blocked) => blocked.in_the_way(),
            // Functions with another use stay in use whoever releases the others.
            Self::Live { live, .. } => {
                let all: Option<Vec<InTheWay>> = live.iter().map(held).collect();
                all.unwrap_or_default()
            }
            _ => Vec::new(),
        }
    }

    /// Whether the kernel still works on the device, which must then be left alone.
    pub(super) fn is_hung(&self) -> bool {
        match self {
            Self::Write(WriteError::Hung { .. }) => true,
            Self::Bind(error) => {
                matches!(&**error, BindError::Failed { source, .. } if source.is_hung())
            }
            _ => false,
        }
    }
}

/// Advice to give a card its driver.
fn way(pf: &HostBdf, why: &NoDriver) -> String {
    match why {
        NoDriver::NotLoaded(module) => format!("`modprobe {module}` loads it"),
        NoDriver::Loaded => format!("`gantry device reattach {pf}`"),
        NoDriver::NoModule => "load its module first".to_owned(),
    }
}
