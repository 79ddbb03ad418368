//! Why a device cannot be given to a VM: because of the host, other VMs, or its IOMMU group.

mod filter;
mod words;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::base::bdf::HostBdf;
use crate::facts::ids::PciId;
use crate::holding::passing::InTheWay;
use crate::holding::record::{LeaseRecord, LeaseStatus};
use crate::inventory::device::DeviceType;
use crate::inventory::device::{HostDevice, NodeAccess};
use crate::inventory::guard::Guarded;
pub(crate) use filter::CandidateFilter;

/// Why a device is not available.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "reason")]
pub enum Unavailable {
    /// It is a bridge.
    Bridge,
    /// It is held.
    Leased {
        /// The holder, if that is recorded.
        holder: Option<LeaseRecord>,
    },
    /// It counts as held, as its lock file cannot be read.
    LockUnreadable {
        /// The file.
        file: PathBuf,
        /// Why not.
        why: String,
    },
    /// It is in quarantine.
    Quarantined {
        /// Why.
        why: String,
    },
    /// It is bound to a host driver.
    HostDriver {
        /// The driver.
        driver: String,
    },
    /// The host needs it, or a device of its IOMMU group, so that no VM may take it on demand.
    HostNeeds {
        /// What for.
        need: Guarded,
    },
    /// It has virtual functions, which would be destroyed if a VM took it on demand.
    HasVfs {
        /// How many.
        count: u16,
    },
    /// It is bound to no driver.
    Unbound,
    /// It is in no IOMMU group.
    NoIommuGroup,
    /// The host uses other devices of its IOMMU group.
    GroupInUse {
        /// The IOMMU group.
        group: u32,
        /// Those devices and their drivers.
        members: Vec<(HostBdf, String)>,
    },
    /// Another device of its IOMMU group is held.
    GroupLeased {
        /// The IOMMU group.
        group: u32,
        /// That device.
        member: HostBdf,
        /// The holder, if that is recorded.
        holder: Option<LeaseRecord>,
    },
    /// There is no VFIO node for its IOMMU group.
    NodeMissing {
        /// The IOMMU group.
        group: u32,
    },
    /// This process may not open the VFIO node of its IOMMU group.
    NodeDenied {
        /// The IOMMU group.
        group: u32,
    },
    /// A resource group that is defined earlier matches it as well, and has it.
    OtherGroup {
        /// That group.
        owner: String,
    },
    /// It belongs to a tenant.
    OfTenant {
        /// The tenant.
        tenant: String,
    },
    /// The same request asks for it a second time.
    AskedFor,
    /// The hardware at its address is not what the group's rule was made for.
    Changed {
        /// The hardware at the address.
        is: PciId,
    },
    /// It is another kind of function (physical, virtual, neither) than the alias asks for.
    DeviceType {
        /// Its kind.
        is: DeviceType,
        /// The kind that the alias asks for, if any.
        wanted: Option<DeviceType>,
    },
    /// It has another resource class than the one asked for.
    ResourceClass {
        /// Its class.
        is: String,
    },
    /// An alias asks for devices whose device_spec has another value of `live_migratable`.
    Migratable {
        /// The value asked for.
        wanted: bool,
    },
    /// It lacks traits that are asked for.
    Traits {
        /// The missing traits.
        missing: Vec<String>,
    },
    /// It is too far from the VM.
    Numa {
        /// Its NUMA node.
        node: Option<u32>,
    },
    /// Its physical function is in quarantine.
    PfQuarantined {
        /// The physical function.
        pf: HostBdf,
        /// Why.
        why: String,
    },
    /// Its physical function is bound to vfio-pci, and without a token only one VM can have functions of it.
    NoVfToken {
        /// The physical function.
        pf: HostBdf,
    },
    /// Its physical function is bound to vfio-pci, and nobody holds it.
    PfIdle {
        /// The physical function.
        pf: HostBdf,
    },
    /// A virtual function of it is held, and without a token only one VM can have functions of it.
    VfHeld {
        /// The virtual function.
        vf: HostBdf,
    },
    /// It has no interrupts, and its entry does not allow that.
    NoInterrupts {
        /// Whether [`Self::NoReset`] stands against it too.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        no_reset: bool,
    },
    /// Nothing resets it between two VMs, and its entry does not allow that.
    NoReset,
    /// It must not be reset, so nothing resets it between two VMs.
    MustNotReset {
        /// The damage that a reset does.
        why: String,
        /// Whether the kernel would reset it when a VM opens it. No entry allows that.
        by_kernel: bool,
    },
    /// Another device of the request has the same physical function.
    SamePf {
        /// The physical function.
        pf: HostBdf,
    },
}

impl Unavailable {
    /// Whether it may become available once another VM releases a device.
    pub fn is_temporary(&self) -> bool {
        matches!(
            self,
            Self::Leased { .. } | Self::GroupLeased { .. } | Self::VfHeld { .. }
        )
    }
}

/// A device that is not available. Shown as a sentence with the device, the reason and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UnavailableDevice {
    /// The device.
    pub bdf: HostBdf,
    /// Why.
    #[serde(flatten)]
    pub why: Unavailable,
}

impl Unavailable {
    /// Why a lease keeps a device from other VMs.
    fn of_lease(lease: &LeaseStatus) -> Option<Self> {
        match lease {
            LeaseStatus::Free => None,
            LeaseStatus::Held(_) | LeaseStatus::Unrecorded => {
                let holder = lease.record().cloned();
                Some(Self::Leased { holder })
            }
            LeaseStatus::Unreadable { file, why } => {
                let (file, why) = (file.clone(), why.clone());
                Some(Self::LockUnreadable { file, why })
            }
        }
    }
}

impl UnavailableDevice {
    /// A device that is held.
    pub(crate) fn leased(bdf: HostBdf, lease: &LeaseStatus) -> Self {
        let held = Unavailable::Leased { holder: None };
        let why = Unavailable::of_lease(lease).unwrap_or(held);
        Self { bdf, why }
    }

    /// The holder, if that is the reason.
    pub(crate) fn in_the_way(&self) -> Vec<InTheWay> {
        match &self.why {
            Unavailable::Leased { holder } => vec![(self.bdf.into(), holder.clone())],
            _ => Vec::new(),
        }
    }
}

/// The host's devices, by IOMMU group.
pub(crate) struct IommuGroups<'a> {
    groups: BTreeMap<u32, Vec<&'a HostDevice>>,
}

impl<'a> IommuGroups<'a> {
    pub(crate) fn new(devices: &'a [HostDevice]) -> Self {
        let mut groups: BTreeMap<u32, Vec<&HostDevice>> = BTreeMap::new();
        for device in devices {
            if let Some(group) = device.iommu_group {
                groups.entry(group).or_default().push(device);
            }
        }
        Self { groups }
    }

    /// All functions of an IOMMU group, bridges included.
    pub(crate) fn members(&self, group: u32) -> &[&'a HostDevice] {
        self.groups.get(&group).map_or(&[], Vec::as_slice)
    }

    /// The first reason why a device, which is no bridge, cannot be assigned.
    pub(crate) fn unavailable(&self, device: &HostDevice) -> Option<Unavailable> {
        if let Some(leased) = Unavailable::of_lease(&device.lease) {
            return Some(leased);
        }
        if let Some(why) = device.quarantine_reason() {
            let why = why.to_owned();
            return Some(Unavailable::Quarantined { why });
        }
        match &device.driver {
            Some(driver) if !device.on_vfio() => {
                return Some(Unavailable::HostDriver {
                    driver: driver.clone(),
                });
            }
            None => return Some(Unavailable::Unbound),
            Some(_) => {}
        }
        let Some(group) = device.iommu_group else {
            return Some(Unavailable::NoIommuGroup);
        };
        self.unavailable_group(group).or(match device.node {
            Some(NodeAccess::Ready) => None,
            Some(NodeAccess::Denied) => Some(Unavailable::NodeDenied { group }),
            Some(NodeAccess::Missing) | None => Some(Unavailable::NodeMissing { group }),
        })
    }

    /// The first reason why a device cannot be taken from the host for a VM.
    pub(crate) fn unavailable_on_demand(
        &self,
        device: &HostDevice,
        guarded: &[Guarded],
    ) -> Option<Unavailable> {
        let first = self.unavailable(device);
        match first {
            None
            | Some(
                Unavailable::HostDriver { .. }
                | Unavailable::Unbound
                | Unavailable::GroupInUse { .. },
            ) => {}
            first => return first,
        }
        let Some(group) = device.iommu_group else {
            return Some(Unavailable::NoIommuGroup);
        };
        let members = self.members(group);
        let need = |member: &&HostDevice| guarded.iter().find(|one| one.bdf == member.bdf);
        if let Some(need) = members.iter().find_map(need) {
            return Some(Unavailable::HostNeeds { need: need.clone() });
        }
        let away = |member: &&&HostDevice| !member.on_vfio() && !member.is_bridge();
        let vfs = members.iter().filter(away).find_map(|member| member.sriov);
        if let Some(sriov) = vfs.filter(|sriov| sriov.active > 0) {
            return Some(Unavailable::HasVfs {
                count: sriov.active,
            });
        }
        let leased = self.leased_in(group);
        let bridge = members
            .iter()
            .any(|member| member.is_bridge() && !member.leaves_group_viable());
        leased.or(first.filter(|_| bridge))
    }

    /// The first reason why a function of the vendor's cannot become a virtual GPU for a VM. It stays bound to
    /// the host's driver, through which VFIO opens it.
    pub(crate) fn unavailable_as_vgpu(&self, device: &HostDevice) -> Option<Unavailable> {
        if let Some(leased) = Unavailable::of_lease(&device.lease) {
            return Some(leased);
        }
        if let Some(why) = &device.quarantine {
            return Some(Unavailable::Quarantined { why: why.clone() });
        }
        match device.iommu_group {
            None => Some(Unavailable::NoIommuGroup),
            Some(group) => self.leased_in(group),
        }
    }

    fn leased_in(&self, group: u32) -> Option<Unavailable> {
        let members = self.members(group);
        let leased = members
            .iter()
            .find_map(|member| Some((member.bdf, held(&member.lease)?)));
        leased.map(|(member, holder)| Unavailable::GroupLeased {
            group,
            member,
            holder,
        })
    }

    fn unavailable_group(&self, group: u32) -> Option<Unavailable> {
        let members = self.members(group);
        if let Some(leased) = self.leased_in(group) {
            return Some(leased);
        }
        let in_use = members
            .iter()
            .filter(|member| !member.leaves_group_viable());
        let in_use: Vec<_> = in_use
            .filter_map(|member| Some((member.bdf, member.driver.clone()?)))
            .collect();
        (!in_use.is_empty()).then_some(Unavailable::GroupInUse {
            group,
            members: in_use,
        })
    }
}

/// The record of the holder, if the device is held.
fn held(lease: &LeaseStatus) -> Option<Option<LeaseRecord>> {
    lease.is_held().then(|| lease.record().cloned())
}
