//! Serving queues whose requests are answered one after the other, each at once.

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::{Activation, ActiveQueue, Segments, Worker};

/// Answers one request: the buffers that the device may read, and those that it may write. Returns how many bytes of
/// the latter were written, or why the device cannot go on.
pub trait Answer: FnMut(&Segments<'_>, &Segments<'_>) -> Result<u32, String> {}

impl<F: FnMut(&Segments<'_>, &Segments<'_>) -> Result<u32, String>> Answer for F {}

/// Serves the queues until the thread has to leave them.
pub fn serve(worker: &Worker, activation: Activation, mut answer: impl Answer) {
    let memory = activation.ram.memory();
    let mut queues = activation.queues;
    let mut broken = false;
    loop {
        for queue in &mut queues {
            // The kick is taken before the queue is looked at: a later one wakes the thread again.
            let _ = queue.kick.read();
            if broken {
                continue;
            }
            if let Err(reason) = drain(queue, memory, &|| worker.is_stopping(), &mut answer) {
                crate::warn_limited!(queue = queue.index, reason, "a virtio device cannot go on");
                broken = true;
                if !worker.is_stopping() {
                    queue.signal.broken();
                }
            }
        }
        if !worker.wait() {
            return;
        }
    }
}

/// Answers the requests of one queue until there are none.
pub(super) fn drain(
    active: &mut ActiveQueue,
    memory: &GuestMemoryMmap,
    is_stopping: &dyn Fn() -> bool,
    answer: &mut impl Answer,
) -> Result<(), String> {
    let broken = |error: virtio_queue::Error| error.to_string();
    let queue = &mut active.queue;
    loop {
        queue.disable_notification(memory).map_err(broken)?;
        while !is_stopping() {
            let Some(chain) = queue.iter(memory).map_err(broken)?.next() else {
                break;
            };
            let head = chain.head_index();
            let buffers = Segments::of(memory, chain);
            let (readable, writable) = buffers.map_err(|error| error.to_string())?;
            let written = answer(&readable, &writable)?;
            queue.add_used(memory, head, written).map_err(broken)?;
            if queue.needs_notification(memory).map_err(broken)? {
                active.signal.used();
            }
        }
        let more = queue.enable_notification(memory).map_err(broken)?;
        if !more || is_stopping() {
            return Ok(());
        }
    }
}
