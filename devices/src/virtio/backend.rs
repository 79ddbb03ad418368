//! What a virtio device is to its transport.

use std::sync::Arc;
use std::time::Duration;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::QueueSignal;
use crate::ram::RamView;

/// The kind of a virtio device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioKind {
    /// The virtio device id (section 5).
    pub id: u16,
    /// The PCI class code: class, subclass and programming interface.
    pub class: u32,
}

/// A device behind the PCI transport. Several vCPUs call at once.
///
/// The transport calls [`Self::start`] when the driver has said that it is ready, and [`Self::stop`] when it
/// resets the device. Between the two, and until [`Self::is_stopped`], the device may read and write guest RAM.
pub trait VirtioBackend: Send + Sync {
    /// What the device is.
    fn kind(&self) -> VirtioKind;

    /// The feature bits that it offers beside those of the transport.
    fn features(&self) -> u64;

    /// The largest size of each of its queues: powers of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from its configuration at `offset`; zeros past the end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// What it did so far, by name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Begins to serve the queues.
    fn start(&self, activation: Activation);

    /// Asks the device to leave guest RAM alone. Returns at once; [`Self::is_stopped`] says when it has.
    fn stop(&self);

    /// Whether the device has no access to guest RAM under way.
    fn is_stopped(&self) -> bool;

    /// Waits until [`Self::is_stopped`]. Returns whether it is.
    fn wait_stopped(&self, timeout: Duration) -> bool;
}

/// What the driver has agreed on with the device.
pub struct Activation {
    /// Guest RAM.
    pub ram: RamView,
    /// The feature bits that the driver has accepted.
    pub features: u64,
    /// The queues that the driver has enabled.
    pub queues: Vec<ActiveQueue>,
}

/// A queue that the driver has enabled. Its rings lie in guest RAM.
pub struct ActiveQueue {
    /// Its number.
    pub index: u16,
    /// Its rings.
    pub queue: Queue,
    /// Readable when the driver has made buffers available.
    pub kick: Arc<EventFd>,
    /// Tells the driver of used buffers.
    pub signal: QueueSignal,
}
