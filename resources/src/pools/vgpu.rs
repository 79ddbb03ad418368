//! A group's definition of virtual GPUs, and the choice among those that the host can create.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::uuid::Uuid;
use crate::facts::vgpu::VendorVgpu;
use crate::inventory::device::HostDevice;
use crate::inventory::mdev::{MdevDevice, MdevParent, MdevType, Mdevs};

/// The virtual GPUs, or other mediated devices, of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VgpuSpec {
    /// The type: "nvidia-222", its maker's name "GRID T4-1Q", or the number of an SR-IOV vGPU's type.
    #[serde(rename = "type")]
    #[schemars(extend("minLength" = 1))]
    pub kind: String,
    /// What may make them: addresses of cards, or names in /sys/class/mdev_bus. Any if absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<String>,
    /// UUIDs of the only devices of the group, created ahead by `gantry group activate`. If absent, each VM gets
    /// new ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uuids: Vec<Uuid>,
}

/// A mediated device that a VM gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// Its UUID; none for a new one.
    pub uuid: Option<Uuid>,
    /// Whether it exists already, and stays when the VM ends.
    pub made: bool,
    /// Its parent.
    pub parent: String,
    /// The id of its type.
    #[serde(rename = "type")]
    pub kind: String,
}

/// Devices that earlier requests of the same VM took.
#[derive(Debug, Default)]
pub(crate) struct TakenInstances {
    uuids: BTreeSet<Uuid>,
    made: BTreeMap<String, u32>,
}

impl VgpuSpec {
    /// Devices of a type, by its id, without UUIDs.
    pub(crate) fn of_kind(id: &str) -> Self {
        Self {
            kind: id.to_owned(),
            parents: Vec::new(),
            uuids: Vec::new(),
        }
    }

    /// The mistake in it: the key, the reason and the remedy.
    pub(crate) fn problem(&self) -> Option<(&'static str, String)> {
        let mut seen = BTreeSet::new();
        if self.kind.trim().is_empty() {
            let problem = "it is empty: name a type that `gantry device mdev` lists";
            return Some(("type", problem.to_owned()));
        }
        let twice = self.uuids.iter().find(|uuid| !seen.insert(**uuid));
        twice.map(|uuid| {
            (
                "uuids",
                format!("{uuid} is given twice: remove one of them"),
            )
        })
    }

    fn allows(&self, parent: &str) -> bool {
        // An address may be written without its domain.
        let same = |one: &String| one == parent || format!("0000:{one}") == parent;
        self.parents.is_empty() || self.parents.iter().any(same)
    }

    fn is_kind(&self, id: &str, title: Option<&str>) -> bool {
        self.kind == id || title == Some(&self.kind)
    }

    /// The most mediated devices that can exist now.
    pub(super) fn most(&self, mdevs: &Mdevs) -> usize {
        let room = self.sources(mdevs).map(|(_, kind)| kind.available as usize);
        room.sum::<usize>() + self.uuids.len()
    }

    /// Whether the group names a mediated device (true), or matches its type (false); none if neither.
    pub(crate) fn names(&self, device: &MdevDevice) -> Option<bool> {
        if self.uuids.contains(&device.uuid) {
            return Some(true);
        }
        let of_type = self.uuids.is_empty() && self.is_kind(&device.kind, device.title.as_deref());
        (of_type && self.allows(&device.parent)).then_some(false)
    }

    /// Whether a function is one of the vendor's that can have, or has, this type.
    pub(crate) fn takes(&self, device: &HostDevice) -> bool {
        let parent = device.physfn.unwrap_or(device.bdf).to_string();
        let of_card = self.allows(&parent) || self.allows(&device.bdf.to_string());
        let vgpu = device.vgpu.as_ref();
        of_card && vgpu.is_some_and(|vgpu| self.vendor_type(vgpu).is_some())
    }

    /// The vendor's number of this type on a function.
    pub(crate) fn vendor_type(&self, vgpu: &VendorVgpu) -> Option<u32> {
        let current = Some(vgpu.current).filter(|id| *id != 0 && self.kind == id.to_string());
        let mut types = vgpu.creatable.iter();
        let creatable = types.find(|one| self.is_kind(&one.id.to_string(), Some(&one.title)));
        current.or(creatable.map(|one| one.id))
    }

    /// Whether a parent supports this type, with free instances or without.
    pub(crate) fn can_be_made(&self, mdevs: &Mdevs) -> bool {
        self.sources(mdevs).next().is_some()
    }

    /// The parents that can make this type, with it.
    fn sources<'m>(
        &self,
        mdevs: &'m Mdevs,
    ) -> impl Iterator<Item = (&'m MdevParent, &'m MdevType)> {
        let of = |parent: &'m MdevParent| {
            let mut types = parent.types.iter();
            let found = types.find(|one| self.is_kind(&one.id, one.title.as_deref()));
            found.filter(|_| self.allows(&parent.name))
        };
        mdevs
            .parents
            .iter()
            .filter_map(move |parent| Some((parent, of(parent)?)))
    }

    /// The available mediated devices: free ones that were created ahead, and up to `wanted` that can be created,
    /// in the order of parents.
    pub(crate) fn instances(
        &self,
        mdevs: &Mdevs,
        taken: &TakenInstances,
        wanted: usize,
    ) -> Vec<Instance> {
        let mut found = Vec::new();
        let mut open: Vec<Option<Uuid>> = Vec::new();
        for &uuid in &self.uuids {
            let there = mdevs.devices.iter().find(|device| device.uuid == uuid);
            match there {
                _ if taken.uuids.contains(&uuid) || mdevs.is_claimed(uuid) => {}
                Some(device) if device.lease.is_held() => {}
                Some(device) => found.extend(self.sources(mdevs).find_map(|(parent, kind)| {
                    let right = device.parent == parent.name && device.kind == kind.id;
                    right.then(|| Instance {
                        uuid: Some(uuid),
                        made: true,
                        parent: parent.name.clone(),
                        kind: kind.id.clone(),
                    })
                })),
                None => open.push(Some(uuid)),
            }
        }
        if self.uuids.is_empty() {
            open = vec![None; wanted];
        }
        let mut open = open.into_iter();
        for (parent, kind) in self.sources(mdevs) {
            let used = taken.made.get(&parent.name).copied().unwrap_or(0);
            let used = used.saturating_add(mdevs.under_way(&parent.name));
            for uuid in open
                .by_ref()
                .take(kind.available.saturating_sub(used) as usize)
            {
                found.push(Instance {
                    uuid,
                    made: false,
                    parent: parent.name.clone(),
                    kind: kind.id.clone(),
                });
            }
        }
        found
    }
}

impl TakenInstances {
    /// Whether none was taken before.
    pub(crate) fn take(&mut self, instances: &[Instance]) -> bool {
        let mut fresh = true;
        for instance in instances {
            fresh &= instance.uuid.is_none_or(|uuid| self.uuids.insert(uuid));
            if !instance.made {
                *self.made.entry(instance.parent.clone()).or_default() += 1;
            }
        }
        fresh
    }
}
