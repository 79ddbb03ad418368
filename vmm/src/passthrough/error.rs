//! Why a device of the host cannot be given to a guest.

use std::path::PathBuf;

use gantry_resources::base::DeviceName;

use crate::kvm::KvmError;
use crate::process::error::HostError;

/// Why a device of the host cannot be given to a guest.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The devices could not be leased.
    #[error(transparent)]
    Allocate(Box<gantry_resources::allocation::AllocateError>),
    /// The helper that opens devices refuses, or cannot be reached.
    #[error(transparent)]
    Opener(#[from] gantry_resources::opener::OpenerError),
    /// A leased device is in no IOMMU group.
    #[error(
        "{device} is in no IOMMU group: without an IOMMU a guest could write to all of the host's \
         memory\nswitch the IOMMU on in the BIOS and with `intel_iommu=on` or `amd_iommu=on` on the \
         kernel's command line"
    )]
    NoIommuGroup {
        /// The device.
        device: DeviceName,
    },
    /// A device that comes later reserves addresses that the guest uses.
    #[error(
        "{device} reserves {start:#x}-{last:#x}, where this VM has RAM or PCI windows\n\
         name its group in `hotplug.groups` of the VM's file, and start the VM again: RAM is then laid \
         out around what the device reserves"
    )]
    Clash {
        /// The device.
        device: DeviceName,
        /// First address.
        start: u64,
        /// Last address.
        last: u64,
    },
    /// The IOMMU of a device that comes later does not reach all of RAM.
    #[error(
        "the host's IOMMU cannot map the guest's memory at {start:#x}-{last:#x} for the new device\n\
         start the VM with the device, or with less memory"
    )]
    Unmappable {
        /// First address.
        start: u64,
        /// Last address.
        last: u64,
    },
    /// A device is to have a ROM that the VM's file does not name.
    #[error(
        "rom: {} is none of the files that this VM's file names: add it to `hotplug.roms` there and start the VM \
         again, or leave the key out", path.display()
    )]
    RomFile {
        /// The file.
        path: PathBuf,
    },
    /// The IOMMU's forbidden ranges are not known.
    #[error(transparent)]
    Reserved(#[from] gantry_resources::facts::ReservedError),
    /// A device has no cdev.
    #[error(transparent)]
    Cdev(#[from] gantry_resources::facts::CdevError),
    /// A client sends a device to a VM that has a container.
    #[error(
        "a device that comes as a descriptor needs iommufd: set \"iommufd\": true under \"platform\" in the VM's \
         file and start the VM again"
    )]
    SentToContainer,
    /// What a client sends is no device.
    #[error(
        "the first descriptor that came with the request is no character device: send an open cdev \
         (/dev/vfio/devices/vfio*)"
    )]
    SentNoDevice,
    /// A device that a client sends has another user.
    #[error(
        "{device} is in use, or its descriptor is bound to an iommufd already: send one that is open and not bound"
    )]
    SentInUse {
        /// The device.
        device: DeviceName,
    },
    /// A call of the kernel on a device does not return.
    #[error(
        "{device} does not answer: a call of the host's kernel on it has not returned for {seconds} s\n\
         the device stays leased until the call returns; `dmesg` may show why"
    )]
    Stuck {
        /// The device.
        device: DeviceName,
        /// For how long.
        seconds: u64,
    },
    /// The bus of a device that has no reset of its own could not be reset.
    #[error(
        "the bus of {device} could not be reset: the device is in quarantine, and `dmesg` may show why\n\
         `gantry device release-quarantine {device}` once it answers again"
    )]
    BusReset {
        /// The device.
        device: DeviceName,
    },
    /// VFIO refused something.
    #[error(transparent)]
    Vfio(#[from] gantry_vfio::Error),
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host's kernel refused something else.
    #[error(transparent)]
    Host(#[from] HostError),
}

impl From<gantry_resources::allocation::AllocateError> for DeviceError {
    fn from(error: gantry_resources::allocation::AllocateError) -> Self {
        Self::Allocate(Box::new(error))
    }
}
