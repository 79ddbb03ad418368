//! A VFIO container: the DMA address space that the groups of one VM share, in VFIO's type1 interface.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use gantry_devices::mapping::HostMapping;
use vfio_bindings::bindings::vfio as abi;

use super::dma::Iommu;
use super::info::{IommuInfo, parse_iommu};
use super::ioctl;
use crate::{Error, Result};

/// A container with a type1v2 IOMMU, which is set when its first group joins.
///
/// When its last group leaves, the kernel removes the IOMMU and every mapping; the container cannot be used
/// again, and a later group needs a new one.
#[derive(Debug)]
pub struct Container {
    file: File,
    groups: Mutex<Groups>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Groups {
    NoneYet,
    Joined(usize),
    AllLeft,
}

impl Container {
    /// Opens `vfio` in the device directory `dev` (`/dev/vfio` on a host as Linux sets it up).
    ///
    /// # Errors
    /// The node is missing or not permitted, or the kernel has no type1v2 IOMMU.
    pub fn open(dev: &Path) -> Result<Self> {
        let path = dev.join("vfio");
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        match opened {
            Ok(file) => Self::new(file, &path),
            Err(source) => Err(Error::Open { path, source }),
        }
    }

    /// A container whose node at `path` the caller has opened.
    ///
    /// # Errors
    /// The file is no container, or the kernel has no type1v2 IOMMU.
    pub fn new(file: File, path: &Path) -> Result<Self> {
        let version = ioctl::api_version(file.as_fd()).map_err(failed("VFIO_GET_API_VERSION"))?;
        let type1 = ioctl::check_extension(file.as_fd(), abi::VFIO_TYPE1v2_IOMMU)
            .map_err(failed("VFIO_CHECK_EXTENSION"))?;
        if version != abi::VFIO_API_VERSION || !type1 {
            let path = path.to_owned();
            return Err(Error::NoIommu { path });
        }
        Ok(Self {
            file,
            groups: Mutex::new(Groups::NoneYet),
        })
    }

    /// Adds a group with `set_container`, and sets the IOMMU if the group is the first.
    pub(super) fn join(
        &self,
        set_container: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        *groups = match *groups {
            Groups::NoneYet => {
                set_container(self.file.as_fd())?;
                ioctl::set_iommu(self.file.as_fd(), abi::VFIO_TYPE1v2_IOMMU)
                    .map_err(failed("VFIO_SET_IOMMU"))?;
                Groups::Joined(1)
            }
            Groups::Joined(count) => {
                set_container(self.file.as_fd())?;
                Groups::Joined(count + 1)
            }
            Groups::AllLeft => {
                return Err(failed("joining")(io::Error::from_raw_os_error(
                    libc::ESTALE,
                )));
            }
        };
        Ok(())
    }

    /// Removes a group with `unset_container`.
    pub(super) fn leave(&self, unset_container: impl FnOnce()) {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        unset_container();
        *groups = match *groups {
            Groups::Joined(count) if count > 1 => Groups::Joined(count - 1),
            _ => Groups::AllLeft,
        };
    }
}

impl Iommu for Container {
    fn info(&self) -> Result<IommuInfo> {
        let bytes = ioctl::iommu_info(self.file.as_fd()).map_err(failed("VFIO_IOMMU_GET_INFO"))?;
        Ok(parse_iommu(&bytes))
    }

    fn map(&self, iova: u64, memory: &HostMapping, offset: u64, len: u64) -> Result<()> {
        let mapped = ioctl::map_dma(self.file.as_fd(), iova, memory, offset, len);
        mapped.map_err(|source| Error::Dma {
            call: "VFIO_IOMMU_MAP_DMA",
            iova,
            len,
            source,
        })
    }

    /// Once no group is left, the kernel has ended all mappings itself.
    fn unmap(&self, iova: u64, len: u64) -> Result<()> {
        let unmapped = ioctl::unmap_dma(self.file.as_fd(), iova, len);
        let groups = *self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        match unmapped {
            Err(_) if groups == Groups::AllLeft => Ok(()),
            Err(source) => Err(Error::Dma {
                call: "VFIO_IOMMU_UNMAP_DMA",
                iova,
                len,
                source,
            }),
            Ok(_) => Ok(()),
        }
    }
}

fn failed(call: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Container { call, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Container {
        /// A container that refuses everything with ENOTTY.
        pub(in crate::host) fn on_null() -> Self {
            Self {
                file: File::open("/dev/null").unwrap(),
                groups: Mutex::new(Groups::NoneYet),
            }
        }
    }

    #[test]
    fn a_missing_node_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Container::open(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("vfio (is the vfio-pci module loaded"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_is_no_container_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("vfio"), "").unwrap();
        let error = Container::open(dir.path()).unwrap_err();
        assert!(matches!(
            error,
            Error::Container {
                call: "VFIO_GET_API_VERSION",
                ..
            }
        ));
    }

    #[test]
    fn a_container_whose_groups_have_left_takes_no_more_and_forgets_its_mappings() {
        let container = Container::on_null();
        *container.groups.lock().unwrap() = Groups::Joined(1);
        assert!(container.unmap(0, 4096).is_err());
        container.join(|_| Ok(())).unwrap();
        container.leave(|| ());
        assert!(container.unmap(0, 4096).is_err());
        container.leave(|| ());
        container.unmap(0, 4096).unwrap();
        assert!(container.join(|_| Ok(())).is_err());
    }

    #[test]
    fn a_first_group_without_an_iommu_has_not_joined() {
        let container = Container::on_null();
        let error = container.join(|_| Ok(())).unwrap_err();
        assert!(matches!(
            error,
            Error::Container {
                call: "VFIO_SET_IOMMU",
                ..
            }
        ));
        assert_eq!(*container.groups.lock().unwrap(), Groups::NoneYet);
    }
}
