//! Closing devices. Each slot's devices have a thread, so that a device that hangs delays neither the control
//! thread nor other devices.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Instant;

use super::SlotDevice;
use crate::info::{EventSink, VmEvent};
use crate::machine::DrainGuard;
use crate::process::sandbox::{Role, Sandbox};
use crate::process::threads::{self, Task};

/// Dropping it says that the guest can no longer reach the devices: their slot is free.
pub struct Retired {
    _slot: Option<DrainGuard>,
    // Its receiver learns that it was dropped.
    _told: Sender<()>,
}

/// The devices that are being closed.
pub struct Closing {
    sandbox: Arc<Sandbox>,
    pending: Vec<PendingClose>,
}

struct PendingClose {
    /// What the devices are called, for the log.
    names: String,
    retired: Receiver<()>,
    task: Task<()>,
}

impl Closing {
    /// None yet.
    pub fn new(sandbox: &Arc<Sandbox>) -> Self {
        Self {
            sandbox: Arc::clone(sandbox),
            pending: Vec::new(),
        }
    }

    /// Runs `close` on a thread. It must retire the devices, drop its argument, and then close the devices.
    pub fn start(
        &mut self,
        slot: Option<DrainGuard>,
        names: String,
        close: impl FnOnce(Retired) + Send + 'static,
    ) {
        self.pending.retain(|one| !one.task.is_finished());
        let (told, retired) = channel();
        let guard = Retired {
            _slot: slot,
            _told: told,
        };
        match threads::spawn(Role::Attach, &self.sandbox, move || close(guard)) {
            Ok(task) => self.pending.push(PendingClose {
                names,
                retired,
                task,
            }),
            // The devices have been dropped, hence closed, with the closure.
            Err(error) => tracing::warn!(%error, "cannot start a thread to close {names}"),
        }
    }

    /// Waits until all devices that leave are retired. Returns the names of those that are not by the deadline.
    pub fn wait_retired(&self, deadline: Instant) -> Vec<&str> {
        let late = self.pending.iter().filter(|one| {
            let left = deadline.saturating_duration_since(Instant::now());
            one.retired.recv_timeout(left) == Err(RecvTimeoutError::Timeout)
        });
        late.map(|one| one.names.as_str()).collect()
    }

    /// Waits until all devices are closed. Those that are not by the deadline are abandoned: their leases end
    /// when the kernel returns from the close, or with the process.
    pub fn finish(&mut self, deadline: Instant) {
        for one in self.pending.drain(..) {
            if let Err(task) = one.task.join_until(deadline) {
                let names = one.names;
                tracing::error!(
                    "the host's kernel hangs while it closes {names}: the lease ends when that call returns"
                );
                task.abandon();
            }
        }
    }
}

/// Retires the devices of a slot, drops `retired`, closes the devices, and sends events. `forced` says whether
/// the guest did not release them; it is `None` for devices that were never announced.
pub fn take_away(
    devices: Vec<SlotDevice>,
    forced: Option<bool>,
    (sandbox, events): (&Sandbox, &EventSink),
    retired: Retired,
) {
    devices.iter().for_each(SlotDevice::retire);
    drop(retired);
    for device in &devices {
        if let Some(why) = device.quarantine_reason() {
            events(VmEvent::DeviceError {
                id: device.id().to_owned(),
                error: format!("{why}: it goes into quarantine"),
            });
        }
    }
    let ids: Vec<_> = devices.iter().map(|one| one.id().to_owned()).collect();
    close(devices, sandbox);
    if let Some(forced) = forced {
        ids.into_iter()
            .for_each(|id| events(VmEvent::Detached { id, forced }));
    }
}

/// Closes devices side by side: the kernel resets each as it is closed.
fn close(devices: Vec<SlotDevice>, sandbox: &Sandbox) {
    let closing: Vec<_> = devices
        .into_iter()
        // Without a thread the device has been dropped, hence closed, here.
        .filter_map(|device| threads::spawn(Role::Device, sandbox, move || drop(device)).ok())
        .collect();
    drop(closing);
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use gantry_devices::events::PlatformEvents;
    use gantry_devices::pci::PciSegment;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::machine::{NoSpace, SlotTable};
    use crate::process::sandbox::SeccompMode;

    #[test]
    fn a_device_that_hangs_holds_up_neither_its_owner_nor_other_devices() {
        let sandbox = Arc::new(Sandbox::new(SeccompMode::Off).unwrap());
        let mut pci = PciSegment::new([0..=4]).unwrap();
        let [hung, slow, good] = [(); 3].map(|()| pci.add_root_port(0).unwrap());
        let events = PlatformEvents::new([hung, slow, good], EventFd::new(0).unwrap());
        let slots = SlotTable::new(
            [hung, slow, good],
            &Arc::new(pci),
            Arc::new(NoSpace),
            &Arc::new(events),
        );
        let mut closing = Closing::new(&sandbox);
        let (let_go, stuck) = channel::<()>();
        let stuck = Arc::new(Mutex::new(stuck));
        let later = Arc::clone(&stuck);
        // Stuck in a register access, and in the kernel's reset at the close.
        closing.start(Some(slots.drain(hung)), "hung".to_owned(), move |retired| {
            let _ = stuck.lock().map(|stuck| stuck.recv());
            drop(retired);
        });
        closing.start(Some(slots.drain(slow)), "slow".to_owned(), move |retired| {
            drop(retired);
            let _ = later.lock().map(|stuck| stuck.recv());
        });
        let (told, closed) = channel();
        closing.start(Some(slots.drain(good)), "good".to_owned(), move |retired| {
            drop(retired);
            told.send(()).unwrap();
        });
        closed.recv().unwrap();
        let soon = || Instant::now() + Duration::from_millis(50);
        // The other devices finish by themselves.
        while slots.is_draining(slow) || slots.is_draining(good) {
            std::thread::yield_now();
        }
        assert!(slots.is_draining(hung));
        assert_eq!(closing.wait_retired(soon()), ["hung"]);
        closing.finish(soon());
        assert!(closing.pending.is_empty());
        drop(let_go);
        while slots.is_draining(hung) {
            std::thread::yield_now();
        }
    }
}
