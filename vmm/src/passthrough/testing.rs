//! A device and its lease for tests.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};

use gantry_devices::mapping::HostMapping;
use gantry_devices::pci::{IntxLine, MsiRoute, MsiRouter};
use gantry_resources::base::HostBdf;
use gantry_resources::inventory::Allow;
use gantry_resources::pools::{OnError, RomSource};
use gantry_vfio::host::{DeviceIo, Irq, IrqInfo, MmapArea, Region, RegionInfo};
use gantry_vfio::pci::Rom;
use vmm_sys_util::eventfd::EventFd;

use super::device::AttachedDevice;
use super::events::DeviceNotify;
use super::lease::{DeviceLabel, DeviceLease, FunctionId, LeasedDevice};

/// What accesses to a device pass: while it is closed, they hang. A device that has died reads all-ones.
#[derive(Default)]
pub struct Gate {
    state: Mutex<(bool, usize)>,
    changed: Condvar,
    dead: AtomicBool,
}

impl Gate {
    /// From now on the device reads all-ones.
    pub fn die(&self) {
        self.dead.store(true, Ordering::SeqCst);
    }

    /// From now on accesses hang.
    pub fn close(&self) {
        self.state.lock().unwrap().0 = true;
    }

    /// All that hang return.
    pub fn open(&self) {
        self.state.lock().unwrap().0 = false;
        self.changed.notify_all();
    }

    /// Waits until an access hangs.
    pub fn wait_until_stuck(&self) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |(_, stuck)| *stuck == 0));
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.1 += 1;
        self.changed.notify_all();
        let mut state = self
            .changed
            .wait_while(state, |(closed, _)| *closed)
            .unwrap();
        state.1 -= 1;
    }
}

/// An endpoint without BARs and interrupts, whose reset, its own or that of its bus, calls a function.
struct FakeDevice<F> {
    name: String,
    on_bus: Vec<String>,
    config: Mutex<[u8; 256]>,
    regions: [RegionInfo; 2],
    gate: Arc<Gate>,
    reset: F,
}

impl<F: Fn() -> gantry_vfio::Result<()> + Send + Sync> DeviceIo for FakeDevice<F> {
    fn name(&self) -> &str {
        &self.name
    }

    fn region(&self, region: Region) -> &RegionInfo {
        &self.regions[usize::from(region == Region::CONFIG)]
    }

    fn irq(&self, _irq: Irq) -> IrqInfo {
        IrqInfo::default()
    }

    fn read(&self, _region: Region, offset: u64, data: &mut [u8]) -> gantry_vfio::Result<()> {
        self.gate.pass();
        if self.gate.dead.load(Ordering::SeqCst) {
            data.fill(0xff);
            return Ok(());
        }
        let offset = offset as usize;
        data.copy_from_slice(&self.config.lock().unwrap()[offset..offset + data.len()]);
        Ok(())
    }

    fn write(&self, _region: Region, offset: u64, data: &[u8]) -> gantry_vfio::Result<()> {
        self.gate.pass();
        let offset = offset as usize;
        self.config.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn map(&self, _region: Region, _part: MmapArea) -> gantry_vfio::Result<Arc<HostMapping>> {
        panic!("it has no BARs")
    }

    fn set_irqs(&self, _: Irq, _: u32, _: &[Option<&EventFd>]) -> gantry_vfio::Result<()> {
        panic!("it has no interrupts")
    }

    fn unmask_by(&self, _irq: Irq, _resample: &EventFd) -> gantry_vfio::Result<()> {
        panic!("it has no interrupts")
    }

    fn disable_irqs(&self, _irq: Irq) -> gantry_vfio::Result<()> {
        Ok(())
    }

    fn reset(&self) -> gantry_vfio::Result<()> {
        self.gate.pass();
        (self.reset)()
    }

    fn on_bus(&self) -> &[String] {
        &self.on_bus
    }

    fn reset_bus(&self) -> gantry_vfio::Result<()> {
        (self.reset)()
    }
}

struct NoRouter;

impl MsiRouter for NoRouter {
    fn route(&self) -> std::io::Result<Box<dyn MsiRoute>> {
        panic!("it has no interrupts")
    }

    fn publish(&self) -> std::io::Result<()> {
        Ok(())
    }

    fn line(&self, _gsi: u32) -> std::io::Result<Box<dyn IntxLine>> {
        panic!("it has no interrupts")
    }
}

/// A lease that passes on the reasons for quarantine.
struct FakeLease(Sender<String>);

impl DeviceLease for FakeLease {
    fn quarantine(&self, reason: &str) {
        let _ = self.0.send(reason.to_owned());
    }
}

/// The device `name`, which is reset by `reset`. Comes with the reasons for which it goes into quarantine; their
/// senders are dropped with its lease.
pub fn attached(
    name: &str,
    reset: impl Fn() -> gantry_vfio::Result<()> + Send + Sync + 'static,
) -> (AttachedDevice, Receiver<String>) {
    attached_on_bus(name, &[], reset)
}

/// The device `name`, every access to which passes `gate`.
pub fn attached_behind(name: &str, gate: &Arc<Gate>) -> (AttachedDevice, Receiver<String>) {
    made(name, &[], Arc::clone(gate), || Ok(()), silent())
}

/// As [`attached_behind`], for a device whose events go to `notify`.
pub fn attached_telling(name: &str, gate: &Arc<Gate>, notify: DeviceNotify) -> AttachedDevice {
    made(name, &[], Arc::clone(gate), || Ok(()), notify).0
}

fn silent() -> DeviceNotify {
    Arc::new(|_, _| {})
}

/// As [`attached`], for a device that is reset with its bus, on which these functions are.
pub fn attached_on_bus(
    name: &str,
    on_bus: &[&str],
    reset: impl Fn() -> gantry_vfio::Result<()> + Send + Sync + 'static,
) -> (AttachedDevice, Receiver<String>) {
    made(name, on_bus, Arc::default(), reset, silent())
}

/// The lease of the device `name`. Comes with the reasons for which it goes into quarantine.
pub fn leased(name: &str) -> (LeasedDevice, Receiver<String>) {
    let (sender, reasons) = channel();
    let leased = LeasedDevice {
        function: FunctionId {
            name: name.parse().unwrap(),
            virtual_function: false,
        },
        label: DeviceLabel {
            id: name.to_owned(),
            group: None,
            allow: Allow {
                no_interrupts: true,
                ..Allow::default()
            },
            on_error: OnError::default(),
            rom: RomSource::Device,
        },
        _space: Arc::new(()),
        lease: Box::new(FakeLease(sender)),
    };
    (leased, reasons)
}

fn made(
    name: &str,
    on_bus: &[&str],
    gate: Arc<Gate>,
    reset: impl Fn() -> gantry_vfio::Result<()> + Send + Sync + 'static,
    notify: DeviceNotify,
) -> (AttachedDevice, Receiver<String>) {
    let (leased, reasons) = leased(name);
    let mut config = [0; 256];
    config[..4].copy_from_slice(&[0x36, 0x1b, 0x10, 0x00]);
    let region = |size| RegionInfo {
        size,
        areas: Vec::new(),
    };
    let full = |name: &str| name.parse::<HostBdf>().unwrap().to_string();
    let io = FakeDevice {
        name: full(name),
        on_bus: on_bus.iter().map(|name| full(name)).collect(),
        config: Mutex::new(config),
        regions: [region(0), region(256)],
        gate,
        reset,
    };
    let device = AttachedDevice::new(leased, io, Rom::Device, Arc::new(NoRouter), notify);
    (device.unwrap(), reasons)
}
