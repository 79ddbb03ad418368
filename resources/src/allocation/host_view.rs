//! The host's devices as they were read for one choice.

use std::collections::{BTreeMap, BTreeSet};

use super::error::AllocateError;
use super::lease::OwnLease;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::facts::topology::Sockets;
use crate::holding::record::{LeaseRecord, LeaseStatus};
use crate::inventory::device::HostDevice;
use crate::inventory::guard::{Guarded, host_uses};
use crate::inventory::mdev::Mdevs;
use crate::inventory::scan::scan_with;
use crate::moving::bind::BindError;
use crate::pools::group::Groups;

/// The host as a choice sees it.
pub(super) struct HostView {
    pub(super) devices: Vec<HostDevice>,
    pub(super) groups: Groups,
    pub(super) sockets: Sockets,
    /// The host's uses of devices that VMs can take on demand.
    pub(super) guarded: Vec<Guarded>,
    /// The VM's own leases and record.
    pub(super) attached: BTreeMap<HostBdf, Option<LeaseRecord>>,
    pub(super) mdevs: Mdevs,
}

impl HostView {
    pub(super) fn at(paths: &HostPaths) -> Result<Self, AllocateError> {
        let groups = Groups::load(paths)?;
        let devices = scan_with(paths, groups.detail())?;
        let guarded = guarded(paths, &groups, &devices)?;
        Ok(Self {
            mdevs: Mdevs::read(paths)?,
            sockets: sockets(paths),
            devices,
            groups,
            guarded,
            attached: BTreeMap::new(),
        })
    }

    /// A view of these devices alone.
    #[cfg(test)]
    pub(super) fn over(devices: Vec<HostDevice>, groups: Groups, sockets: Sockets) -> Self {
        Self {
            devices,
            groups,
            sockets,
            guarded: Vec::new(),
            attached: BTreeMap::new(),
            mdevs: Mdevs::default(),
        }
    }

    /// The same for a VM that has leases, which do not keep devices from the VM itself. A lease may have ended
    /// since it was read: its locks are then taken anew.
    pub(super) fn beside(mut self, own: &[OwnLease]) -> Self {
        let locked = own.iter().flat_map(|lease| lease.locked.iter().copied());
        let kept: BTreeSet<HostBdf> = locked.filter_map(DeviceName::pci).collect();
        let has = |bdf: &HostBdf| own.iter().any(|lease| lease.name == *bdf);
        for device in &mut self.devices {
            if kept.contains(&device.bdf) {
                let lease = std::mem::replace(&mut device.lease, LeaseStatus::Free);
                if has(&device.bdf) {
                    self.attached.insert(device.bdf, lease.record().cloned());
                }
            }
        }
        self
    }

    /// Whether killed VMs left devices that use up instances.
    pub(super) fn has_left_vgpus(&self) -> bool {
        self.mdevs.claims.iter().any(|claim| claim.left)
    }

    /// Whether devices are being created or removed, so that the free instances of their parents are unknown.
    pub(super) fn has_vgpus_under_way(&self) -> bool {
        let mut claims = self.mdevs.claims.iter();
        claims.any(|claim| claim.under_way && !claim.left)
    }
}

/// The host's uses of the devices that a VM could take on demand, and of their IOMMU groups.
fn guarded(
    paths: &HostPaths,
    groups: &Groups,
    devices: &[HostDevice],
) -> Result<Vec<Guarded>, AllocateError> {
    // A device of another VM is unavailable anyway.
    let on_host =
        |device: &&HostDevice| !device.on_vfio() && !device.is_bridge() && !device.lease.is_held();
    let concerned: BTreeSet<Option<u32>> = devices
        .iter()
        .filter(|device| device.iommu_group.is_some() && groups.tags(device).on_demand)
        .map(|device| device.iommu_group)
        .collect();
    let leaving: Vec<HostDevice> = devices
        .iter()
        .filter(|device| on_host(device) && concerned.contains(&device.iommu_group))
        .cloned()
        .collect();
    if leaving.is_empty() {
        return Ok(Vec::new());
    }
    host_uses(paths, &leaving).map_err(|error| AllocateError::Bind(BindError::Guard(error)))
}

/// Where the host does not show which nodes share a socket, each node counts as a socket.
fn sockets(paths: &HostPaths) -> Sockets {
    Sockets::read(paths).unwrap_or_else(|error| {
        tracing::warn!("cannot tell which NUMA nodes share a socket: {error}");
        Sockets::default()
    })
}
