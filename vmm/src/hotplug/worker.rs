//! The attach worker: a thread for the slow part of attaching devices, which is leasing, opening and mapping
//! RAM.
//!
//! It does one job at a time, so that no two jobs make an address space each. Devices that leave are closed
//! meanwhile, on threads of their own ([`super::closing`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SendError, Sender, channel};
use std::time::{Duration, Instant};

use super::attacher::Attacher;
use super::job::{AttachJob, AttachResult, AttachSteps};
use crate::command::CommandError;
use crate::process::error::{HostError, cannot};
use crate::process::sandbox::Role;
use crate::process::threads::{self, Task};

/// How long the worker may take to end: it may have to close devices that it has just opened.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// The thread that does the jobs. Dropping it cancels the current job and waits for it, up to a deadline.
/// Clients that wait are told that the VM is ending.
pub struct AttachWorker {
    // Closed first: that ends the thread.
    jobs: Option<Sender<AttachJob>>,
    ending: Arc<AtomicBool>,
    results: Receiver<AttachResult>,
    thread: Option<Task<()>>,
}

impl AttachWorker {
    /// Starts the thread. It calls `on_done` after each job.
    ///
    /// # Errors
    /// The kernel makes no thread.
    pub fn start(
        attacher: Attacher,
        on_done: impl Fn() + Send + 'static,
    ) -> Result<Self, HostError> {
        let (sender, given) = channel();
        let (done, results) = channel();
        let ending = Arc::new(AtomicBool::new(false));
        let sandbox = Arc::clone(&attacher.context.sandbox);
        let jobs = JobQueue {
            given,
            ending: Arc::clone(&ending),
        };
        let work = move || {
            work(attacher, &jobs, |result| {
                match done.send(result) {
                    Ok(()) => on_done(),
                    // The VM has ended without waiting.
                    Err(SendError(result)) => result.cancel(),
                }
            });
        };
        let thread = threads::spawn(Role::Attach, &sandbox, work);
        Ok(Self {
            jobs: Some(sender),
            ending,
            results,
            thread: Some(thread.map_err(cannot("spawn a thread"))?),
        })
    }

    /// Has a job done.
    pub fn give(&self, job: AttachJob) {
        if let Some(jobs) = &self.jobs {
            // The thread takes jobs for as long as this value lives.
            let _ = jobs.send(job);
        }
    }

    /// A job that is done, if there is one.
    pub fn take_result(&self) -> Option<AttachResult> {
        self.results.try_recv().ok()
    }

    /// Ends the thread, and returns the results that nobody has taken.
    pub fn end(mut self) -> Vec<AttachResult> {
        self.stop();
        self.results.try_iter().collect()
    }

    fn stop(&mut self) {
        self.ending.store(true, Ordering::Release);
        self.jobs = None;
        let deadline = Instant::now() + END_TIMEOUT;
        let late = self
            .thread
            .take()
            .and_then(|thread| thread.join_until(deadline).err());
        if let Some(thread) = late {
            tracing::error!(
                "the host's kernel hangs while it opens a device for the VM: the device stays leased until that call returns"
            );
            thread.abandon();
        }
    }
}

impl Drop for AttachWorker {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What is to be done.
struct JobQueue {
    given: Receiver<AttachJob>,
    /// Nothing more is to be opened.
    ending: Arc<AtomicBool>,
}

impl JobQueue {
    /// The next job, once there is one; `None` if there will be none.
    fn next(&self) -> Option<AttachJob> {
        loop {
            let job = self.given.recv().ok()?;
            if !self.ending.load(Ordering::Acquire) {
                return Some(job);
            }
            (job.reply)(Err(CommandError::Ending));
        }
    }
}

fn work(mut attacher: Attacher, jobs: &JobQueue, done: impl Fn(AttachResult)) {
    while let Some(job) = jobs.next() {
        let mut steps = AttachSteps::start();
        let devices = attacher.attach(&job, &mut steps, &jobs.ending);
        done(AttachResult {
            attach: job.attach,
            reply: job.reply,
            devices,
            steps,
        });
    }
}

#[cfg(test)]
mod tests;
