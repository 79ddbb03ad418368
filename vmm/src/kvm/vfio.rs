//! KVM's VFIO device: tells KVM which VFIO groups or cdevs a VM uses (kernel: virt/kvm/devices/vfio.rst).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use gantry_vfio::host::FileObserver;
use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

use super::KvmError;

/// Tells KVM of each VFIO group or cdev that comes or goes.
pub struct VfioObserver(DeviceFd);

impl VfioObserver {
    /// Makes the VM's VFIO device.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn new(vm: &VmFd) -> Result<Self, KvmError> {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            fd: 0,
            flags: 0,
        };
        let fd = vm
            .create_device(&mut device)
            .map_err(KvmError::call("KVM_CREATE_DEVICE(VFIO)"))?;
        Ok(Self(fd))
    }

    fn set(&self, action: u32, file: BorrowedFd<'_>) -> io::Result<()> {
        let fd: i32 = file.as_raw_fd();
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_DEV_VFIO_FILE,
            attr: u64::from(action),
            addr: std::ptr::from_ref(&fd) as u64,
        };
        self.0.set_device_attr(&attribute).map_err(io::Error::from)
    }
}

impl FileObserver for VfioObserver {
    fn added(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.set(KVM_DEV_VFIO_FILE_ADD, file)
    }

    fn removed(&self, file: BorrowedFd<'_>) {
        if let Err(error) = self.set(KVM_DEV_VFIO_FILE_DEL, file) {
            tracing::error!(%error, "KVM did not release a VFIO group or cdev");
        }
    }
}
