//! The event loop of the thread that owns a VM: other threads post events to its mailbox, and event sources
//! watch files.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What can be posted to a [`Mailbox`].
pub trait Event: Sized {
    /// Whether it repeats `waiting`, which is in the mailbox already. Guests and devices can cause events at
    /// any rate: repeated events are dropped.
    fn repeats(&self, waiting: &Self) -> bool;

    /// Whether it is a request of a client. The number of requests that wait is limited.
    fn is_request(&self) -> bool;

    /// Answers the sender that the event is refused.
    fn refuse(self, why: Refusal);
}

/// Why an event is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Too many requests wait.
    Full,
    /// Nobody takes events any more.
    Closed,
}

/// How many requests of clients may wait. Each takes the control thread microseconds, so that more wait only
/// if that thread is stuck.
const MAX_REQUESTS: usize = 64;

/// Events for the control thread. Any thread may post; none waits.
pub struct Mailbox<E> {
    queue: Mutex<Queue<E>>,
    wakeup: EventFd,
}

struct Queue<E> {
    events: VecDeque<E>,
    /// Nobody takes events any more.
    closed: bool,
}

impl<E: Event> Mailbox<E> {
    /// An empty mailbox.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            queue: Mutex::new(Queue {
                events: VecDeque::new(),
                closed: false,
            }),
            wakeup: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))
    }

    /// Leaves an event for the control thread, unless it repeats one that waits. A request beyond the limit is
    /// refused.
    pub fn post(&self, event: E) {
        let mut queue = self.lock();
        if queue.closed {
            drop(queue);
            return event.refuse(Refusal::Closed);
        }
        if event.is_request() {
            let requests = queue.events.iter().filter(|event| event.is_request());
            if requests.count() >= MAX_REQUESTS {
                drop(queue);
                return event.refuse(Refusal::Full);
            }
        } else if queue.events.iter().any(|waiting| event.repeats(waiting)) {
            return;
        }
        queue.events.push_back(event);
        drop(queue);
        // Fails only when the counter is full, and then the loop is awake already.
        let _ = self.wakeup.write(1);
    }

    /// Takes out the events that `select` names, in their order.
    pub fn extract(&self, select: impl Fn(&E) -> bool) -> Vec<E> {
        let mut queue = self.lock();
        let all = std::mem::take(&mut queue.events);
        let (taken, left): (VecDeque<E>, VecDeque<E>) = all.into_iter().partition(select);
        queue.events = left;
        taken.into()
    }

    /// Refuses the events that wait and those that are posted from now on.
    pub fn close(&self) {
        let mut queue = self.lock();
        queue.closed = true;
        let left = std::mem::take(&mut queue.events);
        drop(queue);
        left.into_iter()
            .for_each(|event| event.refuse(Refusal::Closed));
    }

    /// Whether nobody takes events any more.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    fn take(&self) -> Option<E> {
        self.lock().events.pop_front()
    }

    fn lock(&self) -> MutexGuard<'_, Queue<E>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for events.
pub struct EventLoop<E> {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
    mailbox: Arc<Mailbox<E>>,
}

impl<E: Event + 'static> EventLoop<E> {
    /// A loop that takes from the mailbox.
    ///
    /// # Errors
    /// The kernel refused an epoll instance.
    pub fn new(mailbox: Arc<Mailbox<E>>) -> io::Result<Self> {
        let mut manager: EventManager<Box<dyn MutEventSubscriber>> =
            EventManager::new().map_err(|error| io::Error::other(format!("{error:?}")))?;
        manager.add_subscriber(Box::new(Wakeup(Arc::clone(&mailbox))));
        Ok(Self { manager, mailbox })
    }

    /// Adds a source that posts events.
    pub fn add(&mut self, subscriber: Box<dyn MutEventSubscriber>) {
        self.manager.add_subscriber(subscriber);
    }

    /// Waits for the next event; `None` once the deadline, if there is one, is over.
    ///
    /// # Errors
    /// epoll failed.
    pub fn next(&mut self, deadline: Option<Instant>) -> io::Result<Option<E>> {
        loop {
            if let Some(event) = self.mailbox.take() {
                return Ok(Some(event));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            // Rounded up, so as not to wake up too early; -1 is for ever.
            let wait = left.map_or(-1, |left| {
                i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
            });
            self.manager
                .run_with_timeout(wait)
                .map_err(|error| io::Error::other(format!("{error:?}")))?;
        }
    }
}

/// Wakes the loop when something was posted.
struct Wakeup<E>(Arc<Mailbox<E>>);

impl<E> MutEventSubscriber for Wakeup<E> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        listen(ops, &self.0.wakeup);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.0.wakeup.read();
    }
}

/// Has the loop watch a file for input.
pub fn listen(ops: &mut EventOps<'_>, source: &impl AsRawFd) {
    if let Err(error) = ops.add(Events::new(source, EventSet::IN)) {
        tracing::error!(?error, "cannot watch an event source");
    }
}

#[cfg(test)]
mod tests;
