//! The filters that a device passes before a VM gets it, to count how many devices each one drops.

use std::fmt;

use serde::Serialize;

use super::Unavailable;

/// A filter, in the order in which they are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CandidateFilter {
    /// The rules of the group asked for.
    Group,
    /// An alias: the device is in a group or a device spec.
    Exposed,
    /// The ids of an alias.
    Ids,
    /// The hardware at an address is the recorded one.
    Changed,
    /// The order of the groups that match a device.
    OtherGroup,
    /// The device belongs to no tenant.
    Tenant,
    /// `device_type` of an alias.
    DeviceType,
    /// `resource_class`.
    ResourceClass,
    /// `traits`.
    Traits,
    /// `live_migratable` of an alias.
    Migratable,
    /// The device has interrupts that a guest can get.
    Interrupts,
    /// The device is reset between two VMs.
    Reset,
    /// The device is no bridge.
    Bridge,
    /// The device is not held.
    Leased,
    /// The device is not in quarantine.
    Quarantined,
    /// The device is not bound to a host driver.
    HostDriver,
    /// The host does not need the device.
    HostNeeds,
    /// The device is bound to vfio-pci.
    Unbound,
    /// The device is in an IOMMU group.
    IommuGroup,
    /// The other devices of the IOMMU group.
    Neighbours,
    /// The VFIO node.
    Node,
    /// The request does not name the device twice.
    AskedFor,
    /// NUMA affinity.
    Numa,
    /// The physical function and its virtual functions can go to different VMs.
    VfToken,
    /// Each device has its own physical function.
    Isolation,
}

impl Unavailable {
    /// The filter that drops a device for this reason.
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

/// The reason for a number of dropped devices: "2 held by others".
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
