//! Guest addresses, checked against what the IOMMU of a later device reserves and maps.

use std::ops::RangeInclusive;

/// The guest addresses that an IOMMU must not reserve.
#[derive(Debug, Clone)]
pub struct GuestRanges {
    /// Guest RAM.
    pub ram: Vec<RangeInclusive<u64>>,
    /// Where BARs may be.
    pub windows: Vec<RangeInclusive<u64>>,
}

impl GuestRanges {
    /// The first reserved range that overlaps RAM or a window.
    pub fn conflict<'a>(
        &self,
        reserved: &'a [RangeInclusive<u64>],
    ) -> Option<&'a RangeInclusive<u64>> {
        reserved.iter().find(|range| {
            let mut taken = self.ram.iter().chain(&self.windows);
            taken.any(|taken| taken.start() <= range.end() && range.start() <= taken.end())
        })
    }

    /// The first range of RAM outside the mappable ranges, if those are known.
    pub fn unmappable(&self, iova: &[RangeInclusive<u64>]) -> Option<&RangeInclusive<u64>> {
        let within = |ram: &&RangeInclusive<u64>| {
            iova.iter()
                .any(|range| range.start() <= ram.start() && ram.end() <= range.end())
        };
        self.ram.iter().find(|ram| !iova.is_empty() && !within(ram))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ranges() -> GuestRanges {
        GuestRanges {
            ram: vec![0..=512 * MIB - 1, 4096 * MIB..=5000 * MIB - 1],
            windows: vec![2048 * MIB..=3000 * MIB - 1],
        }
    }

    #[test]
    fn a_device_that_reserves_ram_or_windows_is_noticed() {
        let ranges = ranges();
        let free = [512 * MIB..=600 * MIB, 3000 * MIB..=4096 * MIB - 1];
        assert_eq!(ranges.conflict(&free), None);
        for taken in [0..=0, 512 * MIB - 1..=512 * MIB, 2999 * MIB..=3000 * MIB] {
            let reserved = [free[0].clone(), taken.clone()];
            assert_eq!(ranges.conflict(&reserved), Some(&taken));
        }
    }

    #[test]
    fn ram_beyond_the_iommu_is_noticed() {
        let ranges = ranges();
        assert_eq!(ranges.unmappable(&[]), None, "nothing is known");
        assert_eq!(ranges.unmappable(&[0..=u64::MAX]), None);
        assert_eq!(ranges.unmappable(&[0..=4096 * MIB]), Some(&ranges.ram[1]));
    }
}
