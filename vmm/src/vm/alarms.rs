//! What the host says of a device while a guest has it: that it wants it back, and that it failed.
//!
//! The kernel tells of both through eventfds (`VFIO_PCI_REQ_IRQ_INDEX`, `VFIO_PCI_ERR_IRQ_INDEX`). Those of
//! all devices come together in one epoll instance, which the control loop hears.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use gantry_vfio::host::{DeviceIo, Irq};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet as EpollSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::control::{Event, Mailbox};

/// What the host says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alarm {
    /// It wants the device back, and says so again every ten seconds.
    ReleaseRequested,
    /// The device has reported an error that cannot be corrected.
    Failed,
}

const ALARMS: [(Alarm, Irq); 2] = [
    (Alarm::ReleaseRequested, Irq::Request),
    (Alarm::Failed, Irq::Error),
];

/// Which device an alarm is of: a number that is given once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AlarmKey(u64);

/// The eventfds of one device. Dropping them ends its alarms.
pub struct Wires([Option<EventFd>; 2]);

impl Wires {
    /// Asks the kernel for the alarms that it has of a device. Without them it works as well.
    pub fn lay(io: &dyn DeviceIo) -> Self {
        Self(ALARMS.map(|(alarm, irq)| {
            if io.irq(irq).count == 0 {
                return None;
            }
            let laid = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
                .map_err(|error| error.to_string())
                .and_then(|wire| match io.set_irqs(irq, 0, &[Some(&wire)]) {
                    Ok(()) => Ok(wire),
                    Err(error) => Err(error.to_string()),
                });
            let device = io.name();
            laid.inspect_err(|error| tracing::warn!(device, ?alarm, error, "no alarm"))
                .ok()
        }))
    }
}

/// The alarms of all devices.
pub struct Alarms {
    epoll: Arc<Epoll>,
    next: u64,
}

impl Alarms {
    /// None yet.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Arc::new(Epoll::new()?),
            next: 0,
        })
    }

    /// Hears the alarms of one more device, under the key that comes back.
    pub fn hear(&mut self, wires: &Wires) -> AlarmKey {
        let key = self.next;
        self.next += 1;
        for (place, wire) in (0..).zip(&wires.0) {
            let Some(wire) = wire else { continue };
            // At each edge: nobody has to read it.
            let set = EpollSet::IN | EpollSet::EDGE_TRIGGERED;
            let event = EpollEvent::new(set, key << 1 | place);
            let added = self
                .epoll
                .ctl(ControlOperation::Add, wire.as_raw_fd(), event);
            if let Err(error) = added {
                tracing::warn!(%error, "a device's alarm is not heard");
            }
        }
        AlarmKey(key)
    }

    /// What the control loop hears them by.
    pub fn ears(&self, mailbox: &Arc<Mailbox>) -> Ears {
        Ears {
            epoll: Arc::clone(&self.epoll),
            mailbox: Arc::clone(mailbox),
        }
    }
}

/// Posts the alarms that are raised.
pub struct Ears {
    epoll: Arc<Epoll>,
    mailbox: Arc<Mailbox>,
}

impl Ears {
    fn raised(&self) -> Vec<(AlarmKey, Alarm)> {
        let mut raised = Vec::new();
        let mut events = [EpollEvent::default(); 16];
        while let Ok(count @ 1..) = self.epoll.wait(0, &mut events) {
            let data = events.iter().take(count).map(EpollEvent::data);
            raised.extend(data.filter_map(|data| {
                let (alarm, _) = ALARMS.get((data & 1) as usize)?;
                Some((AlarmKey(data >> 1), *alarm))
            }));
        }
        raised
    }
}

impl MutEventSubscriber for Ears {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&*self.epoll, EventSet::IN)) {
            tracing::error!(?error, "no device's alarm is heard");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        for (key, alarm) in self.raised() {
            self.mailbox.post(Event::Alarm(key, alarm));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire() -> EventFd {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap()
    }

    #[test]
    fn each_alarm_is_heard_each_time_until_its_device_goes() {
        let mut alarms = Alarms::new().unwrap();
        let [first, second] = [(); 2].map(|()| Wires([Some(wire()), Some(wire())]));
        let none = Wires([None, None]);
        let keys = [&first, &none, &second].map(|wires| alarms.hear(wires));
        let ears = alarms.ears(&Mailbox::new().unwrap());
        assert!(ears.raised().is_empty());
        let raise =
            |wires: &Wires, place: usize| wires.0[place].as_ref().unwrap().write(1).unwrap();
        for _ in 0..2 {
            raise(&second, 0);
            assert_eq!(ears.raised(), [(keys[2], Alarm::ReleaseRequested)]);
        }
        raise(&first, 1);
        assert_eq!(ears.raised(), [(keys[0], Alarm::Failed)]);
        raise(&second, 1);
        drop(second);
        assert!(ears.raised().is_empty());
    }
}
