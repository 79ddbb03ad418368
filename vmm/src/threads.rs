//! The one place where threads are made: each has a role, which gives it its name and its filter.

use std::fmt;
use std::io;
use std::panic::resume_unwind;
use std::thread::{Builder, JoinHandle};

use crate::sandbox::Sandbox;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs the control loop of a VM that stands, and takes it apart. A thread comes to this role by
    /// itself: the first one, or one that was [`Role::Vm`].
    Control,
    /// Builds a VM in a process that outlives it, behind the filter of whoever made the thread.
    Vm,
    /// Speaks with clients.
    Api,
    /// Runs one vCPU and answers its exits.
    Vcpu(u8),
    /// Prepares devices that come while the guest runs, and closes those that go.
    Attach,
    /// Opens, resets or closes one device; for a host device the kernel waits for its reset.
    Device,
    /// Makes guest RAM present and maps it for the devices.
    Dma,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control => f.write_str("control"),
            Self::Vm => f.write_str("vm"),
            Self::Api => f.write_str("api"),
            Self::Vcpu(index) => write!(f, "vcpu{index}"),
            Self::Attach => f.write_str("attach"),
            Self::Device => f.write_str("device"),
            Self::Dma => f.write_str("dma"),
        }
    }
}

/// A thread that belongs to somebody: dropping the value waits for its end.
pub struct Task<T>(Option<JoinHandle<T>>);

impl<T> Task<T> {
    /// Waits for the thread's result. A panic in the thread goes on in the caller.
    pub fn join(mut self) -> T {
        // Taken here or in `drop`, and both end the value.
        let Some(thread) = self.0.take() else {
            std::process::abort()
        };
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // What it made is dropped with it; a panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// Runs `body` on a new thread, behind its role's filter, and where no file is in reach unless it builds
/// a VM.
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
    let thread = Builder::new().name(role.to_string()).spawn(move || {
        prepare();
        if let Err(error) = confinement.enter() {
            // Running on unconfined is worse than ending.
            tracing::error!(%role, %error, "the kernel refused to confine the thread");
            std::process::abort();
        }
        body()
    })?;
    Ok(Task(Some(thread)))
}
