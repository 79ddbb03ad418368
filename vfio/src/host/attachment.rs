//! What gives access to a device, and keeps the device in its DMA space.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::group::Group;
use super::ioctl::{self, BusFunction};
use crate::{Error, Result};

/// How long to wait for the user of a physical function to set its token.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(5);
const TOKEN_RETRY: Duration = Duration::from_millis(50);

/// Repeats `attempt` while it answers EACCES, until the deadline.
fn while_denied<T>(deadline: Instant, attempt: impl Fn() -> io::Result<T>) -> io::Result<T> {
    loop {
        match attempt() {
            Err(error)
                if error.raw_os_error() == Some(libc::EACCES) && Instant::now() < deadline =>
            {
                thread::sleep(TOKEN_RETRY);
            }
            result => return result,
        }
    }
}

/// Gives access to devices of one DMA space. An open device owns it: as long as the device is open, the
/// device stays in the DMA space.
#[derive(Debug, Clone)]
pub enum Attachment {
    /// The device's IOMMU group, which has joined a container.
    Group(Arc<Group>),
}

impl Attachment {
    /// Opens the device at the host address `name`.
    ///
    /// With a `token`, other users share the device's card: the first opener of the physical function sets
    /// the token. Until then the kernel refuses its virtual functions, and this call repeats for a while.
    ///
    /// # Errors
    /// The device is not in the group, or the kernel refuses.
    pub(super) fn device(&self, name: &str, token: Option<&str>) -> Result<OwnedFd> {
        let Self::Group(group) = self;
        let argument = match token {
            Some(token) => format!("{name} vf_token={token}"),
            None => name.to_owned(),
        };
        let deadline = Instant::now() + token.map_or(Duration::ZERO, |_| TOKEN_TIMEOUT);
        CString::new(argument)
            .map_err(io::Error::from)
            .and_then(|name| while_denied(deadline, || group.device(&name)))
            .map_err(|source| Error::Device {
                device: name.to_owned(),
                place: "VFIO_GROUP_GET_DEVICE_FD".into(),
                source,
            })
    }

    /// Resets the bus of an open device of this attachment, with all its `functions`.
    ///
    /// # Errors
    /// A function is not in this DMA space, or the kernel refuses.
    pub(super) fn reset_bus(
        &self,
        (name, device): (&str, BorrowedFd<'_>),
        functions: &[BusFunction],
    ) -> Result<()> {
        let Self::Group(group) = self;
        let numbers: BTreeSet<u32> = functions.iter().map(|function| function.owner).collect();
        let joined = numbers.into_iter().map(|number| {
            let joined = group.container().group(number);
            joined.ok_or_else(|| Error::BusShared {
                device: name.to_owned(),
                group: number,
            })
        });
        let groups = joined.collect::<Result<Vec<_>>>()?;
        let groups: Vec<_> = groups.iter().map(|group| group.as_fd()).collect();
        ioctl::hot_reset(device, &groups).map_err(|source| Error::Device {
            device: name.to_owned(),
            place: "VFIO_DEVICE_PCI_HOT_RESET".into(),
            source,
        })
    }
}
