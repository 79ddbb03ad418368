//! Which capabilities of a device its guest gets, and how: the whole table, with reasons.
//!
//! Power management, MSI and MSI-X are emulated, by rules of their own in `config`. What the table shows goes to
//! VFIO, which has rules of its own: it takes a function-level reset and the PCI Express settings of the guest
//! for its own, and ignores writes to what a guest must not change. An extended capability that is not in the table
//! can be read only.

use gantry_devices::pci::{CapabilityId, ExtendedCapabilityId};

/// How a guest gets a capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Treatment {
    /// Reads and writes go to the device.
    Shown,
    /// Reads go to the device, and writes are ignored.
    ReadOnly,
    /// It is in no list, and reads as zeros.
    Hidden,
}

use Treatment::{Hidden, ReadOnly, Shown};

const STANDARD: [(CapabilityId, Treatment); 9] = [
    // Emulated.
    (CapabilityId::POWER_MANAGEMENT, Shown),
    (CapabilityId::MSI, Shown),
    (CapabilityId::MSI_X, Shown),
    // VFIO reads it for the guest: it is written to be read.
    (CapabilityId::VPD, Shown),
    (CapabilityId::PCI_X, Shown),
    // Drivers use it: those of virtio reach BARs through it.
    (CapabilityId::VENDOR_SPECIFIC, Shown),
    // Device control; function-level reset. VFIO keeps the link's control.
    (CapabilityId::PCI_EXPRESS, Shown),
    (CapabilityId::ADVANCED_FEATURES, Shown),
    // It gives BARs fixed addresses, and the guest's are elsewhere.
    (CapabilityId::ENHANCED_ALLOCATION, Hidden),
];

const EXTENDED: [(ExtendedCapabilityId, Treatment); 21] = [
    // The host handles the errors of the device, and its masks decide which it learns of.
    (ExtendedCapabilityId::AER, ReadOnly),
    // The routes of requests among functions, and out of the device, are the host's.
    (ExtendedCapabilityId::ACS, ReadOnly),
    (ExtendedCapabilityId::ARI, Hidden),
    (ExtendedCapabilityId::MULTICAST, Hidden),
    // The guest has no IOMMU with which to translate for the device.
    (ExtendedCapabilityId::ATS, Hidden),
    (ExtendedCapabilityId::PRI, Hidden),
    (ExtendedCapabilityId::PASID, Hidden),
    // Virtual functions are the host's.
    (ExtendedCapabilityId::SR_IOV, Hidden),
    (ExtendedCapabilityId::VF_RESIZABLE_BAR, Hidden),
    // The size of a BAR is fixed while VFIO has the device.
    (ExtendedCapabilityId::RESIZABLE_BAR, Hidden),
    // Both ends of the link have to agree, and the host has the other one.
    (ExtendedCapabilityId::VIRTUAL_CHANNEL, ReadOnly),
    (ExtendedCapabilityId::SECONDARY_PCI_EXPRESS, ReadOnly),
    (ExtendedCapabilityId::LTR, ReadOnly),
    (ExtendedCapabilityId::L1_PM_SUBSTATES, Hidden),
    (ExtendedCapabilityId::PTM, Hidden),
    // Of ports: those of the guest contain no errors.
    (ExtendedCapabilityId::DPC, Hidden),
    // It says where the host's processors want data, by numbers that are the host's.
    (ExtendedCapabilityId::TPH, ReadOnly),
    (ExtendedCapabilityId::SERIAL_NUMBER, ReadOnly),
    // It is written to be read.
    (ExtendedCapabilityId::POWER_BUDGETING, Shown),
    // Drivers use them.
    (ExtendedCapabilityId::VENDOR_SPECIFIC, Shown),
    (ExtendedCapabilityId::DVSEC, Shown),
];

/// How a guest gets a standard capability.
pub(super) fn standard(id: CapabilityId) -> Treatment {
    let row = STANDARD.iter().find(|(known, _)| *known == id);
    row.map_or(Shown, |(_, treatment)| *treatment)
}

/// How a guest gets an extended capability.
pub(super) fn extended(id: ExtendedCapabilityId) -> Treatment {
    let row = EXTENDED.iter().find(|(known, _)| *known == id);
    row.map_or(ReadOnly, |(_, treatment)| *treatment)
}
