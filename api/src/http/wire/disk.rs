//! Disks in the API, and the files of cloud-init.

use std::path::PathBuf;

use gantry_vmm as vmm;
use gantry_vmm::DiskConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A virtio disk of a VM.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Disk {
    /// Its name.
    pub id: String,
    /// Its image or block device.
    pub path: PathBuf,
    /// Whether the guest may not write to it.
    pub readonly: bool,
    /// Whether accesses go past the host's page cache.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub direct: bool,
    /// Whether requests are done one after the other, even where the host has io_uring.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disable_io_uring: bool,
    /// Its serial number in the guest, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Number of its queues.
    pub num_queues: u16,
    /// Size of each queue.
    pub queue_size: u16,
}

impl From<&DiskConfig> for Disk {
    fn from(disk: &DiskConfig) -> Self {
        Self {
            id: disk.id.clone(),
            path: disk.path.clone(),
            readonly: disk.read_only,
            direct: disk.direct,
            disable_io_uring: !disk.io_uring,
            serial: Some(disk.serial.clone()).filter(|serial| !serial.is_empty()),
            num_queues: disk.queues.count,
            queue_size: disk.queues.size,
        }
    }
}

/// Body of `vm.resize-disk`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeDisk {
    /// Name of the disk in the VM.
    pub id: String,
    /// Its new size in bytes.
    pub desired_size: u64,
}

/// The files of cloud-init in the guest.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct CloudInit {
    /// What to set up.
    pub user_data: PathBuf,
    /// Which instance the guest is.
    pub meta_data: PathBuf,
    /// How to set up its network, if that is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_config: Option<PathBuf>,
}

impl From<&vmm::CloudInit> for CloudInit {
    fn from(files: &vmm::CloudInit) -> Self {
        Self {
            user_data: files.user_data.clone(),
            meta_data: files.meta_data.clone(),
            network_config: files.network_config.clone(),
        }
    }
}
