//! Devices of a guest that measures them: its kernel has no IOMMU.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use crate::host::{Attachment, Container, Group, VfioDevice};
use crate::{Error, Result};

/// Opens the device at the address `name`, which is bound to vfio-pci, in the directories `sys` and `dev`.
///
/// # Errors
/// The kernel has no VFIO without an IOMMU, or refuses the device.
pub fn open_without_iommu(sys: &Path, dev: &Path, name: &str) -> Result<VfioDevice> {
    let link = sys.join("bus/pci/devices").join(name).join("iommu_group");
    let number = fs::read_link(&link).and_then(|group| {
        let number = group
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        number.ok_or_else(|| io::ErrorKind::InvalidData.into())
    });
    let number: u32 = number.map_err(|source| Error::Open { path: link, source })?;
    let path = dev.join("vfio/vfio");
    let container = Arc::new(Container::without_iommu(open(&path)?, &path)?);
    let node = open(&dev.join(format!("vfio/noiommu-{number}")))?;
    let group = Arc::new(Group::join(node, number, container, Instant::now())?);
    VfioDevice::open(Attachment::Group { group, token: None }, name)
}

fn open(path: &Path) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|source| Error::Open {
        path: path.to_owned(),
        source,
    })
}
