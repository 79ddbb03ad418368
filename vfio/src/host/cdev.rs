//! A device's character device (cdev), attached to an IOAS of iommufd.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::group::FileObserver;
use super::retry::while_refused;
use crate::{Error, Result};

/// A cdev that is open, and not bound to an iommufd.
#[derive(Debug)]
pub struct UnboundCdev {
    /// The device's address on the host.
    pub device: String,
    /// Its IOMMU group.
    pub group: u32,
    /// The node, open for reading and writing.
    pub file: File,
    /// The token of the device's card, if other users share the card.
    pub token: Option<String>,
}

/// What a cdev is bound and attached to: an [`Ioas`](super::Ioas), or a test's fake. Each call returns the kernel's
/// errno unchanged.
pub trait CdevBinder: fmt::Debug + Send + Sync {
    /// Opens the device behind a cdev, and resets it where it can be. `token` is that of its card.
    ///
    /// # Errors
    /// The kernel refuses.
    fn bind(&self, cdev: BorrowedFd<'_>, token: Option<&[u8; 16]>) -> io::Result<()>;

    /// Lets the DMA of a device that is bound reach what is mapped.
    ///
    /// # Errors
    /// The kernel refuses.
    fn attach(&self, cdev: BorrowedFd<'_>) -> io::Result<()>;

    /// Ends the DMA of a device that is attached.
    ///
    /// # Errors
    /// The kernel refuses.
    fn detach(&self, cdev: BorrowedFd<'_>) -> io::Result<()>;
}

/// A cdev whose device is open and attached to an IOAS. Dropping it ends the device's DMA.
pub struct Cdev {
    device: String,
    observed: ObservedFile,
    binder: Arc<dyn CdevBinder>,
}

/// A cdev of which an observer knows until it is dropped.
struct ObservedFile {
    file: File,
    observer: Arc<dyn FileObserver>,
}

impl Cdev {
    /// Opens the device behind a cdev and attaches it to `binder`. The kernel resets it on the way, where it has a
    /// function-level reset: about 100 ms. `observer` is told before that, and when the device is closed.
    ///
    /// The call repeats while another user has the device, up to `timeout`: after a process is killed, the kernel
    /// releases its file locks before its devices. It also repeats until the physical function's user has set the
    /// token.
    ///
    /// # Errors
    /// The device stays in use, a device of its IOMMU group is bound to a driver of the host, the observer or the
    /// kernel refuses.
    pub fn attach(
        cdev: UnboundCdev,
        binder: Arc<dyn CdevBinder>,
        observer: Arc<dyn FileObserver>,
        timeout: Duration,
    ) -> Result<Self> {
        let begun = Instant::now();
        let UnboundCdev {
            device,
            group,
            file,
            token,
        } = cdev;
        let failed = |place: &str| {
            let (device, place) = (device.clone(), place.to_owned());
            move |source| Error::Device {
                device,
                place,
                source,
            }
        };
        let uuid = token.as_deref().map(uuid_bytes).transpose();
        let uuid = uuid.map_err(failed("reading its token"))?;
        let observed =
            ObservedFile::new(file, observer).map_err(failed("KVM_DEV_VFIO_FILE_ADD"))?;
        let bind = || binder.bind(observed.file.as_fd(), uuid.as_ref());
        // A kernel without tokens on cdevs answers EINVAL at once.
        let in_use = match token {
            Some(_) => &IN_USE[..IN_USE.len() - 1],
            None => IN_USE,
        };
        while_refused(begun + timeout, in_use, bind).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::EPERM) => Error::NotViable { group },
                Some(libc::EINVAL) if token.is_some() => Error::TokenOnCdev {
                    device: device.clone(),
                },
                Some(libc::EBUSY | libc::EINVAL) => Error::DeviceInUse {
                    device: device.clone(),
                    waited: begun.elapsed(),
                },
                _ => failed("VFIO_DEVICE_BIND_IOMMUFD")(source),
            }
        })?;
        let attached = binder.attach(observed.file.as_fd());
        attached.map_err(failed("VFIO_DEVICE_ATTACH_IOMMUFD_PT"))?;
        Ok(Self {
            device,
            observed,
            binder,
        })
    }

    /// A descriptor of the open device.
    pub(super) fn device(&self) -> io::Result<OwnedFd> {
        self.observed.file.as_fd().try_clone_to_owned()
    }
}

/// The kernel's answers while another process has the device's group (EBUSY), while a device of its group has another
/// owner (EPERM), until the token of its physical function is set (EACCES), and last while another process has the
/// device (EINVAL).
const IN_USE: &[i32] = &[libc::EBUSY, libc::EPERM, libc::EACCES, libc::EINVAL];

/// The bytes of a UUID in their order in the text.
fn uuid_bytes(text: &str) -> io::Result<[u8; 16]> {
    let number = u128::from_str_radix(&text.replace('-', ""), 16);
    number.map(u128::to_be_bytes).map_err(io::Error::other)
}

impl Drop for Cdev {
    fn drop(&mut self) {
        // Closing the last descriptor has the same effect; a mapping of a BAR keeps the device open until then.
        if let Err(error) = self.binder.detach(self.observed.file.as_fd()) {
            tracing::warn!(device = self.device, %error, "VFIO_DEVICE_DETACH_IOMMUFD_PT failed");
        }
    }
}

impl fmt::Debug for Cdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cdev")
            .field("device", &self.device)
            .field("binder", &self.binder)
            .finish_non_exhaustive()
    }
}

impl ObservedFile {
    fn new(file: File, observer: Arc<dyn FileObserver>) -> io::Result<Self> {
        observer.added(file.as_fd())?;
        Ok(Self { file, observer })
    }
}

impl Drop for ObservedFile {
    fn drop(&mut self) {
        self.observer.removed(self.file.as_fd());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A kernel and an observer that write down what they are asked, and refuse one call with an errno.
    #[derive(Debug, Default)]
    struct Fake {
        refuses: Option<(&'static str, i32)>,
        calls: Mutex<Vec<&'static str>>,
        token: Mutex<Option<[u8; 16]>>,
    }

    impl Fake {
        fn call(&self, name: &'static str) -> io::Result<()> {
            self.calls.lock().unwrap().push(name);
            match self.refuses {
                Some((refused, errno)) if refused == name => {
                    Err(io::Error::from_raw_os_error(errno))
                }
                _ => Ok(()),
            }
        }
    }

    impl CdevBinder for Fake {
        fn bind(&self, _: BorrowedFd<'_>, token: Option<&[u8; 16]>) -> io::Result<()> {
            *self.token.lock().unwrap() = token.copied();
            self.call("bind")
        }

        fn attach(&self, _: BorrowedFd<'_>) -> io::Result<()> {
            self.call("attach")
        }

        fn detach(&self, _: BorrowedFd<'_>) -> io::Result<()> {
            self.call("detach")
        }
    }

    impl FileObserver for Fake {
        fn added(&self, _: BorrowedFd<'_>) -> io::Result<()> {
            self.call("added")
        }

        fn removed(&self, _: BorrowedFd<'_>) {
            let _ = self.call("removed");
        }
    }

    /// What comes of a device, and what was called.
    fn attached(
        refuses: Option<(&'static str, i32)>,
        token: Option<&str>,
    ) -> (Result<()>, Vec<&'static str>, Arc<Fake>) {
        let kernel = Arc::new(Fake {
            refuses,
            ..Fake::default()
        });
        let cdev = UnboundCdev {
            device: "0000:01:00.0".to_owned(),
            group: 7,
            file: File::open("/dev/null").unwrap(),
            token: token.map(str::to_owned),
        };
        let cdev = Cdev::attach(cdev, kernel.clone(), kernel.clone(), Duration::ZERO);
        let opened = cdev.map(|cdev| {
            cdev.device().unwrap();
        });
        let calls = kernel.calls.lock().unwrap().clone();
        (opened, calls, kernel)
    }

    const TOKEN: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

    #[test]
    fn kvm_learns_of_a_device_before_it_opens_and_when_it_closes() {
        let (opened, calls, kernel) = attached(None, Some(TOKEN));
        opened.unwrap();
        assert_eq!(calls, ["added", "bind", "attach", "detach", "removed"]);
        let token = kernel.token.lock().unwrap().unwrap();
        assert_eq!(token[..4], [0x83, 0xb8, 0xf4, 0xf2]);
        assert_eq!(token[14..], [0x10, 0x01]);
    }

    #[test]
    fn what_fails_undoes_what_was_done() {
        let steps: [(&str, &[&str]); 3] = [
            ("added", &["added"]),
            ("bind", &["added", "bind", "removed"]),
            ("attach", &["added", "bind", "attach", "removed"]),
        ];
        for (refused, expected) in steps {
            let (opened, calls, _) = attached(Some((refused, libc::EIO)), None);
            assert!(matches!(opened, Err(Error::Device { .. })), "{opened:?}");
            assert_eq!(calls, expected, "{refused}");
        }
    }

    #[test]
    fn a_refusal_to_bind_is_told_by_its_cause() {
        let bind = |errno, token| {
            let (opened, ..) = attached(Some(("bind", errno)), token);
            opened.unwrap_err()
        };
        let busy = bind(libc::EBUSY, None);
        assert!(matches!(busy, Error::DeviceInUse { .. }), "{busy}");
        let open = bind(libc::EINVAL, None);
        assert!(matches!(open, Error::DeviceInUse { .. }), "{open}");
        let foreign = bind(libc::EPERM, None);
        assert!(
            matches!(foreign, Error::NotViable { group: 7 }),
            "{foreign}"
        );
        let old = bind(libc::EINVAL, Some(TOKEN));
        assert!(matches!(old, Error::TokenOnCdev { .. }), "{old}");
        let wrong = bind(libc::EACCES, Some(TOKEN)).to_string();
        assert!(wrong.contains("VFIO_DEVICE_BIND_IOMMUFD"), "{wrong}");
    }

    #[test]
    fn a_device_that_another_user_is_leaving_is_waited_for() {
        let kernel = Arc::new(Fake {
            refuses: Some(("bind", libc::EBUSY)),
            ..Fake::default()
        });
        let cdev = UnboundCdev {
            device: "0000:01:00.0".to_owned(),
            group: 7,
            file: File::open("/dev/null").unwrap(),
            token: None,
        };
        let patience = Duration::from_millis(50);
        Cdev::attach(cdev, kernel.clone(), kernel.clone(), patience).unwrap_err();
        assert!(kernel.calls.lock().unwrap().len() > 3);
    }
}
