//! Devices that hang in every access, with a vCPU in it, or that have died: nobody waits for them without an end.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use gantry_devices::pci::registers::{COMMAND, COMMAND_MEMORY};

use super::HostDevices;
use super::testing::{Told, plug, two_slots};
use crate::info::VmEvent;
use crate::machine::NoSpace;
use crate::passthrough::testing::{Gate, attached, attached_behind};

/// Far more than what must not wait takes, on a busy machine too, and less than a test may.
const LATE: Duration = Duration::from_secs(60);

/// A VM with a device that hangs, and another. A vCPU is in the first one's command register.
struct Stuck {
    devices: HostDevices,
    told: Told,
    gate: Arc<Gate>,
    vcpu: Option<thread::JoinHandle<()>>,
    reasons: std::sync::mpsc::Receiver<String>,
}

impl Stuck {
    fn new() -> Self {
        let (mut devices, pci, _events, told) = two_slots();
        let gate = Arc::<Gate>::default();
        let (hangs, reasons) = attached_behind("01:00.0", &gate);
        let (good, _) = attached("02:00.0", || Ok(()));
        plug(&mut devices, [hangs, good]);
        let (port, ..) = pci.ports().next().unwrap();
        let (_, function) = pci.functions_behind(port).remove(0);
        gate.close();
        let vcpu = thread::spawn(move || {
            if function.write_config(COMMAND, &COMMAND_MEMORY.to_le_bytes()) {
                function.remap(&NoSpace);
            }
        });
        gate.wait_until_stuck();
        Self {
            devices,
            told,
            gate,
            vcpu: Some(vcpu),
            reasons,
        }
    }

    fn names(&self) -> Vec<String> {
        let statuses = self.devices.statuses().into_iter();
        statuses.map(|status| status.id).collect()
    }

    fn until_told(&self, event: &VmEvent) {
        let deadline = Instant::now() + LATE;
        while !self.told.lock().unwrap().contains(event) {
            assert!(Instant::now() < deadline, "{event:?} is never told");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The device answers at last: all that was begun comes to its end.
    fn ends(mut self, aside: Option<&str>) {
        self.gate.open();
        self.vcpu.take().unwrap().join().unwrap();
        for id in ["01:00.0", "02:00.0"] {
            let (id, forced) = (id.to_owned(), true);
            if !self.names().contains(&id) {
                self.until_told(&VmEvent::Detached { id, forced });
            }
        }
        drop(self.devices);
        assert_eq!(self.reasons.try_iter().next().as_deref(), aside);
    }
}

#[test]
fn a_forced_detach_does_not_wait_for_a_vcpu_that_is_stuck_in_the_device() {
    let mut stuck = Stuck::new();
    let ports: Vec<_> = stuck
        .devices
        .plugged
        .iter()
        .map(|one| one.status.port)
        .collect();
    stuck.devices.empty_slot(ports[0], true);
    assert_eq!(stuck.names(), ["02:00.0"]);
    // Its slot is not given to another device while the vCPU may still be in it.
    assert!(stuck.devices.slots.is_draining(ports[0]));
    assert_eq!(stuck.devices.counters(&Default::default()).len(), 1);
    stuck.devices.empty_slot(ports[1], true);
    stuck.until_told(&VmEvent::Detached {
        id: "02:00.0".to_owned(),
        forced: true,
    });
    assert!(!stuck.devices.slots.is_draining(ports[1]));
    assert!(stuck.devices.slots.is_draining(ports[0]));
    // A guest's reset goes on without the one that does not stop.
    stuck.devices.wait_for_leaving();
    stuck.devices.reset(&[]);
    stuck.ends(None);
}

#[test]
fn a_reboot_goes_on_without_a_device_that_a_vcpu_is_stuck_in() {
    let mut stuck = Stuck::new();
    stuck.devices.reset(&[]);
    stuck
        .devices
        .reset_within(Duration::from_millis(100))
        .unwrap();
    assert_eq!(stuck.names(), ["02:00.0"]);
    stuck.ends(Some("it could not be reset when the guest rebooted"));
}

#[test]
fn a_device_that_reads_all_ones_is_set_aside_when_it_leaves() {
    let (mut devices, _pci, _events, told) = two_slots();
    let gate = Arc::<Gate>::default();
    let (device, reasons) = attached_behind("01:00.0", &gate);
    plug(&mut devices, [device]);
    gate.die();
    drop(devices);
    let why = reasons.recv_timeout(LATE).unwrap();
    assert!(why.contains("all-ones"), "{why}");
    let error = format!("{why}: it goes into quarantine");
    let id = "01:00.0".to_owned();
    let told = told.lock().unwrap();
    assert!(
        told.contains(&VmEvent::DeviceError { id, error }),
        "{told:?}"
    );
}
