//! Devices on their way back to the host, those of each slot on a thread of their own: one that hangs holds up
//! neither the control thread nor the others.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use gantry_devices::pci::PortIndex;

use crate::sandbox::Sandbox;
use crate::threads::{self, Role, Task};

/// The slots that nothing may come to yet: what was in them may still be reached by the guest, and write to
/// its memory.
#[derive(Debug, Clone, Default)]
pub struct Leaving(Arc<Mutex<BTreeSet<PortIndex>>>);

impl Leaving {
    /// Whether something is on its way out of a slot.
    pub fn has(&self, port: PortIndex) -> bool {
        self.lock().contains(&port)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<PortIndex>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Dropping it says that the devices of a slot are taken away from the guest: its slot can be filled again.
pub struct Retired {
    leaving: Leaving,
    port: Option<PortIndex>,
    // Whoever hears it hears that it was dropped.
    _told: Sender<()>,
}

impl Drop for Retired {
    fn drop(&mut self) {
        if let Some(port) = self.port {
            self.leaving.lock().remove(&port);
        }
    }
}

/// The devices that are being closed.
pub struct Closing {
    sandbox: Arc<Sandbox>,
    leaving: Leaving,
    under_way: Vec<UnderWay>,
}

struct UnderWay {
    /// What the devices are called, for the log.
    names: String,
    retired: Receiver<()>,
    task: Task<()>,
}

impl Closing {
    /// None yet; the slots that are not free yet are in `leaving`.
    pub fn new(sandbox: &Arc<Sandbox>, leaving: Leaving) -> Self {
        Self {
            sandbox: Arc::clone(sandbox),
            leaving,
            under_way: Vec::new(),
        }
    }

    /// Has `close` take the devices of a slot, or of none, away from the guest, drop what it is given, and
    /// close them.
    pub fn begin(
        &mut self,
        port: Option<PortIndex>,
        names: String,
        close: impl FnOnce(Retired) + Send + 'static,
    ) {
        self.under_way.retain(|one| !one.task.is_finished());
        self.leaving.lock().extend(port);
        let (told, retired) = channel();
        let guard = Retired {
            leaving: self.leaving.clone(),
            port,
            _told: told,
        };
        match threads::spawn(Role::Attach, &self.sandbox, move || close(guard)) {
            Ok(task) => self.under_way.push(UnderWay {
                names,
                retired,
                task,
            }),
            // The devices have been dropped, hence closed, with what was to run.
            Err(error) => tracing::warn!(%error, "no thread for closing {names}"),
        }
    }

    /// Waits until all devices that leave are taken away from the guest. Returns those that are not by the
    /// deadline.
    pub fn wait_retired(&self, deadline: Instant) -> Vec<&str> {
        let late = self.under_way.iter().filter(|one| {
            let left = deadline.saturating_duration_since(Instant::now());
            one.retired.recv_timeout(left) == Err(RecvTimeoutError::Timeout)
        });
        late.map(|one| one.names.as_str()).collect()
    }

    /// Waits until all are closed. What is not by the deadline is left to itself: its lease ends when the
    /// kernel comes back from it, or with the process.
    pub fn finish(&mut self, deadline: Instant) {
        for one in self.under_way.drain(..) {
            if let Err(task) = one.task.join_until(deadline) {
                let names = one.names;
                tracing::error!("the host's kernel does not come back from closing {names}");
                task.abandon();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use gantry_devices::pci::PciSegment;

    use super::*;
    use crate::sandbox::SeccompMode;

    #[test]
    fn a_device_that_hangs_holds_up_neither_its_owner_nor_other_devices() {
        let sandbox = Arc::new(Sandbox::new(SeccompMode::Off).unwrap());
        let mut pci = PciSegment::new([0..=4]).unwrap();
        let [hung, slow, good] = [(); 3].map(|()| pci.add_root_port(0).unwrap());
        let leaving = Leaving::default();
        let mut closing = Closing::new(&sandbox, leaving.clone());
        let (let_go, stuck) = channel::<()>();
        let stuck = Arc::new(Mutex::new(stuck));
        let later = Arc::clone(&stuck);
        // Stuck in a register access, and in the kernel's reset at the close.
        closing.begin(Some(hung), "hung".to_owned(), move |retired| {
            let _ = stuck.lock().map(|stuck| stuck.recv());
            drop(retired);
        });
        closing.begin(Some(slow), "slow".to_owned(), move |retired| {
            drop(retired);
            let _ = later.lock().map(|stuck| stuck.recv());
        });
        let (told, closed) = channel();
        closing.begin(Some(good), "good".to_owned(), move |retired| {
            drop(retired);
            told.send(()).unwrap();
        });
        closed.recv().unwrap();
        let soon = || Instant::now() + Duration::from_millis(50);
        // The others are waited for as long as it takes.
        while leaving.has(slow) || leaving.has(good) {
            std::thread::yield_now();
        }
        assert!(leaving.has(hung));
        assert_eq!(closing.wait_retired(soon()), ["hung"]);
        closing.finish(soon());
        assert!(closing.under_way.is_empty());
        drop(let_go);
        while leaving.has(hung) {
            std::thread::yield_now();
        }
    }
}
