//! Doorbells: guest addresses whose writes signal an eventfd in the kernel, without an exit to this process.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// A doorbell. Dropping it removes it from the guest.
pub struct Doorbell {
    vm: Arc<VmFd>,
    at: IoEventAddress,
    event: Arc<EventFd>,
}

impl Doorbell {
    /// Has writes of any length at `at` signal `event` (`KVM_IOEVENTFD`).
    ///
    /// # Errors
    /// The kernel refused, or has no room for more devices on the bus.
    pub fn new(vm: &Arc<VmFd>, at: IoEventAddress, event: &Arc<EventFd>) -> io::Result<Self> {
        vm.register_ioevent(event, &at, NoDatamatch)?;
        let (vm, event) = (Arc::clone(vm), Arc::clone(event));
        Ok(Self { vm, at, event })
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        if let Err(error) = self
            .vm
            .unregister_ioevent(&self.event, &self.at, NoDatamatch)
        {
            // The guest can still ring it, which does nothing: the device looks at its queues and finds none.
            tracing::error!(%error, "cannot remove a doorbell");
        }
    }
}
