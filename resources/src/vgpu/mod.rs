//! Virtual GPUs: mediated devices and the vendor's SR-IOV ones, made when a VM gets them and unmade when
//! it ends; those with identifiers of their own are made ahead, when their group is activated.

pub(crate) mod owed;
mod spec;
mod vendor;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use thiserror::Error;

use crate::group::ResourceGroup;
use crate::host::{HostBdf, HostPaths};
use crate::inventory::{HostDevice, InventoryError};
use crate::lease::{
    ALLOCATION_DEADLINE, AllocationLock, DeviceLock, LeaseError, LeaseRecord, LeaseStatus, holder,
};
use crate::mdev::{MdevDevice, Mdevs, directory};
use crate::uuid::Uuid;
use crate::writer::{SysfsWrite, SysfsWriter, WriteError};
pub(crate) use spec::TakenInstances;
pub use spec::{Instance, VgpuSpec};
pub(crate) use vendor::NVIDIA;
pub use vendor::{VendorType, VendorVgpu};

/// How long a new mediated device may take to have its IOMMU group and its VFIO node.
const NODE_DEADLINE: Duration = Duration::from_secs(5);

/// A virtual GPU was not made, or not unmade.
#[derive(Debug, Error)]
pub enum VgpuError {
    /// A write failed.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The kernel took the write, but there is no device.
    #[error("{parent} made no {kind}: see dmesg")]
    NotMade {
        /// What should have made it.
        parent: String,
        /// Of which type.
        kind: String,
    },
    /// The kernel took the write, but the device is still there.
    #[error("mediated device {uuid} stays although it was removed: see dmesg")]
    Stays {
        /// The device.
        uuid: Uuid,
    },
    /// Somebody has a device that should go.
    #[error("mediated device {uuid} is held by {holder}: end that first")]
    Held {
        /// The device.
        uuid: Uuid,
        /// Who, in words.
        holder: String,
    },
    /// There is no such device.
    #[error(
        "there is no mediated device {uuid} on this host: `gantry device mdev` shows what there is"
    )]
    NoSuch {
        /// Its identifier.
        uuid: Uuid,
    },
    /// A device is in no group.
    #[error(
        "mediated device {uuid} is in no group: name it in the \"uuids\" of one, or give --allow-ungrouped"
    )]
    Ungrouped {
        /// Its identifier.
        uuid: Uuid,
    },
    /// A device is asked for twice.
    #[error("mediated device {uuid} is asked for twice: name it once")]
    AskedTwice {
        /// Its identifier.
        uuid: Uuid,
    },
    /// Devices of the group are another type's, or cannot be made.
    #[error(
        "group \"{group}\" lacks {missing} of its {wanted} devices: no parent makes more of type \"{kind}\" (`gantry device mdev`)"
    )]
    NoRoom {
        /// The group.
        group: String,
        /// How many cannot be made.
        missing: usize,
        /// How many it wants.
        wanted: usize,
        /// The type.
        kind: String,
    },
    /// The group has no devices of its own.
    #[error(
        "group \"{0}\" makes a new device for each VM, none ahead: give its \"vgpu\" \"uuids\" for that"
    )]
    NoneAhead(String),
    /// A record cannot be written, so nothing was made.
    #[error("cannot keep in {path} what is made for a VM")]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A device cannot be looked at.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The locks cannot be used.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// There are no new identifiers.
    #[error("the kernel gives no new identifier")]
    Identifier(#[source] io::Error),
}

/// What became of the devices that a group has made ahead, or in a dry run would.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VgpuReport {
    /// The group.
    pub group: String,
    /// Its devices that there are afterwards.
    pub devices: Vec<Uuid>,
    /// The writes, in order.
    pub writes: Vec<SysfsWrite>,
}

fn create_write(paths: &HostPaths, instance: &Instance, uuid: Uuid) -> SysfsWrite {
    let parent = paths.sysfs.join("class/mdev_bus").join(&instance.parent);
    let kind = parent.join("mdev_supported_types").join(&instance.kind);
    SysfsWrite {
        path: kind.join("create"),
        value: uuid.to_string(),
    }
}

/// Makes the mediated devices of a group that are to be there ahead: all of them or none.
pub fn make_ahead(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    group: &ResourceGroup,
    dry_run: bool,
) -> Result<VgpuReport, VgpuError> {
    let spec = ahead(group)?;
    let record = LeaseRecord::task("gantry group activate");
    let _choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
    let mdevs = Mdevs::read(paths)?;
    let found = spec.instances(&mdevs, &TakenInstances::default(), usize::MAX);
    let held = |uuid: &&Uuid| {
        let mut all = mdevs.devices.iter();
        all.any(|device| device.uuid == **uuid && device.lease.is_held())
    };
    let there = found.len() + spec.uuids.iter().filter(held).count();
    if there < spec.uuids.len() {
        return Err(VgpuError::NoRoom {
            group: group.name.clone(),
            missing: spec.uuids.len() - there,
            wanted: spec.uuids.len(),
            kind: spec.kind.clone(),
        });
    }
    let mut writes: Vec<SysfsWrite> = Vec::new();
    for instance in found.iter().filter(|instance| !instance.made) {
        let Some(uuid) = instance.uuid else { continue };
        let write = create_write(paths, instance, uuid);
        let made = match dry_run {
            true => Ok(()),
            false => make(paths, writer, instance, &write, uuid),
        };
        if let Err(error) = made {
            // What was made before it goes again; the one that failed may be there nevertheless.
            let all = writes.iter().chain([&write]);
            for uuid in all.rev().filter_map(|write| write.value.parse().ok()) {
                undo(paths, writer, uuid);
            }
            return Err(error);
        }
        writes.push(write);
    }
    Ok(VgpuReport {
        group: group.name.clone(),
        devices: spec.uuids.clone(),
        writes,
    })
}

/// Removes the mediated devices that a group has made ahead. Refused while one is held.
pub fn unmake_ahead(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    group: &ResourceGroup,
    dry_run: bool,
) -> Result<VgpuReport, VgpuError> {
    let spec = ahead(group)?;
    let record = LeaseRecord::task("gantry group deactivate");
    let _choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
    let mut locks = Vec::new();
    let mut writes = Vec::new();
    for &uuid in &spec.uuids {
        if MdevDevice::read(paths, uuid)?.is_none() {
            continue;
        }
        match DeviceLock::take(paths, uuid, &record)? {
            Some(lock) => locks.push(lock),
            None => {
                return Err(VgpuError::held(uuid, &holder(paths, uuid)?));
            }
        }
        writes.push(SysfsWrite {
            path: directory(paths, uuid).join("remove"),
            value: "1".to_owned(),
        });
    }
    for write in writes.iter().filter(|_| !dry_run) {
        writer.write(&write.path, &write.value)?;
    }
    Ok(VgpuReport {
        group: group.name.clone(),
        devices: Vec::new(),
        writes,
    })
}

impl VgpuError {
    /// A device that somebody holds.
    pub(crate) fn held(uuid: Uuid, lease: &LeaseStatus) -> Self {
        let record = lease.record().map(ToString::to_string);
        let holder = record.unwrap_or_else(|| "an unknown process".to_owned());
        Self::Held { uuid, holder }
    }
}

fn ahead(group: &ResourceGroup) -> Result<&VgpuSpec, VgpuError> {
    let spec = group.vgpu.as_ref().filter(|spec| !spec.uuids.is_empty());
    spec.ok_or_else(|| VgpuError::NoneAhead(group.name.clone()))
}

fn undo(paths: &HostPaths, writer: &dyn SysfsWriter, uuid: Uuid) {
    let dir = directory(paths, uuid);
    if dir.exists()
        && let Err(error) = writer.write(&dir.join("remove"), "1")
    {
        tracing::error!("mediated device {uuid} stays: {error}");
    }
}

fn make(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    instance: &Instance,
    write: &SysfsWrite,
    uuid: Uuid,
) -> Result<(), VgpuError> {
    writer.write(&write.path, &write.value)?;
    match MdevDevice::read(paths, uuid)? {
        Some(_) => Ok(()),
        None => Err(VgpuError::NotMade {
            parent: instance.parent.clone(),
            kind: instance.kind.clone(),
        }),
    }
}

/// A mediated device for a VM, locked; the allocation lock is held, so that what the choice counted on is
/// still there. `watch` is told of it first: it unmakes what is made when the VM ends.
pub(crate) fn take(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    instance: &Instance,
    uuid: Uuid,
    record: &LeaseRecord,
) -> Result<(MdevDevice, DeviceLock), VgpuError> {
    let Some(lock) = DeviceLock::take(paths, uuid, record)? else {
        return Err(VgpuError::held(uuid, &holder(paths, uuid)?));
    };
    if !instance.made {
        owed::remember(paths, uuid.into(), record)?;
        let write = create_write(paths, instance, uuid);
        if let Err(error) = make(paths, writer, instance, &write, uuid) {
            // Where this fails too, the record is left for the next command.
            let _ = owed::remove_mdev(paths, writer, uuid);
            return Err(error);
        }
    }
    let device = wait_for_node(paths, instance, uuid)?;
    Ok((device, lock))
}

/// The identifier that an instance has, or a new one.
pub(crate) fn identifier(paths: &HostPaths, instance: &Instance) -> Result<Uuid, VgpuError> {
    let new = || Uuid::random(paths).map_err(VgpuError::Identifier);
    instance.uuid.map_or_else(new, Ok)
}

fn wait_for_node(
    paths: &HostPaths,
    instance: &Instance,
    uuid: Uuid,
) -> Result<MdevDevice, VgpuError> {
    let started = Instant::now();
    loop {
        let device = MdevDevice::read(paths, uuid)?.ok_or_else(|| VgpuError::NotMade {
            parent: instance.parent.clone(),
            kind: instance.kind.clone(),
        })?;
        let node = device.iommu_group.map(|group| paths.vfio_group(group));
        let there = node.is_some_and(|node| node.exists());
        if there || started.elapsed() >= NODE_DEADLINE {
            return Ok(device);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sets the type of one of the vendor's functions that this process has locked, if it has none yet.
pub(crate) fn set_type(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    group: &ResourceGroup,
    device: &HostDevice,
    record: &LeaseRecord,
) -> Result<bool, VgpuError> {
    let vgpu = device.vgpu.as_ref().filter(|vgpu| vgpu.current == 0);
    let kind = vgpu.zip(group.vgpu.as_ref());
    let Some(kind) = kind.and_then(|(vgpu, spec)| spec.vendor_type(vgpu)) else {
        return Ok(false);
    };
    let bdf: HostBdf = device.bdf;
    owed::remember(paths, bdf.into(), record)?;
    let written = writer.write(&vendor::current(paths, bdf), &kind.to_string());
    if let Err(error) = written {
        let _ = owed::untype(paths, writer, bdf);
        return Err(error.into());
    }
    Ok(true)
}

#[cfg(test)]
mod tests;
