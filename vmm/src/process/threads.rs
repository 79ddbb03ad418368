//! Starts threads. Each has a role, which determines its name and its filter.

use std::io;
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::sandbox::{Role, Sandbox};

/// A thread. Dropping the value waits for its end.
pub struct Task<T> {
    thread: Option<JoinHandle<()>>,
    result: Receiver<T>,
}

impl<T> Task<T> {
    /// Waits for the thread's result. A panic in the thread goes on in the caller.
    pub fn join(mut self) -> T {
        match self.result.recv() {
            Ok(result) => result,
            Err(RecvError) => self.panicked(),
        }
    }

    /// Waits for the thread's result as [`Self::join`] does, until the deadline.
    ///
    /// # Errors
    /// It has none yet.
    pub fn join_until(mut self, deadline: Instant) -> Result<T, Self> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.result.recv_timeout(left) {
            Ok(result) => Ok(result),
            Err(RecvTimeoutError::Timeout) => Err(self),
            Err(RecvTimeoutError::Disconnected) => Ok(self.panicked()),
        }
    }

    /// Waits for the thread's result as [`Self::join`] does, until the deadline or while it is `wanted`.
    ///
    /// # Errors
    /// It has none yet.
    pub fn join_while(self, deadline: Instant, wanted: impl Fn() -> bool) -> Result<T, Self> {
        let mut task = self;
        loop {
            let step = deadline.min(Instant::now() + STEP);
            task = match task.join_until(step) {
                Err(task) if step < deadline && wanted() => task,
                done => return done,
            };
        }
    }

    /// Whether the thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Detaches a thread that hangs in the kernel. The thread drops its own result.
    pub fn abandon(mut self) {
        drop(self.thread.take());
    }

    fn panicked(&mut self) -> T {
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(panic)) => resume_unwind(panic),
            // It ends with a result or a panic.
            _ => std::process::abort(),
        }
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Its result is dropped with it. The thread itself has reported a panic.
            let _ = thread.join();
        }
    }
}

/// How often to check whether a result is still wanted.
const STEP: Duration = Duration::from_millis(50);

/// Runs `body` on a new thread with its role's filter. The thread can reach no file, unless it builds a VM.
///
/// # Errors
/// The kernel makes no thread.
pub fn spawn<T: Send + 'static>(
    role: Role,
    sandbox: &Sandbox,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Task<T>> {
    spawn_prepared(role, sandbox, || {}, body)
}

/// [`spawn`], where the new thread calls `prepare` before it is confined.
///
/// # Errors
/// The kernel makes no thread.
pub fn spawn_prepared<T: Send + 'static>(
    role: Role,
    sandbox: &Sandbox,
    prepare: impl FnOnce() + Send + 'static,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Task<T>> {
    let confinement = sandbox.confinement(role);
    let (made, result) = channel();
    let thread = Builder::new().name(role.to_string()).spawn(move || {
        prepare();
        if let Err(error) = confinement.enter() {
            // An unconfined thread is worse than the end of the process.
            tracing::error!(%role, %error, "the kernel refused to confine the thread");
            std::process::abort();
        }
        // Fails if nobody waits for the result any more.
        let _ = made.send(body());
    })?;
    Ok(Task {
        thread: Some(thread),
        result,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::Barrier;

    use super::*;
    use crate::process::sandbox::SeccompMode;

    #[test]
    fn a_thread_that_hangs_is_waited_for_until_the_deadline_and_left_to_itself() {
        let sandbox = Sandbox::new(SeccompMode::Off).unwrap();
        let barrier = Arc::new(Barrier::new(2));
        let hangs = Arc::clone(&barrier);
        let made = Arc::new(());
        let result = Arc::clone(&made);
        let body = move || {
            hangs.wait();
            result
        };
        let task = spawn(Role::Device, &sandbox, body).unwrap();
        let soon = || Instant::now() + Duration::from_millis(20);
        let Err(task) = task.join_until(soon()) else {
            panic!("it hangs");
        };
        let later = Instant::now() + Duration::from_secs(3600);
        let Err(task) = task.join_while(later, || false) else {
            panic!("it is unwanted");
        };
        task.abandon();
        barrier.wait();
        while Arc::strong_count(&made) > 1 {
            std::thread::yield_now();
        }
        let task = spawn(Role::Device, &sandbox, || 7).unwrap();
        assert_eq!(task.join_until(later).ok(), Some(7));
    }
}
