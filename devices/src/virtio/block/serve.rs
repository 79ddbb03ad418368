//! Serving the queues of a disk.

use std::sync::Arc;

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::disk::{Disk, Operation};
use super::request::{Request, SERIAL_LEN, Service, Status, Work};
use super::ring::{Flight, LentRing};
use super::vectors::Vectors;
use crate::virtio::{Activation, ActiveQueue, Segments, Worker};

/// The thread of a disk.
pub struct BlockWorker {
    worker: Worker,
    disk: Arc<Disk>,
    serial: [u8; SERIAL_LEN],
    /// For requests side by side; without it, one is done after the other.
    ring: Option<LentRing>,
}

/// The driver has broken the rules of a queue.
#[derive(Debug)]
pub struct Broken(String);

/// A request that is under way, and the chain that it came in.
struct Waiting<'a> {
    queue: usize,
    head: u16,
    operation: Operation,
    bytes: u64,
    request: Request<'a>,
}

impl BlockWorker {
    pub(super) fn new(
        worker: Worker,
        disk: Arc<Disk>,
        serial: &str,
        ring: Option<LentRing>,
    ) -> Self {
        let mut bytes = [0; SERIAL_LEN];
        for (byte, char) in bytes.iter_mut().zip(serial.bytes()) {
            *byte = char;
        }
        Self {
            worker,
            disk,
            serial: bytes,
            ring,
        }
    }

    /// Serves drivers until the device is dropped.
    pub fn run(self) {
        let (disk, serial, mut ring) = (self.disk, self.serial, self.ring);
        let watched = ring.as_ref().and_then(LentRing::fd);
        if let Some(Err(error)) = watched.map(|fd| self.worker.watch(fd)) {
            tracing::warn!(%error, "a disk does one request after the other");
            ring = None;
        }
        self.worker.run(|worker, activation| {
            let service = Service {
                disk: &disk,
                serial: &serial,
                is_stopping: &|| worker.is_stopping(),
                write_through: activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0,
            };
            serve(worker, activation, &service, ring.as_mut());
        });
    }
}

fn serve(
    worker: &Worker,
    activation: Activation,
    service: &Service<'_>,
    ring: Option<&mut LentRing>,
) {
    let memory = activation.ram.memory();
    let mut queues = activation.queues;
    let served = Server::new(memory, service, ring).serve(&mut queues, |_| worker.wait());
    if let Err((queue, Broken(reason))) = served {
        crate::warn_limited!(queue, reason, "a disk's driver breaks the rules");
        if let Some(queue) = queues.get(queue).filter(|_| !worker.is_stopping()) {
            queue.signal.broken();
        }
        while worker.wait() {
            for queue in &queues {
                let _ = queue.kick.read();
            }
        }
    }
}

/// Serves one driver. Dropping it waits for what is under way.
pub struct Server<'a> {
    memory: &'a GuestMemoryMmap,
    service: &'a Service<'a>,
    flight: Option<Flight<'a, Waiting<'a>>>,
}

impl<'a> Server<'a> {
    /// Serves with a ring, if there is one.
    pub fn new(
        memory: &'a GuestMemoryMmap,
        service: &'a Service<'a>,
        ring: Option<&'a mut LentRing>,
    ) -> Self {
        let file = service.disk.file().ok();
        let flight = file.zip(ring).map(|(file, ring)| Flight::new(ring, file));
        Self {
            memory,
            service,
            flight,
        }
    }

    /// Answers requests until `wait` says that it is over. It waits for more, and gets to know how many are under way.
    ///
    /// # Errors
    /// The driver has broken the rules of this queue.
    pub fn serve(
        mut self,
        queues: &mut [ActiveQueue],
        wait: impl Fn(usize) -> bool,
    ) -> Result<(), (usize, Broken)> {
        loop {
            for (index, queue) in queues.iter_mut().enumerate() {
                // The kick is taken before the queue is looked at: a later one wakes the thread again.
                let _ = queue.kick.read();
                let drained = self.drain(index, queue);
                drained.map_err(|broken| (index, broken))?;
            }
            let more = self.reap(queues)?;
            let goes_on = match more {
                true => !(self.service.is_stopping)(),
                false => wait(self.under_way()),
            };
            if !goes_on {
                return Ok(());
            }
        }
    }

    /// Answers or begins the requests of one queue until there are none, or no room for more.
    fn drain(&mut self, index: usize, active: &mut ActiveQueue) -> Result<(), Broken> {
        let stopping = self.service.is_stopping;
        loop {
            let (memory, queue) = (self.memory, &mut active.queue);
            queue.disable_notification(memory).map_err(broken)?;
            while !self.is_full() && !stopping() {
                let Some(chain) = active.queue.iter(memory).map_err(broken)?.next() else {
                    break;
                };
                let head = chain.head_index();
                let buffers = Segments::of(memory, chain);
                let (readable, writable) = buffers.map_err(|error| Broken(error.to_string()))?;
                let request = self.service.begin(readable, writable);
                let request = request.ok_or_else(no_room)?;
                if let Some(request) = self.fly(index, head, request) {
                    let status = self.service.finish(&request.work);
                    self.answer(active, head, &request, status)?;
                }
            }
            let more = active.queue.enable_notification(memory).map_err(broken)?;
            if !more || stopping() || self.is_full() {
                return Ok(());
            }
        }
    }

    fn under_way(&self) -> usize {
        self.flight.as_ref().map_or(0, Flight::count)
    }

    fn is_full(&self) -> bool {
        self.flight.as_ref().is_some_and(Flight::is_full)
    }

    /// Begins a request by the ring. One that the ring is not for comes back.
    fn fly(&mut self, queue: usize, head: u16, request: Request<'a>) -> Option<Request<'a>> {
        let Some(flight) = &mut self.flight else {
            return Some(request);
        };
        let (operation, vectors, bytes) = match &request.work {
            Work::Done(_) => return Some(request),
            Work::Flush => (Operation::Flush, Vectors::default(), 0),
            Work::Move(how, offset, segments) => {
                let vectors = Vectors::new(segments, *offset);
                if vectors.is_done() || !self.service.disk.takes(&vectors) {
                    return Some(request);
                }
                (Operation::Move(*how), vectors, segments.bytes())
            }
        };
        let waiting = Waiting {
            queue,
            head,
            operation,
            bytes,
            request,
        };
        flight.begin(operation, vectors, waiting);
        None
    }

    /// Answers what the ring has done. Returns whether there is more to do: what is done makes room for requests that
    /// were left where they are, and no event tells when the kernel takes a request that it has refused.
    fn reap(&mut self, queues: &mut [ActiveQueue]) -> Result<bool, (usize, Broken)> {
        let Some(mut flight) = self.flight.take() else {
            return Ok(false);
        };
        let submitted = flight.submit();
        let mut answered = Ok(());
        let any = flight.reap(|waiting, result| {
            let Waiting {
                queue,
                head,
                operation,
                bytes,
                request,
            } = waiting;
            let status = self.service.result(operation, bytes, result);
            if let (Some(active), Ok(())) = (queues.get_mut(queue), &answered) {
                let done = self.answer(active, head, &request, status);
                answered = done.map_err(|broken| (queue, broken));
            }
        });
        self.flight = Some(flight);
        if !submitted {
            std::thread::yield_now();
        }
        answered.map(|()| any || !submitted)
    }

    fn answer(
        &self,
        active: &mut ActiveQueue,
        head: u16,
        request: &Request<'_>,
        status: Status,
    ) -> Result<(), Broken> {
        let written = request.answer(status).ok_or_else(no_room)?;
        let (memory, queue) = (self.memory, &mut active.queue);
        queue.add_used(memory, head, written).map_err(broken)?;
        if queue.needs_notification(memory).map_err(broken)? {
            active.signal.used();
        }
        Ok(())
    }
}

fn broken(error: virtio_queue::Error) -> Broken {
    Broken(error.to_string())
}

fn no_room() -> Broken {
    Broken("no room for a status".to_owned())
}
