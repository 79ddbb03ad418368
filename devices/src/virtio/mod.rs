//! virtio devices: the PCI transport that they share, and the devices themselves.
//!
//! Section numbers are those of the Virtual I/O Device (VIRTIO) specification, version 1.2. Only its modern
//! interface is here: no legacy registers, no INTx.

mod backend;
pub mod block;
mod chain;
mod function;
mod kernel;
pub mod net;
pub mod rng;
mod serve;
mod signals;
#[cfg(test)]
mod testing;
mod transport;
pub mod vsock;
mod worker;

pub use backend::{Activation, ActiveQueue, VirtioBackend, VirtioKind};
pub use chain::{ChainError, MAX_BUFFERS, Segments};
pub use function::{VirtioError, VirtioFunction, VirtioHost};
pub use kernel::KernelQueues;
pub use signals::QueueSignal;
pub use worker::{Worker, WorkerHandle, worker};

/// Fills `data` from `bytes` at `offset`; zeros past their end.
fn read_bytes(bytes: &[u8], offset: u64, data: &mut [u8]) {
    for (byte, at) in data.iter_mut().zip(offset..) {
        let at = usize::try_from(at).ok();
        *byte = at.and_then(|at| bytes.get(at)).copied().unwrap_or(0);
    }
}
