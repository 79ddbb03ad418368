//! A client's request for devices on its way through the attach worker.

use std::time::{Duration, Instant};

use super::SlotDevice;
use crate::command::{Attach, CommandError, Reply};
use crate::error::Error;
use crate::info::{EventSink, VmEvent};

/// A request to lease and open devices.
pub struct AttachJob {
    /// Which.
    pub attach: Attach,
    /// Who waits for them.
    pub reply: Reply,
    /// How many slots are free for them.
    pub slots: usize,
}

/// The result of an [`AttachJob`].
pub struct AttachResult {
    /// What was asked for.
    pub attach: Attach,
    /// Who waits for it.
    pub reply: Reply,
    /// The devices, not yet in a slot, or why they could not be had.
    pub devices: Result<Vec<SlotDevice>, Error>,
    /// How long each step took.
    pub steps: AttachSteps,
}

/// Why mapping RAM took long, and how to avoid that.
const MAPPED_LATE: &str = "RAM was made ready and mapped for the VM's first device: with the groups of later \
    devices in `hotplug.groups` of the VM's file, RAM is made ready beforehand";

/// The steps of an attachment and their durations.
pub struct AttachSteps {
    steps: Vec<(&'static str, Duration)>,
    begun: Instant,
    /// RAM was not prefaulted before this attachment.
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

    /// Sends the steps as events of a device.
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
