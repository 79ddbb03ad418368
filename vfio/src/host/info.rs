//! Information of the kernel on regions, interrupts and the IOMMU: pure parsing of its structures.

use std::ops::RangeInclusive;

use vfio_bindings::bindings::vfio as abi;

/// A region of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Size in bytes; 0 if the device has no such region.
    pub size: u64,
    /// The parts that can be mapped into a process, in ascending order.
    pub areas: Vec<MmapArea>,
}

/// A part of a region that can be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmapArea {
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// An interrupt index of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// Number of interrupts.
    pub count: u32,
    /// Whether all interrupts have to be disabled before more can be enabled.
    pub fixed: bool,
}

impl From<abi::vfio_irq_info> for IrqInfo {
    fn from(info: abi::vfio_irq_info) -> Self {
        let usable = info.flags & abi::VFIO_IRQ_INFO_EVENTFD != 0;
        Self {
            count: if usable { info.count } else { 0 },
            fixed: info.flags & abi::VFIO_IRQ_INFO_NORESIZE != 0,
        }
    }
}

/// What an IOMMU can map.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IommuInfo {
    /// Usable IOVA ranges in ascending order; `None` if the kernel does not report them.
    pub iova_ranges: Option<Vec<RangeInclusive<u64>>>,
    /// Mappings that can still be made; `None` if the kernel does not report it.
    pub dma_avail: Option<u32>,
}

impl IommuInfo {
    /// Of an IOAS, from the first and last address of each range. One that covers everything restricts nothing.
    pub(super) fn of_ioas(ranges: &[(u64, u64)]) -> Self {
        let restricted = ranges != [(0, u64::MAX)];
        let mut ranges: Vec<_> = ranges.iter().map(|(start, last)| *start..=*last).collect();
        ranges.sort_by_key(|range| *range.start());
        Self {
            iova_ranges: restricted.then_some(ranges),
            dma_avail: None,
        }
    }
}

/// Little-endian fields of a structure; fields beyond its end read 0.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn u32(self, offset: usize) -> u32 {
        self.bytes(offset).map_or(0, u32::from_le_bytes)
    }

    fn u64(self, offset: usize) -> u64 {
        self.bytes(offset).map_or(0, u64::from_le_bytes)
    }

    fn bytes<const N: usize>(self, offset: usize) -> Option<[u8; N]> {
        self.0.get(offset..)?.first_chunk().copied()
    }

    /// The capability `id` of the chain (`vfio_info_cap_header`) that begins at `first`. The walk follows the
    /// chain only forward, so that it ends.
    fn capability(self, first: u32, id: u32) -> Option<Fields<'a>> {
        let mut at = 0;
        let mut next = first as usize;
        while next > at && next < self.0.len() {
            at = next;
            let capability = Fields(self.0.get(at..)?);
            // id: u16, version: u16, next: u32
            if capability.u32(0) & 0xffff == id {
                return Some(capability);
            }
            next = capability.u32(4) as usize;
        }
        None
    }

    /// The pairs of an array capability: header, `count: u32`, reserved, then pairs of `u64`.
    fn pairs(self) -> impl Iterator<Item = (u64, u64)> + use<'a> {
        let room = self.0.len().saturating_sub(16) / 16;
        let count = (self.u32(8) as usize).min(room);
        (0..count).map(move |pair| (self.u64(16 + pair * 16), self.u64(24 + pair * 16)))
    }
}

/// Parses a `vfio_region_info` with its capabilities. Also returns the region's offset in the
/// device's fd.
pub(super) fn parse_region(bytes: &[u8]) -> (RegionInfo, u64) {
    let info = Fields(bytes);
    let (flags, first) = (info.u32(4), info.u32(12));
    let (size, offset) = (info.u64(16), info.u64(24));
    let first = if flags & abi::VFIO_REGION_INFO_FLAG_CAPS == 0 {
        0
    } else {
        first
    };
    let sparse = info.capability(first, abi::VFIO_REGION_INFO_CAP_SPARSE_MMAP);
    let mut areas = Vec::new();
    if flags & abi::VFIO_REGION_INFO_FLAG_MMAP != 0 {
        match sparse {
            Some(sparse) => {
                areas.extend(sparse.pairs().map(|(offset, len)| MmapArea { offset, len }))
            }
            None => areas.push(MmapArea {
                offset: 0,
                len: size,
            }),
        }
    }
    areas.retain(|area| {
        let end = area.offset.checked_add(area.len);
        area.len > 0 && end.is_some_and(|end| end <= size)
    });
    areas.sort_by_key(|area| area.offset);
    (RegionInfo { size, areas }, offset)
}

/// Parses a `vfio_iommu_type1_info` with its capabilities.
pub(super) fn parse_iommu(bytes: &[u8]) -> IommuInfo {
    let info = Fields(bytes);
    if info.u32(4) & abi::VFIO_IOMMU_INFO_CAPS == 0 {
        return IommuInfo::default();
    }
    let first = info.u32(16);
    let ranges = info.capability(first, abi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE);
    let avail = info.capability(first, abi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL);
    IommuInfo {
        iova_ranges: ranges.map(|list| {
            let mut ranges: Vec<_> = list.pairs().map(|(start, end)| start..=end).collect();
            ranges.sort_by_key(|range| *range.start());
            ranges
        }),
        dma_avail: avail.map(|avail| avail.u32(8)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// argsz, flags, index, cap_offset, size, offset
    fn region(flags: u32, cap_offset: u32, size: u32) -> Vec<u32> {
        vec![0, flags, 0, cap_offset, size, 0, 0x4000, 0x100]
    }

    #[test]
    fn a_mappable_region_is_one_area() {
        let (info, offset) = parse_region(&bytes(&region(0b0111, 0, 0x4000)));
        assert_eq!(offset, 0x100_0000_4000);
        assert_eq!(
            info.areas,
            [MmapArea {
                offset: 0,
                len: 0x4000
            }]
        );
        let (info, _) = parse_region(&bytes(&region(0b0011, 0, 0x4000)));
        assert_eq!((info.size, info.areas.len()), (0x4000, 0));
    }

    #[test]
    fn sparse_areas_are_taken_as_given_and_those_outside_dropped() {
        let mut words = region(0b1111, 32, 0x4000);
        // MSIX_MAPPABLE, next at 40; then SPARSE_MMAP with three areas.
        words.extend([3 | 1 << 16, 40]);
        words.extend([1 | 1 << 16, 0, 3, 0]);
        words.extend([0x3000, 0, 0x1000, 0]);
        words.extend([0, 0, 0x1000, 0]);
        words.extend([0x2000, 0, 0x4000, 0]);
        let (info, _) = parse_region(&bytes(&words));
        let areas = [(0, 0x1000), (0x3000, 0x1000)].map(|(offset, len)| MmapArea { offset, len });
        assert_eq!(info.areas, areas);
    }

    #[test]
    fn an_empty_sparse_list_maps_nothing() {
        let mut words = region(0b1111, 32, 0x4000);
        words.extend([1 | 1 << 16, 0, 0, 0]);
        assert_eq!(parse_region(&bytes(&words)).0.areas, []);
    }

    #[test]
    fn the_iommu_says_its_ranges_and_room() {
        // argsz, flags, pgsizes, cap_offset, pad
        let mut words = vec![0, 0b11, 0x1000, 0, 24, 0];
        words.extend([3 | 1 << 16, 36, 65535]);
        words.extend([1 | 1 << 16, 0, 2, 0]);
        words.extend([0, 0, 0xfedf_ffff, 0]);
        words.extend([0xfef0_0000, 0, 0xffff_ffff, 0x7f]);
        let info = parse_iommu(&bytes(&words));
        assert_eq!(info.dma_avail, Some(65535));
        let ranges = [0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff];
        assert_eq!(info.iova_ranges.as_deref(), Some(&ranges[..]));
        assert_eq!(
            parse_iommu(&bytes(&[0, 1, 0, 0, 24, 0])),
            IommuInfo::default()
        );
    }

    #[test]
    fn an_ioas_without_devices_restricts_nothing() {
        assert_eq!(IommuInfo::of_ioas(&[(0, u64::MAX)]), IommuInfo::default());
        let high = (0xfef0_0000, 0x7f_ffff_ffff);
        let info = IommuInfo::of_ioas(&[high, (0, 0xfedf_ffff)]);
        let ranges = [0..=0xfedf_ffff, high.0..=high.1];
        assert_eq!(info.iova_ranges.as_deref(), Some(&ranges[..]));
        assert_eq!(info.dma_avail, None);
    }

    #[test]
    fn a_chain_that_turns_back_ends() {
        let mut words = region(0b1111, 32, 0x4000);
        words.extend([9 | 1 << 16, 32]);
        assert_eq!(parse_region(&bytes(&words)).0.areas.len(), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_parse_without_a_panic(words in proptest::collection::vec(0u32..64, 0..40)) {
            let (info, _) = parse_region(&bytes(&words));
            for area in info.areas {
                prop_assert!(area.offset + area.len <= info.size);
            }
            parse_iommu(&bytes(&words));
        }
    }
}
