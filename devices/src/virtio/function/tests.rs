use std::sync::atomic::{AtomicBool, Ordering};

use super::super::testing::{AVAILABLE, DESCRIPTORS, RAM, USED, ram};
use super::super::{VirtioKind, signals::NO_VECTOR};
use super::*;
use crate::pci::IntxLine;
use crate::pci::capability::walk_standard;
use crate::pci::fake::FakeSpace;
use crate::pci::interrupts::{InterruptBackend, MsiRoute};

const FEATURE: u64 = 1 << 5;
const VERSION_1: u64 = 1 << 32;
const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const NEEDS_RESET: u8 = 64;

/// The features of an activation, and the number and the used ring of each queue.
type Started = (u64, Vec<(u16, u64)>);

/// Notes what it is told, and stops when it may.
#[derive(Default)]
struct Fake {
    started: Mutex<Option<Started>>,
    running: AtomicBool,
    stays: AtomicBool,
}

impl VirtioBackend for Fake {
    fn kind(&self) -> VirtioKind {
        VirtioKind {
            id: 2,
            class: 0x01_80_00,
        }
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 32]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = at as u8;
        }
    }

    fn start(&self, activation: Activation) {
        let queues = activation.queues.iter();
        let queues = queues.map(|active| (active.index, active.queue.used_ring()));
        *self.started.lock().unwrap() = Some((activation.features, queues.collect()));
        self.running.store(true, Ordering::Relaxed);
    }

    fn stop(&self) {
        self.running
            .fetch_and(self.stays.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        !self.running.load(Ordering::Relaxed)
    }

    fn wait_stopped(&self, _timeout: Duration) -> bool {
        self.is_stopped()
    }
}

struct NoRoutes;

impl MsiRouter for NoRoutes {
    fn route(&self) -> io::Result<Box<dyn MsiRoute>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn publish(&self) -> io::Result<()> {
        Ok(())
    }

    fn line(&self, _gsi: u32) -> io::Result<Box<dyn IntxLine>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

struct Rig {
    backend: Arc<Fake>,
    function: Arc<VirtioFunction>,
}

impl Rig {
    fn new() -> Self {
        let backend = Arc::new(Fake::default());
        let host = VirtioHost {
            ram: ram(),
            router: Arc::new(NoRoutes),
            address_bits: 40,
        };
        let function = VirtioFunction::new("d", backend.clone(), host, || {});
        Self {
            backend,
            function: function.unwrap(),
        }
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut data = [0; N];
        self.function.device.read(at, &mut data);
        data
    }

    fn write(&self, at: u64, data: &[u8]) {
        self.function.device.write(at, data);
    }

    fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    fn config(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.function.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Says that the driver knows these features, and whether the device agreed.
    fn negotiate(&self, features: u64) -> bool {
        self.write(0x14, &[1]);
        self.write(0x14, &[3]);
        for half in 0..2 {
            self.write(0x08, &[half, 0, 0, 0]);
            let bits = (features >> (32 * u32::from(half))) as u32;
            self.write(0x0c, &bits.to_le_bytes());
        }
        self.write(0x14, &[3 | FEATURES_OK]);
        self.status() & FEATURES_OK != 0
    }

    fn set_up_queue(&self, index: u16, used: u64) {
        self.write(0x16, &index.to_le_bytes());
        self.write(0x18, &8_u16.to_le_bytes());
        for (register, address) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, used)] {
            self.write(register, &(address as u32).to_le_bytes());
            self.write(register + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.write(0x1c, &[1, 0]);
    }

    fn finish(&self) {
        self.write(0x14, &[3 | FEATURES_OK | DRIVER_OK]);
    }
}

#[test]
fn its_structures_are_found_by_their_capabilities() {
    let rig = Rig::new();
    assert_eq!(rig.config(0), 0x1042_1af4);
    let capabilities = walk_standard(|offset| rig.config(offset));
    let kinds: Vec<_> = capabilities
        .iter()
        .map(|capability| (capability.id, (rig.config(capability.offset) >> 24) as u8))
        .collect();
    let vendor = CapabilityId::VENDOR_SPECIFIC;
    assert_eq!(kinds[0].0, CapabilityId::MSI_X);
    assert_eq!(
        kinds[1..],
        [
            (vendor, 1),
            (vendor, 3),
            (vendor, 4),
            (vendor, 2),
            (vendor, 5)
        ]
    );
    assert_eq!(rig.config(MSIX_CAP) >> 16, 2, "three vectors");
}

#[test]
fn a_driver_that_agrees_on_features_starts_the_queues_it_has_enabled() {
    let rig = Rig::new();
    assert_eq!(rig.read(0x12), [2, 0], "two queues");
    assert!(rig.negotiate(VERSION_1 | FEATURE));
    rig.set_up_queue(1, USED);
    rig.finish();
    let started = rig.backend.started.lock().unwrap().take();
    assert_eq!(started, Some((VERSION_1 | FEATURE, vec![(1, USED)])));
    // Ready once is ready.
    rig.finish();
    assert!(rig.backend.started.lock().unwrap().is_none());
    assert_eq!(rig.status(), 3 | FEATURES_OK | DRIVER_OK);
}

#[test]
fn features_that_are_not_offered_and_legacy_drivers_are_refused() {
    for features in [FEATURE, VERSION_1 | 1 << 7, 0] {
        let rig = Rig::new();
        assert!(!rig.negotiate(features), "{features:#x}");
        rig.set_up_queue(0, USED);
        rig.finish();
        assert!(rig.backend.started.lock().unwrap().is_none());
    }
}

#[test]
fn what_is_agreed_and_enabled_stays_until_the_reset() {
    let rig = Rig::new();
    rig.negotiate(VERSION_1);
    rig.set_up_queue(0, USED);
    rig.write(0x0c, &u32::MAX.to_le_bytes());
    rig.write(0x30, &u32::MAX.to_le_bytes());
    rig.write(0x18, &4_u16.to_le_bytes());
    assert_eq!(
        (rig.read(0x0c), rig.read(0x30)),
        ([1, 0, 0, 0], (USED as u32).to_le_bytes())
    );
    assert_eq!(rig.read(0x18), [8, 0]);
    rig.write(0x14, &[0]);
    assert_eq!(rig.status(), 0);
    assert_eq!((rig.read(0x18), rig.read::<4>(0x30)), ([16, 0], [0; 4]));
}

#[test]
fn a_queue_that_cannot_be_served_asks_for_a_reset() {
    for used in [RAM - 8, USED + 1, u64::MAX - 3] {
        let rig = Rig::new();
        rig.negotiate(VERSION_1);
        rig.set_up_queue(0, used);
        rig.finish();
        assert!(rig.backend.started.lock().unwrap().is_none(), "{used:#x}");
        assert_ne!(rig.status() & NEEDS_RESET, 0);
        rig.write(0x14, &[0]);
        assert_eq!(rig.status(), 0);
    }
}

#[test]
fn a_reset_is_over_when_the_device_has_left_ram() {
    let rig = Rig::new();
    rig.negotiate(VERSION_1);
    rig.set_up_queue(0, USED);
    rig.finish();
    rig.backend.stays.store(true, Ordering::Relaxed);
    rig.write(0x14, &[0]);
    assert_ne!(rig.status(), 0);
    rig.write(0x14, &[1]);
    rig.backend.stays.store(false, Ordering::Relaxed);
    rig.backend.stop();
    assert_eq!(rig.status(), 0, "what a driver wrote too early is lost");
}

#[test]
fn a_device_that_is_retired_has_left_ram_and_decodes_no_more() {
    let rig = Rig::new();
    rig.function
        .write_config(COMMAND, &COMMAND_MEMORY.to_le_bytes());
    assert!(rig.negotiate(VERSION_1));
    rig.set_up_queue(0, USED);
    rig.finish();
    rig.function.retire().unwrap();
    assert!(rig.backend.is_stopped());
    assert_eq!(rig.config(COMMAND) as u16 & COMMAND_MEMORY, 0);
}

#[test]
fn a_change_of_the_configuration_is_seen_by_its_generation() {
    let rig = Rig::new();
    let before = rig.read::<1>(0x15);
    rig.function.config_changed();
    assert_eq!((before, rig.read::<1>(0x15)), ([0], [1]));
}

#[test]
fn a_reset_of_the_machine_forgets_the_driver() {
    let rig = Rig::new();
    rig.negotiate(VERSION_1);
    rig.set_up_queue(0, USED);
    rig.write(0x1a, &[1, 0]);
    rig.finish();
    rig.function.write_config(COMMAND, &[6, 0]);
    rig.function.reset(&FakeSpace::default()).unwrap();
    assert!(rig.backend.is_stopped());
    assert_eq!(rig.status(), 0);
    assert_eq!(rig.config(COMMAND) & 0xffff, 0);
    assert_eq!(rig.function.device.signals.queue_vector(0), NO_VECTOR);
}

#[test]
fn the_configuration_space_reaches_the_bar() {
    let rig = Rig::new();
    let select = |offset: u64, len: u32| {
        rig.function
            .write_config(ACCESS_CAP + 8, &(offset as u32).to_le_bytes());
        rig.function
            .write_config(ACCESS_CAP + 12, &len.to_le_bytes());
    };
    select(DEVICE_CONFIG + 4, 4);
    assert_eq!(rig.config(ACCESS_DATA), 0x0706_0504);
    select(0x16, 2);
    rig.function.write_config(ACCESS_DATA, &[1, 0]);
    assert_eq!(rig.read(0x16), [1, 0]);
    select(DOORBELLS + 4, 2);
    rig.function.write_config(ACCESS_DATA, &[1, 0]);
    assert_eq!(rig.function.device.doorbells[1].read().unwrap(), 1);
    // Not a place in the BAR.
    select(BAR_SIZE, 4);
    assert_eq!(rig.config(ACCESS_DATA), 0);
    select(u64::from(u32::MAX), 1);
    rig.function.write_config(ACCESS_DATA, &[1]);
}

#[test]
fn any_access_ends() {
    let rig = Rig::new();
    for at in 0..BAR_SIZE {
        for len in [1, 2, 4, 8] {
            rig.write(at, &[0xff; 8][..len]);
            rig.function.device.read(at, &mut [0; 8][..len]);
        }
    }
    for offset in 0..=0xff {
        rig.function.write_config(offset, &[0xff]);
        rig.function.read_config(offset, &mut [0]);
    }
}

#[test]
fn an_interrupt_waits_for_its_vector_and_one_without_is_lost() {
    let signals = Signals::new(1);
    let mut backend = SignalBackend::new("d".into(), Arc::clone(&signals));
    let signal = QueueSignal::new(&signals, 0);
    let trigger = EventFd::new(EFD_NONBLOCK).unwrap();
    signal.used();
    signals.set_queue_vector(0, 2);
    assert_eq!(signals.queue_vector(0), NO_VECTOR, "there are two");
    signals.set_queue_vector(0, 1);
    signal.used();
    assert!(trigger.read().is_err());
    backend.connect(1, &trigger, &Default::default()).unwrap();
    assert_eq!(trigger.read().unwrap(), 1);
    signal.used();
    signal.used();
    assert_eq!(trigger.read().unwrap(), 2);
    backend.disable().unwrap();
    signal.used();
    assert!(trigger.read().is_err());
}
