//! The devices of a running VM: where they are plugged in, and how they come and go.
//!
//! The control thread plugs in, announces and unplugs, which takes microseconds. What takes longer is
//! the [`Worker`]'s. A slot that the guest was asked to empty stays as it is until the guest has done
//! so, is reset, or the time it was given is over.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gantry_devices::pci::PortIndex;
use gantry_devices::pci::firmware::{self, WindowKind};
use gantry_devices::warn_limited;
use gantry_resources::{DeviceName, Request};

use super::alarms::{Alarm, AlarmKey, Alarms, Ears};
use super::attach::{Job, Prepared, Worker, tell_steps};
use super::board::Board;
use super::host_devices::{AttachedDevice, arrange};
use crate::command::{
    Answer, Attach, CommandError, Detach, DeviceCounters, DeviceInfo, DeviceState, EventSink,
    Reply, VmEvent,
};
use crate::control::Mailbox;
use crate::error::Error;
use crate::shown::{Row, Shown, Slots};
use crate::vmm::Ground;

/// How long a guest may take to read what it was told before it is told again: while a guest boots,
/// interrupts get lost. Doubled each time.
const FIRST_REMINDER: Duration = Duration::from_millis(50);
const LAST_REMINDER: Duration = Duration::from_secs(5);

/// How long a guest may take to let go of what the host wants back.
const HOST_PATIENCE: Duration = Duration::from_secs(10);

/// A device in its slot.
struct Plugged {
    row: Row,
    key: AlarmKey,
    device: AttachedDevice,
    attach: Vec<(&'static str, Duration)>,
    /// When it is taken away whether or not the guest has let go of it.
    force_at: Option<Instant>,
    /// Whether the host wants it back.
    wanted: bool,
}

/// All devices of the host that a VM has.
pub struct Devices {
    // Ended before the devices that it knows nothing of are closed.
    worker: Option<Worker>,
    plugged: Vec<Plugged>,
    /// What has been asked for and is on its way.
    coming: usize,
    reminder: Option<(Instant, Duration)>,
    alarms: Alarms,
    slots: Slots,
    shown: Arc<Shown>,
    events: EventSink,
}

impl Devices {
    /// The devices that a VM starts with are plugged in, in the order of the ports; `asked` is what
    /// they were asked for by.
    ///
    /// # Errors
    /// There are not enough ports.
    pub fn plug_in(
        devices: Vec<AttachedDevice>,
        asked: &[Request],
        board: &Board,
        ground: &Ground,
    ) -> Result<Self, Error> {
        let addresses: Vec<DeviceName> = devices.iter().map(AttachedDevice::name).collect();
        let mut devices: Vec<Option<AttachedDevice>> = devices.into_iter().map(Some).collect();
        let names: Vec<Option<String>> = asked.iter().flat_map(names).collect();
        let ports: Vec<PortIndex> = board.pci.ports().map(|(port, ..)| port).collect();
        let mut alarms = Alarms::new().map_err(Error::host("make an epoll instance"))?;
        let mut plugged = Vec::new();
        for (set, port) in arrange(&addresses).into_iter().zip(ports) {
            for (index, function) in set {
                let Some(mut device) = devices.get_mut(index).and_then(Option::take) else {
                    continue;
                };
                device.plug(&board.pci, port, function)?;
                let key = alarms.hear(device.wires());
                board.events.fill(port);
                let row = Row {
                    id: device.name().to_string(),
                    name: device.name(),
                    group: names.get(index).cloned().flatten(),
                    state: DeviceState::Announced,
                    port,
                    function,
                };
                plugged.push(Plugged {
                    row,
                    key,
                    device,
                    attach: Vec::new(),
                    force_at: None,
                    wanted: false,
                });
            }
        }
        Ok(Self {
            worker: None,
            plugged,
            coming: 0,
            reminder: None,
            alarms,
            slots: board.slots(),
            shown: Arc::clone(&ground.shown),
            events: Arc::clone(&ground.events),
        })
    }

    /// From now on devices can come and go.
    pub fn open_slots(&mut self, worker: Worker) {
        self.worker = Some(worker);
    }

    /// Takes all devices out of their slots, and hands them over to be closed.
    pub fn give_up(&mut self) -> Vec<AttachedDevice> {
        self.worker = None;
        let plugged = std::mem::take(&mut self.plugged);
        self.show();
        plugged.into_iter().map(|plugged| plugged.device).collect()
    }

    /// Begins to attach; the reply comes when the guest has been told, or it failed.
    pub fn attach(&mut self, attach: Attach, reply: Reply, board: &Board) {
        let refused = match (&self.worker, &attach.id) {
            (None, _) => Some(CommandError::NoSlots),
            _ if self.free().len() <= self.coming => Some(CommandError::NoFreeSlot {
                slots: board.slots.len(),
            }),
            (_, Some(id)) if self.has(id) => Some(CommandError::DuplicateId(id.clone())),
            _ => None,
        };
        match (refused, &self.worker) {
            (None, Some(worker)) => {
                self.coming += 1;
                worker.give(Job::Attach(attach, reply));
            }
            (refused, _) => reply(Err(refused.unwrap_or(CommandError::NoSlots))),
        }
    }

    /// Plugs in what was prepared, and tells the guest.
    pub fn arrive(&mut self, prepared: Prepared, board: &Board) {
        let Prepared {
            attach,
            reply,
            devices,
            mut steps,
        } = prepared;
        self.coming = self.coming.saturating_sub(1);
        let begun = self.plugged.len();
        let plugged = match devices {
            Ok((devices, asked)) => self.plug(&attach, devices, &asked, board),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = plugged {
            let what = attach.id.unwrap_or_else(|| attach.wanted.to_string());
            (self.events)(VmEvent::AttachFailed {
                id: what,
                error: error.to_string(),
            });
            return reply(Err(error));
        }
        let ports: Vec<PortIndex> = self
            .plugged
            .iter()
            .skip(begun)
            .map(|new| new.row.port)
            .collect();
        ports.iter().for_each(|port| board.events.announce(*port));
        self.remind();
        steps.done("announce");
        for new in self.plugged.iter_mut().skip(begun) {
            new.attach = steps.times().to_vec();
        }
        self.show();
        let infos: Vec<DeviceInfo> = self
            .plugged
            .iter()
            .skip(begun)
            .map(|new| self.slots.info(&new.row))
            .collect();
        for info in &infos {
            tell_steps(&self.events, &info.id, &steps);
            (self.events)(VmEvent::Attached(info.clone()));
        }
        reply(Ok(Answer::Attached(infos)));
    }

    /// Finds slots for devices and plugs them in: all, or none.
    fn plug(
        &mut self,
        attach: &Attach,
        devices: Vec<AttachedDevice>,
        asked: &[Request],
        board: &Board,
    ) -> Result<(), CommandError> {
        let begun = self.plugged.len();
        let mut devices: Vec<Option<AttachedDevice>> = devices.into_iter().map(Some).collect();
        let plugged = self.plug_each(attach, &mut devices, asked, board);
        if plugged.is_err() {
            let left = devices.into_iter().flatten();
            let new = self.plugged.drain(begun..).map(|new| new.device);
            let undone = new.chain(left).map(|mut device| {
                device.unplug();
                (String::new(), device)
            });
            let devices = undone.collect();
            if let Some(worker) = &self.worker {
                worker.give(Job::Close {
                    devices,
                    forced: None,
                });
            }
        }
        plugged
    }

    fn plug_each(
        &mut self,
        attach: &Attach,
        devices: &mut [Option<AttachedDevice>],
        asked: &[Request],
        board: &Board,
    ) -> Result<(), CommandError> {
        let addresses: Vec<DeviceName> =
            devices.iter().flatten().map(AttachedDevice::name).collect();
        let groups: Vec<Option<String>> = asked.iter().flat_map(names).collect();
        for set in arrange(&addresses) {
            let port = self.slot_for(&set, devices, board)?;
            for (index, function) in set {
                let Some(bdf) = addresses.get(index) else {
                    continue;
                };
                let id = match &attach.id {
                    None => bdf.to_string(),
                    Some(id) if index == 0 => id.clone(),
                    Some(id) => format!("{id}-{index}"),
                };
                if self.has(&id) {
                    return Err(CommandError::DuplicateId(id));
                }
                let Some(mut device) = devices.get_mut(index).and_then(Option::take) else {
                    continue;
                };
                let placed = device.plug(&board.pci, port, function);
                let row = Row {
                    id,
                    name: device.name(),
                    group: groups.get(index).cloned().flatten(),
                    state: DeviceState::Announced,
                    port,
                    function,
                };
                self.plugged.push(Plugged {
                    row,
                    key: self.alarms.hear(device.wires()),
                    device,
                    attach: Vec::new(),
                    force_at: None,
                    wanted: false,
                });
                placed.map_err(Error::from)?;
            }
        }
        Ok(())
    }

    /// The first empty slot whose windows hold the BARs of all functions.
    fn slot_for(
        &self,
        set: &[(usize, u8)],
        devices: &[Option<AttachedDevice>],
        board: &Board,
    ) -> Result<PortIndex, CommandError> {
        let mut bars = Vec::new();
        let mut first = None;
        for (index, function) in set {
            if let Some(Some(device)) = devices.get(*index) {
                first = first.or(Some(device.name()));
                bars.extend(device.bars(*function));
            }
        }
        let mut small: Option<(WindowKind, u64)> = None;
        for port in self.free() {
            match firmware::fit(&bars, &board.windows(port)) {
                Ok(()) => return Ok(port),
                Err(window) => small = small.or(Some(window)),
            }
        }
        Err(match (small, first) {
            (Some((kind, size)), Some(device)) => {
                CommandError::SlotsTooSmall { device, kind, size }
            }
            _ => CommandError::NoFreeSlot {
                slots: board.slots.len(),
            },
        })
    }

    /// Asks the guest to let go of a device and of the other functions in its slot.
    ///
    /// # Errors
    /// There is no such device, or this VM cannot let go of any.
    pub fn detach(&mut self, detach: &Detach, board: &Board) -> Result<Answer, CommandError> {
        if self.worker.is_none() {
            return Err(CommandError::NoSlots);
        }
        let port = self.plugged.iter().find(|one| one.row.id == detach.id);
        let Some(port) = port.map(|one| one.row.port) else {
            return Err(CommandError::NoSuchDevice {
                id: detach.id.clone(),
                others: self.plugged.iter().map(|one| one.row.id.clone()).collect(),
            });
        };
        let mut asked = Vec::new();
        let force_at = end_of(Instant::now(), detach.force_after);
        for one in self.plugged.iter_mut().filter(|one| one.row.port == port) {
            one.row.state = DeviceState::Detaching;
            one.force_at = due(one.force_at, force_at, one.wanted);
            asked.push(one.row.id.clone());
        }
        self.show();
        for id in asked {
            (self.events)(VmEvent::DetachAsked { id });
        }
        board.events.request_eject(port);
        self.remind();
        if detach.force_after.is_some_and(|after| after.is_zero()) {
            self.take_out(port, true, board);
        }
        Ok(Answer::Done)
    }

    /// What hears the alarms of the devices.
    pub fn ears(&self, mailbox: &Arc<Mailbox>) -> Ears {
        self.alarms.ears(mailbox)
    }

    /// The host has something to say of a device. What it wants back goes back, if the guest does not let
    /// go of it by force: until then the host's command waits.
    pub fn alarmed(&mut self, key: AlarmKey, alarm: Alarm, board: &Board) {
        let Some(one) = self.plugged.iter().find(|one| one.key == key) else {
            return;
        };
        let id = one.row.id.clone();
        let error = match alarm {
            Alarm::Failed => {
                "it reported an error that cannot be corrected: do not rely on what it did since"
            }
            // It asks again and again.
            Alarm::Wanted if one.wanted => return,
            Alarm::Wanted => {
                let port = one.row.port;
                let slot = self.plugged.iter_mut().filter(|one| one.row.port == port);
                slot.for_each(|one| one.wanted = true);
                (self.events)(VmEvent::Wanted { id: id.clone() });
                let force_after = Some(HOST_PATIENCE);
                let detach = Detach {
                    id: id.clone(),
                    force_after,
                };
                match self.detach(&detach, board) {
                    Ok(_) => return,
                    Err(_) => "the host wants it back, and this VM has no slots to let go of it",
                }
            }
        };
        // A guest can have its device report errors.
        warn_limited!(device = id, "{error}");
        let error = error.to_owned();
        (self.events)(VmEvent::DeviceError { id, error });
    }

    /// The guest has let go of what was in a slot; what has come there since stays.
    pub fn ejected(&mut self, port: PortIndex, board: &Board) {
        if !board.events.is_occupied(port) {
            self.take_out(port, false, board);
        }
    }

    /// Takes what is in a slot away from the guest, and has it closed.
    fn take_out(&mut self, port: PortIndex, forced: bool, board: &Board) {
        let (gone, stay): (Vec<_>, Vec<_>) = std::mem::take(&mut self.plugged)
            .into_iter()
            .partition(|one| one.row.port == port);
        self.plugged = stay;
        if gone.is_empty() {
            return;
        }
        let mut devices = Vec::new();
        for mut one in gone {
            one.device.unplug();
            devices.push((one.row.id, one.device));
        }
        board.events.empty(port, forced);
        self.show();
        if forced {
            self.remind();
        }
        if let Some(worker) = &self.worker {
            worker.give(Job::Close {
                devices,
                forced: Some(forced),
            });
        }
    }

    /// A guest that is reset has let go of what it was asked to let go of.
    pub fn reset(&mut self, ejected: &[PortIndex], board: &Board) {
        let detaching = self
            .plugged
            .iter()
            .filter(|one| one.row.state == DeviceState::Detaching)
            .map(|one| one.row.port);
        let detaching: Vec<PortIndex> = detaching.collect();
        for port in detaching {
            self.take_out(port, false, board);
        }
        for port in ejected {
            self.ejected(*port, board);
        }
        for one in &mut self.plugged {
            one.row.state = DeviceState::Announced;
        }
        self.show();
        self.reminder = None;
    }

    /// The guest has switched a device on.
    pub fn enabled(&mut self, name: DeviceName) {
        let one = self
            .plugged
            .iter_mut()
            .find(|one| one.device.name() == name);
        if let Some(one) = one.filter(|one| one.row.state == DeviceState::Announced) {
            one.row.state = DeviceState::Enabled;
            let id = one.row.id.clone();
            self.show();
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
    pub fn tick(&mut self, now: Instant, board: &Board) {
        let due = |one: &Plugged| one.force_at.is_some_and(|at| at <= now);
        while let Some(port) = self
            .plugged
            .iter()
            .find(|one| due(one))
            .map(|one| one.row.port)
        {
            self.take_out(port, true, board);
        }
        if let Some((at, wait)) = self.reminder
            && at <= now
        {
            let wait = (wait * 2).min(LAST_REMINDER);
            self.reminder = board.events.remind().then_some((now + wait, wait));
        }
    }

    /// Tells the guest again in a while, unless it has read what it was told.
    pub fn remind(&mut self) {
        self.reminder = Some((Instant::now() + FIRST_REMINDER, FIRST_REMINDER));
    }

    /// Shows the devices as they are: done before anyone is told of a change.
    fn show(&self) {
        self.shown.rows(self.rows());
    }

    /// The devices as they are.
    pub fn rows(&self) -> Vec<Row> {
        self.plugged.iter().map(|one| one.row.clone()).collect()
    }

    /// What the devices did; `interrupts` are those of the host, by device and vector.
    pub fn counters(
        &self,
        interrupts: &BTreeMap<String, BTreeMap<u16, u64>>,
    ) -> Vec<DeviceCounters> {
        let counters = self.plugged.iter().map(|one| {
            let bdf = one.device.name().to_string();
            let mut counters = DeviceCounters {
                id: one.row.id.clone(),
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
        self.slots.free(self.plugged.iter().map(|one| &one.row))
    }

    fn has(&self, id: &str) -> bool {
        self.plugged.iter().any(|one| one.row.id == id)
    }
}

/// When a time is over that begins `now`; `None` if it has no end, or one that no clock gets to.
fn end_of(now: Instant, time: Option<Duration>) -> Option<Instant> {
    time.and_then(|time| now.checked_add(time))
}

/// When a device is taken away that was to be at the time `set`, now that it is `asked` for. What is asked
/// last counts, but nobody puts off what the host wants back.
fn due(set: Option<Instant>, asked: Option<Instant>, wanted: bool) -> Option<Instant> {
    match (set, asked) {
        (Some(set), Some(asked)) if wanted => Some(set.min(asked)),
        (set, asked) => asked.or(set),
    }
}

/// The group or alias of each device that a request asks for.
fn names(request: &Request) -> Vec<Option<String>> {
    match request {
        Request::Any(wish) => {
            let name = match &wish.from {
                gantry_resources::Source::Group(name) | gantry_resources::Source::Alias(name) => {
                    name
                }
            };
            vec![Some(name.clone()); wish.count as usize]
        }
        Request::Device { .. } | Request::Mdev { .. } => vec![None],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_puts_off_its_own_time_and_not_the_hosts() {
        let now = Instant::now();
        let [early, late] = [1, 2].map(|hours| Some(now + Duration::from_secs(hours * 3600)));
        for (set, asked, wanted, expected) in [
            (None, None, false, None),
            (None, early, false, early),
            (early, None, false, early),
            (early, late, false, late),
            (late, early, false, early),
            (None, early, true, early),
            (early, None, true, early),
            (early, late, true, early),
            (late, early, true, early),
        ] {
            assert_eq!(
                due(set, asked, wanted),
                expected,
                "{set:?} {asked:?} {wanted}"
            );
        }
    }

    #[test]
    fn times_that_no_clock_gets_to_have_no_end() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        assert_eq!(end_of(now, None), None);
        assert_eq!(end_of(now, Some(second)), Some(now + second));
        for seconds in [1e19, u64::MAX as f64 / 1.1] {
            let time = Duration::try_from_secs_f64(seconds).unwrap();
            assert_eq!(end_of(now, Some(time)), None, "{seconds}");
        }
    }
}
