//! Capability lists: ids, and walks that end for every answer of a device.

use std::fmt;

use super::registers::{CAPABILITIES_POINTER, CONFIG_SIZE, STATUS, STATUS_CAPABILITIES};

/// Where the header ends and standard capabilities may begin.
const STANDARD_START: u16 = 0x40;
/// Where extended configuration space begins.
const EXTENDED_START: u16 = 0x100;
/// Standard capabilities are at least 4 bytes each, between 0x40 and 0x100.
const MAX_STANDARD: usize = (EXTENDED_START - STANDARD_START) as usize / 4;
/// Extended capabilities are at least 8 bytes each.
const MAX_EXTENDED: usize = (CONFIG_SIZE - EXTENDED_START) as usize / 8;

/// The id of a standard capability (PCI Code and ID Assignment Specification, section 2).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CapabilityId(pub u8);

impl CapabilityId {
    /// PCI power management.
    pub const POWER_MANAGEMENT: Self = Self(0x01);
    /// Vital product data.
    pub const VPD: Self = Self(0x03);
    /// Message-signalled interrupts.
    pub const MSI: Self = Self(0x05);
    /// PCI-X.
    pub const PCI_X: Self = Self(0x07);
    /// Vendor-specific.
    pub const VENDOR_SPECIFIC: Self = Self(0x09);
    /// Subsystem ids of a bridge.
    pub const BRIDGE_SUBSYSTEM: Self = Self(0x0d);
    /// PCI Express.
    pub const PCI_EXPRESS: Self = Self(0x10);
    /// MSI-X.
    pub const MSI_X: Self = Self(0x11);
    /// Advanced features of conventional PCI, function-level reset among them.
    pub const ADVANCED_FEATURES: Self = Self(0x13);
    /// Enhanced Allocation: fixed addresses in place of BARs.
    pub const ENHANCED_ALLOCATION: Self = Self(0x14);
}

impl fmt::Debug for CapabilityId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#04x}", self.0)
    }
}

/// The id of an extended capability (PCI Code and ID Assignment Specification, section 3).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtendedCapabilityId(pub u16);

impl ExtendedCapabilityId {
    /// A capability with nothing in it.
    pub const NULL: Self = Self(0x0000);
    /// Advanced error reporting.
    pub const AER: Self = Self(0x0001);
    /// Virtual channels and traffic classes.
    pub const VIRTUAL_CHANNEL: Self = Self(0x0002);
    /// Device serial number.
    pub const SERIAL_NUMBER: Self = Self(0x0003);
    /// Power budgeting.
    pub const POWER_BUDGETING: Self = Self(0x0004);
    /// Vendor-specific.
    pub const VENDOR_SPECIFIC: Self = Self(0x000b);
    /// Access control services.
    pub const ACS: Self = Self(0x000d);
    /// Alternative routing-id interpretation.
    pub const ARI: Self = Self(0x000e);
    /// Address translation services.
    pub const ATS: Self = Self(0x000f);
    /// Single-root I/O virtualisation.
    pub const SR_IOV: Self = Self(0x0010);
    /// Multicast.
    pub const MULTICAST: Self = Self(0x0012);
    /// Page request interface.
    pub const PRI: Self = Self(0x0013);
    /// Resizable BARs.
    pub const RESIZABLE_BAR: Self = Self(0x0015);
    /// Hints about where data is processed.
    pub const TPH: Self = Self(0x0017);
    /// Latency tolerance.
    pub const LTR: Self = Self(0x0018);
    /// The link's equalisation.
    pub const SECONDARY_PCI_EXPRESS: Self = Self(0x0019);
    /// Process address space id.
    pub const PASID: Self = Self(0x001b);
    /// Containment of errors by ports.
    pub const DPC: Self = Self(0x001d);
    /// L1 power management substates.
    pub const L1_PM_SUBSTATES: Self = Self(0x001e);
    /// Precision time measurement.
    pub const PTM: Self = Self(0x001f);
    /// Designated vendor-specific.
    pub const DVSEC: Self = Self(0x0023);
    /// Resizable BARs of virtual functions.
    pub const VF_RESIZABLE_BAR: Self = Self(0x0024);
}

impl fmt::Debug for ExtendedCapabilityId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#06x}", self.0)
    }
}

/// A capability found in a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Its id.
    pub id: CapabilityId,
    /// Where its header is, a multiple of 4 between 0x40 and 0xfc.
    pub offset: u16,
}

/// An extended capability found in a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtendedCapability {
    /// Its id.
    pub id: ExtendedCapabilityId,
    /// Its version, 4 bits.
    pub version: u8,
    /// Where its header is, a multiple of 4 between 0x100 and 0xffc.
    pub offset: u16,
}

/// The standard capabilities in the order of their list (PCI Express Base Specification 6.0,
/// 7.5.1.1.11). `read` gives the 32 bits at an offset that is a multiple of 4.
///
/// The walk ends at the first pointer that is invalid or that it has followed before.
pub fn walk_standard(mut read: impl FnMut(u16) -> u32) -> Vec<Capability> {
    let status = (read(STATUS & !3) >> 16) as u16;
    if status & STATUS_CAPABILITIES == 0 || status == u16::MAX {
        return Vec::new();
    }
    let mut found: Vec<Capability> = Vec::new();
    let mut offset = read(CAPABILITIES_POINTER) as u16 & 0xfc;
    while offset >= STANDARD_START
        && found.len() < MAX_STANDARD
        && found.iter().all(|earlier| earlier.offset != offset)
    {
        let header = read(offset);
        let id = CapabilityId(header as u8);
        if id.0 == u8::MAX {
            break;
        }
        found.push(Capability { id, offset });
        offset = (header >> 8) as u16 & 0xfc;
    }
    found
}

/// The extended capabilities in the order of their list (PCI Express Base Specification 6.0,
/// 7.6.3), without [`ExtendedCapabilityId::NULL`]. `read` as for [`walk_standard`]; all zeros or all
/// ones at 0x100 mean that there is no extended configuration space.
pub fn walk_extended(mut read: impl FnMut(u16) -> u32) -> Vec<ExtendedCapability> {
    let mut found = Vec::new();
    let mut visited: Vec<u16> = Vec::new();
    let mut offset = EXTENDED_START;
    while offset >= EXTENDED_START && visited.len() < MAX_EXTENDED && !visited.contains(&offset) {
        visited.push(offset);
        let header = read(offset);
        if header == 0 || header == u32::MAX {
            break;
        }
        let id = ExtendedCapabilityId(header as u16);
        if id != ExtendedCapabilityId::NULL {
            found.push(ExtendedCapability {
                id,
                version: (header >> 16) as u8 & 0xf,
                offset,
            });
        }
        offset = (header >> 20) as u16 & 0xffc;
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A configuration space with a capability list, and the given dwords in it.
    fn space(dwords: &[(u16, u32)]) -> impl Fn(u16) -> u32 {
        let mut space = vec![0_u32; 1024];
        space[1] = u32::from(STATUS_CAPABILITIES) << 16;
        for &(offset, value) in dwords {
            space[usize::from(offset) / 4] = value;
        }
        move |offset| space[usize::from(offset) / 4]
    }

    fn offsets(read: impl FnMut(u16) -> u32) -> Vec<u16> {
        walk_standard(read).iter().map(|cap| cap.offset).collect()
    }

    #[test]
    fn a_list_is_followed_in_its_own_order() {
        let read = space(&[(0x34, 0x80), (0x80, 0x4011), (0x40, 0x0010)]);
        assert_eq!(
            walk_standard(read),
            [
                Capability {
                    id: CapabilityId::MSI_X,
                    offset: 0x80
                },
                Capability {
                    id: CapabilityId::PCI_EXPRESS,
                    offset: 0x40
                }
            ]
        );
    }

    #[test]
    fn loops_garbage_and_all_ones_end() {
        assert!(offsets(|_| u32::MAX).is_empty());
        assert!(offsets(|_| 0).is_empty());
        let looped = space(&[(0x34, 0x40), (0x40, 0x5005), (0x50, 0x4005)]);
        assert_eq!(offsets(looped), [0x40, 0x50]);
        let own_tail = space(&[(0x34, 0x40), (0x40, 0x4005)]);
        assert_eq!(offsets(own_tail), [0x40]);
        let into_header = space(&[(0x34, 0x40), (0x40, 0x1005)]);
        assert_eq!(offsets(into_header), [0x40]);
        let gone = space(&[(0x34, 0x40), (0x40, 0x5005), (0x50, u32::MAX)]);
        assert_eq!(offsets(gone), [0x40]);
        let no_list = |offset| if offset == 4 { 0 } else { 0x4040_4040 };
        assert!(offsets(no_list).is_empty());
    }

    #[test]
    fn the_low_bits_of_pointers_are_reserved() {
        let read = space(&[(0x34, 0x43), (0x40, 0x5305), (0x50, 0x0001)]);
        assert_eq!(offsets(read), [0x40, 0x50]);
    }

    #[test]
    fn extended_capabilities_skip_null_and_end_in_loops() {
        let read = space(&[
            (0x100, 0x1400_0000),
            (0x140, 0x2002_0001),
            (0x200, 0x1001_000e),
        ]);
        let found = walk_extended(read);
        let ids: Vec<_> = found
            .iter()
            .map(|cap| (cap.id, cap.version, cap.offset))
            .collect();
        assert_eq!(
            ids,
            [
                (ExtendedCapabilityId::AER, 2, 0x140),
                (ExtendedCapabilityId::ARI, 1, 0x200)
            ]
        );
        assert!(walk_extended(|_| u32::MAX).is_empty());
        assert!(walk_extended(|_| 0).is_empty());
    }

    proptest! {
        #[test]
        fn any_device_ends_both_walks(dwords in proptest::collection::vec(any::<u32>(), 1024)) {
            let read = |offset: u16| {
                assert!(offset.is_multiple_of(4));
                dwords[usize::from(offset) / 4]
            };
            let standard = walk_standard(read);
            let extended = walk_extended(read);
            prop_assert!(standard.iter().all(|cap| (0x40..0x100).contains(&cap.offset)));
            prop_assert!(extended.iter().all(|cap| (0x100..0x1000).contains(&cap.offset)));
            let mut seen: Vec<u16> = standard.iter().map(|cap| cap.offset).collect();
            seen.extend(extended.iter().map(|cap| cap.offset));
            let total = seen.len();
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), total);
        }

        /// Every header points to the next dword, so that only the bounds end the walk.
        #[test]
        fn the_longest_lists_end(step in 1_u16..4) {
            let read = |offset: u16| match offset {
                4 => u32::from(STATUS_CAPABILITIES) << 16,
                0x34 => 0x40,
                0x40..0x100 => u32::from((offset + 4 * step) & 0xfc) << 8 | 1,
                _ => u32::from((offset + 4 * step) & 0xffc) << 20 | 0x1_0001,
            };
            prop_assert!(walk_standard(read).len() <= 48);
            prop_assert!(walk_extended(read).len() <= 480);
        }
    }
}
