//! How the processors of a guest make up cores, dies and packages.

/// The numbers at each level. A processor's APIC id is its number: its lowest bits are its thread's number in the
/// core, the next the core's in the die, and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Threads of a core.
    pub threads_per_core: u8,
    /// Cores of a die.
    pub cores_per_die: u8,
    /// Dies of a package.
    pub dies_per_package: u8,
    /// Packages, or sockets.
    pub packages: u8,
}

/// Why numbers make no topology.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// They do not make up all vCPUs.
    #[error("it makes {0} vCPUs")]
    Product(u32),
    /// Numbers of processors would have gaps.
    #[error("{0} is not a power of two, and there is more than one of the level above it")]
    NotPowerOfTwo(u8),
}

impl Topology {
    /// One package with one die of single-threaded cores.
    pub fn flat(count: u8) -> Self {
        Self {
            threads_per_core: 1,
            cores_per_die: count,
            dies_per_package: 1,
            packages: 1,
        }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// They are not those of `count` vCPUs, or APIC ids would not be the numbers of the vCPUs.
    pub fn check(&self, count: u8) -> Result<(), TopologyError> {
        let levels = self.levels();
        let all = levels.iter().map(|level| u32::from(*level)).product();
        if all != u32::from(count) {
            return Err(TopologyError::Product(all));
        }
        for (index, level) in levels.iter().enumerate() {
            let more_above = levels.iter().skip(index + 1).any(|above| *above > 1);
            if more_above && !level.is_power_of_two() {
                return Err(TopologyError::NotPowerOfTwo(*level));
            }
        }
        Ok(())
    }

    /// All vCPUs.
    pub fn count(&self) -> u32 {
        self.per_package() * u32::from(self.packages)
    }

    /// Processors of a die.
    pub fn per_die(&self) -> u32 {
        u32::from(self.threads_per_core) * u32::from(self.cores_per_die)
    }

    /// Processors of a package.
    pub fn per_package(&self) -> u32 {
        self.per_die() * u32::from(self.dies_per_package)
    }

    fn levels(&self) -> [u8; 4] {
        [
            self.threads_per_core,
            self.cores_per_die,
            self.dies_per_package,
            self.packages,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_make_up_all_vcpus_without_gaps() {
        let check = |levels: [u8; 4], count| {
            let [threads_per_core, cores_per_die, dies_per_package, packages] = levels;
            let topology = Topology {
                threads_per_core,
                cores_per_die,
                dies_per_package,
                packages,
            };
            topology.check(count)
        };
        for (levels, count) in [([2, 4, 2, 2], 32), ([1, 1, 1, 3], 3), ([2, 127, 1, 1], 254)] {
            assert_eq!(check(levels, count), Ok(()), "{levels:?}");
        }
        assert_eq!(check([2, 2, 1, 1], 5), Err(TopologyError::Product(4)));
        assert_eq!(check([0, 2, 1, 1], 2), Err(TopologyError::Product(0)));
        assert_eq!(
            check([255; 4], 254),
            Err(TopologyError::Product(4_228_250_625))
        );
        assert_eq!(check([1, 3, 1, 2], 6), Err(TopologyError::NotPowerOfTwo(3)));
        assert_eq!(check([3, 1, 1, 2], 6), Err(TopologyError::NotPowerOfTwo(3)));
    }
}
