//! The devices in the slots of a running VM: attached and detached while the guest runs.
//!
//! The control thread plugs devices in, announces them and takes them out of slots. That takes microseconds and
//! accesses no hardware. The [`AttachWorker`] leases and opens devices, and threads of their own close them. A
//! device that the guest was asked to release stays until the guest releases it, is reset, or a deadline
//! passes.

mod arrange;
mod arrival;
mod attacher;
mod closing;
mod departure;
mod job;
mod ranges;
mod reset;
mod slot_device;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use gantry_devices::pci::PortIndex;
use gantry_devices::virtio::VirtioHost;
use gantry_devices::virtio::block::Rings;
use gantry_resources::base::HostPaths;

use crate::command::{Answer, CommandError, Reply, ResizeError};
use crate::error::Error;
use crate::info::{DeviceCounters, DeviceState, EventSink, VmEvent};
use crate::machine::{MachineError, SlotTable};
use crate::passthrough::{DeviceEventListener, DeviceEvents, DeviceKey, DeviceNotify};
use crate::process::error::cannot;
use crate::process::sandbox::{Role, Sandbox};
use crate::process::threads;
use crate::status::{DeviceStatus, SharedStatus};
use crate::virtio::VirtioContext;
pub use arrange::arrange;
pub use attacher::Attacher;
use closing::Closing;
pub use ranges::GuestRanges;
pub use slot_device::SlotDevice;
pub use worker::AttachWorker;

/// How long to wait until the guest is notified again, if it has not read the notification: a guest that boots
/// loses interrupts. Doubled each time.
const FIRST_REMINDER: Duration = Duration::from_millis(50);
const LAST_REMINDER: Duration = Duration::from_secs(5);

/// How long the kernel may take to close the devices of a VM that ends. It resets each.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// What devices need of the process.
#[derive(Clone)]
pub struct DeviceContext {
    /// Where the host keeps things.
    pub host: HostPaths,
    /// The filters.
    pub sandbox: Arc<Sandbox>,
    /// Where events for clients go.
    pub events: EventSink,
    /// Where the VM's status is published.
    pub status: Arc<SharedStatus>,
    /// Where events of devices go.
    pub notify: DeviceNotify,
    /// For disks.
    pub rings: Rings,
}

impl DeviceContext {
    /// What virtio devices of the VM `host` need.
    pub fn virtio(&self, host: VirtioHost) -> VirtioContext {
        VirtioContext {
            host,
            sandbox: Arc::clone(&self.sandbox),
            notify: Arc::clone(&self.notify),
            rings: self.rings.clone(),
        }
    }
}

/// A device in its slot.
struct PluggedDevice {
    status: DeviceStatus,
    device: SlotDevice,
    attach: Vec<(&'static str, Duration)>,
    /// When the guest loses it, released or not.
    force_at: Option<Instant>,
    /// Whether it leaves in the end whatever a client asks for: the host wants it back, or it has failed.
    must_leave: bool,
}

/// All devices that a VM has in its slots.
///
/// Dropping it takes all of them out of their slots and closes them, also those that were on their way to a
/// slot. A device that the kernel does not come back from in time is left behind.
pub struct HostDevices {
    worker: Option<AttachWorker>,
    plugged: Vec<PluggedDevice>,
    closing: Closing,
    /// How many attachments are in progress.
    coming: usize,
    /// The number in the next name that a disk is given.
    disks_named: usize,
    reminder: Option<(Instant, Duration)>,
    kernel_events: DeviceEvents,
    slots: SlotTable,
    context: DeviceContext,
}

impl HostDevices {
    /// None yet.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new(slots: &SlotTable, context: DeviceContext) -> Result<Self, Error> {
        Ok(Self {
            worker: None,
            plugged: Vec::new(),
            closing: Closing::new(&context.sandbox),
            coming: 0,
            disks_named: 0,
            reminder: None,
            kernel_events: DeviceEvents::new().map_err(cannot("make an epoll instance"))?,
            slots: slots.clone(),
            context,
        })
    }

    /// Plugs in the devices that a VM starts with, in the order of the ports.
    ///
    /// # Errors
    /// There are not enough ports.
    pub fn plug_at_boot(&mut self, devices: Vec<SlotDevice>) -> Result<(), MachineError> {
        let functions: Vec<_> = devices.iter().map(SlotDevice::function).collect();
        let mut devices: Vec<Option<SlotDevice>> = devices.into_iter().map(Some).collect();
        let ports: Vec<PortIndex> = self.slots.pci().ports().map(|(port, ..)| port).collect();
        for (set, port) in arrange(&functions).into_iter().zip(ports) {
            for (index, function) in set {
                if let Some(device) = devices.get_mut(index).and_then(Option::take) {
                    self.plug(device, port, function)?;
                    self.slots.events().fill(port);
                }
            }
        }
        Ok(())
    }

    /// Plugs a device in behind a port as a function. The device is in the list even if that fails.
    fn plug(
        &mut self,
        mut device: SlotDevice,
        port: PortIndex,
        function: u8,
    ) -> Result<(), MachineError> {
        let plugged = device.plug(self.slots.pci(), port, function);
        let status = DeviceStatus {
            id: device.id().to_owned(),
            kind: device.kind(),
            state: DeviceState::Announced,
            port,
            function,
        };
        if let Some(device) = device.passed() {
            self.kernel_events.watch(device.key(), device.events());
        }
        self.plugged.push(PluggedDevice {
            status,
            device,
            attach: Vec::new(),
            force_at: None,
            must_leave: false,
        });
        Ok(plugged?)
    }

    /// From now on devices can come and go.
    pub fn open_slots(&mut self, worker: AttachWorker) {
        self.worker = Some(worker);
    }

    /// The ports of the devices from index `first` on.
    fn ports_from(&self, first: usize) -> BTreeSet<PortIndex> {
        let from = self.plugged.iter().skip(first);
        from.map(|one| one.status.port).collect()
    }

    /// Takes the devices of a slot out of it, and has them taken away from the guest and closed elsewhere. Returns
    /// whether there were any.
    fn close(&mut self, port: PortIndex, forced: Option<bool>) -> bool {
        let (gone, stay): (Vec<_>, Vec<_>) = std::mem::take(&mut self.plugged)
            .into_iter()
            .partition(|one| one.status.port == port);
        self.plugged = stay;
        let devices: Vec<_> = gone.into_iter().map(|one| one.device).collect();
        let any = !devices.is_empty();
        if any {
            self.take_away(Some(port), devices, forced);
        }
        any
    }

    /// Takes devices out of their slot, if they are in one, and has them closed.
    fn take_away(
        &mut self,
        port: Option<PortIndex>,
        mut devices: Vec<SlotDevice>,
        forced: Option<bool>,
    ) {
        devices.iter_mut().for_each(SlotDevice::unplug);
        let names = devices.iter().map(SlotDevice::name);
        let names = names.collect::<Vec<_>>().join(", ");
        let (sandbox, events) = (
            Arc::clone(&self.context.sandbox),
            Arc::clone(&self.context.events),
        );
        let slot = port.map(|port| self.slots.drain(port));
        let slots = self.slots.clone();
        self.closing.start(slot, names, move |retired| {
            closing::take_away(devices, forced, (&sandbox, &events), retired);
            slots.retry_refused();
        });
    }

    /// The event source for the kernel's events of the devices.
    pub fn listener(&self) -> DeviceEventListener {
        self.kernel_events.listener(&self.context.notify)
    }

    /// The guest has enabled a device.
    fn enabled(&mut self, key: DeviceKey) {
        let mut plugged = self.plugged.iter_mut();
        let one = plugged.find(|one| one.device.key() == key);
        if let Some(one) = one.filter(|one| one.status.state == DeviceState::Announced) {
            one.status.state = DeviceState::Enabled;
            let id = one.status.id.clone();
            self.publish();
            self.tell(VmEvent::Enabled { id });
        }
    }

    /// When [`Self::tick`] is to be called next.
    pub fn deadline(&self) -> Option<Instant> {
        let forced = self.plugged.iter().filter_map(|one| one.force_at);
        forced.chain(self.reminder.map(|(at, _)| at)).min()
    }

    /// Takes away devices whose deadline has passed, and notifies the guest again if that is due.
    pub fn tick(&mut self, now: Instant) {
        let due = |one: &PluggedDevice| one.force_at.is_some_and(|at| at <= now);
        while let Some(one) = self.plugged.iter().find(|one| due(one)) {
            self.empty_slot(one.status.port, true);
        }
        if let Some((at, wait)) = self.reminder
            && at <= now
        {
            let wait = (wait * 2).min(LAST_REMINDER);
            let unread = self.slots.events().remind();
            self.reminder = unread.then_some((now + wait, wait));
        }
    }

    /// Schedules another notification in case the guest misses the first.
    pub fn remind(&mut self) {
        self.reminder = Some((Instant::now() + FIRST_REMINDER, FIRST_REMINDER));
    }

    /// Publishes the devices. Called before any event of a change is sent.
    fn publish(&self) {
        self.context.status.set_devices(self.statuses());
    }

    fn tell(&self, event: VmEvent) {
        (self.context.events)(event);
    }

    /// The status of each device.
    pub fn statuses(&self) -> Vec<DeviceStatus> {
        self.plugged.iter().map(|one| one.status.clone()).collect()
    }

    /// The counters of the devices. `interrupts` holds the host's counts by device and vector.
    pub fn counters(
        &self,
        interrupts: &BTreeMap<String, BTreeMap<u16, u64>>,
    ) -> Vec<DeviceCounters> {
        let counters = self.plugged.iter().map(|one| {
            let mut counters = DeviceCounters {
                id: one.status.id.clone(),
                attach: one.attach.clone(),
                ..DeviceCounters::default()
            };
            one.device.count(&mut counters);
            counters.interrupts = interrupts.get(&counters.bdf).cloned().unwrap_or_default();
            counters
        });
        counters.collect()
    }

    /// Makes a disk larger on a thread of its own, which answers.
    pub fn resize_disk(&self, id: String, bytes: u64, reply: Reply) {
        let one = self.plugged.iter().find(|one| one.status.id == id);
        let resizer = one.map(|one| one.device.virtio().and_then(|disk| disk.resizer(bytes)));
        let resize = match resizer {
            None => return reply(Err(self.no_such_device(id))),
            Some(None) => {
                let problem = ResizeError::NoFile;
                return reply(Err(CommandError::Resize { id, problem }));
            }
            Some(Some(resize)) => resize,
        };
        let (sender, receiver) = channel::<Reply>();
        let name = id.clone();
        let run = move || {
            let resized = resize().map(|()| Answer::Done);
            if let Ok(reply) = receiver.recv() {
                reply(resized.map_err(|problem| CommandError::Resize { id: name, problem }));
            }
        };
        match threads::spawn(Role::Disk, &self.context.sandbox, run) {
            Ok(task) => {
                // The thread waits for it.
                let _ = sender.send(reply);
                task.abandon();
            }
            Err(error) => {
                let problem = ResizeError::Thread(error);
                reply(Err(CommandError::Resize { id, problem }));
            }
        }
    }

    fn no_such_device(&self, id: String) -> CommandError {
        let others = self.plugged.iter().map(|one| one.status.id.clone());
        let others = others.collect();
        CommandError::NoSuchDevice { id, others }
    }

    fn free(&self) -> Vec<PortIndex> {
        let occupied = |port| self.plugged.iter().any(|one| one.status.port == port);
        self.slots.free(occupied)
    }

    fn has(&self, id: &str) -> bool {
        self.plugged.iter().any(|one| one.status.id == id)
    }
}

impl Drop for HostDevices {
    fn drop(&mut self) {
        let left = self.worker.take().map(AttachWorker::end);
        for port in self.ports_from(0) {
            self.close(port, None);
        }
        for result in left.into_iter().flatten() {
            if let Ok(devices) = result.devices {
                self.take_away(None, devices, None);
            }
            (result.reply)(Err(CommandError::Ending));
        }
        self.publish();
        self.closing.finish(Instant::now() + CLOSE_TIMEOUT);
    }
}
