//! What gives access to a device, and keeps the device in its DMA space.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_bindings::bindings::vfio as abi;

use super::cdev::Cdev;
use super::group::Group;
use super::ioctl::{self, BusFunction};
use super::retry::while_refused;
use crate::{Error, Result};

/// How long to wait for the user of a physical function to set its token.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(5);

/// A function that is not of the device's iommufd, in the answer for a cdev.
const NOT_OWNED: u32 = abi::VFIO_PCI_DEVID_NOT_OWNED as u32;

/// Gives access to a device of a DMA space. The open device owns it: as long as the device is open, it stays in the
/// DMA space.
#[derive(Debug)]
pub enum Attachment {
    /// The device's IOMMU group, which has joined a container.
    Group {
        /// The group.
        group: Arc<Group>,
        /// The token of the device's card, if other users share the card. The first opener of the physical function
        /// sets it. Until then the kernel refuses its virtual functions, and opening one repeats for a while.
        token: Option<String>,
    },
    /// The device's cdev, which is attached to an IOAS.
    Cdev(Cdev),
}

impl Attachment {
    /// Opens the device at the host address `name`.
    ///
    /// # Errors
    /// The device is not in the group, or the kernel refuses.
    pub(super) fn device(&self, name: &str) -> Result<OwnedFd> {
        let (opened, place) = match self {
            Self::Group { group, token } => {
                let opened = open_in_group(group, name, token.as_deref());
                (opened, "VFIO_GROUP_GET_DEVICE_FD")
            }
            Self::Cdev(cdev) => (cdev.device(), "duplicating its descriptor"),
        };
        opened.map_err(|source| Error::Device {
            device: name.to_owned(),
            place: place.into(),
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
        let shared = |other| Error::BusShared {
            device: name.to_owned(),
            other,
        };
        let groups = match self {
            Self::Group { group, .. } => {
                let numbers: BTreeSet<u32> =
                    functions.iter().map(|function| function.owner).collect();
                let joined = numbers.into_iter().map(|number| {
                    let joined = group.container().group(number);
                    joined.ok_or_else(|| shared(format!("IOMMU group {number}")))
                });
                joined.collect::<Result<Vec<_>>>()?
            }
            // The kernel knows which functions the iommufd has.
            Self::Cdev(_) => {
                let not_owned = |function: &&BusFunction| function.owner == NOT_OWNED;
                match functions.iter().find(not_owned) {
                    Some(function) => return Err(shared(function.to_string())),
                    None => Vec::new(),
                }
            }
        };
        let groups: Vec<_> = groups.iter().map(|group| group.as_fd()).collect();
        ioctl::hot_reset(device, &groups).map_err(|source| match source.raw_os_error() {
            // A function of the bus has left the iommufd since this device was opened.
            Some(libc::EINVAL) if groups.is_empty() => {
                shared("a function that has left".to_owned())
            }
            _ => Error::Device {
                device: name.to_owned(),
                place: "VFIO_DEVICE_PCI_HOT_RESET".into(),
                source,
            },
        })
    }
}

fn open_in_group(group: &Group, name: &str, token: Option<&str>) -> io::Result<OwnedFd> {
    let argument = match token {
        Some(token) => format!("{name} vf_token={token}"),
        None => name.to_owned(),
    };
    let name = CString::new(argument)?;
    let deadline = Instant::now() + token.map_or(Duration::ZERO, |_| TOKEN_TIMEOUT);
    while_refused(deadline, &[libc::EACCES], || group.device(&name))
}
