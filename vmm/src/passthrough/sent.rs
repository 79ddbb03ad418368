//! A device that a client has opened, and sends.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use gantry_resources::opener::Opener;
use gantry_resources::pools::{DeviceRequest, SentRequest};

use super::error::DeviceError;
use crate::process::error::cannot;

/// A device that comes as an open descriptor.
#[derive(Debug)]
pub struct SentDevice {
    /// On which terms.
    pub request: SentRequest,
    /// Its cdev, bound to no iommufd.
    pub cdev: File,
    /// The iommufd for it, if this VM has no device yet.
    pub iommufd: Option<File>,
}

impl SentDevice {
    /// The request for it. Which device it is, the number of its cdev says and nothing else: the client may have other
    /// names for it.
    ///
    /// # Errors
    /// It is no cdev.
    pub fn request(&self, opener: &Opener) -> Result<DeviceRequest, DeviceError> {
        let status = self.cdev.metadata();
        let status = status.map_err(cannot("look at the descriptor that came with the request"))?;
        if !status.file_type().is_char_device() {
            return Err(DeviceError::SentNoDevice);
        }
        let number = status.rdev();
        let device = opener.device_of_cdev(libc::major(number), libc::minor(number))?;
        Ok(self.request.of(device))
    }
}
