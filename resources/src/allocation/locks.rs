//! The locks of chosen devices.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::AllocateError;
use super::lease::{Lease, OwnLease};
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::facts::alive::ConfigSpace;
use crate::holding::device_lock::DeviceLock;
use crate::holding::lock_file::holder;
use crate::holding::passing::is_passing;
use crate::holding::record::LeaseRecord;
use crate::inventory::device::HostDevice;
use crate::inventory::unavailable::{IommuGroups, Unavailable, UnavailableDevice};

/// How long to wait for a holder that took a lock between the choice and this allocation.
const MOMENT: Duration = Duration::from_secs(2);

/// Locks chosen devices, one IOMMU group after the other. A failure drops the locks taken so far.
pub(super) fn lock(
    paths: &HostPaths,
    devices: &[HostDevice],
    chosen: &[&HostDevice],
    own: &[OwnLease],
    record: &LeaseRecord,
) -> Result<Vec<Lease>, AllocateError> {
    let pool = IommuGroups::new(devices);
    let shared = |lease: &OwnLease| Some((lease.iommu_group?, lease.locks()?));
    let mut groups: BTreeMap<u32, Arc<[DeviceLock]>> = own.iter().filter_map(shared).collect();
    let mut leases = Vec::new();
    for &device in chosen {
        let bdf = device.bdf;
        let Some(group) = device.iommu_group else {
            let why = Unavailable::NoIommuGroup;
            return Err(AllocateError::Unavailable(Box::new(UnavailableDevice {
                bdf,
                why,
            })));
        };
        let locks = match groups.get(&group) {
            Some(locks) => locks.clone(),
            None => lock_group(paths, pool.members(group), record)?,
        };
        groups.insert(group, locks.clone());
        let config = ConfigSpace::open(paths, bdf);
        leases.push(Lease::new(device.clone(), locks, config));
    }
    Ok(leases)
}

fn lock_group(
    paths: &HostPaths,
    members: &[&HostDevice],
    record: &LeaseRecord,
) -> Result<Arc<[DeviceLock]>, AllocateError> {
    let members = members.iter().filter(|member| !member.is_bridge());
    let locks: Result<Vec<DeviceLock>, AllocateError> = members
        .map(|member| lock_one(paths, member.bdf, record))
        .collect();
    Ok(locks?.into())
}

/// Only a process without the allocation lock can have taken the lock in between: for a tenant, a command of root's
/// that restores a function, which takes a moment; or a lease of the same VM that is just ending.
fn lock_one(
    paths: &HostPaths,
    bdf: HostBdf,
    record: &LeaseRecord,
) -> Result<DeviceLock, AllocateError> {
    let deadline = Instant::now() + MOMENT;
    loop {
        if let Some(lock) = DeviceLock::take(paths, bdf, record)? {
            return Ok(lock);
        }
        let lease = holder(paths, bdf);
        let ours = |holder: &LeaseRecord| holder.name == record.name && holder.pid == record.pid;
        let passing = is_passing(paths, bdf, lease.record()) || lease.record().is_some_and(ours);
        if !passing || Instant::now() >= deadline {
            return Err(AllocateError::Unavailable(Box::new(
                UnavailableDevice::leased(bdf, &lease),
            )));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
