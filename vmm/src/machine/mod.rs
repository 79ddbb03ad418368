//! The machine of a VM: address space, RAM, interrupt routes, and the devices every VM has.

mod address_space;
mod console;
mod error;
mod memory;
mod serial;
mod slot_windows;
mod slots;

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use gantry_devices::events::{self, PlatformEvents};
use gantry_devices::panic::{self, PanicRegister};
use gantry_devices::pci::firmware::HostWindows;
use gantry_devices::pci::{BarSpaceError, ConfigPorts, EcamWindow, PciSegment};
use gantry_devices::power::{self, PowerRegisters};
use gantry_devices::serial::{LEN as SERIAL_LEN, Serial};
use gantry_devices::virtio::VirtioHost;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::acpi::HotSlot;
use crate::config::VmConfig;
use crate::host::placement::VmPlacement;
use crate::info::ConsoleSink;
use crate::kvm::{GsiRoutes, KvmVm};
use crate::layout::{self, Layout};
use crate::process::error::cannot;
pub use address_space::AddressSpace;
use address_space::Guard;
pub use console::{Keyboard, SerialOutput};
pub use error::MachineError;
use memory::GuestRam;
pub use memory::release_program_pages;
pub use slot_windows::SlotWindows;
#[cfg(test)]
pub use slots::NoSpace;
pub use slots::{DrainGuard, SlotTable};

/// Registers of the in-kernel interrupt controllers: 4 KiB for the I/O APIC, and the MiB to which
/// message-signalled interrupts are written.
const IO_APIC_LEN: u64 = 0x1000;
const LOCAL_APIC_LEN: u64 = 0x10_0000;
/// The identity map page and three TSS pages.
const KVM_PAGES_LEN: u64 = 0x4000;

/// The hardware that every VM has.
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
    /// The register by which the guest's kernel reports a panic, if the VM has it.
    panic: Option<Arc<PanicRegister>>,
    /// The notifications of the guest.
    pub events: Arc<PlatformEvents>,
    /// The hot-plug slots, for the ACPI tables.
    pub hot_slots: Vec<HotSlot>,
    /// The hot-plug slots and their states.
    pub slots: SlotTable,
    /// What the ports can hold.
    pub windows: SlotWindows,
    // Taken out of the address space when the machine is dropped.
    _guards: Vec<Guard>,
}

impl Machine {
    /// Builds the machine as planned. The first `ports` root ports are for the devices that the VM starts with.
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
        console: &ConsoleSink,
    ) -> Result<Self, MachineError> {
        let hot = usize::from(config.hotplug.slots);
        let ram = GuestRam::new(&layout.ram, placement).map_err(cannot("set guest RAM aside"))?;
        let routes = GsiRoutes::new(Arc::clone(kvm.vm()))
            .map_err(cannot("set up interrupt routes (KVM_SET_GSI_ROUTING)"))?;
        let pci = Arc::new(hierarchy(layout)?);
        let serial = serial::port(config, console, || connect_irq(&routes, layout::SERIAL_GSI))?;
        // In a VM with hot-plug slots, the devices at boot can be detached, too.
        let all = pci.ports().map(|(port, at, _)| HotSlot { port, at });
        let hot_slots: Vec<HotSlot> = all.filter(|_| hot > 0).collect();
        let trigger = connect_irq(&routes, layout::EVENT_GSI)?;
        let slot_ports = hot_slots.iter().map(|slot| slot.port);
        let events = Arc::new(PlatformEvents::new(slot_ports.clone(), trigger));
        let space = Arc::new(AddressSpace::new(kvm.vm()));
        let mut machine = Self {
            slots: SlotTable::new(slot_ports, &pci, Arc::clone(&space) as _, &events),
            space,
            ram,
            routes,
            pci,
            serial,
            panic: config.pvpanic.then(Arc::default),
            events,
            hot_slots,
            windows: SlotWindows::new(ports, config.hotplug.window),
            _guards: Vec::new(),
        };
        machine._guards = machine
            .fill(layout)
            .map_err(MachineError::place("the machine"))?;
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
            guards.push(space.add_ports(layout::SERIAL_PORT, SERIAL_LEN as u16, serial.clone())?);
        }
        Ok(guards)
    }

    /// What virtio devices need of a guest with so many bits of physical address.
    pub fn virtio_host(&self, address_bits: u8) -> VirtioHost {
        VirtioHost {
            ram: self.ram.view(),
            router: Arc::new(self.routes.clone()),
            address_bits,
        }
    }

    /// Assigns bus numbers, windows and BAR addresses, as firmware would.
    ///
    /// # Errors
    /// A window of the plan does not hold what is behind its ports.
    pub fn assign_pci(&mut self, layout: &Layout) -> Result<(), MachineError> {
        for (index, bridge) in layout.bridges.iter().enumerate() {
            let host = HostWindows {
                mem32: half_open(&bridge.mem32),
                mem64: half_open(&bridge.mem64),
                io: u64::from(*bridge.io.start())..u64::from(*bridge.io.end()) + 1,
            };
            self.windows.assign(&self.pci, index, &host)?;
        }
        Ok(())
    }

    /// Resets everything but the devices behind the ports, and assigns the PCI addresses again.
    ///
    /// # Errors
    /// A window of the plan does not hold what is behind its ports.
    pub fn reset(&mut self, layout: &Layout) -> Result<(), MachineError> {
        if let Some(serial) = &self.serial {
            serial.reset();
        }
        self.events.reset();
        if let Some(panic) = &self.panic {
            panic.reset();
        }
        for function in self.pci.bridges_and_ports() {
            let reset = function.reset(&*self.space);
            reset.map_err(cannot("reset a root port for the guest's reboot"))?;
        }
        self.assign_pci(layout)
    }
}

fn half_open(range: &RangeInclusive<u64>) -> Range<u64> {
    *range.start()..range.end().saturating_add(1)
}

/// The host bridges of the plan, each with a root port for every further bus.
fn hierarchy(layout: &Layout) -> Result<PciSegment, MachineError> {
    let bridges = layout.bridges.iter();
    let mut segment = PciSegment::new(bridges.map(|bridge| bridge.first_bus..=bridge.last_bus))?;
    for (index, bridge) in layout.bridges.iter().enumerate() {
        for _ in bridge.first_bus..bridge.last_bus {
            segment.add_root_port(index)?;
        }
    }
    Ok(segment)
}

/// An eventfd that raises a line of the I/O APIC.
fn connect_irq(routes: &GsiRoutes, line: u32) -> Result<EventFd, MachineError> {
    let trigger = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(cannot("make an eventfd"))?;
    routes
        .wire_pin(line, &trigger)
        .map_err(cannot("wire an interrupt line (KVM_IRQFD)"))?;
    Ok(trigger)
}
