//! virtio devices: the PCI transport that they share, and the devices themselves.
//!
//! Section numbers are those of the Virtual I/O Device (VIRTIO) specification, version 1.2. Only its modern
//! interface is here: no legacy registers, no INTx.

mod backend;
pub mod block;
mod chain;
mod function;
mod signals;
#[cfg(test)]
mod testing;
mod transport;
mod worker;

pub use backend::{Activation, ActiveQueue, VirtioBackend, VirtioKind};
pub use chain::{ChainError, Segments};
pub use function::{VirtioError, VirtioFunction, VirtioHost};
pub use signals::QueueSignal;
pub use worker::{Worker, WorkerHandle, worker};
