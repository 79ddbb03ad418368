//! A virtio block device (section 5.2) over a file or a block device of the host.

mod direct;
mod disk;
mod request;
mod ring;
mod serve;
mod vectors;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

pub use disk::{Disk, ResizeError, SECTOR};
pub use request::SERIAL_LEN;
pub use ring::Rings;
pub use serve::BlockWorker;

use super::{Activation, MAX_BUFFERS, VirtioBackend, VirtioKind, WorkerHandle, read_bytes, worker};

/// Mass storage of no other subclass: Linux looks at the virtio id alone.
const CLASS: u32 = 0x01_80_00;
/// The most buffers of data in a request; two more are its header and its status.
const MAX_SEGMENTS: u32 = MAX_BUFFERS - 2;
/// The most sectors that one request may discard or fill with zeros: the disk is busy with it meanwhile.
const MAX_ERASE: u32 = 1 << 22;

/// The queues of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queues {
    /// How many.
    pub count: u16,
    /// The size of each: a power of two.
    pub size: u16,
}

/// The device. Its [`BlockWorker`] does the work on a thread of its own.
pub struct Block {
    disk: Arc<Disk>,
    sizes: Vec<u16>,
    worker: WorkerHandle,
    has_ring: bool,
}

impl Block {
    /// The device for `disk` with these queues, and what its thread runs. `serial` is cut to [`SERIAL_LEN`] bytes.
    /// Requests are done side by side if one of `rings` is free, or else one after the other.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new(
        disk: &Arc<Disk>,
        serial: &str,
        queues: Queues,
        rings: &Rings,
    ) -> io::Result<(Self, BlockWorker)> {
        let (handle, worker) = worker()?;
        let disk = Arc::clone(disk);
        let ring = disk.file().ok().and_then(|_| rings.take());
        let device = Self {
            disk: Arc::clone(&disk),
            has_ring: ring.is_some(),
            sizes: vec![queues.size; usize::from(queues.count)],
            worker: handle,
        };
        Ok((device, BlockWorker::new(worker, disk, serial, ring)))
    }

    /// The configuration (section 5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut bytes = [0; 60];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.disk.sectors().to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &self.disk.block_size().to_le_bytes());
        put(34, &(self.sizes.len() as u16).to_le_bytes());
        let alignment = self.disk.block_size() / SECTOR as u32;
        for (at, value) in [
            (36, MAX_ERASE),
            (40, request::MAX_RANGES),
            (44, alignment),
            (48, MAX_ERASE),
            (52, request::MAX_RANGES),
        ] {
            put(at, &value.to_le_bytes());
        }
        // Zeros may be written by giving the space back.
        put(56, &[1]);
        bytes
    }
}

impl VirtioBackend for Block {
    fn kind(&self) -> VirtioKind {
        VirtioKind {
            id: VIRTIO_ID_BLOCK as u16,
            class: CLASS,
        }
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        let more: &[u32] = match self.disk.is_read_only() {
            true => &[VIRTIO_BLK_F_RO],
            false => &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES],
        };
        let bits = always.iter().chain(more);
        bits.fold(0, |bits, bit| bits | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.disk.counters().to_vec();
        counters.push(("io_uring", self.has_ring.into()));
        counters
    }

    fn start(&self, activation: Activation) {
        self.worker.start(activation);
    }

    fn stop(&self) {
        self.worker.stop();
    }

    fn is_stopped(&self) -> bool {
        self.worker.is_stopped()
    }

    fn wait_stopped(&self, timeout: Duration) -> bool {
        self.worker.wait_stopped(timeout)
    }
}

#[cfg(test)]
mod tests;
