//! Prepares chosen devices for a VM: creates, configures and binds them, and undoes that afterwards.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::AllocateError;
use super::choose::{Pick, PickedDevice};
use crate::allocation::Lease;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::uuid::Uuid;
use crate::holding::record::LeaseRecord;
use crate::inventory::device::HostDevice;
use crate::making::demand::{Binder, HelperPipe};
use crate::making::sriov::{self, SriovError};
use crate::making::vgpu;
use crate::making::vgpu::ClaimedInstance;
use crate::pools::group::{GroupType, Groups};
use crate::pools::request::DeviceRequest;
use crate::pools::vgpu::Instance;

/// Creates the virtual functions of on-demand groups that a VM asks for.
pub(super) fn activate_wanted(
    paths: &HostPaths,
    requests: &[DeviceRequest],
    binder: &Binder<'_>,
) -> Result<(), AllocateError> {
    let groups = Groups::load(paths)?;
    for name in requests.iter().filter_map(|request| request.from.pool()) {
        if let Some(group) = groups.get(name) {
            sriov::activate_for_vm(paths, binder.host, group)?;
        }
    }
    Ok(())
}

/// The preparation that chosen devices need.
pub(super) struct Preparation<'a> {
    paths: &'a HostPaths,
    groups: &'a Groups,
    binder: &'a Binder<'a>,
    record: &'a LeaseRecord,
    /// The devices that leave their host drivers.
    lent: Vec<HostBdf>,
    /// All changes for the VM, which are undone after it.
    changed: Vec<DeviceName>,
    /// Mediated devices with their UUIDs, present or future.
    instances: Vec<(Instance, Uuid)>,
    watch: Option<Arc<HelperPipe>>,
}

impl<'a> Preparation<'a> {
    /// Plans the preparation, and starts the helper that undoes it before anything is changed.
    pub(super) fn of(
        paths: &'a HostPaths,
        groups: &'a Groups,
        binder: &'a Binder<'a>,
        record: &'a LeaseRecord,
        picks: &[Pick<'_>],
    ) -> Result<Self, AllocateError> {
        let mut needs = Self {
            paths,
            groups,
            binder,
            record,
            lent: Vec::new(),
            changed: Vec::new(),
            instances: Vec::new(),
            watch: None,
        };
        for pick in picks {
            match &pick.thing {
                PickedDevice::Device(device) => needs.look_at(device)?,
                PickedDevice::Instance(instance) => {
                    let uuid = vgpu::identifier(paths, instance)?;
                    let name = DeviceName::from(uuid);
                    needs.changed.extend((!instance.made).then_some(name));
                    needs.instances.push((instance.clone(), uuid));
                }
            }
        }
        if !needs.changed.is_empty() {
            needs.watch = Some(Arc::new(
                binder
                    .watch(paths, &needs.changed)
                    .map_err(AllocateError::Helper)?,
            ));
        }
        Ok(needs)
    }

    fn look_at(&mut self, device: &HostDevice) -> Result<(), AllocateError> {
        let demand = self.groups.tags(device).on_demand && device.vgpu.is_none();
        self.lent.extend(demand.then_some(device.bdf));
        let set = sriov::vf_restore::function(self.paths, self.groups, device);
        let set = set.map_err(SriovError::from)?.is_some();
        let changed = demand || set || device.vgpu.is_some();
        let name = DeviceName::from(device.bdf);
        self.changed.extend(changed.then_some(name));
        Ok(())
    }

    /// Claims the mediated devices under the allocation lock, while the counted instances are still free.
    pub(super) fn claim(&mut self) -> Result<Vec<ClaimedInstance>, AllocateError> {
        let claim = |(instance, uuid): &(Instance, Uuid)| {
            vgpu::claim(self.paths, instance, *uuid, self.record)
        };
        let claimed: Result<Vec<ClaimedInstance>, _> = self.instances.iter().map(claim).collect();
        Ok(claimed?)
    }

    /// The mediated devices, created where they are missing. If one fails, the helper removes those that were
    /// created and the records of the others.
    pub(super) fn instances(
        &self,
        claimed: Vec<ClaimedInstance>,
    ) -> Result<Vec<Lease>, AllocateError> {
        let mut leases = Vec::new();
        for one in claimed {
            let watch = self.watch.clone().filter(|_| one.is_new());
            let (device, lock) = vgpu::take(self.paths, self.binder.host.writer, one)?;
            leases.push(Lease::mdev(device, lock, watch));
        }
        Ok(leases)
    }

    /// Detaches on-demand devices from the host, after giving functions their settings and types.
    pub(super) fn functions(&self, leases: Vec<Lease>) -> Result<Vec<Lease>, AllocateError> {
        let (paths, groups, host) = (self.paths, self.groups, self.binder.host);
        for device in leases.iter().filter_map(Lease::device) {
            sriov::vf_restore::prepare(paths, host.links, groups, device)?;
            if paths.only.is_some() {
                sriov::granted::warn_if_changed(paths, host.links, device.bdf);
            }
            let group = groups.group_of(device);
            if let Some(group) = group.filter(|group| group.kind == GroupType::Vgpu) {
                vgpu::set_type(paths, host.writer, group, device, self.record)?;
            }
        }
        self.binder.bind(paths, &self.lent)?;
        leases.into_iter().map(|lease| self.finish(lease)).collect()
    }

    /// The lease for the VM: of the device as it is now, with its token.
    fn finish(&self, lease: Lease) -> Result<Lease, AllocateError> {
        let Some(bdf) = lease.device().map(|device| device.bdf) else {
            return Ok(lease);
        };
        let lease = match &self.watch {
            Some(watch) if self.changed.contains(&bdf.into()) => {
                lease.on_demand(HostDevice::read(self.paths, bdf)?, watch)
            }
            _ => lease,
        };
        let device = lease.device();
        let token = device.map(|device| sriov::token::of(self.paths, self.groups, device));
        Ok(lease.with_token(token.transpose()?.flatten()))
    }
}

/// Orders the leases as the devices were chosen, each with its terms.
pub(super) fn in_order(picks: &[Pick<'_>], functions: Vec<Lease>, mdevs: Vec<Lease>) -> Vec<Lease> {
    let mut by_name: BTreeMap<DeviceName, Lease> = functions
        .into_iter()
        .map(|lease| (lease.name(), lease))
        .collect();
    let mut mdevs = mdevs.into_iter();
    let one = |pick: &Pick<'_>| {
        let lease = match &pick.thing {
            PickedDevice::Device(device) => by_name.remove(&device.bdf.into()),
            PickedDevice::Instance(_) => mdevs.next(),
        };
        Some(lease?.on_terms(pick.terms))
    };
    picks.iter().filter_map(one).collect()
}
