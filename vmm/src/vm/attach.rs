//! The slow part of plugging in, on a thread of its own: leases, files, resets, pinning.
//!
//! Jobs are done one after the other, so that two of them do not both make the container that there is to be.
//! Devices that go are not its business: they are closed meanwhile, each on a thread of its own.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use gantry_devices::pci::MsiRouter;
use gantry_resources::opener::Opener;
use gantry_resources::pools::Request;

use super::domain::{Domain, RamRanges};
use super::host_devices::{self, AttachedDevice, Claimed};
use super::populate::Populating;
use crate::command::{Attach, CommandError, DeviceSelector, EventSink, Reply, VmEvent};
use crate::control::Event;
use crate::error::Error;
use crate::kvm::VfioObserver;
use crate::preflight;
use crate::threads::{self, Role, Task};
use crate::vmm::VmContext;

/// Devices that are to be leased and opened; the result goes to the mailbox.
pub struct Job {
    /// Which.
    pub attach: Attach,
    /// Who waits for them.
    pub reply: Reply,
    /// How many slots are free for them.
    pub slots: usize,
}

/// How often devices are leased again, as devices of their IOMMU groups were closed meanwhile.
const CLAIM_TRIES: u32 = 3;

/// How long the worker may take to end once the VM ends: it may be closing devices that it has just opened.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// Devices that were leased and opened, or why not.
pub struct Prepared {
    /// What was asked for.
    pub attach: Attach,
    /// Who waits for it.
    pub reply: Reply,
    /// The devices, in no slot yet, and what they were taken for.
    pub devices: Result<(Vec<AttachedDevice>, Vec<Request>), Error>,
    /// How long each step took.
    pub steps: Steps,
}

impl Prepared {
    /// Closes the devices, and tells the client that the VM is ending.
    pub fn give_up(self) {
        drop(self.devices);
        (self.reply)(Err(CommandError::Ending));
    }
}

/// Why the step in which RAM is mapped took its time, and how to avoid that.
const MAPPED_LATE: &str = "RAM was made ready and mapped for the VM's first device: with the groups of later \
    devices in `hotplug.groups` of the VM's file, RAM is made ready beforehand";

/// How long the steps took so far.
pub struct Steps {
    steps: Vec<(&'static str, Duration)>,
    begun: Instant,
    /// RAM was not made ready for this device beforehand.
    mapped_late: bool,
}

impl Steps {
    fn begin() -> Self {
        Self {
            steps: Vec::new(),
            begun: Instant::now(),
            mapped_late: false,
        }
    }

    /// Says that a step is done, and the next begins.
    pub fn done(&mut self, step: &'static str) -> Duration {
        let took = self.begun.elapsed();
        self.begun = Instant::now();
        self.steps.push((step, took));
        took
    }

    /// The steps and their times.
    pub fn times(&self) -> &[(&'static str, Duration)] {
        &self.steps
    }
}

/// The addresses that must be free of what an IOMMU reserves.
#[derive(Debug, Clone)]
pub struct Room {
    /// Guest RAM.
    pub ram: Vec<RangeInclusive<u64>>,
    /// Where BARs may be.
    pub windows: Vec<RangeInclusive<u64>>,
}

impl Room {
    /// The first reserved range that meets RAM or a window.
    fn conflict<'a>(&self, reserved: &'a [RangeInclusive<u64>]) -> Option<&'a RangeInclusive<u64>> {
        reserved.iter().find(|range| {
            let mut taken = self.ram.iter().chain(&self.windows);
            taken.any(|taken| taken.start() <= range.end() && range.start() <= taken.end())
        })
    }

    /// The first range of RAM that is in none of the mappable ones, if those are known.
    fn unmappable(&self, iova: &[RangeInclusive<u64>]) -> Option<&RangeInclusive<u64>> {
        let within = |ram: &&RangeInclusive<u64>| {
            iova.iter()
                .any(|range| range.start() <= ram.start() && ram.end() <= range.end())
        };
        self.ram.iter().find(|ram| !iova.is_empty() && !within(ram))
    }
}

/// What the jobs are done with.
pub struct Workshop {
    /// Who leases and opens.
    pub opener: Opener,
    /// The domain of the devices, as long as there are any.
    pub domain: Weak<Domain>,
    /// Whom to tell of groups.
    pub observer: Arc<VfioObserver>,
    /// Interrupts.
    pub router: Arc<dyn MsiRouter>,
    /// What is mapped for the first device.
    pub ram: RamRanges,
    /// What no device may reserve.
    pub room: Room,
    /// Bytes that the process may pin; none if there is no limit.
    pub memlock: Option<u64>,
    /// How many threads make RAM present for the first device.
    pub threads: usize,
    /// Whether the VM's file names the groups of later devices, for which RAM is made ready beforehand.
    pub declared: bool,
    /// What the VM stands on.
    pub context: VmContext,
}

/// The thread that does the jobs. Dropping it waits for the one it is at, which is told to hurry, but not for
/// a device that hangs. Clients that wait for devices are told that the VM is ending.
pub struct Worker {
    // Closed first: it ends the thread.
    jobs: Option<Sender<Job>>,
    ending: Arc<AtomicBool>,
    thread: Option<Task<()>>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// The kernel makes no thread.
    pub fn start(workshop: Workshop) -> Result<Self, Error> {
        let (sender, jobs) = channel();
        let ending = Arc::new(AtomicBool::new(false));
        let (sandbox, told) = (Arc::clone(&workshop.context.sandbox), Arc::clone(&ending));
        let jobs = Jobs {
            given: jobs,
            ending: told,
        };
        let work = move || work(workshop, jobs);
        let thread = threads::spawn(Role::Attach, &sandbox, work);
        Ok(Self {
            jobs: Some(sender),
            ending,
            thread: Some(thread.map_err(Error::host("spawn a thread"))?),
        })
    }

    /// Has a job done.
    pub fn give(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // The thread takes jobs for as long as this value lives.
            let _ = jobs.send(job);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        self.jobs = None;
        let deadline = Instant::now() + END_PATIENCE;
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

/// What is to be done.
struct Jobs {
    given: Receiver<Job>,
    /// Nothing more is to be opened.
    ending: Arc<AtomicBool>,
}

impl Jobs {
    /// The next job, once there is one; `None` if there will be none.
    fn next(&mut self) -> Option<Job> {
        loop {
            let job = self.given.recv().ok()?;
            if !self.ending.load(Ordering::Acquire) {
                return Some(job);
            }
            (job.reply)(Err(CommandError::Ending));
        }
    }
}

fn work(mut workshop: Workshop, mut jobs: Jobs) {
    while let Some(job) = jobs.next() {
        let mut steps = Steps::begin();
        let devices = workshop.attach(&job, &mut steps, &jobs.ending);
        let prepared = Prepared {
            attach: job.attach,
            reply: job.reply,
            devices,
            steps,
        };
        // The mailbox outlives this VM: the next one must not find the devices of this one there.
        if jobs.ending.load(Ordering::Acquire) {
            prepared.give_up();
            continue;
        }
        let mailbox = &workshop.context.mailbox;
        mailbox.post(Event::Prepared(Box::new(prepared)));
    }
}

impl Workshop {
    fn attach(
        &mut self,
        job: &Job,
        steps: &mut Steps,
        ending: &Arc<AtomicBool>,
    ) -> Result<(Vec<AttachedDevice>, Vec<Request>), Error> {
        let VmContext {
            sandbox, mailbox, ..
        } = &self.context;
        let requests = match &job.attach.wanted {
            DeviceSelector::Request(request) => vec![request.clone()],
            DeviceSelector::Plan(name) => self.opener.plan(name)?,
        };
        let unwanted = || ending.load(Ordering::Acquire);
        self.opener.slots(job.slots)?;
        let claimed = self.claim(&requests, &unwanted)?;
        steps.done("lease");
        let fresh = claimed.domain().map(Arc::downgrade);
        let first = !fresh.is_some_and(|domain| domain.ptr_eq(&self.domain));
        if let Some(range) = self.room.conflict(claimed.reserved()) {
            let (start, last) = (*range.start(), *range.end());
            let device = claimed.names().first().copied();
            return Err(
                device.map_or(Error::Unmappable { start, last }, |device| Error::Clash {
                    device,
                    start,
                    last,
                }),
            );
        }
        let mapping = match claimed.domain().filter(|_| first) {
            Some(domain) => Some(self.map(domain, ending)?),
            None => None,
        };
        let domain = claimed.domain().map_or_else(Weak::new, Arc::downgrade);
        let opening = claimed.open(&self.router, mailbox, sandbox)?;
        let devices = host_devices::opened(opening, || !unwanted());
        steps.done("open");
        let mapped = mapping.map_or(Ok(()), Task::join);
        steps.done("map");
        steps.mapped_late = first && !self.declared;
        let devices = devices?;
        mapped?;
        self.domain = domain;
        Ok((devices, requests))
    }

    /// Leases what is asked for, and joins it in the domain there is, or in a new one.
    fn claim(&self, requests: &[Request], unwanted: &dyn Fn() -> bool) -> Result<Claimed, Error> {
        let mut tries = 0;
        loop {
            let domain = self.domain.upgrade();
            let held = domain.as_ref().map(|domain| domain.held());
            let held = held.unwrap_or_default();
            let opened = self.opener.open(requests, &held, true, unwanted)?;
            let host = &self.context.host;
            match Claimed::opened(opened, domain, &self.observer, host) {
                // A group that the domain had has left it meanwhile, with its last device.
                Err(Error::NoIommuGroup { .. }) if tries < CLAIM_TRIES => tries += 1,
                claimed => return claimed,
            }
        }
    }

    /// Begins to map RAM for the first device.
    fn map(
        &self,
        domain: &Arc<Domain>,
        ending: &Arc<AtomicBool>,
    ) -> Result<Task<Result<(), Error>>, Error> {
        let iova = domain.iova_ranges()?;
        if let Some(ram) = self.room.unmappable(&iova) {
            return Err(Error::Unmappable {
                start: *ram.start(),
                last: *ram.end(),
            });
        }
        let ram = self.ram.iter().map(|(_, memory)| memory.size() as u64);
        preflight::check_pinned(ram.sum(), self.memlock)?;
        let sandbox = &self.context.sandbox;
        let populating = Populating::begin(&self.ram, self.threads, ending, sandbox)?;
        let (domain, ram) = (Arc::clone(domain), Arc::clone(&self.ram));
        let ending = Arc::clone(ending);
        let map = move || {
            populating.finish();
            domain.map(&ram, || ending.load(Ordering::Acquire))
        };
        threads::spawn(Role::Dma, &self.context.sandbox, map).map_err(Error::host("spawn a thread"))
    }
}

/// Tells of the steps of attaching a device.
pub fn tell_steps(events: &EventSink, id: &str, steps: &Steps) {
    for (step, took) in steps.times() {
        events(VmEvent::AttachStep {
            id: id.to_owned(),
            step,
            took: *took,
            hint: (*step == "map" && steps.mapped_late).then_some(MAPPED_LATE),
        });
    }
}

#[cfg(test)]
mod tests;
