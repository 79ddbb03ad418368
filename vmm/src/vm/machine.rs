//! The machine of a VM: address space, RAM, interrupt routes, and the devices every VM has.

use std::io::{self, Write};
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gantry_devices::bounded::BoundedFile;
use gantry_devices::bounded_writer::{self, BoundedWriter};
use gantry_devices::events::{self, PlatformEvents};
use gantry_devices::panic::{self, PanicRegister};
use gantry_devices::pci::firmware::{
    self, FirmwareError, HostWindows, IO_GRANULARITY, Minimum, WindowKind,
};
use gantry_devices::pci::{
    BarSpace, BarSpaceError, ConfigPorts, EcamWindow, PciDevice, PciSegment, PortIndex, PortWindows,
};
use gantry_devices::power::{self, PowerRegisters};
use gantry_devices::serial::{self, Serial};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::closing::Leaving;
use super::payload;
use crate::address_space::{AddressSpace, Guard};
use crate::boot::acpi::HotSlot;
use crate::config::{SerialMode, VmConfig};
use crate::error::Error;
use crate::kvm::{GsiRoutes, KvmVm, MemorySlots};
use crate::layout::{self, Layout};
use crate::memory::GuestRam;
use crate::placement::VmPlacement;
use crate::sandbox::Sandbox;
use crate::status::SlotTable;
use crate::threads::{self, Role};

/// Registers of the in-kernel interrupt controllers: 4 KiB for the I/O APIC, and the MiB to which
/// message-signalled interrupts are written.
const IO_APIC_LEN: u64 = 0x1000;
const LOCAL_APIC_LEN: u64 = 0x10_0000;
/// The identity map page and three TSS pages.
const KVM_PAGES_LEN: u64 = 0x4000;

/// The most that `serial.file` holds. A guest can write without end, and a full disk harms the host.
const SERIAL_FILE_MOST: u64 = 64 << 20;

/// How long a device may take to be reset. The kernel waits for some seconds at most, for a device that comes back.
const RESET_PATIENCE: Duration = Duration::from_secs(10);

/// What every VM has, whatever is plugged into it.
pub struct Machine {
    /// Who answers where.
    pub space: Arc<AddressSpace>,
    /// RAM.
    pub ram: GuestRam,
    /// Message-signalled interrupts.
    pub routes: GsiRoutes,
    /// PCI.
    pub pci: Arc<PciSegment>,
    /// The serial port, if there is one.
    pub serial: Option<Arc<Serial>>,
    /// Where its kernel says that it has panicked, if it has such a register.
    panic: Option<Arc<PanicRegister>>,
    /// What the guest is told of while it runs.
    pub events: Arc<PlatformEvents>,
    /// SlotTable that can be filled and emptied while the guest runs.
    pub slots: Vec<HotSlot>,
    /// SlotTable that something is still on its way out of.
    pub leaving: Leaving,
    windows: SlotWindows,
    // Taken out of the address space when the machine is dropped.
    _guards: Vec<Guard>,
}

impl Machine {
    /// Builds the machine as planned, with so many PCIe root ports for the devices that the VM
    /// starts with, and as many more as it has slots for others.
    ///
    /// # Errors
    /// The host has no memory or descriptors left, KVM refused, or the serial port's file cannot
    /// be made.
    pub fn new(
        kvm: &KvmVm,
        layout: &Layout,
        config: &VmConfig,
        ports: usize,
        placement: &VmPlacement,
    ) -> Result<Self, Error> {
        let hot = usize::from(config.hotplug.slots);
        let ram =
            GuestRam::new(&layout.ram, placement).map_err(Error::host("set guest RAM aside"))?;
        let routes = GsiRoutes::new(Arc::clone(kvm.vm()))
            .map_err(Error::host("set up interrupt routes (KVM_SET_GSI_ROUTING)"))?;
        let pci = Arc::new(hierarchy(layout, ports + hot)?);
        let serial = serial_port(config, &routes)?;
        // Where devices can come, those that are there can go.
        let all = pci.ports().map(|(port, at, _)| HotSlot { port, at });
        let slots: Vec<HotSlot> = all.filter(|_| hot > 0).collect();
        let windows = SlotWindows {
            first: ports,
            wish: config.hotplug.window,
            share: None,
            given: Vec::new(),
        };
        let trigger = wire(&routes, layout::EVENT_GSI)?;
        let events = PlatformEvents::new(slots.iter().map(|slot| slot.port), trigger);
        let space = Arc::new(AddressSpace::new(MemorySlots::new(Arc::clone(kvm.vm()))));
        let mut machine = Self {
            space,
            ram,
            routes,
            pci,
            serial,
            panic: config.pvpanic.then(Arc::default),
            events: Arc::new(events),
            slots,
            leaving: Leaving::default(),
            windows,
            _guards: Vec::new(),
        };
        machine._guards = machine.fill(layout).map_err(Error::place("the machine"))?;
        Ok(machine)
    }

    /// Whether the guest's kernel can say that it has panicked.
    pub fn has_pvpanic(&self) -> bool {
        self.panic.is_some()
    }

    fn fill(&self, layout: &Layout) -> Result<Vec<Guard>, BarSpaceError> {
        let space = &self.space;
        let mut guards = vec![
            space.reserve(layout::IO_APIC, IO_APIC_LEN)?,
            space.reserve(layout::LOCAL_APIC, LOCAL_APIC_LEN)?,
            space.reserve(layout::KVM_PAGES, KVM_PAGES_LEN)?,
        ];
        for region in self.ram.regions() {
            guards.push(space.add_ram(region.guest, &region.mapping)?);
        }
        let ecam_len = layout.ecam.end() - layout.ecam.start() + 1;
        let ecam = Arc::new(EcamWindow::new(Arc::clone(&self.pci)));
        guards.push(space.add_mmio(*layout.ecam.start(), ecam_len, ecam)?);
        let ports = layout::PCI_CONFIG_PORTS;
        let config = Arc::new(ConfigPorts::new(Arc::clone(&self.pci)));
        guards.push(space.add_ports(*ports.start(), ports.len() as u16, config)?);
        let power = Arc::new(PowerRegisters);
        guards.push(space.add_ports(layout::POWER_PORT, power::LEN as u16, power)?);
        if let Some(panic) = self.panic.clone() {
            guards.push(space.add_ports(panic::PORT, panic::LEN as u16, panic)?);
        }
        let events = Arc::clone(&self.events);
        guards.push(space.add_ports(layout::EVENT_PORT, events::LEN as u16, events)?);
        if let Some(serial) = &self.serial {
            guards.push(space.add_ports(
                layout::SERIAL_PORT,
                serial::LEN as u16,
                serial.clone(),
            )?);
        }
        Ok(guards)
    }

    /// Gives bus numbers, windows and BAR addresses to everything behind the root ports, as firmware
    /// would: there is none.
    ///
    /// # Errors
    /// A window of the plan does not hold what is behind its ports.
    pub fn assign_pci(&mut self, layout: &Layout) -> Result<(), Error> {
        for bridge in &layout.bridges {
            let host = HostWindows {
                mem32: half_open(&bridge.mem32),
                mem64: half_open(&bridge.mem64),
                io: u64::from(*bridge.io.start())..u64::from(*bridge.io.end()) + 1,
            };
            self.windows.assign(&self.pci, &host, &self.slots)?;
        }
        Ok(())
    }

    /// The slots, as they are status to clients.
    pub fn slots(&self) -> SlotTable {
        SlotTable {
            ports: self.slots.iter().map(|slot| slot.port).collect(),
            pci: Arc::clone(&self.pci),
            events: Arc::clone(&self.events),
            leaving: self.leaving.clone(),
        }
    }

    /// What a port can hold, as it was given when the guest last booted.
    pub fn windows(&self, port: PortIndex) -> PortWindows {
        self.windows
            .given
            .get(port.get())
            .cloned()
            .unwrap_or_default()
    }

    /// Resets all functions behind the ports side by side, as a host device takes a tenth of a second. Returns
    /// the ports of those that failed, or did not answer in time.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn reset_devices(&self, sandbox: &Sandbox) -> Result<Vec<PortIndex>, Error> {
        let ports = self.pci.ports().map(|(port, ..)| port);
        let behind = ports.flat_map(|port| {
            let functions = self.pci.functions_behind(port).into_iter();
            functions.map(move |(_, function)| (port, function))
        });
        reset_all(behind.collect(), &self.space, sandbox, RESET_PATIENCE)
    }

    /// Brings all but what is behind the ports back to its state before the guest started, and gives PCI its
    /// addresses again.
    ///
    /// # Errors
    /// A window of the plan does not hold what is behind its ports.
    pub fn reset(&mut self, layout: &Layout) -> Result<(), Error> {
        if let Some(serial) = &self.serial {
            serial.reset();
        }
        self.events.reset();
        if let Some(panic) = &self.panic {
            panic.reset();
        }
        for function in self.pci.bridges_and_ports() {
            let reset = function.reset(&*self.space);
            reset.map_err(Error::host("reset a root port for the guest's reboot"))?;
        }
        self.assign_pci(layout)
    }
}

/// Resets functions side by side. Returns the ports of those that failed, or did not answer within `patience`.
fn reset_all(
    behind: Vec<(PortIndex, Arc<dyn PciDevice>)>,
    space: &Arc<impl BarSpace + Send + Sync + 'static>,
    sandbox: &Sandbox,
    patience: Duration,
) -> Result<Vec<PortIndex>, Error> {
    let mut tasks = Vec::new();
    for (port, function) in behind {
        let space = Arc::clone(space);
        let reset = move || function.reset(&*space);
        let task = threads::spawn(Role::Device, sandbox, reset);
        tasks.push((port, task.map_err(Error::host("spawn a thread"))?));
    }
    let deadline = Instant::now() + patience;
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

/// The windows of the slots, which are there before anything is in them.
struct SlotWindows {
    /// Number of the first port that is empty at the start.
    first: usize,
    /// Bytes of 64-bit addresses that each such port is to have, if that was said.
    wish: Option<u64>,
    /// What each got.
    share: Option<Share>,
    /// The windows of all ports.
    given: Vec<PortWindows>,
}

/// What the ports that are empty at the start get.
#[derive(Debug, Clone, Copy)]
struct Share {
    /// Bytes of addresses below 4 GiB.
    mem32: u64,
    /// Bytes of 64-bit addresses.
    mem64: u64,
    /// How many get I/O ports: there are few of them. The last, as slots are filled from the first on, and
    /// most devices have no I/O BAR.
    with_io: usize,
}

/// The most 64-bit addresses that a slot gets unasked: enough for the largest BARs there are.
const MAX_SHARE64: u64 = 256 << 30;
/// The most addresses below 4 GiB: few devices have more than one BAR of 16 MiB there.
const MAX_SHARE32: u64 = 256 << 20;
/// The least that is worth having.
const MIN_SHARE64: u64 = 1 << 20;

impl SlotWindows {
    fn assign(
        &mut self,
        pci: &PciSegment,
        host: &HostWindows,
        slots: &[HotSlot],
    ) -> Result<(), FirmwareError> {
        let empty = slots.len().saturating_sub(self.first) as u64;
        let mut share = self.share.unwrap_or_else(|| self.even(host, empty));
        let plans = loop {
            let first_with_io = slots.len().saturating_sub(share.with_io);
            let minimum = |port: PortIndex| match port.get() {
                port if port < self.first => Minimum::default(),
                port => Minimum {
                    mem32: share.mem32,
                    mem64: share.mem64,
                    io: IO_GRANULARITY * u64::from(port >= first_with_io),
                },
            };
            match firmware::assign(pci, host, minimum) {
                Err(error) if empty > 0 && self.shrink(&mut share, error.kind()) => {}
                plans => break plans?,
            }
        };
        self.share = Some(share);
        self.given = plans.into_iter().map(|plan| plan.windows).collect();
        Ok(())
    }

    /// An even share of a part of what there is: the rest is for the devices that are there.
    fn even(&self, host: &HostWindows, empty: u64) -> Share {
        let len = |range: &Range<u64>| range.end.saturating_sub(range.start) / empty.max(1);
        let least = Minimum::default().mem32;
        let mem32 = (len(&host.mem32) / 4 * 3).clamp(least, MAX_SHARE32);
        let mem64 = (len(&host.mem64) / 2).clamp(MIN_SHARE64, MAX_SHARE64);
        let windows = (host.io.end.saturating_sub(host.io.start) / IO_GRANULARITY).min(empty);
        Share {
            mem32: 1 << mem32.ilog2(),
            mem64: self.wish.unwrap_or(1 << mem64.ilog2()),
            with_io: windows as usize,
        }
    }

    /// Makes shares that did not fit smaller; `false` if nothing is left to be made smaller.
    fn shrink(&self, share: &mut Share, kind: WindowKind) -> bool {
        if kind == WindowKind::Io {
            let more = share.with_io > 0;
            share.with_io = share.with_io.saturating_sub(1);
            return more;
        }
        if share.mem32 > Minimum::default().mem32 {
            share.mem32 /= 2;
            return true;
        }
        let more = self.wish.is_none() && share.mem64 > MIN_SHARE64;
        if more {
            share.mem64 /= 2;
        }
        more
    }
}

fn half_open(range: &RangeInclusive<u64>) -> Range<u64> {
    *range.start()..range.end().saturating_add(1)
}

/// The host bridges of the plan, and `ports` root ports on the first.
fn hierarchy(layout: &Layout, ports: usize) -> Result<PciSegment, Error> {
    let buses = layout
        .bridges
        .iter()
        .map(|bridge| bridge.first_bus..=bridge.last_bus);
    let mut segment = PciSegment::new(buses)?;
    for _ in 0..ports {
        segment.add_root_port(0)?;
    }
    Ok(segment)
}

fn serial_port(config: &VmConfig, routes: &GsiRoutes) -> Result<Option<Arc<Serial>>, Error> {
    let below = config.folders.as_ref();
    let below = below.and_then(|folders| folders.output.as_deref());
    let out: Box<dyn Write + Send> = match &config.serial {
        SerialMode::Off => return Ok(None),
        SerialMode::Null => Box::new(io::sink()),
        SerialMode::Tty => {
            let stdout = BoundedWriter::of_stream(&io::stdout(), bounded_writer::Kind::Guest);
            Box::new(stdout.map_err(Error::host("use stdout"))?)
        }
        SerialMode::File(path) => Box::new(BoundedFile::new(
            payload::create("serial.file", path, below)?,
            SERIAL_FILE_MOST,
        )),
    };
    let trigger = wire(routes, layout::SERIAL_GSI)?;
    let serial = Serial::new(trigger, out).map_err(Error::host("make an eventfd"))?;
    Ok(Some(Arc::new(serial)))
}

/// An eventfd that raises a line of the I/O APIC.
fn wire(routes: &GsiRoutes, line: u32) -> Result<EventFd, Error> {
    let trigger =
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::host("make an eventfd"))?;
    routes
        .wire_pin(line, &trigger)
        .map_err(Error::host("wire an interrupt line (KVM_IRQFD)"))?;
    Ok(trigger)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::channel;

    use gantry_devices::pci::{BarGuard, BarPlacement};

    use super::*;
    use crate::sandbox::SeccompMode;

    const GIB: u64 = 1 << 30;

    fn host() -> HostWindows {
        HostWindows {
            mem32: 2 * GIB..3 * GIB + GIB / 2,
            mem64: 4 * GIB..1024 * GIB,
            io: 0x1000..0x1_0000,
        }
    }

    fn windows(wish: Option<u64>) -> SlotWindows {
        SlotWindows {
            first: 1,
            wish,
            share: None,
            given: Vec::new(),
        }
    }

    fn segment(ports: usize) -> (PciSegment, Vec<HotSlot>) {
        let mut segment = PciSegment::new([0..=0xff]).unwrap();
        for _ in 0..ports {
            segment.add_root_port(0).unwrap();
        }
        let slots = segment.ports().map(|(port, at, _)| HotSlot { port, at });
        let slots = slots.collect();
        (segment, slots)
    }

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
    fn a_device_whose_reset_fails_or_hangs_is_named_and_the_others_are_reset() {
        let sandbox = Sandbox::new(SeccompMode::Off).unwrap();
        let (_, slots) = segment(3);
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
        let ports: Vec<PortIndex> = slots.iter().map(|slot| slot.port).collect();
        let behind = ports.iter().copied().zip(functions).collect();
        // Long enough for the two that answer.
        let patience = Duration::from_secs(2);
        let failed = reset_all(behind, &Arc::new(NoSpace), &sandbox, patience).unwrap();
        assert_eq!(failed, ports[..2]);
        assert!(*done.lock().unwrap());
        drop(let_go);
    }

    #[test]
    fn empty_slots_share_what_there_is() {
        for (empty, mem32, mem64) in [(1, 256 << 20, 256 * GIB), (32, 32 << 20, 8 * GIB)] {
            let (segment, slots) = segment(empty + 1);
            let mut windows = windows(None);
            windows.assign(&segment, &host(), &slots).unwrap();
            let len = |window: &Option<Range<u64>>| {
                window
                    .as_ref()
                    .map_or(0, |window| window.end - window.start)
            };
            assert_eq!(len(&windows.given[0].mem64), 0, "there from the start");
            for given in &windows.given[1..] {
                assert_eq!((len(&given.mem32), len(&given.mem64)), (mem32, mem64));
            }
            // 60 KiB of I/O ports, and the first slots go without.
            let with_io = windows.given.iter().map(|given| len(&given.io));
            let mut expected = vec![0; empty + 1];
            expected[(empty + 1).saturating_sub(15).max(1)..].fill(0x1000);
            assert!(with_io.eq(expected));
            let before = windows.given.clone();
            windows.assign(&segment, &host(), &slots).unwrap();
            assert_eq!(windows.given, before, "the same at a reboot");
        }
    }

    #[test]
    fn io_ports_that_others_need_are_done_without() {
        let mut few = host();
        few.io = 0x1000..0x4000;
        let (segment, slots) = segment(6);
        let mut shared = windows(None);
        shared.assign(&segment, &few, &slots).unwrap();
        assert_eq!(shared.share.map(|share| share.with_io), Some(3));
        // As after a reboot with fewer left.
        few.io = 0x1000..0x3000;
        shared.assign(&segment, &few, &slots).unwrap();
        assert_eq!(shared.share.map(|share| share.with_io), Some(2));
        few.io = 0x1000..0x1000;
        windows(None).assign(&segment, &few, &slots).unwrap();
    }

    #[test]
    fn shares_shrink_until_they_fit_and_wishes_do_not() {
        let mut small = host();
        small.mem32 = 2 * GIB..2 * GIB + (544 << 20);
        let (segment, slots) = segment(33);
        let mut shared = windows(None);
        shared.assign(&segment, &small, &slots).unwrap();
        assert_eq!(shared.share.map(|share| share.mem32), Some(16 << 20));
        let refused = windows(Some(128 * GIB)).assign(&segment, &host(), &slots);
        assert!(matches!(refused, Err(FirmwareError::Slot { .. })));
        let (segment, slots) = self::segment(5);
        windows(Some(128 * GIB))
            .assign(&segment, &host(), &slots)
            .unwrap();
    }
}
