//! A device, an interrupt router and an address space for tests: they record all calls in common, can fail at
//! any step, and assert the rules of the real ones.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use gantry_devices::mapping::HostMapping;
use gantry_devices::pci::registers::{COMMAND, COMMAND_INTX_DISABLE};
use gantry_devices::pci::{
    BarGuard, BarPlacement, BarSet, BarSpace, BarSpaceError, IntxLine, MsiMessage, MsiRoute,
    MsiRouter,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::host::{DeviceIo, Irq, IrqInfo, MmapArea, Region, RegionInfo};
use crate::{Error, Result};

/// The calls, in order, and when to fail.
#[derive(Default)]
pub struct Trace(Mutex<Events>);

#[derive(Default)]
struct Events {
    seen: Vec<String>,
    steps_left: Option<usize>,
    failures_left: usize,
    failed: Option<String>,
    reads: usize,
    /// Memory BARs that the guest can reach now.
    mapped: Vec<u64>,
}

impl Trace {
    /// Lets `steps` more calls succeed and refuses the one after them.
    pub fn fail_after(&self, steps: usize) {
        self.fail(steps, 1);
    }

    /// Lets `steps` more calls succeed and refuses the next `times`.
    pub fn fail(&self, steps: usize, times: usize) {
        let mut events = self.0.lock().unwrap();
        events.steps_left = Some(steps);
        events.failures_left = times;
        events.failed = None;
    }

    /// The call that was refused.
    pub fn failed(&self) -> Option<String> {
        self.0.lock().unwrap().failed.clone()
    }

    /// How many reads there were.
    pub fn reads(&self) -> usize {
        self.0.lock().unwrap().reads
    }

    /// The calls since the last time.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().seen)
    }

    /// Guest addresses of the BARs that are mapped now.
    pub fn mapped(&self) -> Vec<u64> {
        self.0.lock().unwrap().mapped.clone()
    }

    fn step(&self, event: String) -> io::Result<()> {
        let mut events = self.0.lock().unwrap();
        match events.steps_left {
            Some(0) => {
                events.failures_left -= 1;
                if events.failures_left == 0 {
                    events.steps_left = None;
                }
                events.failed = Some(event);
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            Some(left) => events.steps_left = Some(left - 1),
            None => {}
        }
        match event.starts_with("read") {
            true => events.reads += 1,
            false => events.seen.push(event),
        }
        Ok(())
    }
}

/// A device of PCI vendor 1b36 that remembers what is written to it.
pub struct FakeDevice {
    pub name: String,
    pub trace: Arc<Trace>,
    pub regions: Vec<RegionInfo>,
    pub msix: IrqInfo,
    pub msi: IrqInfo,
    pub intx: IrqInfo,
    pub resettable: bool,
    /// The functions that a reset of its bus resets.
    pub on_bus: Vec<String>,
    /// Whether another user has functions on its bus.
    pub bus_shared: bool,
    /// Interrupt vectors that the host has for it.
    pub host_vectors: usize,
    pub config: Mutex<Vec<u8>>,
    silent: AtomicBool,
    bytes: Mutex<BTreeMap<(Region, u64), u8>>,
    /// The index that is enabled, and its vectors.
    vectors: Mutex<Option<(Irq, Vec<Option<EventFd>>)>>,
    /// Interrupt Disable in the hardware, which is not always what was written.
    intx_disabled: Mutex<bool>,
    mappings: Mutex<Vec<Weak<HostMapping>>>,
}

/// Where the fake's capabilities are.
pub const PM: u16 = 0x40;
pub const MSI: u16 = 0x50;
pub const EXPRESS: u16 = 0x70;
pub const MSIX: u16 = 0xb0;
pub const MSIX_TABLE: u64 = 0x5200;
pub const MSIX_PBA: u64 = 0x5e00;
pub const MSIX_VECTORS: u16 = 65;

/// The configuration space of a PCI Express endpoint in a root complex, part of a multi-function
/// device, with power management (D0, D2, D3), MSI, PCI Express, MSI-X, ARI, AER and SR-IOV.
pub fn config() -> Vec<u8> {
    let mut config = vec![0; 4096];
    let mut put = |at: u16, bytes: &[u8]| {
        config[usize::from(at)..usize::from(at) + bytes.len()].copy_from_slice(bytes);
    };
    put(0x00, &[0x36, 0x1b, 0x10, 0x00, 0x07, 0x01, 0x18, 0x00]);
    put(0x08, &[2, 2, 8, 1, 0, 0, 0x80, 0x8f]);
    // BAR0: 64-bit; BAR2: I/O; BAR4: 64-bit prefetchable.
    put(0x10, &0xfebf_0004_u32.to_le_bytes());
    put(0x18, &0xc001_u32.to_le_bytes());
    put(0x20, &0x0000_000c_u32.to_le_bytes());
    put(0x34, &[PM as u8]);
    put(0x3c, &[11, 1]);
    put(PM, &[0x01, MSI as u8, 0x03, 0x04, 0x08, 0x00, 0, 0]);
    put(MSI, &[0x05, EXPRESS as u8, 0x80, 0x01]);
    put(MSI + 4, &[0xaa; 20]);
    put(EXPRESS, &[0x10, MSIX as u8, 0x92, 0x00]);
    put(MSIX, &[0x11, 0, 64, 0]);
    put(MSIX + 4, &(MSIX_TABLE as u32).to_le_bytes());
    put(MSIX + 8, &(MSIX_PBA as u32).to_le_bytes());
    put(0x100, &0x1401_000e_u32.to_le_bytes());
    put(0x104, &[0xbb; 4]);
    put(0x140, &0x2002_0001_u32.to_le_bytes());
    put(0x200, &0x2401_0010_u32.to_le_bytes());
    put(0x204, &[0xcc; 0x3c]);
    put(0x240, &0x0001_0003_u32.to_le_bytes());
    config
}

impl FakeDevice {
    /// BAR0: 32 KiB with an unaligned MSI-X table, BAR2: 32 I/O ports, BAR4: 1 MiB.
    pub fn new() -> Self {
        let region = |size: u64, mappable: bool| RegionInfo {
            size,
            areas: Vec::from_iter(mappable.then_some(MmapArea {
                offset: 0,
                len: size,
            })),
        };
        let mut regions = vec![RegionInfo::default(); Region::COUNT];
        regions[0] = region(0x8000, true);
        regions[2] = region(0x20, false);
        regions[4] = region(1 << 20, true);
        regions[Region::CONFIG.index()] = region(4096, false);
        Self {
            name: "0000:01:00.0".to_owned(),
            trace: Arc::default(),
            regions,
            msix: IrqInfo {
                count: MSIX_VECTORS.into(),
                fixed: false,
            },
            msi: IrqInfo {
                count: 1,
                fixed: true,
            },
            intx: IrqInfo {
                count: 1,
                fixed: true,
            },
            resettable: true,
            on_bus: Vec::new(),
            bus_shared: false,
            host_vectors: usize::MAX,
            config: Mutex::new(config()),
            silent: AtomicBool::new(false),
            bytes: Mutex::default(),
            vectors: Mutex::default(),
            intx_disabled: Mutex::default(),
            mappings: Mutex::default(),
        }
    }

    /// Has all reads answer ones, as those of a device that is gone.
    pub fn fall_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::Relaxed);
    }

    /// How many of the mappings made of it are still alive.
    pub fn mappings(&self) -> usize {
        let mappings = self.mappings.lock().unwrap();
        mappings
            .iter()
            .filter(|mapping| mapping.strong_count() > 0)
            .count()
    }

    /// The vectors that VFIO has allocated, and whether each is connected; `None` while interrupts are off.
    pub fn armed(&self) -> Option<Vec<bool>> {
        let vectors = self.vectors.lock().unwrap();
        let (_, vectors) = vectors.as_ref()?;
        Some(vectors.iter().map(Option::is_some).collect())
    }

    /// The kind of interrupts that is enabled.
    pub fn enabled(&self) -> Option<Irq> {
        let vectors = self.vectors.lock().unwrap();
        vectors.as_ref().map(|(irq, _)| *irq)
    }

    /// Interrupt Disable as the hardware has it.
    pub fn intx_disabled(&self) -> bool {
        *self.intx_disabled.lock().unwrap()
    }

    /// Raises an interrupt as the hardware would.
    pub fn fire(&self, vector: usize) {
        let vectors = self.vectors.lock().unwrap();
        let trigger = vectors
            .as_ref()
            .and_then(|(_, vectors)| vectors.get(vector)?.as_ref());
        trigger.expect("vector is armed").write(1).unwrap();
    }

    pub fn command(&self) -> u16 {
        let config = self.config.lock().unwrap();
        u16::from_le_bytes([config[4], config[5]])
    }

    pub fn power(&self) -> u8 {
        self.config.lock().unwrap()[usize::from(PM) + 4] & 3
    }

    fn check(&self, region: Region, offset: u64, len: usize) -> io::Result<()> {
        let end = offset
            .checked_add(len as u64)
            .filter(|&end| end <= self.region(region).size);
        end.map(drop)
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let range = offset as usize..offset as usize + data.len();
        let control = usize::from(MSIX) + 2..usize::from(MSIX) + 4;
        let missed = range.end <= control.start || range.start >= control.end;
        assert!(missed, "MSI-X control belongs to VFIO");
        let msi = usize::from(MSI)..usize::from(MSI) + 24;
        let missed = range.end <= msi.start || range.start >= msi.end;
        assert!(missed, "MSI belongs to VFIO");
        assert!(
            !BarSet::handles(offset as u16),
            "BARs are answered from a shadow"
        );
        let before = self.command() & COMMAND_INTX_DISABLE;
        let command = range.contains(&(usize::from(COMMAND) + 1));
        self.config.lock().unwrap()[range].copy_from_slice(data);
        let after = self.command() & COMMAND_INTX_DISABLE;
        assert!(
            !command || self.enabled().is_some() || after != 0,
            "INTx is enabled and nothing handles it"
        );
        // The kernel has a copy of the bit, and writes the hardware's where the copy changes.
        if before != after {
            *self.intx_disabled.lock().unwrap() = after != 0;
        }
        let decodes = self.command() & 2 != 0 && self.power() == 0;
        let reachable = self.trace.mapped();
        assert!(
            decodes || reachable.is_empty(),
            "no longer decoded, still mapped: {reachable:x?}"
        );
    }
}

fn failed(place: &str) -> impl FnOnce(io::Error) -> Error {
    let place = place.to_owned();
    move |source| Error::Device {
        device: "0000:01:00.0".into(),
        place,
        source,
    }
}

impl DeviceIo for FakeDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn region(&self, region: Region) -> &RegionInfo {
        &self.regions[region.index()]
    }

    fn irq(&self, irq: Irq) -> IrqInfo {
        match irq {
            Irq::Msix => self.msix,
            Irq::Msi => self.msi,
            Irq::Intx => self.intx,
            _ => IrqInfo::default(),
        }
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<()> {
        let place = format!("read {region} {offset:#x}");
        self.check(region, offset, data.len())
            .and_then(|()| self.trace.step(place.clone()))
            .map_err(failed(&place))?;
        let bytes = self.bytes.lock().unwrap();
        for (at, byte) in (offset..).zip(data) {
            *byte = match region {
                _ if self.silent.load(Ordering::Relaxed) => u8::MAX,
                Region::CONFIG => self.config.lock().unwrap()[at as usize],
                _ => bytes.get(&(region, at)).copied().unwrap_or(at as u8),
            };
        }
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<()> {
        let place = format!("write {region} {offset:#x} {data:02x?}");
        self.check(region, offset, data.len())
            .and_then(|()| self.trace.step(place.clone()))
            .map_err(failed(&place))?;
        if region == Region::CONFIG {
            self.write_config(offset, data);
            return Ok(());
        }
        let mut bytes = self.bytes.lock().unwrap();
        bytes.extend((offset..).map(|at| (region, at)).zip(data.iter().copied()));
        Ok(())
    }

    fn map(&self, region: Region, part: MmapArea) -> Result<Arc<HostMapping>> {
        let MmapArea { offset, len } = part;
        let place = format!("mmap {region} {offset:#x}+{len:#x}");
        self.trace.step(place.clone()).map_err(failed(&place))?;
        let end = offset + len;
        let areas = &self.region(region).areas;
        let inside = areas
            .iter()
            .any(|area| area.offset <= offset && end <= area.offset + area.len);
        assert!(inside && offset % 4096 == 0 && len % 4096 == 0, "{place}");
        let mapping = Arc::new(HostMapping::anonymous(len as usize, 4096).unwrap());
        self.mappings.lock().unwrap().push(Arc::downgrade(&mapping));
        Ok(mapping)
    }

    /// As vfio-pci does it: the first call allocates vectors, and a later one can add to them only if the
    /// kernel allocates vectors one by one.
    fn set_irqs(&self, irq: Irq, start: u32, triggers: &[Option<&EventFd>]) -> Result<()> {
        let (start, end) = (start as usize, start as usize + triggers.len());
        let info = self.irq(irq);
        let place = match irq {
            Irq::Msix => format!("irqs {start}..{end}"),
            _ => format!("{irq} {start}..{end}"),
        };
        self.trace.step(place.clone()).map_err(failed(&place))?;
        let mut vectors = self.vectors.lock().unwrap();
        let refused = |errno| failed(&place)(io::Error::from_raw_os_error(errno));
        let fits = vectors.as_ref().is_none_or(|(enabled, vectors)| {
            assert_eq!(*enabled, irq, "one index at a time");
            end <= vectors.len() || !info.fixed
        });
        if triggers.is_empty() || end > info.count as usize || !fits {
            return Err(refused(libc::EINVAL));
        }
        if end > self.host_vectors {
            return Err(refused(libc::ENOSPC));
        }
        if vectors.is_none() {
            let copy = self.command() & COMMAND_INTX_DISABLE != 0;
            *self.intx_disabled.lock().unwrap() = copy || irq != Irq::Intx;
        }
        let (_, vectors) = vectors.get_or_insert((irq, Vec::new()));
        vectors.resize_with(vectors.len().max(end), || None);
        for (vector, trigger) in vectors[start..].iter_mut().zip(triggers) {
            *vector = trigger.map(|trigger| trigger.try_clone().unwrap());
        }
        Ok(())
    }

    fn unmask_by(&self, irq: Irq, _resample: &EventFd) -> Result<()> {
        let place = format!("{irq} unmasked by");
        self.trace.step(place.clone()).map_err(failed(&place))?;
        let vectors = self.vectors.lock().unwrap();
        let enabled = vectors.as_ref().map(|(enabled, _)| *enabled);
        assert_eq!(enabled, Some(irq), "the trigger comes first");
        Ok(())
    }

    fn disable_irqs(&self, irq: Irq) -> Result<()> {
        let place = match irq {
            Irq::Msix => "irqs off".to_owned(),
            _ => format!("{irq} off"),
        };
        self.trace.step(place.clone()).map_err(failed(&place))?;
        let vectors = self.vectors.lock().unwrap().take();
        if let Some((enabled, _)) = vectors {
            assert_eq!(enabled, irq, "another kind is enabled");
            if irq != Irq::Intx {
                *self.intx_disabled.lock().unwrap() = false;
            }
        }
        Ok(())
    }

    fn reset(&self) -> Result<()> {
        if !self.resettable {
            return Err(failed("reset")(io::ErrorKind::Unsupported.into()));
        }
        self.trace.step("reset".into()).map_err(failed("reset"))
    }

    fn on_bus(&self) -> &[String] {
        &self.on_bus
    }

    fn reset_bus(&self) -> Result<()> {
        if self.bus_shared {
            let device = self.name().to_owned();
            let other = "IOMMU group 9".to_owned();
            return Err(Error::BusShared { device, other });
        }
        let name = self.name.as_str();
        let place = format!("reset bus of {name}");
        self.trace.step(place.clone()).map_err(failed(&place))
    }
}

/// Has `limit` routes.
pub struct FakeRouter {
    trace: Arc<Trace>,
    limit: usize,
    live: Arc<Mutex<Vec<Arc<Route>>>>,
    lines: Arc<Mutex<Vec<u32>>>,
}

struct Route {
    number: usize,
    trigger: EventFd,
    message: Mutex<Option<MsiMessage>>,
}

impl FakeRouter {
    pub fn new(trace: &Arc<Trace>, limit: usize) -> Self {
        Self {
            trace: Arc::clone(trace),
            limit,
            live: Arc::default(),
            lines: Arc::default(),
        }
    }

    /// Routes in use.
    pub fn live(&self) -> usize {
        self.live.lock().unwrap().len()
    }

    /// Lines that are connected.
    pub fn lines(&self) -> Vec<u32> {
        self.lines.lock().unwrap().clone()
    }

    /// The messages delivered to the guest since the last time, in the order of the routes.
    pub fn delivered(&self) -> Vec<MsiMessage> {
        let live = self.live.lock().unwrap();
        let delivered = live.iter().filter_map(|route| {
            let message = (*route.message.lock().unwrap())?;
            route.trigger.read().is_ok().then_some(message)
        });
        delivered.collect()
    }
}

impl MsiRouter for FakeRouter {
    fn route(&self) -> io::Result<Box<dyn MsiRoute>> {
        let mut live = self.live.lock().unwrap();
        if live.len() == self.limit {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let used = |number| live.iter().any(|route| route.number == number);
        let number = (0..).find(|&number| !used(number)).unwrap();
        self.trace.step(format!("route {number}"))?;
        let route = Arc::new(Route {
            number,
            trigger: EventFd::new(EFD_NONBLOCK)?,
            message: Mutex::new(None),
        });
        live.push(Arc::clone(&route));
        Ok(Box::new(FakeRoute {
            trace: Arc::clone(&self.trace),
            live: Arc::clone(&self.live),
            route,
        }))
    }

    fn publish(&self) -> io::Result<()> {
        self.trace.step("publish".into())
    }

    fn line(&self, gsi: u32) -> io::Result<Box<dyn IntxLine>> {
        self.trace.step(format!("line {gsi}"))?;
        self.lines.lock().unwrap().push(gsi);
        Ok(Box::new(FakeLine {
            lines: Arc::clone(&self.lines),
            gsi,
            events: [EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?],
        }))
    }
}

struct FakeLine {
    lines: Arc<Mutex<Vec<u32>>>,
    gsi: u32,
    events: [EventFd; 2],
}

impl IntxLine for FakeLine {
    fn trigger(&self) -> &EventFd {
        &self.events[0]
    }

    fn resample(&self) -> &EventFd {
        &self.events[1]
    }
}

impl Drop for FakeLine {
    fn drop(&mut self) {
        self.lines.lock().unwrap().retain(|gsi| *gsi != self.gsi);
    }
}

struct FakeRoute {
    trace: Arc<Trace>,
    live: Arc<Mutex<Vec<Arc<Route>>>>,
    route: Arc<Route>,
}

impl MsiRoute for FakeRoute {
    fn prepare(&self, _message: MsiMessage) {}

    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let data = message.map(|message| message.data);
        *self.route.message.lock().unwrap() = None;
        self.trace
            .step(format!("route {} set {data:x?}", self.route.number))?;
        *self.route.message.lock().unwrap() = message;
        Ok(())
    }

    fn pending(&self) -> bool {
        let held = self.route.message.lock().unwrap().is_none();
        let trigger = &self.route.trigger;
        held && trigger
            .read()
            .is_ok_and(|count| trigger.write(count).is_ok())
    }

    fn trigger(&self) -> &EventFd {
        &self.route.trigger
    }
}

impl Drop for FakeRoute {
    fn drop(&mut self) {
        let mut live = self.live.lock().unwrap();
        live.retain(|route| !Arc::ptr_eq(route, &self.route));
    }
}

/// An address space in which every placement fits.
pub struct FakeSpace<'a>(pub &'a FakeDevice);

struct Guard {
    trace: Arc<Trace>,
    base: u64,
    io: bool,
}

impl BarSpace for FakeSpace<'_> {
    fn map(&self, placement: &BarPlacement) -> std::result::Result<BarGuard, BarSpaceError> {
        let BarPlacement { base, io, size, .. } = *placement;
        let trace = &self.0.trace;
        trace
            .step(format!("map {base:#x}"))
            .map_err(|source| BarSpaceError::Slot {
                guest: base,
                size,
                source,
            })?;
        assert_eq!(self.0.power(), 0, "only D0 decodes");
        let needed = if io { 1 } else { 2 };
        assert_ne!(self.0.command() & needed, 0, "the hardware decodes first");
        if !io {
            trace.0.lock().unwrap().mapped.push(base);
        }
        Ok(Box::new(Guard {
            trace: Arc::clone(trace),
            base,
            io,
        }))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut events = self.trace.0.lock().unwrap();
        events.seen.push(format!("unmap {:#x}", self.base));
        if !self.io {
            let at = events
                .mapped
                .iter()
                .position(|&base| base == self.base)
                .unwrap();
            events.mapped.remove(at);
        }
    }
}

/// Writes to a function's configuration space, and remaps it, as the owner of its bus does.
pub fn write_config(
    function: &dyn gantry_devices::pci::PciDevice,
    space: &dyn BarSpace,
    offset: u16,
    data: &[u8],
) {
    if function.write_config(offset, data) {
        function.remap(space);
    }
}

/// The command register's offset, for short lines in tests.
pub const CMD: u16 = COMMAND;
