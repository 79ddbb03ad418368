//! A client's request for devices on its way through the attach worker.

use std::time::{Duration, Instant};

use crate::command::{Attach, CommandError, Reply};
use crate::error::Error;
use crate::info::{EventSink, VmEvent};
use crate::passthrough::AttachedDevice;

/// Devices that are to be leased and opened.
pub struct AttachJob {
    /// Which.
    pub attach: Attach,
    /// Who waits for them.
    pub reply: Reply,
    /// How many slots are free for them.
    pub slots: usize,
}

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
    pub mapped_late: bool,
}

impl AttachSteps {
    pub fn start() -> Self {
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

impl AttachResult {
    /// Closes the devices, and tells the client that the VM is ending.
    pub fn cancel(self) {
        drop(self.devices);
        (self.reply)(Err(CommandError::Ending));
    }
}
