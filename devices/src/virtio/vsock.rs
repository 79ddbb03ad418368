//! A virtio socket device (section 5.10) whose packets the host's kernel moves.

use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::{Activation, KernelQueues, VirtioBackend, VirtioKind, kernel};

/// A communication controller of no other subclass.
const CLASS: u32 = 0x07_80_00;
/// The feature bit for sockets that keep the bounds of messages (section 5.10.3).
const SEQPACKET: u64 = 1 << 1;
/// Receiving, sending, events. The kernel serves the first two; there are no events without migration.
const SIZES: [u16; 3] = [128; 3];
const EVENTS: u16 = 2;

/// The device.
pub struct Vsock {
    cid: u64,
    features: u64,
    path: Arc<dyn KernelQueues>,
}

impl Vsock {
    /// The device of the guest with this context id. `features` are those that the kernel can serve.
    pub fn new(cid: u32, features: u64, path: Arc<dyn KernelQueues>) -> Self {
        Self {
            cid: cid.into(),
            features: features & SEQPACKET,
            path,
        }
    }
}

impl VirtioBackend for Vsock {
    fn kind(&self) -> VirtioKind {
        VirtioKind {
            id: VIRTIO_ID_VSOCK as u16,
            class: CLASS,
        }
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn start(&self, activation: Activation) {
        let mut queues = activation.queues;
        queues.retain(|queue| queue.index < EVENTS);
        kernel::start(&*self.path, activation.features, &queues);
    }

    fn stop(&self) {
        self.path.stop();
    }

    fn is_stopped(&self) -> bool {
        true
    }

    fn wait_stopped(&self, _timeout: Duration) -> bool {
        true
    }
}
