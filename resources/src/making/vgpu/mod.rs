//! Virtual GPUs: mediated devices and the vendor's SR-IOV functions, created for a VM and removed when it ends.
//! Those with UUIDs in their group are created ahead, when the group is activated.

pub(crate) mod recorded;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::uuid::Uuid;
use crate::facts::vfio::{VfioBackEnd, cdev};
use crate::holding::device_lock::DeviceLock;
use crate::holding::host_lock::LeaseError;
use crate::holding::lock_file::holder;
use crate::holding::passing::{InTheWay, under_lock};
use crate::holding::record::{LeaseRecord, LeaseStatus};
use crate::holding::restore::Change;
use crate::inventory::device::HostDevice;
use crate::inventory::error::InventoryError;
use crate::inventory::mdev::{MdevDevice, Mdevs};
use crate::moving::writer::{SysfsWrite, SysfsWriter, WriteError};
use crate::pools::group::{GroupError, ResourceGroup};
use crate::pools::tenant::Tenants;
use crate::pools::vgpu::{Instance, TakenInstances, VgpuSpec};

/// How long a new mediated device may take to get its IOMMU group and its VFIO node.
const NODE_DEADLINE: Duration = Duration::from_secs(5);

/// A virtual GPU was not created, or not removed.
#[derive(Debug, Error)]
pub enum VgpuError {
    /// A write failed.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The write succeeded, but there is no device.
    #[error("{parent} made no {kind}: see dmesg")]
    NotMade {
        /// The parent.
        parent: String,
        /// The type.
        kind: String,
    },
    /// The write succeeded, but the device is still there.
    #[error("mediated device {uuid} is still there after its removal: see dmesg")]
    Stays {
        /// The device.
        uuid: Uuid,
    },
    /// A device to remove is leased.
    #[error("mediated device {uuid} is held by {}: end that first", who(.holder))]
    Held {
        /// The device.
        uuid: Uuid,
        /// Its holder, if that is recorded.
        holder: Option<LeaseRecord>,
    },
    /// The kernel has not returned from an earlier write.
    #[error(
        "the kernel has not finished creating or removing {name}: see dmesg; only a reboot of the host may end that"
    )]
    AtWork {
        /// The device.
        name: DeviceName,
    },
    /// There is no such device.
    #[error("there is no mediated device {uuid} on this host: `gantry device mdev` lists all")]
    NoSuch {
        /// Its identifier.
        uuid: Uuid,
    },
    /// A device belongs to a tenant.
    #[error(
        "mediated device {uuid} belongs to tenant \"{tenant}\": `gantry tenant revoke {tenant} {uuid}` takes it back"
    )]
    OfTenant {
        /// Its identifier.
        uuid: Uuid,
        /// The tenant.
        tenant: String,
    },
    /// The owners of devices cannot be read.
    #[error(transparent)]
    Tenants(#[from] GroupError),
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
    /// Devices of the group have another type, or cannot be created.
    #[error(
        "group \"{group}\" lacks {missing} of its {wanted} devices: no parent makes more of type \"{kind}\" (`gantry device mdev`)"
    )]
    NoRoom {
        /// The group.
        group: String,
        /// How many cannot be created.
        missing: usize,
        /// How many it asks for.
        wanted: usize,
        /// The type.
        kind: String,
    },
    /// The group has no devices of its own.
    #[error(
        "group \"{0}\" creates a new device for each VM: to create devices ahead, add \"uuids\" to its \"vgpu\""
    )]
    NoneAhead(String),
    /// A record cannot be written, so no device was created.
    #[error("cannot write the record of the VM's mediated device to {path}")]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A device cannot be read.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The locks cannot be used.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The kernel makes no UUID.
    #[error("the kernel gives no new UUID")]
    Identifier(#[source] io::Error),
}

impl VgpuError {
    /// Whether the same request may succeed once another VM or command has finished.
    pub(crate) fn is_temporary(&self) -> bool {
        matches!(
            self,
            Self::Held { .. } | Self::AtWork { .. } | Self::NoRoom { .. }
        )
    }

    /// Whether the devices are unavailable. Otherwise the host failed.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Held { .. }
                | Self::AtWork { .. }
                | Self::NoSuch { .. }
                | Self::OfTenant { .. }
                | Self::Ungrouped { .. }
                | Self::AskedTwice { .. }
                | Self::NoRoom { .. }
        )
    }
}

/// The result of creating or removing a group's devices, or of its dry run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VgpuReport {
    /// The group.
    pub group: String,
    /// Its devices afterwards.
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

/// A mediated device that this process has locked and may create.
#[derive(Debug)]
pub(crate) struct ClaimedInstance {
    instance: Instance,
    uuid: Uuid,
    lock: DeviceLock,
}

impl ClaimedInstance {
    /// Whether it is created for this VM, and removed with it.
    pub(crate) fn is_new(&self) -> bool {
        !self.instance.made
    }
}

/// Creates the mediated devices that a group names ahead of VMs: all or none.
pub fn make_ahead(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    group: &ResourceGroup,
    dry_run: bool,
) -> Result<VgpuReport, VgpuError> {
    let spec = ahead(group)?;
    let record = LeaseRecord::task("gantry group activate");
    let report = |instances: &[Instance]| VgpuReport {
        group: group.name.clone(),
        devices: spec.uuids.clone(),
        writes: instances
            .iter()
            .filter_map(|instance| Some(create_write(paths, instance, instance.uuid?)))
            .collect(),
    };
    if dry_run {
        return Ok(report(&missing(paths, group, spec)?));
    }
    // The claims suffice from here on: a slow driver delays no other allocation.
    let claimed = under_lock(paths, &record, VgpuError::in_the_way, || {
        let instances = missing(paths, group, spec)?;
        let mut claimed: Vec<ClaimedInstance> = Vec::new();
        for instance in &instances {
            let claim = instance
                .uuid
                .map(|uuid| claim(paths, instance, uuid, &record));
            claimed.extend(claim.transpose().inspect_err(|_| {
                // Devices that were claimed before the failure are not created.
                let claimed = claimed.iter();
                claimed.for_each(|one| Change::Vgpu.forget(paths, one.uuid));
            })?);
        }
        Ok(claimed)
    })?;
    for (index, one) in claimed.iter().enumerate() {
        if let Err(error) = make(paths, writer, &one.instance, one.uuid) {
            // Remove the devices created before it; the one that failed may exist too.
            for one in claimed[..=index].iter().rev() {
                undo(paths, writer, one.uuid);
            }
            claimed[index + 1..]
                .iter()
                .for_each(|one| Change::Vgpu.forget(paths, one.uuid));
            return Err(error);
        }
    }
    // They stay, so their restore records go.
    let uuids = claimed.iter().map(|one| one.uuid);
    uuids.for_each(|uuid| Change::Vgpu.forget(paths, uuid));
    let instances: Vec<Instance> = claimed.into_iter().map(|one| one.instance).collect();
    Ok(report(&instances))
}

/// The devices of a group to create; an error unless all can be.
fn missing(
    paths: &HostPaths,
    group: &ResourceGroup,
    spec: &VgpuSpec,
) -> Result<Vec<Instance>, VgpuError> {
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
    Ok(found.into_iter().filter(|one| !one.made).collect())
}

/// Removes the mediated devices that were created ahead for a group. Refused while one is held.
pub fn unmake_ahead(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    group: &ResourceGroup,
    dry_run: bool,
) -> Result<VgpuReport, VgpuError> {
    let spec = ahead(group)?;
    let record = LeaseRecord::task("gantry group deactivate");
    // The devices' locks suffice from here on: a slow driver delays no other allocation.
    let locked = under_lock(paths, &record, VgpuError::in_the_way, || {
        // Owners change under this lock too.
        let tenants = Tenants::load(paths)?;
        let owned = |uuid: &Uuid| Some((*uuid, tenants.owner_of(*uuid)?.name.clone()));
        if let Some((uuid, tenant)) = spec.uuids.iter().find_map(owned) {
            return Err(VgpuError::OfTenant { uuid, tenant });
        }
        let mut locked = Vec::new();
        for &uuid in &spec.uuids {
            if MdevDevice::read(paths, uuid)?.is_some() {
                locked.push((uuid, lock(paths, uuid, &record)?));
            }
        }
        Ok::<_, VgpuError>(locked)
    })?;
    let write = |(uuid, _): &(Uuid, DeviceLock)| SysfsWrite {
        path: paths.mdev(*uuid).join("remove"),
        value: "1".to_owned(),
    };
    let writes = locked.iter().map(write).collect();
    for &(uuid, _) in locked.iter().filter(|_| !dry_run) {
        recorded::remember(paths, uuid.into(), None, &record)?;
        recorded::remove_mdev(paths, writer, uuid).inspect_err(|error| {
            // It stays the group's, unless the kernel still works on it.
            if !error.is_hung() {
                Change::Vgpu.forget(paths, uuid);
            }
        })?;
    }
    Ok(VgpuReport {
        group: group.name.clone(),
        devices: Vec::new(),
        writes,
    })
}

impl VgpuError {
    /// A device that is held.
    pub(crate) fn held(uuid: Uuid, lease: &LeaseStatus) -> Self {
        let holder = lease.record().cloned();
        Self::Held { uuid, holder }
    }

    /// Whether the kernel still works on the device.
    fn is_hung(&self) -> bool {
        matches!(
            self,
            Self::AtWork { .. } | Self::Write(WriteError::Hung { .. })
        )
    }

    /// The held device that caused the failure, with its holder.
    fn in_the_way(&self) -> Vec<InTheWay> {
        match self {
            Self::Held { uuid, holder } => vec![((*uuid).into(), holder.clone())],
            _ => Vec::new(),
        }
    }
}

fn who(holder: &Option<LeaseRecord>) -> String {
    let record = holder.as_ref().map(ToString::to_string);
    record.unwrap_or_else(|| "an unknown process".to_owned())
}

fn ahead(group: &ResourceGroup) -> Result<&VgpuSpec, VgpuError> {
    let spec = group.vgpu.as_ref().filter(|spec| !spec.uuids.is_empty());
    spec.ok_or_else(|| VgpuError::NoneAhead(group.name.clone()))
}

/// Removes a device that was or may have been created. If that fails, its record is left for the next command.
fn undo(paths: &HostPaths, writer: &dyn SysfsWriter, uuid: Uuid) {
    if let Err(error) = recorded::remove_mdev(paths, writer, uuid) {
        tracing::error!("mediated device {uuid} stays: {error}");
    }
}

fn lock(paths: &HostPaths, uuid: Uuid, record: &LeaseRecord) -> Result<DeviceLock, VgpuError> {
    let lock = DeviceLock::take(paths, uuid, record)?;
    match lock {
        Some(lock) => Ok(lock),
        None => Err(VgpuError::held(uuid, &holder(paths, uuid))),
    }
}

/// Locks a mediated device and, if it does not exist yet, records that it will be created. The allocation lock is
/// held, so that no other choice counts on the same instances.
pub(crate) fn claim(
    paths: &HostPaths,
    instance: &Instance,
    uuid: Uuid,
    record: &LeaseRecord,
) -> Result<ClaimedInstance, VgpuError> {
    let lock = lock(paths, uuid, record)?;
    if !instance.made {
        recorded::remember(paths, uuid.into(), Some(&instance.parent), record)?;
    }
    Ok(ClaimedInstance {
        instance: instance.clone(),
        uuid,
        lock,
    })
}

/// Creates a claimed mediated device.
fn make(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    instance: &Instance,
    uuid: Uuid,
) -> Result<(), VgpuError> {
    let not_made = || VgpuError::NotMade {
        parent: instance.parent.clone(),
        kind: instance.kind.clone(),
    };
    let mut work = recorded::LockedRecord::begin(paths, uuid.into())?.ok_or_else(not_made)?;
    let write = create_write(paths, instance, uuid);
    work.write(writer, &write.path, &write.value)?;
    MdevDevice::read(paths, uuid)?
        .map(drop)
        .ok_or_else(not_made)
}

/// A claimed mediated device for a VM, created if it does not exist.
pub(crate) fn take(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    claimed: ClaimedInstance,
) -> Result<(MdevDevice, DeviceLock), VgpuError> {
    let ClaimedInstance {
        instance,
        uuid,
        lock,
    } = claimed;
    if !instance.made
        && let Err(error) = make(paths, writer, &instance, uuid)
    {
        undo(paths, writer, uuid);
        return Err(error);
    }
    let device = wait_for_node(paths, &instance, uuid)?;
    Ok((device, lock))
}

/// The UUID of an instance, or a new one.
pub(crate) fn identifier(paths: &HostPaths, instance: &Instance) -> Result<Uuid, VgpuError> {
    let new = || paths.random_uuid().map_err(VgpuError::Identifier);
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
        let node = match VfioBackEnd::of_host(paths) {
            VfioBackEnd::Container => device.iommu_group.map(|group| paths.vfio_group(group)),
            VfioBackEnd::Iommufd => cdev(paths, uuid.into()).ok(),
        };
        let there = node.is_some_and(|node| node.exists());
        if there || started.elapsed() >= NODE_DEADLINE {
            return Ok(device);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sets the type of one of the vendor's functions, which this process has locked, if it has none yet.
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
    recorded::remember(paths, bdf.into(), None, record)?;
    let Some(mut work) = recorded::LockedRecord::begin(paths, bdf.into())? else {
        return Ok(false);
    };
    let written = work.write(
        writer,
        &crate::facts::vgpu::current(paths, bdf),
        &kind.to_string(),
    );
    drop(work);
    written.inspect_err(|_| {
        // If this fails too, the record is left for the next command.
        let _ = recorded::untype(paths, writer, bdf);
    })?;
    Ok(true)
}

#[cfg(test)]
mod tests;
