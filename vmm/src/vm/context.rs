//! What the VMs of a process share.

use std::sync::Arc;

use gantry_devices::virtio::block::Rings;
use gantry_resources::base::HostPaths;

use super::event::Event;
use crate::error::Error;
use crate::hotplug::DeviceContext;
use crate::info::{ConsoleSink, EventSink};
use crate::process::error::cannot;
use crate::process::event_loop::{EventLoop, Mailbox};
use crate::process::sandbox::Sandbox;
use crate::process::signals::{SignalWatch, Signals};
use crate::status::SharedStatus;

/// What the VMs of a process share.
#[derive(Clone)]
pub struct VmContext {
    /// Where the host keeps things.
    pub host: HostPaths,
    /// The filters.
    pub sandbox: Arc<Sandbox>,
    /// Where commands and events come in.
    pub mailbox: Arc<Mailbox<Event>>,
    /// The signals that ask the process to end.
    pub signals: Arc<Signals>,
    /// Where events go.
    pub events: EventSink,
    /// Where the output of the guest's serial port goes, beside its file.
    pub console: ConsoleSink,
    /// Where the VM's status is published.
    pub status: Arc<SharedStatus>,
    /// For disks.
    pub rings: Rings,
}

impl VmContext {
    /// An event loop that reads the mailbox and watches for signals.
    ///
    /// # Errors
    /// The kernel refused, or a signal has come before.
    pub fn event_loop(&self) -> Result<EventLoop<Event>, Error> {
        let control =
            EventLoop::new(Arc::clone(&self.mailbox)).map_err(cannot("make the control loop"));
        let mut control = control?;
        self.signals.check()?;
        let mailbox = Arc::clone(&self.mailbox);
        let on_signal = move |number| mailbox.post(Event::Signal(number));
        control.add(Box::new(SignalWatch::new(&self.signals, on_signal)));
        Ok(control)
    }

    /// What host devices need of it.
    pub fn for_devices(&self) -> DeviceContext {
        let mailbox = Arc::clone(&self.mailbox);
        DeviceContext {
            host: self.host.clone(),
            sandbox: Arc::clone(&self.sandbox),
            events: Arc::clone(&self.events),
            status: Arc::clone(&self.status),
            rings: self.rings.clone(),
            notify: Arc::new(move |key, event| mailbox.post(Event::Device(key, event))),
        }
    }
}
