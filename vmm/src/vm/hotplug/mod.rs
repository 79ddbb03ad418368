//! The devices of a running VM: where they are plugged in, and how they come and go.
//!
//! The control thread plugs in, announces and takes out of slots, which takes microseconds and accesses no
//! hardware. Devices that come are the [`Worker`]'s, and those that go have threads of their own. A slot that
//! the guest was asked to empty stays as it is until the guest has done so, is reset, or the time it was given
//! is over.

mod arrival;
mod departure;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gantry_devices::pci::{PortIndex, SegmentError};
use gantry_resources::base::DeviceName;

use super::alarms::{AlarmKey, Alarms, Ears};
use super::attach::Worker;
use super::closing::Closing;
use super::host_devices::{self, AttachedDevice, Part, arrange};
use super::machine::Machine;
use crate::command::{CommandError, DeviceCounters, DeviceState, EventSink, VmEvent};
use crate::config::NamedRequest;
use crate::control::Mailbox;
use crate::error::Error;
use crate::status::{DeviceStatus, SharedStatus, SlotTable};
use crate::vmm::VmContext;
pub use arrival::called_twice;

/// How long a guest may take to read what it was told before it is told again: while a guest boots,
/// interrupts get lost. Doubled each time.
const FIRST_REMINDER: Duration = Duration::from_millis(50);
const LAST_REMINDER: Duration = Duration::from_secs(5);

/// How long the kernel may take to close the devices of a VM that ends. It resets each.
const CLOSE_PATIENCE: Duration = Duration::from_secs(30);

/// A device in its slot.
struct Plugged {
    status: DeviceStatus,
    key: AlarmKey,
    device: AttachedDevice,
    attach: Vec<(&'static str, Duration)>,
    /// When it is taken away whether or not the guest has let go of it.
    force_at: Option<Instant>,
    /// Whether the host wants it back.
    wanted: bool,
}

/// What a device was asked for by, and is to be called.
#[derive(Debug, Clone, Default)]
struct Label {
    id: Option<String>,
    group: Option<String>,
}

/// All devices of the host that a VM has.
///
/// Dropping it takes all of them out of their slots and closes them, also those that were on their way to a
/// slot. A device that the kernel does not come back from in time is left behind.
pub struct Devices {
    worker: Option<Worker>,
    plugged: Vec<Plugged>,
    closing: Closing,
    /// What has been asked for and is on its way.
    coming: usize,
    reminder: Option<(Instant, Duration)>,
    alarms: Alarms,
    slots: SlotTable,
    status: Arc<SharedStatus>,
    events: EventSink,
    context: VmContext,
}

impl Devices {
    /// The devices that a VM starts with are plugged in, in the order of the ports; `asked` is what
    /// they were asked for by.
    ///
    /// # Errors
    /// There are not enough ports.
    pub fn plug_in(
        devices: Vec<AttachedDevice>,
        asked: &[NamedRequest],
        machine: &Machine,
        context: &VmContext,
    ) -> Result<Self, Error> {
        let parts: Vec<Part> = devices.iter().map(AttachedDevice::part).collect();
        let mut devices: Vec<Option<AttachedDevice>> = devices.into_iter().map(Some).collect();
        let requests: Vec<usize> = devices
            .iter()
            .flatten()
            .map(|device| device.terms().request)
            .collect();
        let labels = arrival::labels(asked, &requests);
        let ports: Vec<PortIndex> = machine.pci.ports().map(|(port, ..)| port).collect();
        let mut this = Self {
            worker: None,
            plugged: Vec::new(),
            closing: Closing::new(&context.sandbox, machine.leaving.clone()),
            coming: 0,
            reminder: None,
            alarms: Alarms::new().map_err(Error::host("make an epoll instance"))?,
            slots: machine.slots(),
            status: Arc::clone(&context.status),
            events: Arc::clone(&context.events),
            context: context.clone(),
        };
        for (set, port) in arrange(&parts).into_iter().zip(ports) {
            for (index, function) in set {
                let Some(device) = devices.get_mut(index).and_then(Option::take) else {
                    continue;
                };
                let Label { id, group } = labels.get(index).cloned().unwrap_or_default();
                let id = id.unwrap_or_else(|| device.name().to_string());
                let group = group.or_else(|| device.pool().map(str::to_owned));
                this.seat(device, (port, function), (id, group), machine)?;
                machine.events.fill(port);
            }
        }
        Ok(this)
    }

    /// Plugs a device in behind a port as a function, under its name and that of its group. It is among the
    /// others even where that fails.
    fn seat(
        &mut self,
        mut device: AttachedDevice,
        (port, function): (PortIndex, u8),
        (id, group): (String, Option<String>),
        machine: &Machine,
    ) -> Result<(), SegmentError> {
        let placed = device.plug(&machine.pci, port, function);
        let status = DeviceStatus {
            id,
            name: device.name(),
            group,
            allow: device.terms().allow,
            state: DeviceState::Announced,
            port,
            function,
        };
        self.plugged.push(Plugged {
            status,
            key: self.alarms.hear(device.wires()),
            device,
            attach: Vec::new(),
            force_at: None,
            wanted: false,
        });
        placed
    }

    /// From now on devices can come and go.
    pub fn open_slots(&mut self, worker: Worker) {
        self.worker = Some(worker);
    }

    /// The ports of all devices from the `first` in the list on.
    fn ports_from(&self, first: usize) -> BTreeSet<PortIndex> {
        let from = self.plugged.iter().skip(first);
        from.map(|one| one.status.port).collect()
    }

    /// Takes what is in a slot out of it, and has it taken away from the guest and closed elsewhere. Returns
    /// whether there was something.
    fn close(&mut self, port: PortIndex, forced: Option<bool>) -> bool {
        let (gone, stay): (Vec<_>, Vec<_>) = std::mem::take(&mut self.plugged)
            .into_iter()
            .partition(|one| one.status.port == port);
        self.plugged = stay;
        let devices = gone.into_iter().map(|mut one| {
            one.device.unplug();
            (one.status.id, one.device)
        });
        let devices: Vec<_> = devices.collect();
        let any = !devices.is_empty();
        if any {
            self.leave(Some(port), devices, forced);
        }
        any
    }

    /// Has devices that are in no slot any more closed.
    fn leave(
        &mut self,
        port: Option<PortIndex>,
        devices: Vec<(String, AttachedDevice)>,
        forced: Option<bool>,
    ) {
        let names = devices.iter().map(|(_, device)| device.name().to_string());
        let names = names.collect::<Vec<_>>().join(", ");
        let context = self.context.clone();
        self.closing.begin(port, names, move |retired| {
            host_devices::leave(devices, forced, &context, retired);
        });
    }

    /// What hears the alarms of the devices.
    pub fn ears(&self, mailbox: &Arc<Mailbox>) -> Ears {
        self.alarms.ears(mailbox)
    }

    /// The guest has switched a device on.
    pub fn enabled(&mut self, name: DeviceName) {
        let one = self
            .plugged
            .iter_mut()
            .find(|one| one.device.name() == name);
        if let Some(one) = one.filter(|one| one.status.state == DeviceState::Announced) {
            one.status.state = DeviceState::Enabled;
            let id = one.status.id.clone();
            self.publish();
            (self.events)(VmEvent::Enabled { id });
        }
    }

    /// When [`Self::tick`] is to be called next.
    pub fn deadline(&self) -> Option<Instant> {
        let forced = self.plugged.iter().filter_map(|one| one.force_at).min();
        let reminder = self.reminder.map(|(at, _)| at);
        match (forced, reminder) {
            (Some(forced), Some(reminder)) => Some(forced.min(reminder)),
            (forced, reminder) => forced.or(reminder),
        }
    }

    /// Does what is due by now.
    pub fn tick(&mut self, now: Instant, machine: &Machine) {
        let due = |one: &Plugged| one.force_at.is_some_and(|at| at <= now);
        while let Some(port) = self
            .plugged
            .iter()
            .find(|one| due(one))
            .map(|one| one.status.port)
        {
            self.take_out(port, true, machine);
        }
        if let Some((at, wait)) = self.reminder
            && at <= now
        {
            let wait = (wait * 2).min(LAST_REMINDER);
            self.reminder = machine.events.remind().then_some((now + wait, wait));
        }
    }

    /// Tells the guest again in a while, unless it has read what it was told.
    pub fn remind(&mut self) {
        self.reminder = Some((Instant::now() + FIRST_REMINDER, FIRST_REMINDER));
    }

    /// Shows the devices as they are: done before anyone is told of a change.
    fn publish(&self) {
        self.status.set_devices(self.statuses());
    }

    /// The devices as they are.
    pub fn statuses(&self) -> Vec<DeviceStatus> {
        self.plugged.iter().map(|one| one.status.clone()).collect()
    }

    /// What the devices did; `interrupts` are those of the host, by device and vector.
    pub fn counters(
        &self,
        interrupts: &BTreeMap<String, BTreeMap<u16, u64>>,
    ) -> Vec<DeviceCounters> {
        let counters = self.plugged.iter().map(|one| {
            let bdf = one.device.name().to_string();
            let mut counters = DeviceCounters {
                id: one.status.id.clone(),
                interrupts: interrupts.get(&bdf).cloned().unwrap_or_default(),
                bdf,
                attach: one.attach.clone(),
                ..DeviceCounters::default()
            };
            one.device.counts().read(&mut counters);
            counters
        });
        counters.collect()
    }

    fn free(&self) -> Vec<PortIndex> {
        self.slots.free(self.plugged.iter().map(|one| &one.status))
    }

    fn has(&self, id: &str) -> bool {
        self.plugged.iter().any(|one| one.status.id == id)
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.worker = None;
        for port in self.ports_from(0) {
            self.close(port, None);
        }
        for prepared in self.context.mailbox.take_prepared() {
            if let Ok((devices, _)) = prepared.devices {
                let named = devices.into_iter();
                let named = named.map(|device| (device.name().to_string(), device));
                self.leave(None, named.collect(), None);
            }
            (prepared.reply)(Err(CommandError::Ending));
        }
        self.publish();
        self.closing.finish(Instant::now() + CLOSE_PATIENCE);
    }
}
