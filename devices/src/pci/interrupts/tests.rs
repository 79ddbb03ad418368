//! Interrupts of an emulated device: the modes, and the vectors that reach the guest.

use std::collections::BTreeMap;
use std::io;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

/// What the device and the routes did.
#[derive(Default)]
struct Log {
    calls: Vec<String>,
    enabled: bool,
    /// The trigger of each connected vector, as the device has it.
    device: BTreeMap<u16, EventFd>,
    /// The trigger and the message of each route, by number.
    routes: BTreeMap<usize, (EventFd, Option<MsiMessage>)>,
    next: usize,
    /// The trigger of the pin, as the device has it.
    pin: Option<EventFd>,
    /// The lines that are connected.
    lines: Vec<u32>,
}

type Shared = Arc<Mutex<Log>>;

struct Device(Shared);

impl InterruptBackend for Device {
    fn name(&self) -> &str {
        "emulated"
    }

    fn enable(
        &mut self,
        kind: MessageKind,
        vectors: u16,
        triggers: &Triggers,
    ) -> Result<u16, BackendError> {
        let mut log = self.0.lock().unwrap();
        log.calls.push(format!("enable {kind:?} {vectors}"));
        log.enabled = true;
        for vector in 0..vectors {
            if let Some(trigger) = triggers.get(vector) {
                log.device.insert(vector, trigger.try_clone().unwrap());
            }
        }
        Ok(vectors)
    }

    fn connect(
        &mut self,
        vector: u16,
        trigger: &EventFd,
        _connected: &Triggers,
    ) -> Result<(), ConnectError> {
        let mut log = self.0.lock().unwrap();
        log.device.insert(vector, trigger.try_clone().unwrap());
        Ok(())
    }

    fn connect_pin(&mut self, line: &dyn IntxLine) -> Result<(), BackendError> {
        let mut log = self.0.lock().unwrap();
        log.calls.push("connect pin".to_owned());
        log.enabled = true;
        log.pin = Some(line.trigger().try_clone()?);
        Ok(())
    }

    fn disable(&mut self) -> Result<(), BackendError> {
        let mut log = self.0.lock().unwrap();
        if std::mem::take(&mut log.enabled) {
            log.calls.push("disable".into());
        }
        log.device.clear();
        log.pin = None;
        Ok(())
    }
}

struct Router(Shared);

struct Route(Shared, usize, EventFd);

impl MsiRouter for Router {
    fn route(&self) -> io::Result<Box<dyn MsiRoute>> {
        let trigger = EventFd::new(EFD_NONBLOCK)?;
        let mut log = self.0.lock().unwrap();
        let number = log.next;
        log.next += 1;
        log.routes.insert(number, (trigger.try_clone()?, None));
        Ok(Box::new(Route(Arc::clone(&self.0), number, trigger)))
    }

    fn publish(&self) -> io::Result<()> {
        Ok(())
    }

    fn line(&self, gsi: u32) -> io::Result<Box<dyn IntxLine>> {
        self.0.lock().unwrap().lines.push(gsi);
        let events = [EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?];
        Ok(Box::new(Line(Arc::clone(&self.0), gsi, events)))
    }
}

struct Line(Shared, u32, [EventFd; 2]);

impl IntxLine for Line {
    fn trigger(&self) -> &EventFd {
        &self.2[0]
    }

    fn resample(&self) -> &EventFd {
        &self.2[1]
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut log = self.0.lock().unwrap();
        log.lines.retain(|gsi| *gsi != self.1);
    }
}

impl MsiRoute for Route {
    fn prepare(&self, _message: MsiMessage) {}

    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut log = self.0.lock().unwrap();
        log.routes.get_mut(&self.1).unwrap().1 = message;
        Ok(())
    }

    fn pending(&self) -> bool {
        let held = self.0.lock().unwrap().routes[&self.1].1.is_none();
        held && self.2.read().is_ok_and(|count| self.2.write(count).is_ok())
    }

    fn trigger(&self) -> &EventFd {
        &self.2
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        self.0.lock().unwrap().routes.remove(&self.1);
    }
}

/// A device with a pin, four MSI vectors, which have masks, and three of MSI-X in its BAR 1.
struct Rig(Shared, Interrupts<Device>, [u8; MSI_MAX_LEN]);

impl Rig {
    fn new() -> Self {
        let log = Shared::default();
        let at = |offset| InBar { bar: 1, offset };
        let layout = MsixLayout {
            vectors: 3,
            table: at(0),
            pba: at(0x800),
        };
        let structures = MsixStructures::new(&layout, |_| 0x1000).unwrap();
        let msi = MsiLayout::from_control(0x0184);
        let router = Arc::new(Router(Arc::clone(&log)));
        let device = Device(Arc::clone(&log));
        let interrupts = Interrupts::new(Some(structures), Some(msi), device, router);
        Self(log, interrupts, [0; MSI_MAX_LEN])
    }

    fn msi(&mut self, offset: usize, data: &[u8]) {
        self.2[offset..offset + data.len()].copy_from_slice(data);
        self.1.write_msi(&self.2);
        self.follow(false);
    }

    fn msix(&self, control: u16) {
        self.1.write_msix_control(control);
        self.follow(false);
    }

    /// What the owner of the function does after a write of the guest.
    fn follow(&self, enabled: bool) {
        assert!(self.1.switch(self.1.wanted(enabled)));
    }

    /// Unmasks a vector of MSI-X, with 0x80 and its number as data.
    fn unmask(&self, vector: u8) {
        let at = 16 * u64::from(vector);
        assert!(self.1.write(1, at, &0xfee0_0000_u64.to_le_bytes()));
        assert!(
            self.1
                .write(1, at + 8, &[0x80 | vector, 0, 0, 0, 0, 0, 0, 0])
        );
    }

    fn raise(&self, vector: u16) {
        self.0.lock().unwrap().device[&vector].write(1).unwrap();
    }

    fn connected(&self) -> Vec<u16> {
        self.0.lock().unwrap().device.keys().copied().collect()
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().calls)
    }

    /// The data of the interrupts that the guest has received since the last time.
    fn received(&self) -> Vec<u32> {
        let log = self.0.lock().unwrap();
        let received = log.routes.values().filter_map(|(trigger, message)| {
            let message = (*message)?;
            trigger.read().is_ok().then_some(message.data)
        });
        received.collect()
    }
}

#[test]
fn an_emulated_device_raises_msix_vectors() {
    let rig = Rig::new();
    rig.unmask(2);
    assert!(rig.connected().is_empty());
    rig.msix(0x8000);
    assert_eq!(rig.calls(), ["enable Msix 3"]);
    assert_eq!(rig.connected(), [2]);
    rig.raise(2);
    assert_eq!(rig.received(), [0x82]);
    assert!(!rig.1.write(1, 0x700, &[0; 4]), "the device's own register");
}

#[test]
fn msi_vectors_are_masked_and_moved() {
    let mut rig = Rig::new();
    rig.msi(4, &0xfee0_1000_u64.to_le_bytes());
    rig.msi(12, &[0x40]);
    rig.msi(2, &[0x21]);
    assert_eq!(rig.calls(), ["enable Msi 4"]);
    assert_eq!(rig.connected(), [0, 1, 2, 3]);
    rig.raise(1);
    assert_eq!(rig.received(), [0x41]);

    rig.msi(16, &[0b1010]);
    rig.raise(1);
    rig.raise(3);
    rig.raise(0);
    assert_eq!(rig.received(), [0x40]);
    assert_eq!(rig.1.msi_pending(), 0b1010);
    // The interrupt moves to another processor while two vectors are masked.
    rig.msi(4, &[0, 0x20]);
    rig.msi(12, &[0x50]);
    rig.msi(16, &[0b1000]);
    assert_eq!(rig.received(), [0x51]);
    assert_eq!(rig.1.msi_pending(), 0b1000);
    let moved = MsiMessage {
        address: 0xfee0_2000,
        data: 0x50,
    };
    assert_eq!(rig.0.lock().unwrap().routes[&0].1, Some(moved));
    assert_eq!(rig.calls(), Vec::<String>::new());
}

#[test]
fn a_guest_that_enables_another_number_of_vectors_gets_those() {
    let mut rig = Rig::new();
    rig.msi(2, &[0x01]);
    assert_eq!(rig.connected(), [0]);
    rig.msi(2, &[0x11]);
    assert_eq!(rig.calls(), ["enable Msi 1", "disable", "enable Msi 2"]);
    assert_eq!(rig.connected(), [0, 1]);
}

#[test]
fn one_kind_is_enabled_at_a_time() {
    let mut rig = Rig::new();
    rig.unmask(0);
    rig.msi(2, &[0x01]);
    rig.msix(0x8000);
    rig.raise(0);
    assert_eq!(rig.received(), [0x80], "MSI-X wins");
    // What the guest writes to the other has no effect now.
    rig.msi(12, &[0x40]);
    rig.raise(0);
    assert_eq!(rig.received(), [0x80]);
    assert_eq!(rig.1.msi_pending(), 0);
    rig.msix(0);
    rig.raise(0);
    assert_eq!(rig.received(), [0x40]);
    rig.msi(2, &[0]);
    let calls = [
        "enable Msi 1",
        "disable",
        "enable Msix 3",
        "disable",
        "enable Msi 1",
        "disable",
    ];
    assert_eq!(rig.calls(), calls);
    assert!(rig.0.lock().unwrap().routes.is_empty());
    rig.msi(2, &[1]);
    rig.1.reset();
    assert!(rig.0.lock().unwrap().routes.is_empty());
    rig.msix(0);
    assert!(rig.connected().is_empty());
}

#[test]
fn the_pin_gives_way_to_messages_and_comes_back_after_them() {
    let mut rig = Rig::new();
    rig.follow(true);
    assert_eq!(rig.1.mode(), InterruptMode::Off, "it has no line yet");
    rig.1.set_line(Some(18));
    rig.follow(false);
    assert_eq!(rig.1.mode(), InterruptMode::Off, "the function is disabled");
    for kind in [MessageKind::Msi, MessageKind::Msix] {
        rig.follow(true);
        assert_eq!(rig.1.mode(), InterruptMode::Intx(18));
        assert_eq!(rig.0.lock().unwrap().lines, [18]);
        rig.follow(true);
        match kind {
            MessageKind::Msi => rig.msi(2, &[1]),
            MessageKind::Msix => rig.msix(0x8000),
        }
        assert!(matches!(rig.1.mode(), InterruptMode::Messages(on, _) if on == kind));
        assert!(rig.0.lock().unwrap().lines.is_empty());
        match kind {
            MessageKind::Msi => rig.msi(2, &[0]),
            MessageKind::Msix => rig.msix(0),
        }
    }
    let calls = [
        "connect pin",
        "disable",
        "enable Msi 1",
        "disable",
        "connect pin",
        "disable",
        "enable Msix 3",
        "disable",
    ];
    assert_eq!(rig.calls(), calls);
    rig.follow(true);
    rig.1.reset();
    assert!(rig.0.lock().unwrap().lines.is_empty());
}
