//! Memory slots: host memory that the guest reaches without an exit.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION takes a host address on trust.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use gantry_devices::mapping::HostMapping;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

/// The slots of one virtual machine.
pub struct MemorySlots {
    vm: Arc<VmFd>,
    // Index is the slot's number; held while a slot is made or removed, and never with another lock.
    used: Mutex<Vec<bool>>,
}

/// A memory slot; dropping it takes the memory away from the guest.
pub struct SlotGuard {
    slots: Arc<MemorySlots>,
    number: u32,
    guest: u64,
    // The host memory outlives the slot.
    mapping: Arc<HostMapping>,
}

impl MemorySlots {
    /// No slots yet.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            used: Mutex::default(),
        })
    }

    /// Shows `len` bytes of `mapping`, from `offset` on, to the guest at `guest`.
    ///
    /// # Errors
    /// The range is not inside the mapping, not page-aligned, overlaps another slot, or the kernel
    /// has no slots left.
    pub fn map(
        self: &Arc<Self>,
        guest: u64,
        mapping: &Arc<HostMapping>,
        offset: u64,
        len: u64,
    ) -> io::Result<SlotGuard> {
        let size = mapping.size() as u64;
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let number = used.iter().position(|used| !used).unwrap_or(used.len());
        let slot = u32::try_from(number).map_err(io::Error::other)?;
        self.set(kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: mapping.address() + offset,
        })?;
        match used.get_mut(number) {
            Some(entry) => *entry = true,
            None => used.push(true),
        }
        let (slots, mapping) = (Arc::clone(self), Arc::clone(mapping));
        Ok(SlotGuard {
            slots,
            number: slot,
            guest,
            mapping,
        })
    }

    fn set(&self, region: kvm_userspace_memory_region) -> io::Result<()> {
        // SAFETY: the host range lies inside a `HostMapping` that the guard keeps mapped until the
        // slot is gone, for ever if it does not go, and this process reaches it through raw pointers only.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(io::Error::from)
    }
}

impl Drop for SlotGuard {
    fn drop(&mut self) {
        let mut used = self
            .slots
            .used
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let removed = self.slots.set(kvm_userspace_memory_region {
            slot: self.number,
            flags: 0,
            guest_phys_addr: self.guest,
            memory_size: 0,
            userspace_addr: 0,
        });
        match removed {
            Ok(()) => {
                if let Some(entry) = used.get_mut(self.number as usize) {
                    *entry = false;
                }
            }
            // Neither the number nor the host addresses are used again: the guest still has the slot, and would
            // reach whatever is there.
            Err(error) => {
                std::mem::forget(Arc::clone(&self.mapping));
                tracing::error!(slot = self.number, %error, "cannot remove a memory slot");
            }
        }
    }
}
