//! An IOAS: the DMA address space that the devices of one VM share, in iommufd's interface.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use gantry_devices::mapping::HostMapping;
use vfio_ioctls::VfioIommufd;

use super::cdev::CdevBinder;
use super::dma::Iommu;
use super::info::IommuInfo;
use super::iommufd;
use crate::{Error, Result};

/// An IOAS with an iommufd of its own. It stays usable when its last device leaves.
pub struct Ioas(VfioIommufd);

impl Ioas {
    /// Opens the node of iommufd at `path` (`/dev/iommu` on a host as Linux sets it up).
    ///
    /// # Errors
    /// The node is missing or not permitted, or the kernel refuses.
    pub fn open(path: &Path) -> Result<Self> {
        let opened = OpenOptions::new().read(true).write(true).open(path);
        Self::new(opened.map_err(|source| Error::Open {
            path: path.to_owned(),
            source,
        })?)
    }

    /// An IOAS of the iommufd that the caller has opened.
    ///
    /// # Errors
    /// The file is no iommufd, or the kernel refuses.
    pub fn new(file: File) -> Result<Self> {
        let made = iommufd::alloc_ioas(file).map_err(failed("IOMMU_IOAS_ALLOC"));
        made.map(Self)
    }
}

impl CdevBinder for Ioas {
    fn bind(&self, cdev: BorrowedFd<'_>, token: Option<&[u8; 16]>) -> io::Result<()> {
        iommufd::bind(cdev, &**self.0.iommufd(), token)
    }

    fn attach(&self, cdev: BorrowedFd<'_>) -> io::Result<()> {
        iommufd::attach(cdev, self.0.ioas().id())
    }

    fn detach(&self, cdev: BorrowedFd<'_>) -> io::Result<()> {
        iommufd::detach(cdev)
    }
}

impl Iommu for Ioas {
    /// The kernel limits pinned memory, and not the number of mappings.
    fn info(&self) -> Result<IommuInfo> {
        let ranges = iommufd::iova_ranges(&self.0).map_err(failed("IOMMU_IOAS_IOVA_RANGES"))?;
        Ok(IommuInfo::of_ioas(&ranges))
    }

    fn map(&self, iova: u64, memory: &HostMapping, offset: u64, len: u64) -> Result<()> {
        let mapped = iommufd::map_ioas(&self.0, iova, memory, offset, len);
        mapped.map_err(|source| Error::Dma {
            call: "IOMMU_IOAS_MAP",
            iova,
            len,
            source,
        })
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<()> {
        let unmapped = iommufd::unmap_ioas(&self.0, iova, len);
        unmapped.map_err(|source| Error::Dma {
            call: "IOMMU_IOAS_UNMAP",
            iova,
            len,
            source,
        })
    }
}

impl fmt::Debug for Ioas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ioas").field(&self.0.ioas().id()).finish()
    }
}

fn failed(call: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Iommufd { call, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_node_is_named_and_a_file_that_is_no_iommufd_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("iommu");
        let missing = Ioas::open(&path).unwrap_err().to_string();
        assert!(
            missing.contains("/iommu") && missing.contains("modprobe iommufd"),
            "{missing}"
        );
        std::fs::write(&path, "").unwrap();
        let refused = Ioas::open(&path).unwrap_err();
        assert!(matches!(
            refused,
            Error::Iommufd {
                call: "IOMMU_IOAS_ALLOC",
                ..
            }
        ));
    }
}
