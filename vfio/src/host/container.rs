//! A VFIO container: the DMA address space that the groups of one VM share, in VFIO's type1 interface.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    /// The kernel's number for its kind of IOMMU.
    iommu: u32,
    groups: Mutex<Groups>,
}

#[derive(Debug)]
enum Groups {
    NoneYet,
    /// Their numbers and descriptors.
    Joined(BTreeMap<u32, Arc<File>>),
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
        Self::of_kind(file, path, abi::VFIO_TYPE1v2_IOMMU)
    }

    /// A container of a kernel without an IOMMU, whose node at `path` the caller has opened. Its devices reach all
    /// physical memory: it is for a guest that measures its own devices.
    ///
    /// # Errors
    /// The file is no container, or the kernel allows no such container.
    pub fn without_iommu(file: File, path: &Path) -> Result<Self> {
        Self::of_kind(file, path, abi::VFIO_NOIOMMU_IOMMU)
    }

    fn of_kind(file: File, path: &Path, iommu: u32) -> Result<Self> {
        let version = ioctl::api_version(file.as_fd()).map_err(failed("VFIO_GET_API_VERSION"))?;
        let known =
            ioctl::check_extension(file.as_fd(), iommu).map_err(failed("VFIO_CHECK_EXTENSION"))?;
        if version != abi::VFIO_API_VERSION || !known {
            let path = path.to_owned();
            return Err(Error::NoIommu { path });
        }
        Ok(Self {
            file,
            iommu,
            groups: Mutex::new(Groups::NoneYet),
        })
    }

    /// Adds a group with `set_container`, and sets the IOMMU if the group is the first.
    pub(super) fn join(
        &self,
        number: u32,
        group: &Arc<File>,
        set_container: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut groups = self.groups();
        match &mut *groups {
            Groups::NoneYet => {
                set_container(self.file.as_fd())?;
                ioctl::set_iommu(self.file.as_fd(), self.iommu)
                    .map_err(failed("VFIO_SET_IOMMU"))?;
                *groups = Groups::Joined([(number, Arc::clone(group))].into());
            }
            Groups::Joined(joined) => {
                set_container(self.file.as_fd())?;
                joined.insert(number, Arc::clone(group));
            }
            Groups::AllLeft => {
                return Err(failed("joining")(io::Error::from_raw_os_error(
                    libc::ESTALE,
                )));
            }
        }
        Ok(())
    }

    /// Removes a group with `unset_container`.
    pub(super) fn leave(&self, number: u32, unset_container: impl FnOnce()) {
        let mut groups = self.groups();
        unset_container();
        if let Groups::Joined(joined) = &mut *groups {
            joined.remove(&number);
            if joined.is_empty() {
                *groups = Groups::AllLeft;
            }
        }
    }

    /// The descriptor of a group, if the group is in the container.
    pub(super) fn group(&self, number: u32) -> Option<Arc<File>> {
        match &*self.groups() {
            Groups::Joined(joined) => joined.get(&number).cloned(),
            Groups::NoneYet | Groups::AllLeft => None,
        }
    }

    fn groups(&self) -> MutexGuard<'_, Groups> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
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
        match unmapped {
            Err(_) if matches!(*self.groups(), Groups::AllLeft) => Ok(()),
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
                iommu: abi::VFIO_TYPE1v2_IOMMU,
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
        let group = Arc::new(File::open("/dev/null").unwrap());
        *container.groups() = Groups::Joined([(7, Arc::clone(&group))].into());
        assert!(container.unmap(0, 4096).is_err());
        container.join(8, &group, |_| Ok(())).unwrap();
        assert!(container.group(7).is_some() && container.group(8).is_some());
        container.leave(7, || ());
        assert!(container.group(7).is_none());
        assert!(container.unmap(0, 4096).is_err());
        container.leave(8, || ());
        container.unmap(0, 4096).unwrap();
        assert!(container.join(8, &group, |_| Ok(())).is_err());
        assert_eq!(Arc::strong_count(&group), 1);
    }

    #[test]
    fn a_first_group_without_an_iommu_has_not_joined() {
        let container = Container::on_null();
        let group = Arc::new(File::open("/dev/null").unwrap());
        let error = container.join(7, &group, |_| Ok(())).unwrap_err();
        assert!(matches!(
            error,
            Error::Container {
                call: "VFIO_SET_IOMMU",
                ..
            }
        ));
        assert!(matches!(*container.groups(), Groups::NoneYet));
    }
}
