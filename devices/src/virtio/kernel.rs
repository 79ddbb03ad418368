//! Queues that the host's kernel serves.

use std::error::Error;
use std::io;

use super::ActiveQueue;

/// Queues that the host's kernel serves: it reads and writes guest RAM, takes the driver's notifications and raises
/// interrupts, and none of our code runs for any of them.
pub trait KernelQueues: Send + Sync {
    /// Has the kernel serve these queues for a driver that has accepted `features`.
    ///
    /// # Errors
    /// The kernel refused. It may serve some of them all the same.
    fn start(&self, features: u64, queues: &[ActiveQueue]) -> io::Result<()>;

    /// Has the kernel leave guest RAM alone, which it does before this returns.
    fn stop(&self);
}

/// Starts all of the queues or none. Returns whether they are served; if not, the driver is told that the device
/// needs a reset.
pub fn start(path: &dyn KernelQueues, features: u64, queues: &[ActiveQueue]) -> bool {
    let Err(error) = path.start(features, queues) else {
        return true;
    };
    path.stop();
    let error = &error as &dyn Error;
    crate::warn_limited!(error, "the host's kernel does not serve a virtio device");
    if let Some(queue) = queues.first() {
        queue.signal.broken();
    }
    false
}
