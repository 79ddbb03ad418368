//! The thread of a device: it waits for the driver, serves the queues, and stops when it is told to.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Activation;

/// What the thread is doing, and what it is to do next.
#[derive(Default)]
enum Phase {
    /// It waits for a driver.
    #[default]
    Idle,
    /// A driver is ready.
    Starting(Activation),
    /// It serves the queues.
    Running,
    /// It is to leave the queues.
    Stopping,
}

#[derive(Default)]
struct State {
    phase: Phase,
    /// The thread is to end.
    ended: bool,
}

struct Shared {
    state: Mutex<State>,
    /// Signalled when the phase becomes [`Phase::Idle`].
    idle: Condvar,
    /// Readable when there is something to look at in the state.
    wake: EventFd,
}

/// The device's side: starts and stops what the thread does. Dropping it ends the thread.
pub struct WorkerHandle(Arc<Shared>);

/// The thread's side.
pub struct Worker {
    shared: Arc<Shared>,
    /// Ready when the state has changed, or when the driver has made buffers available.
    events: Epoll,
}

/// Both sides of a new worker.
///
/// # Errors
/// No file descriptor can be made.
pub fn worker() -> io::Result<(WorkerHandle, Worker)> {
    let shared = Arc::new(Shared {
        state: Mutex::default(),
        idle: Condvar::new(),
        wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
    });
    let events = Epoll::new()?;
    watch(&events, ControlOperation::Add, &shared.wake)?;
    let handle = WorkerHandle(Arc::clone(&shared));
    Ok((handle, Worker { shared, events }))
}

fn watch(events: &Epoll, operation: ControlOperation, fd: &EventFd) -> io::Result<()> {
    let event = EpollEvent::new(EventSet::IN, 0);
    events.ctl(operation, fd.as_raw_fd(), event)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only if the counter is full: then the descriptor is readable already.
        let _ = self.wake.write(1);
    }
}

impl WorkerHandle {
    /// Has the thread serve the queues, if it has [stopped](Self::is_stopped).
    pub fn start(&self, activation: Activation) {
        let mut state = self.0.lock();
        if matches!(state.phase, Phase::Idle) {
            state.phase = Phase::Starting(activation);
            self.0.wake();
        }
    }

    /// Has the thread leave the queues.
    pub fn stop(&self) {
        let mut state = self.0.lock();
        state.phase = match std::mem::take(&mut state.phase) {
            Phase::Idle | Phase::Starting(_) => Phase::Idle,
            Phase::Running | Phase::Stopping => Phase::Stopping,
        };
        self.0.wake();
    }

    /// Whether the thread has left the queues.
    pub fn is_stopped(&self) -> bool {
        matches!(self.0.lock().phase, Phase::Idle)
    }

    /// Waits until the thread has left the queues. Returns whether it has.
    pub fn wait_stopped(&self, timeout: Duration) -> bool {
        let busy = |state: &mut State| !matches!(state.phase, Phase::Idle);
        let waited = self.0.idle.wait_timeout_while(self.0.lock(), timeout, busy);
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(state);
        !timeout.timed_out()
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.stop();
        self.0.lock().ended = true;
        self.0.wake();
    }
}

/// Queues that the thread serves. Dropping it says that the thread has left them, even if it panics.
struct Serving<'a> {
    worker: &'a Worker,
    kicks: Vec<Arc<EventFd>>,
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        for kick in &self.kicks {
            // It was not added if adding it failed.
            let _ = watch(&self.worker.events, ControlOperation::Delete, kick);
        }
        self.worker.shared.lock().phase = Phase::Idle;
        self.worker.shared.idle.notify_all();
    }
}

impl Worker {
    /// Serves the queues whenever a driver is ready, until the device is dropped. `serve` returns once
    /// [`Self::wait`] says so.
    pub fn run(self, mut serve: impl FnMut(&Self, Activation)) {
        loop {
            let mut state = self.shared.lock();
            if state.ended {
                return;
            }
            match std::mem::take(&mut state.phase) {
                Phase::Starting(activation) => {
                    state.phase = Phase::Running;
                    drop(state);
                    self.serve(activation, &mut serve);
                }
                Phase::Idle | Phase::Running | Phase::Stopping => {
                    drop(state);
                    self.wait_for_event();
                }
            }
        }
    }

    fn serve(&self, activation: Activation, serve: &mut impl FnMut(&Self, Activation)) {
        let queues = activation.queues.iter();
        let serving = Serving {
            worker: self,
            kicks: queues.map(|queue| Arc::clone(&queue.kick)).collect(),
        };
        for kick in &serving.kicks {
            if let Err(error) = watch(&self.events, ControlOperation::Add, kick) {
                tracing::error!(%error, "the queues of a virtio device cannot be served");
                let queue = activation.queues.first();
                if let Some(queue) = queue.filter(|_| !self.is_stopping()) {
                    queue.signal.broken();
                }
                return;
            }
        }
        serve(self, activation);
    }

    /// Has [`Self::wait`] return, too, whenever this descriptor is readable.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn watch(&self, fd: RawFd) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, 0);
        self.events.ctl(ControlOperation::Add, fd, event)
    }

    /// Whether the thread has to leave the queues.
    pub fn is_stopping(&self) -> bool {
        !matches!(self.shared.lock().phase, Phase::Running)
    }

    /// Waits until the driver has made buffers available in one of the queues, whose kick stays readable. Returns
    /// `false` once the thread has to leave the queues.
    pub fn wait(&self) -> bool {
        if !self.is_stopping() {
            self.wait_for_event();
        }
        !self.is_stopping()
    }

    fn wait_for_event(&self) {
        let mut events = [EpollEvent::default()];
        // A signal may interrupt it: the callers look at the state again.
        let _ = self.events.wait(-1, &mut events);
        let _ = self.shared.wake.read();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::super::signals::Signals;
    use super::super::testing;
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_worker_serves_from_start_to_stop_and_ends_with_its_handle() {
        let (handle, worker) = worker().unwrap();
        let served = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&served);
        let thread = thread::spawn(move || {
            worker.run(|worker, _| {
                counter.fetch_add(1, Ordering::SeqCst);
                while worker.wait() {}
            });
        });
        for _ in 0..3 {
            handle.start(testing::no_queues());
            handle.stop();
            assert!(handle.wait_stopped(LONG));
        }
        let before = served.load(Ordering::SeqCst);
        handle.start(testing::no_queues());
        while served.load(Ordering::SeqCst) == before {
            thread::yield_now();
        }
        assert!(!handle.is_stopped());
        assert!(!handle.wait_stopped(Duration::ZERO));
        drop(handle);
        thread.join().unwrap();
    }

    #[test]
    fn a_device_whose_queues_cannot_be_watched_is_broken() {
        let (handle, worker) = worker().unwrap();
        let signals = Signals::new(2);
        let queues = [0, 1].map(|index| testing::active_queue(&signals, index, 16));
        let [first, mut second] = queues;
        // The kernel watches no file twice.
        second.kick = Arc::clone(&first.kick);
        let thread = thread::spawn(move || worker.run(|_, _| panic!("it serves")));
        handle.start(Activation {
            queues: vec![first, second],
            ..testing::no_queues()
        });
        while !handle.is_stopped() {
            thread::yield_now();
        }
        assert!(signals.is_broken());
        drop(handle);
        thread.join().unwrap();
    }

    #[test]
    fn a_worker_that_panics_has_left_the_queues() {
        let (handle, worker) = worker().unwrap();
        handle.start(testing::no_queues());
        let run = move || worker.run(|_, _| panic!("for the test"));
        assert!(thread::spawn(run).join().is_err());
        assert!(handle.is_stopped());
    }
}
