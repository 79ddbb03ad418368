//! How devices go: the guest is asked, or made, to let go of them.

use std::time::{Duration, Instant};

use gantry_devices::pci::PortIndex;
use gantry_devices::warn_limited;

use super::Devices;
use crate::command::{Answer, CommandError, Detach, DeviceState, VmEvent};
use crate::vm::alarms::{Alarm, AlarmKey};
use crate::vm::machine::Machine;

/// How long a guest may take to let go of what the host wants back.
const HOST_PATIENCE: Duration = Duration::from_secs(10);

/// How long a device may take to stop, once it is taken away from a guest that is reset.
const RETIRE_PATIENCE: Duration = Duration::from_secs(2);

impl Devices {
    /// Asks the guest to let go of a device and of the other functions in its slot.
    ///
    /// # Errors
    /// There is no such device, or this VM cannot let go of any.
    pub fn detach(&mut self, detach: &Detach, machine: &Machine) -> Result<Answer, CommandError> {
        if self.worker.is_none() {
            return Err(CommandError::NoSlots);
        }
        let port = self.plugged.iter().find(|one| one.status.id == detach.id);
        let Some(port) = port.map(|one| one.status.port) else {
            return Err(CommandError::NoSuchDevice {
                id: detach.id.clone(),
                others: self
                    .plugged
                    .iter()
                    .map(|one| one.status.id.clone())
                    .collect(),
            });
        };
        let mut asked = Vec::new();
        let force_at = end_of(Instant::now(), detach.force_after);
        for one in self
            .plugged
            .iter_mut()
            .filter(|one| one.status.port == port)
        {
            one.status.state = DeviceState::Detaching;
            one.force_at = due(one.force_at, force_at, one.wanted);
            asked.push(one.status.id.clone());
        }
        self.publish();
        for id in asked {
            (self.events)(VmEvent::DetachAsked { id });
        }
        machine.events.request_eject(port);
        self.remind();
        if detach.force_after.is_some_and(|after| after.is_zero()) {
            self.take_out(port, true, machine);
        }
        Ok(Answer::Done)
    }

    /// The host has something to say of a device. What it wants back goes back, if the guest does not let
    /// go of it by force: until then the host's command waits.
    pub fn alarmed(&mut self, key: AlarmKey, alarm: Alarm, machine: &Machine) {
        let Some(one) = self.plugged.iter().find(|one| one.key == key) else {
            return;
        };
        let id = one.status.id.clone();
        let error = match alarm {
            Alarm::Failed => {
                one.device.counts().failed();
                "it reported an error that cannot be corrected: do not rely on what it did since"
            }
            // It asks again and again.
            Alarm::ReleaseRequested if one.wanted => return,
            Alarm::ReleaseRequested => {
                let port = one.status.port;
                let slot = self
                    .plugged
                    .iter_mut()
                    .filter(|one| one.status.port == port);
                slot.for_each(|one| one.wanted = true);
                (self.events)(VmEvent::ReleaseRequested { id: id.clone() });
                let force_after = Some(HOST_PATIENCE);
                let detach = Detach {
                    id: id.clone(),
                    force_after,
                };
                match self.detach(&detach, machine) {
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
    pub fn ejected(&mut self, port: PortIndex, machine: &Machine) {
        if !machine.events.is_occupied(port) {
            self.take_out(port, false, machine);
        }
    }

    /// Takes what is in a slot away from the guest, and has it closed.
    pub(super) fn take_out(&mut self, port: PortIndex, forced: bool, machine: &Machine) {
        if !self.close(port, Some(forced)) {
            return;
        }
        machine.events.empty(port, forced);
        self.publish();
        if forced {
            self.remind();
        }
    }

    /// What is in a slot could not be reset with the guest: it is taken away, and nobody else gets it.
    pub fn lose(&mut self, port: PortIndex, machine: &Machine) {
        for one in self
            .plugged
            .iter_mut()
            .filter(|one| one.status.port == port)
        {
            one.device
                .condemn("it could not be reset when the guest rebooted");
            let device = one.status.id.as_str();
            tracing::warn!(
                device,
                "the guest goes on without a device that could not be reset"
            );
        }
        self.take_out(port, true, machine);
    }

    /// Waits until devices that leave neither write to RAM nor interrupt any more, but for those that hang.
    pub fn wait_for_leaving(&self) {
        for device in self.closing.wait_retired(Instant::now() + RETIRE_PATIENCE) {
            tracing::warn!(
                device,
                "a device that is taken away does not answer: it may still write to the guest's memory"
            );
        }
    }

    /// A guest that is reset has let go of what it was asked to let go of.
    pub fn reset(&mut self, ejected: &[PortIndex], machine: &Machine) {
        let detaching = self
            .plugged
            .iter()
            .filter(|one| one.status.state == DeviceState::Detaching)
            .map(|one| one.status.port);
        let detaching: Vec<PortIndex> = detaching.collect();
        for port in detaching {
            self.take_out(port, false, machine);
        }
        for port in ejected {
            self.ejected(*port, machine);
        }
        for one in &mut self.plugged {
            one.status.state = DeviceState::Announced;
        }
        self.publish();
        self.reminder = None;
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
