//! Guest memory as devices see it: mappings in a container that last as long as their guards.

use std::io;
use std::sync::Arc;

use gantry_devices::mapping::HostMapping;

use super::container::Container;
use crate::{Error, Result};

/// The largest range mapped by one call: the kernel holds its lock throughout, and what needs it
/// meanwhile should not wait for all of a guest's memory.
const CHUNK: u64 = 1 << 30;

/// The DMA address space of a VM: its RAM is mapped here once, whatever the number of devices.
///
/// Every method takes `&self` and only the container's kernel lock is held while the kernel pins
/// memory, so that one thread can map while others open devices.
#[derive(Debug, Clone)]
pub struct DmaSpace {
    container: Arc<Container>,
}

/// Memory that devices can reach. Dropping it takes the mapping away before the memory goes.
#[derive(Debug)]
pub struct DmaMapping {
    container: Arc<Container>,
    iova: u64,
    len: u64,
    _memory: Arc<HostMapping>,
}

impl DmaSpace {
    /// The space of `container`, which has a group.
    pub fn new(container: Arc<Container>) -> Self {
        Self { container }
    }

    /// The container whose address space it is.
    pub fn container(&self) -> &Arc<Container> {
        &self.container
    }

    /// Lets devices reach the whole of `memory` at `iova`: its pages are made to exist and pinned.
    /// That takes seconds for much memory; `unwanted` is asked at each GiB whether to go on.
    ///
    /// # Errors
    /// The container has too few mappings left, the kernel refuses the range, or it became unwanted.
    /// Nothing stays mapped then.
    pub fn map(
        &self,
        iova: u64,
        memory: &Arc<HostMapping>,
        unwanted: impl Fn() -> bool,
    ) -> Result<DmaMapping> {
        let len = memory.size() as u64;
        self.check_entries(chunks(iova, len).count() as u64)?;
        let mut mapping = DmaMapping {
            container: Arc::clone(&self.container),
            iova,
            len: 0,
            _memory: Arc::clone(memory),
        };
        for chunk in chunks(iova, len) {
            let (iova, len) = (iova + chunk.offset, chunk.len);
            let mapped = if unwanted() {
                Err(io::ErrorKind::Interrupted.into())
            } else {
                self.container.map(iova, memory, chunk.offset, len)
            };
            mapped.map_err(|source| Error::Dma {
                call: "VFIO_IOMMU_MAP_DMA",
                iova,
                len,
                source,
            })?;
            mapping.len += len;
        }
        Ok(mapping)
    }

    fn check_entries(&self, needed: u64) -> Result<()> {
        match self.container.info()?.dma_avail {
            Some(available) if u64::from(available) < needed => {
                Err(Error::DmaEntries { needed, available })
            }
            _ => Ok(()),
        }
    }
}

impl Drop for DmaMapping {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        if let Err(error) = self.container.unmap(self.iova, self.len) {
            // The pages stay pinned for the device: lost to the host until the container goes, but
            // never given to anybody else.
            tracing::error!(
                iova = format_args!("{:#x}", self.iova),
                len = format_args!("{:#x}", self.len),
                %error,
                "VFIO_IOMMU_UNMAP_DMA failed"
            );
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
}
