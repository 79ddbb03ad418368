//! Detaching devices: the guest is asked to release them, or loses them by force.

use std::time::{Duration, Instant};

use gantry_devices::pci::PortIndex;
use gantry_devices::warn_limited;
use gantry_resources::pools::OnError;

use super::HostDevices;
use crate::command::{Answer, CommandError, Detach};
use crate::info::{DeviceState, VmEvent};
use crate::passthrough::{DeviceEvent, DeviceKey};

/// How long a guest may take to release a device that the host wants back, or that reported an error.
const HOST_TIMEOUT: Duration = Duration::from_secs(10);

/// What is told of a device that reported an error.
const FAILED: &str =
    "it reported an error that cannot be corrected: do not rely on what it did since";

/// What is told of a device that reads all ones.
const SILENT: &str = "it does not answer: its registers read all ones, as those of a device that was removed or has failed";

/// How long a device may take to stop when it leaves a guest that is being reset.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(2);

impl HostDevices {
    /// Asks the guest to release a device and the other functions in its slot.
    ///
    /// # Errors
    /// There is no such device, or this VM has no hot-plug slots.
    pub fn detach(&mut self, detach: &Detach) -> Result<Answer, CommandError> {
        if self.worker.is_none() {
            return Err(CommandError::NoSlots);
        }
        let port = self.plugged.iter().find(|one| one.status.id == detach.id);
        let Some(port) = port.map(|one| one.status.port) else {
            return Err(self.no_such_device(detach.id.clone()));
        };
        let mut asked = Vec::new();
        let force_at = end_of(Instant::now(), detach.force_after);
        for one in self
            .plugged
            .iter_mut()
            .filter(|one| one.status.port == port)
        {
            one.status.state = DeviceState::Detaching;
            one.force_at = due(one.force_at, force_at, one.must_leave);
            asked.push(one.status.id.clone());
        }
        self.publish();
        for id in asked {
            self.tell(VmEvent::DetachAsked { id });
        }
        self.slots.events().request_eject(port);
        self.remind();
        if detach.force_after.is_some_and(|after| after.is_zero()) {
            self.empty_slot(port, true);
        }
        Ok(Answer::Done)
    }

    /// Handles an event of a device. Returns the device's id if the VM is to end.
    pub fn handle(&mut self, key: DeviceKey, event: DeviceEvent) -> Option<String> {
        match event {
            DeviceEvent::Enabled => self.enabled(key),
            DeviceEvent::ReleaseRequested => self.release_requested(key),
            DeviceEvent::Failed => return self.failed(key, FAILED),
            DeviceEvent::Silent => return self.failed(key, SILENT),
        }
        None
    }

    /// The host wants a device back: the command that wants it waits until the VM has closed the device.
    fn release_requested(&mut self, key: DeviceKey) {
        let Some(one) = self.plugged.iter().find(|one| one.device.key() == key) else {
            return;
        };
        // The kernel repeats it.
        if one.must_leave {
            return;
        }
        let (id, port) = (one.status.id.clone(), one.status.port);
        self.tell(VmEvent::ReleaseRequested { id: id.clone() });
        self.detach_soon(&id, port);
    }

    /// A device has failed as `error` says. What follows is its entry's to say.
    fn failed(&mut self, key: DeviceKey, error: &str) -> Option<String> {
        let one = self.plugged.iter().find(|one| one.device.key() == key)?;
        let device = one.device.passed()?;
        device.counters().failed();
        let then = one.status.kind.passed()?.on_error;
        let (id, port) = (one.status.id.clone(), one.status.port);
        let leaves = one.must_leave;
        // A guest can make its device report errors.
        warn_limited!(device = id, "{error}");
        let error = error.to_owned();
        self.tell(VmEvent::DeviceError {
            id: id.clone(),
            error,
        });
        match then {
            OnError::Stop => return Some(id),
            OnError::Unplug if !leaves => self.detach_soon(&id, port),
            OnError::Unplug | OnError::Report => {}
        }
        None
    }

    /// Asks the guest to release a device, which the guest loses if it does not in time; at once if this VM has no
    /// hot-plug slots, so that the guest cannot be asked.
    fn detach_soon(&mut self, id: &str, port: PortIndex) {
        let slot = self.plugged.iter_mut();
        let slot = slot.filter(|one| one.status.port == port);
        slot.for_each(|one| one.must_leave = true);
        let asked = self.detach(&Detach {
            id: id.to_owned(),
            force_after: Some(HOST_TIMEOUT),
        });
        if asked.is_err() {
            self.empty_slot(port, true);
        }
    }

    /// The guest has released the devices of a slot. A device that was plugged in since stays.
    pub fn ejected(&mut self, port: PortIndex) {
        if !self.slots.events().is_occupied(port) {
            self.empty_slot(port, false);
        }
    }

    /// Takes the devices of a slot away from the guest, and has them closed.
    pub(super) fn empty_slot(&mut self, port: PortIndex, forced: bool) {
        if !self.close(port, Some(forced)) {
            return;
        }
        self.slots.events().empty(port, forced);
        self.publish();
        if forced && self.worker.is_some() {
            self.remind();
        }
    }

    /// Waits until the devices that leave have stopped DMA and interrupts. Gives up on those that hang.
    pub fn wait_for_leaving(&self) {
        for device in self.closing.wait_retired(Instant::now() + RETIRE_TIMEOUT) {
            tracing::warn!(
                device,
                "a detached device does not stop: it may still write to the guest's memory"
            );
        }
    }

    /// The guest is being reset: it has released every device that it was asked to release.
    pub fn reset(&mut self, ejected: &[PortIndex]) {
        let detaching = self
            .plugged
            .iter()
            .filter(|one| one.status.state == DeviceState::Detaching)
            .map(|one| one.status.port);
        let detaching: Vec<PortIndex> = detaching.collect();
        for port in detaching {
            self.empty_slot(port, false);
        }
        for port in ejected {
            self.ejected(*port);
        }
        for one in &mut self.plugged {
            one.status.state = DeviceState::Announced;
        }
        self.publish();
        self.reminder = None;
    }
}

/// The deadline of a time that begins `now`; `None` without a limit, or if no clock reaches it.
fn end_of(now: Instant, time: Option<Duration>) -> Option<Instant> {
    time.and_then(|time| now.checked_add(time))
}

/// The new deadline of a device whose deadline was `set` and for which a client has `asked`. The last request
/// counts, but no client can postpone the end of a device that must leave.
fn due(set: Option<Instant>, asked: Option<Instant>, must_leave: bool) -> Option<Instant> {
    match (set, asked) {
        (Some(set), Some(asked)) if must_leave => Some(set.min(asked)),
        (set, asked) => asked.or(set),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::RecvTimeoutError;

    use super::super::testing::{plug, two_slots};
    use super::*;
    use crate::info::{DeviceCounters, DeviceKind};
    use crate::passthrough::testing::attached;

    #[test]
    fn what_follows_an_error_of_a_device_is_its_entrys_to_say() {
        let (mut devices, _pci, _events, told) = two_slots();
        let (device, _reasons) = attached("01:00.0", || Ok(()));
        plug(&mut devices, [device]);
        let key = devices.plugged[0].device.key();
        let mut counters = DeviceCounters::default();
        for (then, end, left) in [
            (OnError::Report, None, 1),
            (OnError::Stop, Some("01:00.0"), 1),
            // This guest cannot be asked: it loses the device at once.
            (OnError::Unplug, None, 0),
        ] {
            devices.plugged[0].device.count(&mut counters);
            let DeviceKind::Passed(device) = &mut devices.plugged[0].status.kind else {
                panic!("it is passed");
            };
            device.on_error = then;
            let ends = devices.handle(key, DeviceEvent::Failed);
            assert_eq!(ends.as_deref(), end);
            let told = std::mem::take(&mut *told.lock().unwrap());
            let is_error = |event: &VmEvent| match event {
                VmEvent::DeviceError { error, .. } => error.contains("cannot be corrected"),
                _ => false,
            };
            assert!(told.first().is_some_and(is_error), "{told:?}");
            assert_eq!(devices.plugged.len(), left);
        }
        assert_eq!(counters.errors, 2, "before the last one");
        assert_eq!(devices.handle(key, DeviceEvent::Failed), None);
    }

    #[test]
    fn the_host_gets_a_device_back_from_a_vm_without_slots_too() {
        let (mut devices, _pci, _events, told) = two_slots();
        let (device, reasons) = attached("01:00.0", || Ok(()));
        plug(&mut devices, [device]);
        let key = devices.plugged[0].device.key();
        assert_eq!(devices.handle(key, DeviceEvent::ReleaseRequested), None);
        assert!(devices.plugged.is_empty());
        let late = Duration::from_secs(60);
        let returned = reasons.recv_timeout(late).unwrap_err();
        assert_eq!(
            returned,
            RecvTimeoutError::Disconnected,
            "its lease has ended"
        );
        drop(devices);
        let (id, forced) = ("01:00.0".to_owned(), true);
        let told = told.lock().unwrap();
        assert_eq!(told[0], VmEvent::ReleaseRequested { id: id.clone() });
        assert!(told.contains(&VmEvent::Detached { id, forced }), "{told:?}");
    }

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
