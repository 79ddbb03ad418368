//! A driver for tests: rings in guest RAM, and what a driver writes to a device.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::signals::Signals;
use super::{Activation, ActiveQueue, QueueSignal};
use crate::mapping::HostMapping;
use crate::ram::RamView;

/// Bytes of guest RAM in tests.
pub const RAM: u64 = 1 << 20;
/// Where the rings of the first queue are.
pub const DESCRIPTORS: u64 = 0x1000;
pub const AVAILABLE: u64 = 0x2000;
pub const USED: u64 = 0x3000;
/// Descriptor flags (section 2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub fn ram() -> RamView {
    let mapping = HostMapping::anonymous(RAM as usize, 4096).unwrap();
    RamView::new(Arc::new([(0, Arc::new(mapping))])).unwrap()
}

/// What a driver that enables no queue has agreed on.
pub fn no_queues() -> Activation {
    Activation {
        ram: ram(),
        features: 0,
        queues: Vec::new(),
    }
}

/// A queue of `signals` that a driver has enabled, with the rings of the first queue.
pub fn active_queue(signals: &Arc<Signals>, index: u16, size: u16) -> ActiveQueue {
    let mut queue = Queue::new(size).unwrap();
    queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
    queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_ready(true);
    ActiveQueue {
        index,
        queue,
        kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        signal: QueueSignal::new(signals, index),
    }
}

/// A driver of one queue.
pub struct Driver {
    pub ram: RamView,
    pub size: u16,
    next: u16,
}

impl Driver {
    pub fn new(ram: RamView, size: u16) -> Self {
        Self { ram, size, next: 0 }
    }

    pub fn memory(&self) -> &GuestMemoryMmap {
        self.ram.memory()
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory()
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    /// Writes a descriptor with its flags and the number of the next one.
    pub fn describe(&self, at: u64, address: u64, len: u32, (flags, next): (u16, u16)) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(at, &bytes);
    }

    /// Writes a chain of buffers, `(address, length, writable)`, from descriptor 0 on, and makes it available.
    pub fn offer(&mut self, buffers: &[(u64, u32, bool)]) {
        let last = buffers.len() - 1;
        for (index, (address, len, writable)) in buffers.iter().enumerate() {
            let next = if index < last { NEXT } else { 0 };
            let write = if *writable { WRITE } else { 0 };
            let at = DESCRIPTORS + 16 * index as u64;
            let link = (next | write, index as u16 + 1);
            self.describe(at, *address, *len, link);
        }
        self.make_available(0);
    }

    /// Writes a chain of buffers into an indirect table at `table`, and makes it available.
    pub fn offer_indirect(&mut self, table: u64, buffers: &[(u64, u32, bool)]) {
        let last = buffers.len() - 1;
        for (index, (address, len, writable)) in buffers.iter().enumerate() {
            let next = if index < last { NEXT } else { 0 };
            let write = if *writable { WRITE } else { 0 };
            let link = (next | write, index as u16 + 1);
            self.describe(table + 16 * index as u64, *address, *len, link);
        }
        let len = 16 * buffers.len() as u32;
        self.describe(DESCRIPTORS, table, len, (INDIRECT, 0));
        self.make_available(0);
    }

    /// Makes the chain that begins with a descriptor available.
    pub fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.next % self.size);
        self.write(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.set_available(self.next);
    }

    /// Sets the index of the available ring.
    pub fn set_available(&self, index: u16) {
        self.write(AVAILABLE + 2, &index.to_le_bytes());
    }

    /// How many chains the device has used.
    pub fn used(&self) -> u16 {
        let bytes = self.read(USED + 2, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// How many bytes the device says that it has written into the chain that it used last.
    pub fn written(&self) -> u32 {
        let slot = u64::from(self.used().wrapping_sub(1) % self.size);
        let bytes = self.read(USED + 4 + 8 * slot + 4, 4);
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}
