//! Resets the devices when the guest reboots.

use std::collections::BTreeSet;
use std::time::Duration;

use gantry_devices::pci::PortIndex;

use super::HostDevices;
use crate::passthrough::{RESET_TIMEOUT, reset_all, resets_of};
use crate::process::error::{HostError, cannot};
use crate::virtio::VirtioDevice;

impl HostDevices {
    /// Resets all devices in parallel, those on one bus together if one of them has no reset of its own. The guest
    /// loses the devices whose reset fails or takes too long, and they go into quarantine.
    ///
    /// # Errors
    /// No thread could be made, or a virtio device does not leave guest RAM.
    pub fn reset_functions(&mut self) -> Result<(), HostError> {
        self.reset_within(RESET_TIMEOUT)
    }

    pub(super) fn reset_within(&mut self, timeout: Duration) -> Result<(), HostError> {
        let virtio = || self.plugged.iter().filter_map(|one| one.device.virtio());
        virtio().for_each(VirtioDevice::stop);
        let passed = self.plugged.iter();
        let passed = passed.filter_map(|one| Some((one.status.port, one.device.passed()?)));
        let (ports, devices): (Vec<PortIndex>, Vec<_>) = passed.unzip();
        let failed = reset_all(resets_of(&devices), &self.context.sandbox, timeout)?;
        let failed = failed.into_iter().filter_map(|index| ports.get(index));
        let ports: BTreeSet<PortIndex> = failed.copied().collect();
        // Unlike a device of the host, one that does not stop would write to the memory of the guest that boots.
        let reset = virtio().try_for_each(VirtioDevice::reset);
        reset.map_err(cannot("reset a virtio device for the guest's reboot"))?;
        for port in ports {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use super::super::testing::{plug, two_slots};
    use super::*;
    use crate::info::VmEvent;
    use crate::passthrough::testing::{attached, attached_on_bus};

    #[test]
    fn the_functions_of_a_bus_are_reset_at_once_and_leave_together_if_that_fails() {
        let (mut devices, pci, _events, _told) = two_slots();
        let count = Arc::new(AtomicUsize::new(0));
        let fails = Arc::new(AtomicUsize::new(usize::MAX));
        // Of functions without function 0, each has a slot of its own.
        let bus = ["01:00.1", "01:00.2"];
        let (both, reasons): (Vec<_>, Vec<_>) = bus
            .iter()
            .map(|name| {
                let (count, fails) = (Arc::clone(&count), Arc::clone(&fails));
                attached_on_bus(name, &bus, move || {
                    let done = count.fetch_add(1, Ordering::SeqCst);
                    match done == fails.load(Ordering::SeqCst) {
                        true => Err(gantry_vfio::Error::Unusable {
                            device: "01:00".to_owned(),
                            why: "it does not come back".to_owned(),
                        }),
                        false => Ok(()),
                    }
                })
            })
            .unzip();
        plug(&mut devices, both);
        devices.reset_functions().unwrap();
        assert_eq!(count.load(Ordering::SeqCst), 1);
        assert_eq!(devices.statuses().len(), 2);
        fails.store(1, Ordering::SeqCst);
        devices.reset_functions().unwrap();
        assert_eq!(count.load(Ordering::SeqCst), 2);
        assert!(devices.statuses().is_empty());
        for (port, ..) in pci.ports() {
            assert!(pci.functions_behind(port).is_empty());
        }
        for reasons in reasons {
            let late = Duration::from_secs(60);
            assert_eq!(reasons.recv_timeout(late).unwrap(), "its reset failed");
        }
    }

    #[test]
    fn a_device_that_cannot_be_reset_leaves_the_guest_and_goes_into_quarantine() {
        let (mut devices, pci, events, told) = two_slots();
        let ports: Vec<_> = pci.ports().map(|(port, ..)| port).collect();
        let (fails, why_it_failed) = attached("01:00.0", || {
            Err(gantry_vfio::Error::Unusable {
                device: "01:00.0".to_owned(),
                why: "it does not come back".to_owned(),
            })
        });
        let (let_go, stuck) = channel::<()>();
        let stuck = std::sync::Mutex::new(stuck);
        let (hangs, why_it_hung) = attached("02:00.0", move || {
            let _ = stuck.lock().unwrap().recv();
            Ok(())
        });
        plug(&mut devices, [fails, hangs]);

        let soon = Duration::from_millis(100);
        devices.reset_within(soon).unwrap();
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
}
