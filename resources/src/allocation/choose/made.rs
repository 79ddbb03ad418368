//! The part of the choice for mediated devices, and for virtual functions whose card another VM has.

use super::super::{AllocateError, RequestFit};
use super::{Choice, Picked, RequestedDevices};
use crate::base::uuid::Uuid;
use crate::inventory::device::HostDevice;
use crate::inventory::mdev::MdevDevice;
use crate::inventory::unavailable::Unavailable;
use crate::making::sriov::token;
use crate::making::vgpu::VgpuError;
use crate::pools::sriov::VfToken;
use crate::pools::vgpu::{Instance, VgpuSpec};

impl<'a> Choice<'a, '_> {
    pub(super) fn exact_mdev(
        &mut self,
        uuid: Uuid,
        ungrouped: bool,
    ) -> Result<Picked<'a>, AllocateError> {
        let mut all = self.look.mdevs.devices.iter();
        let device = all.find(|device| device.uuid == uuid);
        if device.is_some_and(|device| device.quarantine.is_some()) {
            return Err(VgpuError::AtWork { name: uuid.into() }.into());
        }
        let leaving = |device: &&MdevDevice| {
            self.look.mdevs.is_claimed(device.uuid) && !device.lease.is_held()
        };
        let device = device.filter(|device| !leaving(device));
        let device = device.ok_or(VgpuError::NoSuch { uuid })?;
        if let Some(tenant) = self.look.groups.owner(uuid) {
            let tenant = tenant.to_owned();
            return Err(VgpuError::OfTenant { uuid, tenant }.into());
        }
        if !ungrouped && self.look.groups.group_of_mdev(device).is_none() {
            return Err(VgpuError::Ungrouped { uuid }.into());
        }
        if device.lease.is_held() {
            return Err(VgpuError::held(uuid, &device.lease).into());
        }
        let instance = Instance {
            uuid: Some(uuid),
            made: true,
            parent: device.parent.clone(),
            kind: device.kind.clone(),
        };
        if !self.instances.take(std::slice::from_ref(&instance)) {
            return Err(VgpuError::AskedTwice { uuid }.into());
        }
        Ok(Picked {
            devices: Vec::new(),
            fit: RequestFit::exact_mdev(&instance),
            instances: vec![instance],
        })
    }

    /// The available mediated devices of a group, up to a number.
    pub(super) fn instances_of(
        &self,
        meant: &RequestedDevices<'_>,
        wanted: usize,
    ) -> Vec<Instance> {
        let spec = match meant {
            RequestedDevices::Group(group) => group.vgpu.as_ref(),
            RequestedDevices::Alias(_) => None,
        };
        let (groups, mdevs) = (&self.look.groups, &self.look.mdevs);
        let free = |spec: &VgpuSpec| groups.free_instances(spec, mdevs, &self.instances, wanted);
        spec.map(free).unwrap_or_default()
    }

    /// Why a card with vfio-pci and its virtual functions cannot go to different VMs.
    pub(super) fn of_card(&self, device: &HostDevice) -> Option<Unavailable> {
        let card = token::card(device);
        let has_token = !matches!(
            self.look.groups.vf_token(card),
            None | Some(VfToken::Secret(false))
        );
        let devices = &self.look.devices;
        // Devices of the VM itself count as free.
        let is_held = |device: &HostDevice| {
            device.lease.is_held() || self.look.attached.contains_key(&device.bdf)
        };
        if device.physfn.is_none() {
            let of_it = |other: &&HostDevice| other.physfn == Some(card) && is_held(other);
            let held = devices.iter().find(of_it).filter(|_| !has_token)?;
            return Some(Unavailable::VfHeld { vf: held.bdf });
        }
        let pf = devices.iter().find(|other| other.bdf == card)?;
        if let Some(why) = &pf.quarantine {
            let why = why.clone();
            return Some(Unavailable::PfQuarantined { pf: card, why });
        }
        if !pf.on_vfio() {
            return None;
        }
        let owned = is_held(pf) || self.taken.contains(&card);
        match (has_token, owned) {
            (false, _) => Some(Unavailable::NoVfToken { pf: card }),
            (true, false) => Some(Unavailable::PfIdle { pf: card }),
            (true, true) => None,
        }
    }
}
