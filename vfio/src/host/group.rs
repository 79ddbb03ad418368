//! An IOMMU group: the smallest set of devices that the IOMMU can isolate.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_bindings::bindings::vfio as abi;

use super::container::Container;
use super::ioctl;
use super::retry::while_refused;
use crate::{Error, Result};

/// Is told which groups or cdevs a VM uses. KVM's VFIO device implements it, so that the kernel takes the devices'
/// cache coherence into account.
pub trait FileObserver: Send + Sync {
    /// A group has joined a container, and none of its devices is open; or a cdev is open, and not bound yet.
    ///
    /// # Errors
    /// The devices cannot be used with this VM.
    fn added(&self, file: BorrowedFd<'_>) -> io::Result<()>;

    /// The devices of a group are closed, and the group is about to leave; or a cdev is about to be closed.
    fn removed(&self, file: BorrowedFd<'_>);
}

/// A group that has joined a container. Dropping it tells its observer and leaves the container.
pub struct Group {
    number: u32,
    // Declared before the container, so that the group is closed first.
    file: Arc<File>,
    observer: Option<Arc<dyn FileObserver>>,
    container: Arc<Container>,
}

/// A group is in use.
const BUSY: &[i32] = &[libc::EBUSY];

impl Group {
    /// Opens group `number` in the device directory `dev` and puts it into `container`.
    ///
    /// The call repeats while the group is in use, up to `timeout`: after a process is killed, the kernel
    /// releases its file locks before its VFIO groups, which a reset can hold for a while.
    ///
    /// # Errors
    /// The node is missing or not permitted, the group stays in use, some of its devices are bound
    /// to a host driver, or the kernel refuses.
    pub fn open(
        dev: &Path,
        number: u32,
        container: Arc<Container>,
        timeout: Duration,
    ) -> Result<Self> {
        let path = dev.join(number.to_string());
        let deadline = Instant::now() + timeout;
        let open = || OpenOptions::new().read(true).write(true).open(&path);
        let file =
            while_refused(deadline, BUSY, open).map_err(|source| match source.raw_os_error() {
                Some(libc::EBUSY) => in_use(number, timeout),
                _ => Error::Open {
                    path: path.clone(),
                    source,
                },
            })?;
        Self::join(file, number, container, deadline)
    }

    /// Puts group `number`, whose node the caller has opened, into `container`. The call repeats while the
    /// group is in use, until the deadline.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn join(
        file: File,
        number: u32,
        container: Arc<Container>,
        deadline: Instant,
    ) -> Result<Self> {
        let begun = Instant::now();
        let failed = |call| {
            move |source| Error::Group {
                group: number,
                call,
                source,
            }
        };
        let status = ioctl::group_status(file.as_fd()).map_err(failed("VFIO_GROUP_GET_STATUS"))?;
        if status & abi::VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(Error::NotViable { group: number });
        }
        let file = Arc::new(file);
        container.join(number, &file, |container| {
            let join = || ioctl::group_set_container(file.as_fd(), container);
            while_refused(deadline, BUSY, join).map_err(|source| match source.raw_os_error() {
                Some(libc::EBUSY) => in_use(number, begun.elapsed()),
                _ => failed("VFIO_GROUP_SET_CONTAINER")(source),
            })
        })?;
        Ok(Self {
            number,
            file,
            observer: None,
            container,
        })
    }

    /// Tells `observer` of the group, now and when the group leaves. Call it before any device of the group is
    /// opened.
    ///
    /// # Errors
    /// The observer refuses the group.
    pub fn announce(&mut self, observer: Arc<dyn FileObserver>) -> Result<()> {
        observer
            .added(self.file.as_fd())
            .map_err(|source| Error::Group {
                group: self.number,
                call: "KVM_DEV_VFIO_FILE_ADD",
                source,
            })?;
        self.observer = Some(observer);
        Ok(())
    }

    /// The container it has joined.
    pub fn container(&self) -> &Arc<Container> {
        &self.container
    }

    pub(super) fn device(&self, name: &CStr) -> io::Result<OwnedFd> {
        ioctl::group_get_device_fd(self.file.as_fd(), name)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(observer) = self.observer.take() {
            observer.removed(self.file.as_fd());
        }
        self.container.leave(self.number, || {
            // Closing the file has the same effect; the call before it reports a device that is still open.
            match ioctl::group_unset_container(self.file.as_fd()) {
                // The host has unbound its last device, and the kernel has removed the group.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => {
                    tracing::warn!(group = self.number, %error, "VFIO_GROUP_UNSET_CONTAINER failed");
                }
                Ok(()) => {}
            }
        });
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

fn in_use(group: u32, waited: Duration) -> Error {
    Error::GroupInUse { group, waited }
}
