//! Guest memory as devices see it: mappings in a DMA address space that last as long as their guards.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use gantry_devices::mapping::HostMapping;

use super::info::IommuInfo;
use crate::{Error, Result};

/// The largest range that one call maps: the kernel holds its lock during the call, and others should not
/// wait for all of a guest's memory.
const CHUNK: u64 = 1 << 30;

/// The kernel's side of a DMA address space: a type1 container, or an IOAS of iommufd.
pub trait Iommu: fmt::Debug + Send + Sync {
    /// What the IOMMU can do, as of now.
    ///
    /// # Errors
    /// No device is attached, or the kernel refuses.
    fn info(&self) -> Result<IommuInfo>;

    /// Lets devices reach `len` bytes of `memory` from `offset` on at `iova`.
    ///
    /// # Errors
    /// The kernel refuses the range, or cannot pin the memory.
    fn map(&self, iova: u64, memory: &HostMapping, offset: u64, len: u64) -> Result<()>;

    /// Ends all mappings of a range.
    ///
    /// # Errors
    /// The kernel refuses.
    fn unmap(&self, iova: u64, len: u64) -> Result<()>;
}

/// The DMA address space of a VM: its RAM is mapped here once, whatever the number of devices.
///
/// Every method takes `&self` and holds only the kernel's lock while the kernel pins memory, so that one
/// thread can map while others open devices.
#[derive(Debug, Clone)]
pub struct DmaSpace {
    iommu: Arc<dyn Iommu>,
}

/// Memory that devices can reach. Dropping it ends the mapping before the memory goes.
#[derive(Debug)]
pub struct DmaMapping {
    iommu: Arc<dyn Iommu>,
    iova: u64,
    len: u64,
    _memory: Arc<HostMapping>,
}

impl DmaSpace {
    /// The address space of `iommu`, to which a device is attached.
    pub fn new(iommu: Arc<dyn Iommu>) -> Self {
        Self { iommu }
    }

    /// The IOVA ranges that can be mapped; empty where nothing restricts them.
    ///
    /// # Errors
    /// No device is attached, or the kernel refuses.
    pub fn iova_ranges(&self) -> Result<Vec<RangeInclusive<u64>>> {
        Ok(self.iommu.info()?.iova_ranges.unwrap_or_default())
    }

    /// How many mappings can still be made; `None` where there is no limit.
    ///
    /// # Errors
    /// As [`Self::iova_ranges`].
    pub fn capacity(&self) -> Result<Option<u32>> {
        Ok(self.iommu.info()?.dma_avail)
    }

    /// Lets devices reach the whole of `memory` at `iova`: the kernel makes its pages exist and pins them.
    /// That takes seconds for much memory; `unwanted` is asked at each GiB whether to stop.
    ///
    /// # Errors
    /// Too few mappings are left, the kernel refuses the range, or it became unwanted. Nothing stays
    /// mapped then.
    pub fn map(
        &self,
        iova: u64,
        memory: &Arc<HostMapping>,
        unwanted: impl Fn() -> bool,
    ) -> Result<DmaMapping> {
        let len = memory.size() as u64;
        let needed = chunks(iova, len).count() as u64;
        if let Some(available) = self.capacity()?
            && u64::from(available) < needed
        {
            return Err(Error::DmaEntries { needed, available });
        }
        let mut mapping = DmaMapping {
            iommu: Arc::clone(&self.iommu),
            iova,
            len: 0,
            _memory: Arc::clone(memory),
        };
        for chunk in chunks(iova, len) {
            let (iova, len) = (iova + chunk.offset, chunk.len);
            if unwanted() {
                return Err(Error::Dma {
                    call: "mapping",
                    iova,
                    len,
                    source: io::ErrorKind::Interrupted.into(),
                });
            }
            self.iommu.map(iova, memory, chunk.offset, len)?;
            mapping.len += len;
        }
        Ok(mapping)
    }
}

impl Drop for DmaMapping {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        if let Err(error) = self.iommu.unmap(self.iova, self.len) {
            // The pages stay pinned for the device: the host loses them until the address space goes, but
            // they are never given to anybody else.
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "guest memory stays mapped for devices");
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Chunk {
    offset: u64,
    len: u64,
}

/// Cuts a range at every multiple of [`CHUNK`] in the IOVA space, so that no superpage is split.
fn chunks(iova: u64, len: u64) -> impl Iterator<Item = Chunk> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let left = len.checked_sub(offset).filter(|&left| left > 0)?;
        let to_boundary = CHUNK - iova.wrapping_add(offset) % CHUNK;
        let chunk = Chunk {
            offset,
            len: left.min(to_boundary),
        };
        offset += chunk.len;
        Some(chunk)
    })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Mutex;

    use super::super::container::Container;
    use super::*;

    fn cut(iova: u64, len: u64) -> Vec<(u64, u64)> {
        chunks(iova, len)
            .map(|chunk| (chunk.offset, chunk.len))
            .collect()
    }

    #[test]
    fn ranges_are_cut_at_gigabytes_of_iova() {
        assert_eq!(cut(0, 0), []);
        assert_eq!(cut(0, 0xa_0000), [(0, 0xa_0000)]);
        assert_eq!(cut(0, CHUNK), [(0, CHUNK)]);
        assert_eq!(
            cut(0x10_0000, 2 * CHUNK),
            [
                (0, CHUNK - 0x10_0000),
                (CHUNK - 0x10_0000, CHUNK),
                (2 * CHUNK - 0x10_0000, 0x10_0000)
            ]
        );
        assert_eq!(
            cut(4 * CHUNK, 3 * CHUNK / 2),
            [(0, CHUNK), (CHUNK, CHUNK / 2)]
        );
    }

    #[test]
    fn nothing_is_mapped_in_a_container_that_cannot_say_what_it_has() {
        let space = DmaSpace::new(Arc::new(Container::on_null()));
        let memory = Arc::new(HostMapping::anonymous(4096, 4096).unwrap());
        let error = space.map(0, &memory, || false).unwrap_err();
        assert!(matches!(
            error,
            Error::Container {
                call: "VFIO_IOMMU_GET_INFO",
                ..
            }
        ));
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    /// Has room for so many mappings, and keeps those that are made.
    #[derive(Debug, Default)]
    struct FakeIommu {
        room: Option<u32>,
        fails_at: Option<u64>,
        mapped: Mutex<Vec<(u64, u64)>>,
    }

    impl Iommu for FakeIommu {
        fn info(&self) -> Result<IommuInfo> {
            Ok(IommuInfo {
                iova_ranges: None,
                dma_avail: self.room,
            })
        }

        fn map(&self, iova: u64, _memory: &HostMapping, _offset: u64, len: u64) -> Result<()> {
            if self.fails_at == Some(iova) {
                return Err(Error::Dma {
                    call: "fake",
                    iova,
                    len,
                    source: io::ErrorKind::OutOfMemory.into(),
                });
            }
            self.mapped.lock().unwrap().push((iova, len));
            Ok(())
        }

        fn unmap(&self, iova: u64, len: u64) -> Result<()> {
            let mut mapped = self.mapped.lock().unwrap();
            mapped.retain(|&(start, _)| start < iova || start >= iova + len);
            Ok(())
        }
    }

    #[test]
    fn a_mapping_ends_with_its_guard_and_one_that_fails_leaves_nothing() {
        let memory = Arc::new(HostMapping::anonymous(2 << 30, 4096).unwrap());
        let base = CHUNK / 2;
        let map = |iommu: &Arc<FakeIommu>, unwanted: &dyn Fn() -> bool| {
            DmaSpace::new(iommu.clone()).map(base, &memory, unwanted)
        };
        let wanted = || false;
        let iommu = Arc::new(FakeIommu::default());
        let mapping = map(&iommu, &wanted).unwrap();
        assert_eq!(iommu.mapped.lock().unwrap().len(), 3);
        drop(mapping);
        assert_eq!(*iommu.mapped.lock().unwrap(), []);

        let failing = Arc::new(FakeIommu {
            fails_at: Some(2 * CHUNK),
            ..FakeIommu::default()
        });
        map(&failing, &wanted).unwrap_err();
        assert_eq!(*failing.mapped.lock().unwrap(), []);

        let asked = Cell::new(0);
        let third = || asked.replace(asked.get() + 1) == 2;
        let interrupted = map(&iommu, &third).unwrap_err();
        assert!(matches!(interrupted, Error::Dma { source, .. }
            if source.kind() == io::ErrorKind::Interrupted));
        assert_eq!(*iommu.mapped.lock().unwrap(), []);

        let full = Arc::new(FakeIommu {
            room: Some(2),
            ..FakeIommu::default()
        });
        let refused = map(&full, &wanted).unwrap_err();
        assert!(matches!(
            refused,
            Error::DmaEntries {
                needed: 3,
                available: 2
            }
        ));
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}
