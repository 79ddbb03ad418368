//! The filters that a device passes on its way to a VM, to count what each of them drops.

use std::fmt;

use serde::Serialize;

use super::Unavailable;

/// A filter, in the order in which they are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CandidateFilter {
    /// The rules of the group asked for.
    Group,
    /// For an alias: to be in some group or device spec.
    Exposed,
    /// Vendor and device id of an alias.
    Ids,
    /// The hardware behind an address must be what it was.
    Changed,
    /// The order of groups that match one device.
    OtherGroup,
    /// Not to belong to a tenant.
    Tenant,
    /// `device_type` of an alias.
    DeviceType,
    /// `resource_class`.
    ResourceClass,
    /// `traits`.
    Traits,
    /// `live_migratable` of an alias.
    Migratable,
    /// Interrupts that a guest can be given.
    Interrupts,
    /// A reset between two VMs.
    Reset,
    /// What the host keeps for itself.
    Bridge,
    /// Not to be held by anybody.
    Leased,
    /// Not to be in quarantine.
    Quarantined,
    /// Not to be bound to a host driver.
    HostDriver,
    /// Not to be needed by the host.
    HostNeeds,
    /// To be with vfio-pci.
    Unbound,
    /// To be in an IOMMU group.
    IommuGroup,
    /// The other devices of the IOMMU group.
    Neighbours,
    /// The VFIO node.
    Node,
    /// Not to be asked for twice.
    AskedFor,
    /// NUMA affinity.
    Numa,
    /// What a physical function and its virtual ones owe each other.
    VfToken,
    /// Physical functions of their own.
    Isolation,
}

impl Unavailable {
    /// The filter that drops a device for this.
    pub(crate) fn dropped_by(&self) -> CandidateFilter {
        match self {
            Self::Bridge => CandidateFilter::Bridge,
            Self::Leased { .. } | Self::LockUnreadable { .. } => CandidateFilter::Leased,
            Self::Quarantined { .. } | Self::PfQuarantined { .. } => CandidateFilter::Quarantined,
            Self::HostDriver { .. } => CandidateFilter::HostDriver,
            Self::HostNeeds { .. } | Self::HasVfs { .. } => CandidateFilter::HostNeeds,
            Self::Unbound => CandidateFilter::Unbound,
            Self::NoIommuGroup => CandidateFilter::IommuGroup,
            Self::GroupInUse { .. } | Self::GroupLeased { .. } => CandidateFilter::Neighbours,
            Self::NodeMissing { .. } | Self::NodeDenied { .. } => CandidateFilter::Node,
            Self::OtherGroup { .. } => CandidateFilter::OtherGroup,
            Self::OfTenant { .. } => CandidateFilter::Tenant,
            Self::AskedFor => CandidateFilter::AskedFor,
            Self::Changed { .. } => CandidateFilter::Changed,
            Self::DeviceType { .. } => CandidateFilter::DeviceType,
            Self::ResourceClass { .. } => CandidateFilter::ResourceClass,
            Self::Traits { .. } => CandidateFilter::Traits,
            Self::Migratable { .. } => CandidateFilter::Migratable,
            Self::Numa { .. } => CandidateFilter::Numa,
            Self::NoVfToken { .. } | Self::PfIdle { .. } | Self::VfHeld { .. } => {
                CandidateFilter::VfToken
            }
            Self::NoInterrupts { .. } => CandidateFilter::Interrupts,
            Self::NoReset | Self::MustNotReset { .. } => CandidateFilter::Reset,
            Self::SamePf { .. } => CandidateFilter::Isolation,
        }
    }
}

/// What is the matter with the devices dropped: "2 held by others".
impl fmt::Display for CandidateFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Group => "not in the group",
            Self::Exposed => "in no group or device_spec",
            Self::Ids => "with another vendor or product id",
            Self::Changed => "replaced by other hardware",
            Self::OtherGroup => "in a group defined earlier",
            Self::Tenant => "that belong to tenants",
            Self::DeviceType => "with another device_type",
            Self::ResourceClass => "with another resource_class",
            Self::Traits => "without the traits",
            Self::Migratable => "with another live_migratable",
            Self::Interrupts => "without interrupts",
            Self::Reset => "without a reset",
            Self::Bridge => "bridges",
            Self::Leased => "held by others",
            Self::Quarantined => "in quarantine",
            Self::HostDriver => "bound to a host driver",
            Self::HostNeeds => "in use by the host",
            Self::Unbound => "bound to no driver",
            Self::IommuGroup => "without IOMMU group",
            Self::Neighbours => "sharing an IOMMU group with a device in use",
            Self::Node => "whose VFIO node cannot be opened",
            Self::AskedFor => "asked for twice",
            Self::Numa => "on another NUMA node",
            Self::VfToken => "that need a VF token",
            Self::Isolation => "on a physical function already used",
        })
    }
}
