//! Resets the devices when the guest reboots.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gantry_devices::pci::{BarSpace, PciDevice, PortIndex};

use super::HostDevices;
use crate::process::error::{HostError, cannot};
use crate::process::sandbox::{Role, Sandbox};
use crate::process::threads;

/// How long a reset may take. The kernel waits for some seconds at most.
const RESET_TIMEOUT: Duration = Duration::from_secs(10);

impl HostDevices {
    /// Resets all functions behind the ports in parallel: a host device takes a tenth of a second. The guest
    /// loses the functions whose reset fails or takes too long, and they go into quarantine.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn reset_functions(
        &mut self,
        space: &Arc<impl BarSpace + Send + Sync + 'static>,
    ) -> Result<(), HostError> {
        self.reset_within(space, RESET_TIMEOUT)
    }

    fn reset_within(
        &mut self,
        space: &Arc<impl BarSpace + Send + Sync + 'static>,
        timeout: Duration,
    ) -> Result<(), HostError> {
        let pci = self.slots.pci();
        let ports = pci.ports().map(|(port, ..)| port);
        let behind = ports.flat_map(|port| {
            let functions = pci.functions_behind(port).into_iter();
            functions.map(move |(_, function)| (port, function))
        });
        let sandbox = &self.context.sandbox;
        for port in reset_all(behind.collect(), space, sandbox, timeout)? {
            self.lose(port);
        }
        Ok(())
    }

    /// Takes the devices of a slot, whose reset failed, away from the guest. They go into quarantine.
    fn lose(&mut self, port: PortIndex) {
        for one in self
            .plugged
            .iter_mut()
            .filter(|one| one.status.port == port)
        {
            one.device
                .quarantine("it could not be reset when the guest rebooted");
            let device = one.status.id.as_str();
            tracing::warn!(
                device,
                "the guest goes on without a device that could not be reset"
            );
        }
        self.empty_slot(port, true);
    }
}

/// Resets functions in parallel. Returns the ports of those whose reset failed or took longer than `timeout`.
fn reset_all(
    behind: Vec<(PortIndex, Arc<dyn PciDevice>)>,
    space: &Arc<impl BarSpace + Send + Sync + 'static>,
    sandbox: &Sandbox,
    timeout: Duration,
) -> Result<Vec<PortIndex>, HostError> {
    let mut tasks = Vec::new();
    for (port, function) in behind {
        let space = Arc::clone(space);
        let reset = move || function.reset(&*space);
        let task = threads::spawn(Role::Device, sandbox, reset);
        tasks.push((port, task.map_err(cannot("spawn a thread"))?));
    }
    let deadline = Instant::now() + timeout;
    let mut failed = Vec::new();
    for (port, task) in tasks {
        match task.join_until(deadline) {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "a device could not be reset for the guest's reboot");
            }
            Err(task) => task.abandon(),
        }
        failed.push(port);
    }
    Ok(failed)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;
    use std::sync::Mutex;
    use std::sync::mpsc::channel;

    use gantry_devices::events::PlatformEvents;
    use gantry_devices::pci::{BarGuard, BarPlacement, BarSpaceError, PciSegment};
    use gantry_resources::base::HostPaths;
    use vmm_sys_util::eventfd::EventFd;

    use super::super::DeviceContext;
    use super::*;
    use crate::info::VmEvent;
    use crate::machine::SlotTable;
    use crate::passthrough::testing::attached;
    use crate::process::sandbox::SeccompMode;

    /// A function whose reset calls this.
    struct Resets<F>(F);

    impl<F: Fn() -> io::Result<()> + Send + Sync> PciDevice for Resets<F> {
        fn read_config(&self, _offset: u16, _data: &mut [u8]) {}

        fn write_config(&self, _offset: u16, _data: &[u8]) -> bool {
            false
        }

        fn remap(&self, _space: &dyn BarSpace) {}

        fn reset(&self, _space: &dyn BarSpace) -> io::Result<()> {
            (self.0)()
        }
    }

    struct NoSpace;

    impl BarSpace for NoSpace {
        fn map(&self, _: &BarPlacement) -> Result<BarGuard, BarSpaceError> {
            Ok(Box::new(()))
        }
    }

    #[test]
    fn a_device_that_cannot_be_reset_leaves_the_guest_and_goes_into_quarantine() {
        let mut pci = PciSegment::new([0..=2]).unwrap();
        let ports = [(); 2].map(|()| pci.add_root_port(0).unwrap());
        let pci = Arc::new(pci);
        let events = Arc::new(PlatformEvents::new(ports, EventFd::new(0).unwrap()));
        let told: Arc<Mutex<Vec<VmEvent>>> = Arc::default();
        let all = Arc::clone(&told);
        let context = DeviceContext {
            host: HostPaths::under(Path::new("/nowhere")),
            sandbox: Arc::new(Sandbox::new(SeccompMode::Off).unwrap()),
            events: Arc::new(move |event| all.lock().unwrap().push(event)),
            status: Arc::default(),
            notify: Arc::new(|_, _| {}),
        };
        let slots = SlotTable::new(ports, &pci, &events);
        let mut devices = HostDevices::new(&slots, context).unwrap();
        let (fails, why_it_failed) = attached("01:00.0", || {
            Err(gantry_vfio::Error::Unusable {
                device: "01:00.0".to_owned(),
                why: "it does not come back".to_owned(),
            })
        });
        let (let_go, stuck) = channel::<()>();
        let stuck = Mutex::new(stuck);
        let (hangs, why_it_hung) = attached("02:00.0", move || {
            let _ = stuck.lock().unwrap().recv();
            Ok(())
        });
        devices.plug_at_boot(vec![fails, hangs]).unwrap();

        let soon = Duration::from_millis(100);
        devices.reset_within(&Arc::new(NoSpace), soon).unwrap();
        assert!(devices.statuses().is_empty());
        for port in ports {
            assert!(pci.functions_behind(port).is_empty());
            assert!(!events.is_occupied(port));
        }
        let late = Duration::from_secs(60);
        assert_eq!(
            why_it_failed.recv_timeout(late).unwrap(),
            "its reset failed"
        );
        // While the call still hangs.
        let reason = why_it_hung.recv_timeout(late).unwrap();
        assert_eq!(reason, "it could not be reset when the guest rebooted");
        drop(let_go);
        drop(devices);
        for (id, why) in [
            ("01:00.0", "its reset failed"),
            ("02:00.0", "it could not be reset when the guest rebooted"),
        ] {
            let id = id.to_owned();
            let error = format!("{why}: it goes into quarantine");
            let told = told.lock().unwrap();
            assert!(told.contains(&VmEvent::DeviceError {
                id: id.clone(),
                error
            }));
            assert!(told.contains(&VmEvent::Detached { id, forced: true }));
        }
    }

    #[test]
    fn a_device_whose_reset_fails_or_hangs_is_named_and_the_others_are_reset() {
        let sandbox = Sandbox::new(SeccompMode::Off).unwrap();
        let mut pci = PciSegment::new([0..=4]).unwrap();
        let ports = [(); 3].map(|()| pci.add_root_port(0).unwrap());
        let (let_go, stuck) = channel::<()>();
        let stuck = Mutex::new(stuck);
        let done = Arc::new(Mutex::new(false));
        let good = Arc::clone(&done);
        let functions: [Arc<dyn PciDevice>; 3] = [
            Arc::new(Resets(move || {
                let _ = stuck.lock().map(|stuck| stuck.recv());
                Ok(())
            })),
            Arc::new(Resets(|| Err(io::ErrorKind::TimedOut.into()))),
            Arc::new(Resets(move || {
                *good.lock().unwrap() = true;
                Ok(())
            })),
        ];
        let behind = ports.iter().copied().zip(functions).collect();
        // Long enough for the two that answer.
        let timeout = Duration::from_secs(2);
        let failed = reset_all(behind, &Arc::new(NoSpace), &sandbox, timeout).unwrap();
        assert_eq!(failed, ports[..2]);
        assert!(*done.lock().unwrap());
        drop(let_go);
    }
}
