//! The interrupts of a virtio device: which MSI-X vector each event has, and where the vectors lead.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::pci::IntxLine;
use crate::pci::interrupts::{BackendError, ConnectError, InterruptBackend, MessageKind, Triggers};

/// No vector: the event raises no interrupt (section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// The events of a device, one for its configuration and one for each queue, with their vectors.
pub struct Signals {
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    vectors: Mutex<Vectors>,
    /// The device cannot go on until the driver resets it.
    broken: AtomicBool,
    /// Counts the changes of the configuration (section 4.1.4.3.1).
    generation: AtomicU8,
}

#[derive(Default)]
struct Vectors {
    connected: BTreeMap<u16, EventFd>,
    /// Raised before the guest unmasked them for the first time.
    pending: BTreeSet<u16>,
    /// By the number of the queue.
    followers: BTreeMap<u16, Follower>,
}

/// What raises a queue's interrupt without a call of ours: the host's kernel, which writes to an eventfd.
struct Follower {
    /// Has the kernel write to this eventfd from now on.
    connect: Box<dyn Fn(&EventFd) + Send>,
    /// What the kernel writes to while the queue has no vector that is connected.
    parked: EventFd,
}

impl Vectors {
    /// Tells the follower of a queue which eventfd raises `vector`, the queue's own.
    fn tell(&self, queue: u16, vector: u16) {
        let Some(follower) = self.followers.get(&queue) else {
            return;
        };
        match self.connected.get(&vector) {
            None => (follower.connect)(&follower.parked),
            Some(trigger) => {
                (follower.connect)(trigger);
                // Raised in between: drivers cope with an interrupt too many.
                if follower.parked.read().is_ok() {
                    drop(trigger.write(1));
                }
            }
        }
    }
}

impl Signals {
    /// The events of a device with so many queues. None of them has a vector.
    pub fn new(queues: usize) -> Arc<Self> {
        Arc::new(Self {
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            vectors: Mutex::default(),
            broken: AtomicBool::new(false),
            generation: AtomicU8::new(0),
        })
    }

    /// How many vectors the device has: one for each event.
    pub fn count(&self) -> u16 {
        u16::try_from(self.queues.len() + 1).unwrap_or(u16::MAX)
    }

    /// The vector of the configuration.
    pub fn config_vector(&self) -> u16 {
        self.config.load(Ordering::Relaxed)
    }

    /// Sets the vector of the configuration; one that there is not becomes [`NO_VECTOR`].
    pub fn set_config_vector(&self, vector: u16) {
        self.config.store(self.checked(vector), Ordering::Relaxed);
    }

    /// The vector of a queue.
    pub fn queue_vector(&self, queue: u16) -> u16 {
        let queue = self.queues.get(usize::from(queue));
        queue.map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    /// Sets the vector of a queue; one that there is not becomes [`NO_VECTOR`].
    pub fn set_queue_vector(&self, queue: u16, vector: u16) {
        let vector = self.checked(vector);
        if let Some(event) = self.queues.get(usize::from(queue)) {
            event.store(vector, Ordering::Relaxed);
            self.lock().tell(queue, vector);
        }
    }

    /// Tells the followers of all queues for which `concerned` is true of the vector.
    fn tell_all(&self, vectors: &Vectors, concerned: impl Fn(u16) -> bool) {
        for queue in vectors.followers.keys() {
            let vector = self.queue_vector(*queue);
            if concerned(vector) {
                vectors.tell(*queue, vector);
            }
        }
    }

    /// Whether the device needs a reset.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Takes all vectors away from their events. Nothing follows them any more.
    pub fn reset(&self) {
        self.lock().followers.clear();
        for event in self.queues.iter().chain([&self.config]) {
            event.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.mend();
    }

    /// Says that the device cannot go on until the driver resets it (section 2.1.2).
    pub fn break_device(&self) {
        if !self.broken.swap(true, Ordering::Relaxed) {
            self.raise(self.config_vector());
        }
    }

    /// Says that the device works (again).
    pub fn mend(&self) {
        self.broken.store(false, Ordering::Relaxed);
    }

    /// How often the configuration has changed, modulo 256.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// Says that the configuration has changed (section 2.5).
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
        self.raise(self.config_vector());
    }

    fn checked(&self, vector: u16) -> u16 {
        match vector < self.count() {
            true => vector,
            false => NO_VECTOR,
        }
    }

    fn raise(&self, vector: u16) {
        if vector == NO_VECTOR {
            return;
        }
        let mut vectors = self.lock();
        match vectors.connected.get(&vector) {
            // Fails only if the counter is full: then the interrupt is raised already.
            Some(trigger) => drop(trigger.write(1)),
            None => drop(vectors.pending.insert(vector)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vectors> {
        self.vectors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the driver of used buffers in one queue.
#[derive(Clone)]
pub struct QueueSignal {
    signals: Arc<Signals>,
    queue: u16,
}

impl QueueSignal {
    pub(super) fn new(signals: &Arc<Signals>, queue: u16) -> Self {
        Self {
            signals: Arc::clone(signals),
            queue,
        }
    }

    /// Raises the queue's interrupt.
    pub fn used(&self) {
        self.signals.raise(self.signals.queue_vector(self.queue));
    }

    /// Calls `connect` with the eventfd that raises the queue's interrupt, now and whenever it changes, until the
    /// driver resets the device. A write to the eventfd is enough at any time: what comes while the interrupt is
    /// masked, or has no vector, waits. `connect` must not call the device.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn follow(&self, connect: impl Fn(&EventFd) + Send + 'static) -> io::Result<()> {
        let follower = Follower {
            connect: Box::new(connect),
            parked: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        };
        let mut vectors = self.signals.lock();
        vectors.followers.insert(self.queue, follower);
        vectors.tell(self.queue, self.signals.queue_vector(self.queue));
        Ok(())
    }

    /// Says that the driver has broken the rules of the queue, and that the device waits for its reset.
    pub fn broken(&self) {
        self.signals.break_device();
    }
}

/// Raises the vectors of a virtio device.
pub struct SignalBackend {
    name: Arc<str>,
    signals: Arc<Signals>,
}

impl SignalBackend {
    /// The vectors of `signals`. Log lines name the device `name`.
    pub fn new(name: Arc<str>, signals: Arc<Signals>) -> Self {
        Self { name, signals }
    }
}

impl InterruptBackend for SignalBackend {
    fn name(&self) -> &str {
        &self.name
    }

    fn enable(
        &mut self,
        _kind: MessageKind,
        vectors: u16,
        triggers: &Triggers,
    ) -> Result<u16, BackendError> {
        for vector in 0..vectors {
            if let Some(trigger) = triggers.get(vector) {
                self.connect(vector, trigger, triggers)?;
            }
        }
        Ok(vectors)
    }

    fn connect(
        &mut self,
        vector: u16,
        trigger: &EventFd,
        _connected: &Triggers,
    ) -> Result<(), ConnectError> {
        let trigger = trigger.try_clone();
        let trigger = trigger.map_err(|error| ConnectError::One(error.into()))?;
        let mut vectors = self.signals.lock();
        if vectors.pending.remove(&vector) {
            drop(trigger.write(1));
        }
        vectors.connected.insert(vector, trigger);
        self.signals.tell_all(&vectors, |other| other == vector);
        Ok(())
    }

    fn connect_pin(&mut self, _line: &dyn IntxLine) -> Result<(), BackendError> {
        Err("the device has no pin".into())
    }

    fn disable(&mut self) -> Result<(), BackendError> {
        let mut vectors = self.signals.lock();
        vectors.connected.clear();
        vectors.pending.clear();
        self.signals.tell_all(&vectors, |_| true);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> EventFd {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap()
    }

    /// Signals of two queues, the vectors' backend, and the eventfd that the follower of queue 0 has been told of.
    fn followed() -> (Arc<Signals>, SignalBackend, Arc<Mutex<EventFd>>) {
        let signals = Signals::new(2);
        let backend = SignalBackend::new("d".into(), Arc::clone(&signals));
        let told = Arc::new(Mutex::new(event()));
        let noted = Arc::clone(&told);
        let follow = move |trigger: &EventFd| *noted.lock().unwrap() = trigger.try_clone().unwrap();
        QueueSignal::new(&signals, 0).follow(follow).unwrap();
        (signals, backend, told)
    }

    fn raise(told: &Mutex<EventFd>) {
        told.lock().unwrap().write(1).unwrap();
    }

    #[test]
    fn a_follower_raises_the_vector_that_the_queue_has_now() {
        let (signals, mut backend, told) = followed();
        let triggers = [event(), event()];
        signals.set_queue_vector(0, 0);
        for (vector, trigger) in (0..).zip(&triggers) {
            let connected = backend.connect(vector, trigger, &Triggers::default());
            assert!(connected.is_ok());
        }
        raise(&told);
        assert_eq!(
            triggers.each_ref().map(|one| one.read().is_ok()),
            [true, false]
        );
        signals.set_queue_vector(0, 1);
        raise(&told);
        assert_eq!(
            triggers.each_ref().map(|one| one.read().is_ok()),
            [false, true]
        );
        // The vector of another queue is none of its business.
        signals.set_queue_vector(1, 0);
        raise(&told);
        assert_eq!(
            triggers.each_ref().map(|one| one.read().is_ok()),
            [false, true]
        );
    }

    #[test]
    fn what_comes_without_a_vector_waits_for_one() {
        let (signals, mut backend, told) = followed();
        let trigger = event();
        raise(&told);
        signals.set_queue_vector(0, 2);
        assert!(backend.connect(2, &trigger, &Triggers::default()).is_ok());
        assert!(trigger.read().is_ok());
        // So it does while messages are off, and where the vector does not exist.
        for leave in [true, false] {
            match leave {
                true => assert!(backend.disable().is_ok()),
                false => signals.set_queue_vector(0, 100),
            }
            raise(&told);
            assert!(trigger.read().is_err());
            signals.set_queue_vector(0, 2);
            assert!(backend.connect(2, &trigger, &Triggers::default()).is_ok());
            assert!(trigger.read().is_ok());
        }
    }

    #[test]
    fn a_reset_ends_what_follows() {
        let (signals, mut backend, told) = followed();
        let trigger = event();
        signals.reset();
        signals.set_queue_vector(0, 0);
        assert!(backend.connect(0, &trigger, &Triggers::default()).is_ok());
        raise(&told);
        assert!(trigger.read().is_err());
    }
}
