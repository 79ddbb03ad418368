//! Disks of the guest, files or block devices of the host and that of cloud-init: opened, and made virtio devices.

mod cloud_init;
mod open;

use std::fs::File;
use std::io;
use std::sync::Arc;

use gantry_devices::virtio::block::{Block, Disk, Rings};

pub use cloud_init::CloudInitError;
pub use open::{DiskProblem, flags, open};

use crate::config::{DiskConfig, VmConfig};
use crate::info::DeviceKind;
use crate::process::sandbox::Role;
use crate::virtio::{VirtioContext, VirtioDevice, VirtioDeviceError};

/// An open disk, and what it is in the VM.
pub struct OpenDisk {
    kind: DeviceKind,
    config: DiskConfig,
    disk: Disk,
}

/// How many disks that come while a VM runs can do requests side by side at a time.
const LATER_RINGS: usize = 4;

/// How many rings a VM's disks take at most.
pub fn rings(config: &VmConfig) -> usize {
    let later = config.later_disks();
    let none_comes = later.read.is_empty() && later.write.is_empty();
    config.disks.len() + if none_comes { 0 } else { LATER_RINGS }
}

/// Opens the disks of a VM, in their order; the last is that of cloud-init.
///
/// # Errors
/// The first that is missing, not permitted, in use, or no disk.
pub fn open_all(config: &VmConfig) -> Result<Vec<OpenDisk>, DiskError> {
    let mut disks = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let opened = open(disk, config.folders.as_ref());
        let opened = opened.map_err(|problem| DiskError::Open { index, problem })?;
        disks.push(OpenDisk::new(disk, opened));
    }
    if let Some(files) = &config.cloud_init {
        let below = config.folders.as_ref();
        let below = below.map(|folders| folders.payload.as_path());
        disks.push(OpenDisk {
            kind: DeviceKind::CloudInit,
            config: cloud_init::config(),
            disk: cloud_init::disk(files, below)?,
        });
    }
    Ok(disks)
}

impl OpenDisk {
    fn new(config: &DiskConfig, disk: Disk) -> Self {
        Self {
            kind: DeviceKind::Disk(config.clone()),
            config: config.clone(),
            disk,
        }
    }

    /// A disk that comes while the VM runs, whose file was `opened` with [`flags`].
    ///
    /// # Errors
    /// It could not be opened, is in use, or no disk.
    pub fn later(config: &DiskConfig, opened: io::Result<File>) -> Result<Self, DiskError> {
        Ok(Self::new(config, open::accept(config, opened)?))
    }

    /// Makes a device of the guest of it.
    ///
    /// # Errors
    /// There are not enough descriptors or threads.
    pub fn device(self, context: &VirtioContext) -> Result<VirtioDevice, DiskError> {
        let Self { kind, config, disk } = self;
        let make = || -> Result<VirtioDevice, VirtioDeviceError> {
            let disk = Arc::new(disk);
            let none = Rings::default();
            let rings = if config.io_uring {
                &context.rings
            } else {
                &none
            };
            let (backend, worker) = Block::new(&disk, &config.serial, config.queues, rings)?;
            let service = (Role::Disk, Box::new(move || worker.run()) as _);
            let backend = Arc::new(backend);
            let device = VirtioDevice::new(&config.id, kind, backend, Some(service), context)?;
            Ok(device.with_disk(disk))
        };
        make().map_err(|source| DiskError::Make {
            id: config.id.clone(),
            source,
        })
    }
}

/// A disk cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file of a disk at boot cannot be used.
    #[error("disks[{index}].path: {problem}")]
    Open {
        /// Its place in the list.
        index: usize,
        /// Why.
        problem: DiskProblem,
    },
    /// The file of a disk that comes later cannot be used.
    #[error(transparent)]
    Later(#[from] DiskProblem),
    /// That of cloud-init cannot be made.
    #[error(transparent)]
    CloudInit(#[from] CloudInitError),
    /// The process lacks what a device takes.
    #[error("the disk {id} cannot be made")]
    Make {
        /// What it is called.
        id: String,
        /// Why.
        #[source]
        source: VirtioDeviceError,
    },
}
