//! The devices that groups make, virtual functions and virtual GPUs: mistakes in their definition, and the group that a
//! device belongs to.

use super::{GroupType, Groups, ResourceGroup};
use crate::base::bdf::HostBdf;
use crate::inventory::mdev::{MdevDevice, Mdevs};
use crate::pools::sriov::VfToken;
use crate::pools::vgpu::{Instance, TakenInstances, VgpuSpec};

impl Groups {
    /// What is wrong with the devices that a group makes: the key, and the mistake with its remedy.
    pub(super) fn problem(&self, group: &ResourceGroup) -> Option<(String, String)> {
        if let Some((key, problem)) = self.sriov_problem(group) {
            return Some((format!("sriov.{key}"), problem));
        }
        let spec = group.vgpu.as_ref()?;
        if group.kind != GroupType::Vgpu {
            let problem = "only groups of type \"vgpu\" have it: change `type`, or remove it";
            return Some(("vgpu".to_owned(), problem.to_owned()));
        }
        let named_by = |uuid| {
            let names = |spec: &VgpuSpec| spec.uuids.contains(uuid);
            let mut groups = self.groups.iter();
            groups.find(|other| other.vgpu.as_ref().is_some_and(names))
        };
        let mut shared = spec
            .uuids
            .iter()
            .filter_map(|uuid| Some((uuid, named_by(uuid)?)));
        if let Some((uuid, other)) = shared.next() {
            let problem = format!(
                "{uuid} belongs to group \"{}\" too: take it out of one of them",
                other.name
            );
            return Some(("vgpu.uuids".to_owned(), problem));
        }
        let (key, problem) = spec.problem()?;
        Some((format!("vgpu.{key}"), problem))
    }

    /// What is wrong with the virtual functions that a group makes: the key, and the mistake with its remedy.
    fn sriov_problem(&self, group: &ResourceGroup) -> Option<(&'static str, String)> {
        let spec = group.sriov.as_ref()?;
        let of = |other: &&ResourceGroup| {
            let spec_of = other.sriov.as_ref();
            spec_of.is_some_and(|other| other.pf == spec.pf)
        };
        if !matches!(group.kind, GroupType::Pci | GroupType::SriovNic) {
            let problem = "only groups of type \"sriov-nic\" or \"pci\" have virtual functions: change `type`, or \
                remove `sriov`";
            return Some(("pf", problem.to_owned()));
        }
        if let Some(other) = self.groups.iter().find(of) {
            let problem = format!(
                "group \"{}\" makes the virtual functions of {} already, all at once: remove `sriov` from one of them",
                other.name, spec.pf
            );
            return Some(("pf", problem));
        }
        spec.problem()
    }

    /// The group of a mediated device: the one that names it, or else the first of its type.
    pub fn group_of_mdev(&self, device: &MdevDevice) -> Option<&ResourceGroup> {
        let spec = |group: &&ResourceGroup, named: bool| {
            let spec = group.vgpu.as_ref();
            spec.is_some_and(|spec| spec.names(device) == Some(named))
        };
        if self.owner(device.uuid).is_some() {
            return None;
        }
        let named = self.groups.iter().find(|group| spec(group, true));
        named.or_else(|| self.groups.iter().find(|group| spec(group, false)))
    }

    /// How many mediated devices a VM could have of these now.
    pub fn free_mdevs(&self, spec: &VgpuSpec, mdevs: &Mdevs) -> usize {
        let none = TakenInstances::default();
        self.free_instances(spec, mdevs, &none, spec.most(mdevs))
            .len()
    }

    /// [`VgpuSpec::instances`] without the devices of tenants.
    pub(crate) fn free_instances(
        &self,
        spec: &VgpuSpec,
        mdevs: &Mdevs,
        taken: &TakenInstances,
        wanted: usize,
    ) -> Vec<Instance> {
        let mut found = spec.instances(mdevs, taken, wanted);
        let owner = |uuid| self.owner(uuid);
        found.retain(|instance| instance.uuid.and_then(owner).is_none());
        found
    }

    /// The token that the group of a card's virtual functions asks for.
    pub(crate) fn vf_token(&self, pf: HostBdf) -> Option<VfToken> {
        let mut specs = self.groups.iter().filter_map(|group| group.sriov.as_ref());
        specs.find(|spec| spec.pf == pf)?.vf_token
    }
}
