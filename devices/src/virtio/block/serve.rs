//! Serving the queues of a disk.

use std::sync::Arc;

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::disk::Disk;
use super::request::{SERIAL_LEN, Service};
use crate::virtio::{Activation, ActiveQueue, Segments, Worker};

/// The thread of a disk.
pub struct BlockWorker {
    worker: Worker,
    disk: Arc<Disk>,
    serial: [u8; SERIAL_LEN],
}

/// The driver has broken the rules of a queue.
struct Broken(String);

impl BlockWorker {
    pub(super) fn new(worker: Worker, disk: Arc<Disk>, serial: &str) -> Self {
        let mut bytes = [0; SERIAL_LEN];
        for (byte, char) in bytes.iter_mut().zip(serial.bytes()) {
            *byte = char;
        }
        Self {
            worker,
            disk,
            serial: bytes,
        }
    }

    /// Serves drivers until the device is dropped.
    pub fn run(self) {
        let (disk, serial) = (self.disk, self.serial);
        self.worker.run(|worker, activation| {
            let service = Service {
                disk: &disk,
                serial: &serial,
                is_stopping: &|| worker.is_stopping(),
                write_through: activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0,
            };
            serve(worker, activation, &service);
        });
    }
}

fn serve(worker: &Worker, activation: Activation, service: &Service<'_>) {
    let memory = activation.ram.memory();
    let mut queues = activation.queues;
    loop {
        for queue in &mut queues {
            // The kick is taken before the queue is looked at: a later one wakes the thread again.
            let _ = queue.kick.read();
            if let Err(Broken(reason)) = drain(queue, memory, service) {
                crate::warn_limited!(
                    queue = queue.index,
                    reason,
                    "a disk's driver breaks the rules"
                );
                if !worker.is_stopping() {
                    queue.signal.broken();
                }
                return wait_for_reset(worker, &queues);
            }
        }
        if !worker.wait() {
            return;
        }
    }
}

fn wait_for_reset(worker: &Worker, queues: &[ActiveQueue]) {
    while worker.wait() {
        for queue in queues {
            let _ = queue.kick.read();
        }
    }
}

/// Answers the requests of one queue until there are none.
fn drain(
    active: &mut ActiveQueue,
    memory: &GuestMemoryMmap,
    service: &Service<'_>,
) -> Result<(), Broken> {
    let broken = |error: virtio_queue::Error| Broken(error.to_string());
    let queue = &mut active.queue;
    loop {
        queue.disable_notification(memory).map_err(broken)?;
        while !(service.is_stopping)() {
            let Some(chain) = queue.iter(memory).map_err(broken)?.next() else {
                break;
            };
            let head = chain.head_index();
            let buffers = Segments::of(memory, chain);
            let (readable, writable) = buffers.map_err(|error| Broken(error.to_string()))?;
            let written = service.answer(readable, writable);
            let written = written.ok_or_else(|| Broken("no room for a status".to_owned()))?;
            queue.add_used(memory, head, written).map_err(broken)?;
            if queue.needs_notification(memory).map_err(broken)? {
                active.signal.used();
            }
        }
        let more = queue.enable_notification(memory).map_err(broken)?;
        if !more || (service.is_stopping)() {
            return Ok(());
        }
    }
}

/// [`drain`] outside of a worker. Returns whether the driver has kept to the rules.
#[cfg(test)]
pub fn drain_for_tests(
    active: &mut ActiveQueue,
    memory: &GuestMemoryMmap,
    service: &Service<'_>,
) -> bool {
    drain(active, memory, service).is_ok()
}
