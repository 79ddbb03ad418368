//! Mediated devices: their parents, their types, and the existing ones
//! (Documentation/driver-api/vfio-mediated-device.rst).

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::base::uuid::Uuid;
use crate::holding::lock_file::holder;
use crate::holding::record::LeaseStatus;
use crate::holding::vgpu_records::{Claim, claims, hangs};
use crate::inventory::device::DeviceState;
use crate::inventory::error::InventoryError;

/// The reason for a device that the kernel has not finished creating or removing.
pub(crate) const HANGS: &str =
    "the kernel has not finished creating or removing it: see `gantry check`";

/// A kind of mediated device that a parent can make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MdevType {
    /// Its directory's name: "nvidia-222".
    pub id: String,
    /// The vendor's name for it: "GRID T4-1Q".
    pub title: Option<String>,
    /// How many more can be created now. Types share the parent's resources.
    pub available: u32,
}

/// A parent of mediated devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MdevParent {
    /// Its name in `/sys/class/mdev_bus`.
    pub name: String,
    /// Its address, if it is a PCI function.
    pub bdf: Option<HostBdf>,
    /// The types that it supports.
    pub types: Vec<MdevType>,
}

/// A mediated device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MdevDevice {
    /// Its UUID.
    pub uuid: Uuid,
    /// The name of its parent.
    pub parent: String,
    /// The id of its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// The vendor's name for the type.
    pub title: Option<String>,
    /// Its IOMMU group, once a driver has it.
    pub iommu_group: Option<u32>,
    /// Its lease.
    pub lease: LeaseStatus,
    /// Why no VM gets it.
    #[serde(skip)]
    pub quarantine: Option<String>,
}

/// The mediated devices of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Mdevs {
    /// Their parents.
    pub parents: Vec<MdevParent>,
    /// The existing devices.
    pub devices: Vec<MdevDevice>,
    /// The devices that are being created, that one VM has for itself, or that an ended VM left.
    #[serde(skip)]
    pub(crate) claims: Vec<Claim>,
}

impl Mdevs {
    /// Reads them; a host without any has none.
    pub fn read(paths: &HostPaths) -> Result<Self, InventoryError> {
        let class = paths.sysfs.join("class/mdev_bus");
        let unreadable = |source| InventoryError::Sysfs {
            path: class.clone(),
            source,
        };
        let mut all = Self::default();
        // Free instances are counted last: a device created meanwhile is counted twice as used, rather than
        // as free.
        let names = sysfs::entries(&paths.sysfs.join("bus/mdev/devices")).map_err(unreadable)?;
        for uuid in names.iter().filter_map(|name| name.parse().ok()) {
            all.devices.extend(MdevDevice::read(paths, uuid)?);
        }
        all.claims = claims(paths);
        for name in sysfs::entries(&class).map_err(unreadable)? {
            let mut types = types(&class.join(&name)).map_err(unreadable)?;
            if paths.only.is_some() {
                // A tenant creates none.
                types.iter_mut().for_each(|kind| kind.available = 0);
            }
            all.parents.push(MdevParent {
                bdf: name.parse().ok(),
                name,
                types,
            });
        }
        Ok(all)
    }

    /// How many devices must be subtracted from a parent's free instances, since it may not have counted them
    /// yet.
    pub(crate) fn under_way(&self, parent: &str) -> u32 {
        let claims = self.claims.iter();
        let of_it = |claim: &&Claim| claim.under_way && claim.parent.as_deref() == Some(parent);
        u32::try_from(claims.filter(of_it).count()).unwrap_or(u32::MAX)
    }

    /// Whether a device was created for one VM, and is removed with it.
    pub(crate) fn is_claimed(&self, uuid: Uuid) -> bool {
        self.claims.iter().any(|claim| claim.uuid == uuid)
    }
}

impl MdevDevice {
    /// Reads one; none if it does not exist.
    pub fn read(paths: &HostPaths, uuid: Uuid) -> Result<Option<Self>, InventoryError> {
        if !paths.shows(uuid) {
            return Ok(None);
        }
        let dir = paths.mdev(uuid);
        let facts = || -> io::Result<Option<Self>> {
            let real = match fs::canonicalize(&dir) {
                Ok(real) => real,
                Err(error) if sysfs::is_gone(&error) => return Ok(None),
                Err(error) => return Err(error),
            };
            let parent = real.parent().and_then(Path::file_name);
            let (Some(parent), Some(kind)) = (parent, sysfs::link_name(&dir.join("mdev_type"))?)
            else {
                return Ok(None);
            };
            let group = sysfs::link_name(&dir.join("iommu_group"))?;
            Ok(Some(Self {
                uuid,
                parent: parent.to_string_lossy().into_owned(),
                kind,
                title: sysfs::text(&dir.join("mdev_type/name"))?,
                iommu_group: group.and_then(|name| name.parse().ok()),
                lease: LeaseStatus::Free,
                quarantine: None,
            }))
        };
        let found = facts().map_err(|source| InventoryError::Sysfs {
            path: dir.clone(),
            source,
        })?;
        let Some(device) = found else {
            return Ok(None);
        };
        let lease = holder(paths, uuid);
        let quarantine = hangs(paths, uuid).then(|| HANGS.to_owned());
        Ok(Some(Self {
            lease,
            quarantine,
            ..device
        }))
    }
}

impl MdevDevice {
    /// Whether a VM has it.
    pub fn state(&self) -> DeviceState {
        match (&self.quarantine, &self.lease) {
            (Some(reason), _) => DeviceState::Quarantined {
                reason: reason.clone(),
            },
            (None, LeaseStatus::Free) => DeviceState::Detached,
            (None, lease) => DeviceState::Assigned {
                vm: lease.record().map(|record| record.name.clone()),
            },
        }
    }
}

fn types(parent: &Path) -> io::Result<Vec<MdevType>> {
    let dir = parent.join("mdev_supported_types");
    let one = |id: String| {
        let dir = dir.join(&id);
        Ok(MdevType {
            title: sysfs::text(&dir.join("name"))?.filter(|title| !title.is_empty()),
            available: sysfs::decimal(&dir.join("available_instances"))?.unwrap_or(0),
            id,
        })
    };
    sysfs::entries(&dir)?.into_iter().map(one).collect()
}
