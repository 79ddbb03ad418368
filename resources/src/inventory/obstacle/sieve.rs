//! The filters that a device passes on its way to a VM, to count what each of them drops.

use std::fmt;

use serde::Serialize;

use super::Obstacle;

/// A filter, in the order in which they are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sieve {
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

impl Obstacle {
    /// The filter that drops a device for this.
    pub(crate) fn sieve(&self) -> Sieve {
        match self {
            Self::Bridge => Sieve::Bridge,
            Self::Leased { .. } | Self::LockUnreadable { .. } => Sieve::Leased,
            Self::Quarantined { .. } | Self::PfQuarantined { .. } => Sieve::Quarantined,
            Self::HostDriver { .. } => Sieve::HostDriver,
            Self::HostNeeds { .. } | Self::HasVfs { .. } => Sieve::HostNeeds,
            Self::Unbound => Sieve::Unbound,
            Self::NoIommuGroup => Sieve::IommuGroup,
            Self::GroupInUse { .. } | Self::GroupLeased { .. } => Sieve::Neighbours,
            Self::NodeMissing { .. } | Self::NodeDenied { .. } => Sieve::Node,
            Self::OtherGroup { .. } => Sieve::OtherGroup,
            Self::OfTenant { .. } => Sieve::Tenant,
            Self::AskedFor => Sieve::AskedFor,
            Self::Changed { .. } => Sieve::Changed,
            Self::DeviceType { .. } => Sieve::DeviceType,
            Self::ResourceClass { .. } => Sieve::ResourceClass,
            Self::Traits { .. } => Sieve::Traits,
            Self::Migratable { .. } => Sieve::Migratable,
            Self::Numa { .. } => Sieve::Numa,
            Self::NoVfToken { .. } | Self::PfIdle { .. } | Self::VfHeld { .. } => Sieve::VfToken,
            Self::NoMessages { .. } => Sieve::Interrupts,
            Self::NoReset => Sieve::Reset,
            Self::SamePf { .. } => Sieve::Isolation,
        }
    }
}

/// What is the matter with the devices dropped: "2 held by others".
impl fmt::Display for Sieve {
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
            Self::Interrupts => "without MSI-X and MSI",
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
