//! The slow part of attaching devices, on a thread of its own: leases, files, resets, pinning.
//!
//! Jobs are done one after the other, so that no two of them make the address space that there is to be one of.
//! Devices that go are closed meanwhile, each on a thread of its own ([`super::closing`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SendError, Sender, channel};
use std::time::{Duration, Instant};

use super::attacher::Attacher;
use crate::command::{Attach, CommandError, Reply};
use crate::error::Error;
use crate::info::{EventSink, VmEvent};
use crate::passthrough::AttachedDevice;
use crate::process::error::{HostError, cannot};
use crate::process::sandbox::Role;
use crate::process::threads::{self, Task};

/// Devices that are to be leased and opened.
pub struct AttachJob {
    /// Which.
    pub attach: Attach,
    /// Who waits for them.
    pub reply: Reply,
    /// How many slots are free for them.
    pub slots: usize,
}

/// How long the worker may take to end once the VM ends: it may be closing devices that it has just opened.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Devices that were leased and opened, or why not.
pub struct AttachResult {
    /// What was asked for.
    pub attach: Attach,
    /// Who waits for it.
    pub reply: Reply,
    /// The devices, in no slot yet.
    pub devices: Result<Vec<AttachedDevice>, Error>,
    /// How long each step took.
    pub steps: AttachSteps,
}

/// Why the step in which RAM is mapped took its time, and how to avoid that.
const MAPPED_LATE: &str = "RAM was made ready and mapped for the VM's first device: with the groups of later \
    devices in `hotplug.groups` of the VM's file, RAM is made ready beforehand";

/// How long the steps took so far.
pub struct AttachSteps {
    steps: Vec<(&'static str, Duration)>,
    begun: Instant,
    /// RAM was not made ready for this device beforehand.
    pub(super) mapped_late: bool,
}

impl AttachSteps {
    fn start() -> Self {
        Self {
            steps: Vec::new(),
            begun: Instant::now(),
            mapped_late: false,
        }
    }

    /// Ends a step and begins the next.
    pub fn done(&mut self, step: &'static str) {
        let took = self.begun.elapsed();
        self.begun = Instant::now();
        self.steps.push((step, took));
    }

    /// The steps and their times.
    pub fn times(&self) -> &[(&'static str, Duration)] {
        &self.steps
    }

    /// Tells of the steps of attaching a device.
    pub fn tell(&self, events: &EventSink, id: &str) {
        for (step, took) in &self.steps {
            events(VmEvent::AttachStep {
                id: id.to_owned(),
                step,
                took: *took,
                hint: (*step == "map" && self.mapped_late).then_some(MAPPED_LATE),
            });
        }
    }
}

/// The thread that does the jobs. Dropping it waits for the job in hand, which is told to hurry, but not for
/// a device that hangs. Clients that wait for devices are told that the VM is ending.
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
                "the host's kernel does not come back from a device that was on its way to the VM"
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

impl AttachResult {
    /// Closes the devices, and tells the client that the VM is ending.
    fn cancel(self) {
        drop(self.devices);
        (self.reply)(Err(CommandError::Ending));
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
