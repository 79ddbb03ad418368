//! A virtio device as a PCI function (section 4.1).

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::signals::{SignalBackend, Signals};
use super::transport::{COMMON_LEN, Step, Transport};
use super::{Activation, ActiveQueue, QueueSignal, VirtioBackend};
use crate::bus::{BusDevice, Effect};
use crate::pci::interrupts::{InBar, Interrupts, MsixLayout, MsixStructures, OutsideBar};
use crate::pci::registers::{
    CACHE_LINE_SIZE, CAPABILITIES_POINTER, COMMAND, COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE,
    COMMAND_MEMORY, DEVICE_ID, INTERRUPT_LINE, REVISION_ID, STATUS, STATUS_CAPABILITIES,
    SUBSYSTEM_ID, SUBSYSTEM_VENDOR_ID, VENDOR_ID,
};
use crate::pci::{
    Area, Bar, BarError, BarKind, BarSet, BarSpace, CapabilityId, ConfigSpace, Decode, MsiRouter,
    NoBacking, PciDevice, Segment, SegmentKind,
};
use crate::ram::RamView;
use crate::warn_limited;

/// The vendor of virtio devices; their device ids begin at [`DEVICE_BASE`] (section 4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
/// At least 1 for a device without the legacy interface.
const REVISION: u32 = 1;

/// The one BAR, in which all structures lie.
const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE_CONFIG: u64 = 0x2000;
const DEVICE_CONFIG_LEN: u64 = 0x1000;
/// Writes here are seen by the hypervisor alone.
const DOORBELLS: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x6000;
/// Bytes between two doorbells.
const DOORBELL_STRIDE: u32 = 4;
/// The most queues whose doorbells there is room for.
const MAX_QUEUES: usize = 256;

/// Where the capabilities lie.
const MSIX_CAP: u16 = 0x40;
const COMMON_CAP: u16 = 0x50;
const ISR_CAP: u16 = 0x60;
const DEVICE_CAP: u16 = 0x70;
const NOTIFY_CAP: u16 = 0x80;
const ACCESS_CAP: u16 = 0x98;
/// Message control of MSI-X: on, and all vectors masked.
const MSIX_WRITABLE: u16 = 0xc000;
const MSIX_CONTROL: u16 = MSIX_CAP + 2;
/// The data window of the capability by which the configuration space reaches the BAR (section 4.1.4.9).
const ACCESS_DATA: u16 = ACCESS_CAP + 16;

/// How long a reset of the machine waits for the device to leave guest RAM.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a virtio device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// The device asks for more than the transport has room for.
    #[error("the device has {0} queues, and at most {MAX_QUEUES} fit")]
    Queues(usize),
    /// The BAR is invalid.
    #[error(transparent)]
    Bar(#[from] BarError),
    /// The interrupt table does not fit.
    #[error(transparent)]
    Msix(#[from] OutsideBar),
    /// No file descriptor can be made.
    #[error("cannot make an eventfd: {0}")]
    EventFd(#[source] io::Error),
}

/// What a virtio device needs of its VM.
#[derive(Clone)]
pub struct VirtioHost {
    /// Guest RAM.
    pub ram: RamView,
    /// Delivers interrupts.
    pub router: Arc<dyn MsiRouter>,
    /// Bits of a guest-physical address.
    pub address_bits: u8,
}

/// A virtio device in the guest's PCI hierarchy.
pub struct VirtioFunction {
    device: Arc<Device>,
    registers: Mutex<Registers>,
}

struct Registers {
    config: ConfigSpace,
    bars: BarSet,
}

/// What is behind the BAR.
struct Device {
    name: Arc<str>,
    backend: Arc<dyn VirtioBackend>,
    ram: RamView,
    transport: Mutex<Transport>,
    signals: Arc<Signals>,
    interrupts: Interrupts<SignalBackend>,
    doorbells: Arc<[Arc<EventFd>]>,
    on_ready: Box<dyn Fn() + Send + Sync>,
}

impl VirtioFunction {
    /// The function of `backend` in a guest. Log lines name it `name`. It calls `on_ready` each time that a driver
    /// is ready.
    ///
    /// # Errors
    /// The backend has too many queues, or the process has no file descriptors left.
    pub fn new(
        name: &str,
        backend: Arc<dyn VirtioBackend>,
        host: VirtioHost,
        on_ready: impl Fn() + Send + Sync + 'static,
    ) -> Result<Arc<Self>, VirtioError> {
        let VirtioHost {
            ram,
            router,
            address_bits,
        } = host;
        let name: Arc<str> = name.into();
        let sizes = backend.queue_sizes();
        let queues = sizes.len();
        if queues > MAX_QUEUES {
            return Err(VirtioError::Queues(queues));
        }
        let signals = Signals::new(queues);
        let in_bar = |offset| InBar { bar: BAR, offset };
        let layout = MsixLayout {
            vectors: signals.count(),
            table: in_bar(MSIX_TABLE),
            pba: in_bar(MSIX_PENDING),
        };
        let structures = MsixStructures::new(&layout, |bar| match bar {
            BAR => BAR_SIZE,
            _ => 0,
        })?;
        let raises = SignalBackend::new(Arc::clone(&name), Arc::clone(&signals));
        let doorbell = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        let doorbells: io::Result<Arc<[_]>> = (0..queues).map(doorbell).collect();
        let config = config_space(&*backend, signals.count());
        let device = Arc::new(Device {
            name: Arc::clone(&name),
            transport: Mutex::new(Transport::new(backend.features(), sizes)),
            interrupts: Interrupts::new(Some(structures), None, raises, router),
            doorbells: doorbells.map_err(VirtioError::EventFd)?,
            signals,
            backend,
            ram,
            on_ready: Box::new(on_ready),
        });
        let bars = BarSet::new(name, [bar(&device)], address_bits)?;
        Ok(Arc::new(Self {
            device,
            registers: Mutex::new(Registers { config, bars }),
        }))
    }

    /// Has the device leave guest RAM. [`Self::power_cycle`] waits for it.
    pub fn stop(&self) {
        self.device.backend.stop();
    }

    /// What the device did so far, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.device.backend.counters()
    }

    /// Tells the driver that the device's configuration has changed.
    pub fn config_changed(&self) {
        self.device.signals.config_changed();
    }

    /// Brings the function to its state at the first start of the guest.
    ///
    /// # Errors
    /// The device does not leave guest RAM in time.
    pub fn power_cycle(&self) -> io::Result<()> {
        self.device.stop_and_wait()?;
        self.reset_config();
        self.device.reset_registers(&mut self.device.transport());
        self.device.interrupts.reset();
        Ok(())
    }

    /// Takes the device, which is out of its slot, away from the guest: its BAR, its interrupts, guest RAM.
    ///
    /// # Errors
    /// The device does not leave guest RAM in time.
    pub fn retire(&self) -> io::Result<()> {
        self.reset_config();
        let stopped = self.device.stop_and_wait();
        self.device.interrupts.reset();
        stopped
    }

    fn reset_config(&self) {
        let mut registers = self.lock();
        registers.bars.unmap();
        registers.bars.unassign();
        let vectors = self.device.signals.count();
        registers.config = config_space(&*self.device.backend, vectors);
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }
}

impl Drop for VirtioFunction {
    fn drop(&mut self) {
        self.device.backend.stop();
    }
}

impl Registers {
    fn decode(&self) -> Decode {
        Decode::from_command(u16::from_le_bytes(self.config.get(COMMAND)))
    }

    /// The place in the BAR that the access capability names, if `data` can be accessed there.
    fn access(&self, data: &[u8]) -> Option<u64> {
        let [bar] = self.config.get(ACCESS_CAP + 4);
        let offset = u32::from_le_bytes(self.config.get(ACCESS_CAP + 8));
        let len = u32::from_le_bytes(self.config.get(ACCESS_CAP + 12));
        let aligned = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len);
        let fits = data.len() == len as usize && u64::from(offset) + u64::from(len) <= BAR_SIZE;
        (bar == BAR && aligned && fits).then_some(offset.into())
    }
}

impl PciDevice for VirtioFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let registers = self.lock();
        if BarSet::handles(offset) {
            return registers.bars.read(offset, data);
        }
        registers.config.read(offset, data, &NoBacking);
        if offset == ACCESS_DATA
            && let Some(at) = registers.access(data)
        {
            drop(registers);
            self.device.read(at, data);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> bool {
        let mut registers = self.lock();
        if BarSet::handles(offset) {
            registers.bars.write(offset, data);
            return registers.bars.is_stale(registers.decode());
        }
        registers.config.write(offset, data, &NoBacking);
        let stale = registers.bars.is_stale(registers.decode());
        let control = u16::from_le_bytes(registers.config.get(MSIX_CONTROL));
        if (MSIX_CAP..MSIX_CAP + 4).contains(&offset) {
            // Under the lock, so that the table follows the register in the order of the guest's writes.
            let interrupts = &self.device.interrupts;
            interrupts.write_msix_control(control);
            interrupts.switch(interrupts.wanted(false));
        }
        let access = (offset == ACCESS_DATA).then(|| registers.access(data));
        drop(registers);
        if let Some(at) = access.flatten() {
            self.device.write_or_ring(at, data);
        }
        stale
    }

    fn remap(&self, space: &dyn BarSpace) {
        let mut registers = self.lock();
        let decode = registers.decode();
        registers.bars.remap(decode, space, || {});
    }

    fn reset(&self, _space: &dyn BarSpace) -> io::Result<()> {
        self.power_cycle()
    }
}

impl Device {
    fn transport(&self) -> MutexGuard<'_, Transport> {
        lock(&self.transport)
    }

    fn read(&self, at: u64, data: &mut [u8]) {
        match at {
            ..ISR => {
                let transport = self.transport();
                match self.is_leaving(&transport) {
                    // What the driver reads must not depend on what is left of the last one.
                    true => read_while_leaving(at, data),
                    false => transport.read(at - COMMON, data, &self.signals),
                }
            }
            // Interrupts are messages only: there is nothing to acknowledge.
            ISR..DEVICE_CONFIG => data.fill(0),
            DEVICE_CONFIG..DOORBELLS => self.backend.read_config(at - DEVICE_CONFIG, data),
            _ if self.interrupts.read(BAR, at, data) => {}
            _ => data.fill(0),
        }
    }

    fn write(&self, at: u64, data: &[u8]) {
        match at {
            ..ISR => {
                // Held to the end: no other vCPU starts the device between its stop and the reset of its registers.
                let mut transport = self.transport();
                if self.is_leaving(&transport) {
                    return;
                }
                match transport.write(at - COMMON, data, &self.signals) {
                    Step::None => {}
                    Step::Reset => {
                        self.backend.stop();
                        self.reset_registers(&mut transport);
                    }
                    Step::Start => {
                        self.start(&transport);
                        drop(transport);
                        (self.on_ready)();
                    }
                }
            }
            ISR..DOORBELLS => {}
            _ => {
                self.interrupts.write(BAR, at, data);
            }
        }
    }

    /// A write by the access capability, which reaches the doorbells too.
    fn write_or_ring(&self, at: u64, data: &[u8]) {
        match at.checked_sub(DOORBELLS) {
            Some(doorbell) if at < MSIX_TABLE => {
                let index = doorbell / u64::from(DOORBELL_STRIDE);
                let doorbell = usize::try_from(index).ok();
                if let Some(doorbell) = doorbell.and_then(|index| self.doorbells.get(index)) {
                    // Fails only if the counter is full: then it is rung already.
                    let _ = doorbell.write(1);
                }
            }
            _ => self.write(at, data),
        }
    }

    /// Whether the driver has reset the device, and the device has not left guest RAM yet.
    fn is_leaving(&self, transport: &Transport) -> bool {
        transport.status() == 0 && !self.backend.is_stopped()
    }

    fn start(&self, transport: &Transport) {
        // What the device said of the last driver while it left is over.
        self.signals.mend();
        match self.active_queues(transport) {
            Ok(queues) => self.backend.start(Activation {
                ram: self.ram.clone(),
                features: transport.accepted(),
                queues,
            }),
            Err(reason) => {
                warn_limited!(device = %self.name, reason, "a virtio driver has set up a queue that cannot be");
                self.signals.break_device();
            }
        }
    }

    fn active_queues(&self, transport: &Transport) -> Result<Vec<ActiveQueue>, String> {
        let queues = transport.queues().map_err(|error| error.to_string())?;
        let active = queues.into_iter().map(|(index, queue)| {
            if !queue.is_valid(self.ram.memory()) {
                return Err(format!("queue {index} lies outside of RAM"));
            }
            let doorbell = self.doorbells.get(usize::from(index));
            Ok(ActiveQueue {
                index,
                queue,
                kick: Arc::clone(doorbell.ok_or("no doorbell")?),
                signal: QueueSignal::new(&self.signals, index),
            })
        });
        active.collect()
    }

    fn reset_registers(&self, transport: &mut Transport) {
        transport.reset();
        self.signals.reset();
    }

    fn stop_and_wait(&self) -> io::Result<()> {
        self.backend.stop();
        if self.backend.wait_stopped(STOP_TIMEOUT) {
            return Ok(());
        }
        let message = format!("{} does not leave guest RAM", self.name);
        Err(io::Error::new(io::ErrorKind::TimedOut, message))
    }
}

/// A driver waits until the status reads 0 before it goes on (section 4.1.4.3.2).
fn read_while_leaving(at: u64, data: &mut [u8]) {
    for (byte, at) in data.iter_mut().zip(at..) {
        *byte = u8::from(at == super::transport::STATUS);
    }
}

/// A part of the BAR that traps, from an offset on.
struct Window {
    device: Arc<Device>,
    from: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.device.read(self.from + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        self.device.write(self.from + offset, data);
        Effect::None
    }
}

fn bar(device: &Arc<Device>) -> Bar {
    let trapped = |from, len| Segment {
        offset: from,
        kind: SegmentKind::Trapped {
            len,
            device: Arc::new(Window {
                device: Arc::clone(device),
                from,
            }),
        },
    };
    let doorbells = Segment {
        offset: DOORBELLS,
        kind: SegmentKind::Doorbells {
            stride: DOORBELL_STRIDE.into(),
            events: Arc::clone(&device.doorbells),
        },
    };
    Bar {
        index: BAR,
        kind: BarKind::Memory32 {
            prefetchable: false,
        },
        size: BAR_SIZE,
        segments: Arc::new([
            trapped(COMMON, DOORBELLS),
            doorbells,
            trapped(MSIX_TABLE, BAR_SIZE - MSIX_TABLE),
        ]),
    }
}

/// The configuration space after a reset.
fn config_space(backend: &dyn VirtioBackend, vectors: u16) -> ConfigSpace {
    let kind = backend.kind();
    let device = DEVICE_BASE + kind.id;
    let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
    let class = kind.class << 8 | REVISION;
    let notify = capability(ACCESS_CAP, 2, DOORBELLS, (MSIX_TABLE - DOORBELLS) as u32);
    let access = Area::emulated(
        ACCESS_CAP,
        &capability(0, 5, 0, 0),
        &[
            0, 0, 0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        ],
    );
    let plain =
        |at, next, kind, offset, len| Area::read_only(at, &capability(next, kind, offset, len));
    ConfigSpace::new()
        .with(Area::read_only(VENDOR_ID, &VENDOR.to_le_bytes()))
        .with(Area::read_only(DEVICE_ID, &device.to_le_bytes()))
        .with(Area::emulated(COMMAND, &[0; 2], &command.to_le_bytes()))
        .with(Area::read_only(STATUS, &STATUS_CAPABILITIES.to_le_bytes()))
        .with(Area::read_only(REVISION_ID, &class.to_le_bytes()))
        .with(Area::emulated(CACHE_LINE_SIZE, &[0], &[0xff]))
        .with(Area::read_only(SUBSYSTEM_VENDOR_ID, &VENDOR.to_le_bytes()))
        .with(Area::read_only(SUBSYSTEM_ID, &device.to_le_bytes()))
        .with(Area::read_only(CAPABILITIES_POINTER, &[MSIX_CAP as u8]))
        .with(Area::emulated(INTERRUPT_LINE, &[0], &[0xff]))
        .with(msix(vectors))
        .with(plain(COMMON_CAP, ISR_CAP, 1, COMMON, COMMON_LEN as u32))
        .with(plain(ISR_CAP, DEVICE_CAP, 3, ISR, 1))
        .with(plain(
            DEVICE_CAP,
            NOTIFY_CAP,
            4,
            DEVICE_CONFIG,
            DEVICE_CONFIG_LEN as u32,
        ))
        .with(Area::read_only(
            NOTIFY_CAP,
            &[&notify[..], &DOORBELL_STRIDE.to_le_bytes()].concat(),
        ))
        .with(access)
}

fn msix(vectors: u16) -> Area {
    let mut bytes = [0; 12];
    bytes[0] = CapabilityId::MSI_X.0;
    bytes[1] = COMMON_CAP as u8;
    bytes[2..4].copy_from_slice(&(vectors - 1).to_le_bytes());
    bytes[4..8].copy_from_slice(&(MSIX_TABLE as u32 | u32::from(BAR)).to_le_bytes());
    bytes[8..12].copy_from_slice(&(MSIX_PENDING as u32 | u32::from(BAR)).to_le_bytes());
    let control = MSIX_WRITABLE.to_le_bytes();
    Area::emulated(MSIX_CAP, &bytes, &[0, 0, control[0], control[1]])
}

/// The part that all vendor-specific capabilities of virtio have in common (section 4.1.4). `next` is 0 in the
/// last one.
fn capability(next: u16, kind: u8, offset: u64, len: u32) -> [u8; 16] {
    /// The capabilities for notifications and for access have four bytes more.
    const LONG: [u8; 2] = [2, 5];
    let mut bytes = [0; 16];
    bytes[0] = CapabilityId::VENDOR_SPECIFIC.0;
    bytes[1] = next as u8;
    bytes[2] = match LONG.contains(&kind) {
        true => 20,
        false => 16,
    };
    bytes[3] = kind;
    bytes[4] = BAR;
    bytes[8..12].copy_from_slice(&(offset as u32).to_le_bytes());
    bytes[12..16].copy_from_slice(&len.to_le_bytes());
    bytes
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
