//! Events of a device while a guest has it: the guest enables it, the host wants it back, it reports an error.
//!
//! The kernel signals the latter two through eventfds (`VFIO_PCI_REQ_IRQ_INDEX`, `VFIO_PCI_ERR_IRQ_INDEX`).
//! Those of all devices are in one epoll instance, which the control loop watches.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use gantry_vfio::host::{DeviceIo, Irq};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet as EpollSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The number of a device within the process. No number is used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceKey(u64);

impl DeviceKey {
    /// A number that no other device has had.
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// An event of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The guest has enabled its memory or I/O ports.
    Enabled,
    /// The host wants it back. The kernel repeats that every ten seconds.
    ReleaseRequested,
    /// It has reported an error that cannot be corrected.
    Failed,
    /// It answers nothing any more.
    Silent,
}

/// Receives the events of devices, on any thread. Must not wait.
pub type DeviceNotify = Arc<dyn Fn(DeviceKey, DeviceEvent) + Send + Sync>;

/// The events that the kernel signals, in the order of [`DeviceEventFds`].
const FROM_KERNEL: [(DeviceEvent, Irq); 2] = [
    (DeviceEvent::ReleaseRequested, Irq::Request),
    (DeviceEvent::Failed, Irq::Error),
];

/// The eventfds of one device. Dropping them ends its events.
pub struct DeviceEventFds([Option<EventFd>; 2]);

impl DeviceEventFds {
    /// Asks the kernel to signal the events of a device. The device works without them, too.
    pub fn register(io: &dyn DeviceIo) -> Self {
        Self(FROM_KERNEL.map(|(event, irq)| {
            if io.irq(irq).count == 0 {
                return None;
            }
            let registered = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
                .map_err(|error| error.to_string())
                .and_then(|fd| match io.set_irqs(irq, 0, &[Some(&fd)]) {
                    Ok(()) => Ok(fd),
                    Err(error) => Err(error.to_string()),
                });
            let device = io.name();
            registered
                .inspect_err(|error| {
                    tracing::warn!(
                        device,
                        ?event,
                        error,
                        "an event of the device cannot be registered"
                    )
                })
                .ok()
        }))
    }
}

/// The events of all devices.
pub struct DeviceEvents(Arc<Epoll>);

impl DeviceEvents {
    /// None yet.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Epoll::new()?)))
    }

    /// Watches the eventfds of one more device.
    pub fn watch(&self, DeviceKey(key): DeviceKey, fds: &DeviceEventFds) {
        for (place, fd) in (0..).zip(&fds.0) {
            let Some(fd) = fd else { continue };
            // Edge-triggered, so that nobody has to read the eventfd.
            let set = EpollSet::IN | EpollSet::EDGE_TRIGGERED;
            let event = EpollEvent::new(set, key << 1 | place);
            let added = self.0.ctl(ControlOperation::Add, fd.as_raw_fd(), event);
            if let Err(error) = added {
                tracing::warn!(%error, "cannot watch an event of a device");
            }
        }
    }

    /// An event source for the control loop, which passes the events on to `notify`.
    pub fn listener(&self, notify: &DeviceNotify) -> DeviceEventListener {
        DeviceEventListener {
            epoll: Arc::clone(&self.0),
            notify: Arc::clone(notify),
        }
    }
}

/// Passes on the events that come.
pub struct DeviceEventListener {
    epoll: Arc<Epoll>,
    notify: DeviceNotify,
}

impl DeviceEventListener {
    fn pass_on(&self) {
        let mut ready = [EpollEvent::default(); 16];
        while let Ok(count @ 1..) = self.epoll.wait(0, &mut ready) {
            for data in ready.iter().take(count).map(EpollEvent::data) {
                if let Some((event, _)) = FROM_KERNEL.get((data & 1) as usize) {
                    (self.notify)(DeviceKey(data >> 1), *event);
                }
            }
        }
    }
}

impl MutEventSubscriber for DeviceEventListener {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&*self.epoll, EventSet::IN)) {
            tracing::error!(?error, "cannot watch the events of devices");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.pass_on();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn eventfd() -> EventFd {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap()
    }

    #[test]
    fn each_event_is_told_each_time_until_its_device_goes() {
        let events = DeviceEvents::new().unwrap();
        let [first, second] = [(); 2].map(|()| DeviceEventFds([Some(eventfd()), Some(eventfd())]));
        let none = DeviceEventFds([None, None]);
        let keys = [&first, &none, &second].map(|fds| {
            let key = DeviceKey::unique();
            events.watch(key, fds);
            key
        });
        let told: Arc<Mutex<Vec<(DeviceKey, DeviceEvent)>>> = Arc::default();
        let all = Arc::clone(&told);
        let notify: DeviceNotify =
            Arc::new(move |key, event| all.lock().unwrap().push((key, event)));
        let listener = events.listener(&notify);
        let heard = || {
            listener.pass_on();
            std::mem::take(&mut *told.lock().unwrap())
        };
        assert!(heard().is_empty());
        let raise = |fds: &DeviceEventFds, place: usize| {
            fds.0[place].as_ref().unwrap().write(1).unwrap();
        };
        for _ in 0..2 {
            raise(&second, 0);
            assert_eq!(heard(), [(keys[2], DeviceEvent::ReleaseRequested)]);
        }
        raise(&first, 1);
        assert_eq!(heard(), [(keys[0], DeviceEvent::Failed)]);
        raise(&second, 1);
        drop(second);
        assert!(heard().is_empty());
    }
}
