//! A PCIe root port: the bridge between a root bus and the one device behind it.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::config::{Area, ConfigSpace, NoBacking};
use super::host_bridge::VENDOR;
use super::registers::{
    BRIDGE_CONTROL, CACHE_LINE_SIZE, CAPABILITIES_POINTER, COMMAND, COMMAND_BUS_MASTER, COMMAND_IO,
    COMMAND_MEMORY, DEVICE_ID, HEADER_BRIDGE, HEADER_TYPE, INTERRUPT_LINE, IO_WINDOW,
    MEMORY_WINDOW, PREFETCHABLE_UPPER, PREFETCHABLE_WINDOW, PRIMARY_BUS, REVISION_ID, STATUS,
    STATUS_CAPABILITIES, VENDOR_ID,
};
use super::{BarSpace, CapabilityId, PciDevice};

/// QEMU's generic root port: Linux has no quirk for it, binds `pcieport` by class, and users recognise it as
/// virtual.
const DEVICE: u16 = 0x000c;
/// Class 06 bridge, subclass 04 PCI-to-PCI bridge, programming interface 0.
const CLASS: u32 = 0x06_04_00;

/// Command bits that can be set: I/O, memory, bus master, parity, SERR#, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0547;
/// Bridge control bits that can be set: parity, SERR#, ISA, VGA, VGA 16-bit. Secondary bus reset is not
/// among them: it would have no effect.
const BRIDGE_CONTROL_WRITABLE: u16 = 0x001f;

/// Granularity of the memory windows in bytes.
pub(super) const MEMORY_GRANULARITY: u64 = 1 << 20;
/// Granularity of the I/O window, in ports: its size and alignment are multiples of it.
pub const IO_GRANULARITY: u64 = 1 << 12;
/// The low nibbles of the prefetchable base and limit: 64-bit addresses.
const PREFETCHABLE_64_BIT: u16 = 1;

/// Where the PCI Express capability lies.
const EXPRESS: u16 = 0x40;
/// Offset of the link status register in it.
const LINK_STATUS: u16 = EXPRESS + 0x12;
/// Offset of the slot status register in it.
const SLOT_STATUS: u16 = EXPRESS + 0x1a;
/// 32 GT/s, as a link speed field: no slower than devices behind the port, or guests would report the port
/// as a bottleneck.
const LINK_SPEED: u16 = 5;
/// 16 lanes, as a link width field.
const LINK_WIDTH: u16 = 16 << 4;
/// Link status: both ends use the reference clock of the slot.
const LINK_SLOT_CLOCK: u16 = 1 << 12;
/// Link status: the data link layer is up.
const LINK_ACTIVE: u16 = 1 << 13;
/// Slot status: a card is present.
const SLOT_PRESENCE: u16 = 1 << 6;

/// The address ranges that a bridge forwards to the bus behind it. `None` is a closed window.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortWindows {
    /// Memory below 4 GiB, in units of 1 MiB.
    pub mem32: Option<Range<u64>>,
    /// Prefetchable memory, in units of 1 MiB.
    pub mem64: Option<Range<u64>>,
    /// I/O ports, in units of 4 KiB. Without a range the port does not implement the window.
    pub io: Option<Range<u64>>,
}

/// A root port with a slot, after the PCI Express Base Specification 6.0, 7.5.1.3 and 7.5.3.
///
/// It has no interrupts, no AER and no native hot-plug. Its bus numbers, its windows, and the bits of its command
/// register that open these have an effect.
pub struct RootPort {
    bus: u8,
    secondary: u8,
    slot: u16,
    config: Mutex<ConfigSpace>,
}

impl RootPort {
    /// A port on bus `bus`, with bus `secondary` behind it and `slot` as the number of its slot
    /// (13 bits) and, cut to 8 bits, its link.
    pub fn new(bus: u8, secondary: u8, slot: u16) -> Self {
        Self {
            bus,
            secondary,
            slot,
            config: Mutex::new(power_on(bus, secondary, slot)),
        }
    }

    /// The bus directly behind the port, as the guest has it now.
    pub fn secondary_bus(&self) -> u8 {
        self.config().get::<1>(PRIMARY_BUS + 1)[0]
    }

    /// The addresses that the port forwards to the bus behind it, as the guest has programmed it.
    pub fn forwards(&self) -> PortWindows {
        let config = self.config();
        let command = u16::from_le_bytes(config.get(COMMAND));
        let window = |opened: u16, base: u64, last: u64| {
            (command & opened != 0 && base <= last).then(|| base..last.saturating_add(1))
        };
        let ends = |register: u16| {
            let [base, limit] =
                [register, register + 2].map(|at| u16::from_le_bytes(config.get(at)));
            (
                u64::from(base & 0xfff0) << 16,
                u64::from(limit & 0xfff0) << 16,
            )
        };
        let upper = |register: u16| u64::from(u32::from_le_bytes(config.get(register))) << 32;
        let (base, limit) = ends(MEMORY_WINDOW);
        let mem32 = window(COMMAND_MEMORY, base, limit | 0xf_ffff);
        let (base, limit) = ends(PREFETCHABLE_WINDOW);
        let base = base | upper(PREFETCHABLE_UPPER);
        let limit = limit | upper(PREFETCHABLE_UPPER + 4) | 0xf_ffff;
        let mem64 = window(COMMAND_MEMORY, base, limit);
        let [base, limit] = config
            .get(IO_WINDOW)
            .map(|end: u8| u64::from(end & 0xf0) << 8);
        // A port without such a window has it at 0, where the ports of the platform are.
        let io = window(COMMAND_IO, base, limit | 0xfff).filter(|io| io.start != 0);
        PortWindows { mem32, mem64, io }
    }

    /// Sets the windows as firmware does, and has the port forward accesses.
    pub fn program(&self, windows: &PortWindows) {
        let mut command = COMMAND_BUS_MASTER | COMMAND_MEMORY;
        if windows.io.is_some() {
            command |= COMMAND_IO;
        }
        let mut config = self.config();
        config.insert(io_window(windows.io.as_ref()));
        let (base, limit) = memory_window(windows.mem32.as_ref());
        config.set(MEMORY_WINDOW, &window_bytes(base as u16, limit as u16));
        let (base, limit) = memory_window(windows.mem64.as_ref());
        let low = |unit: u64| unit as u16 | PREFETCHABLE_64_BIT;
        config.set(PREFETCHABLE_WINDOW, &window_bytes(low(base), low(limit)));
        config.set(PREFETCHABLE_UPPER, &((base >> 16) as u32).to_le_bytes());
        config.set(
            PREFETCHABLE_UPPER + 4,
            &((limit >> 16) as u32).to_le_bytes(),
        );
        config.set(COMMAND, &command.to_le_bytes());
    }

    /// Shows a card in the slot with its link up, or an empty slot.
    pub fn set_occupied(&self, occupied: bool) {
        let (link, slot) = if occupied {
            let link = LINK_SPEED | LINK_WIDTH | LINK_SLOT_CLOCK | LINK_ACTIVE;
            (link, SLOT_PRESENCE)
        } else {
            (LINK_SLOT_CLOCK, 0)
        };
        let mut config = self.config();
        config.set(LINK_STATUS, &link.to_le_bytes());
        config.set(SLOT_STATUS, &slot.to_le_bytes());
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciDevice for RootPort {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data, &NoBacking);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> bool {
        let before = self.forwards();
        self.config().write(offset, data, &NoBacking);
        self.forwards() != before
    }

    fn remap(&self, _space: &dyn BarSpace) {}

    /// Closes the windows: firmware programs them anew.
    fn reset(&self, _space: &dyn BarSpace) -> io::Result<()> {
        let mut config = self.config();
        let occupied = config.get(SLOT_STATUS) != [0; 2];
        *config = power_on(self.bus, self.secondary, self.slot);
        drop(config);
        self.set_occupied(occupied);
        Ok(())
    }
}

/// The configuration space before firmware has run, but for the bus numbers.
fn power_on(bus: u8, secondary: u8, slot: u16) -> ConfigSpace {
    let all = [0xff; 4];
    let window_mask = window_bytes(0xfff0, 0xfff0);
    let (base, limit) = memory_window(None);
    let closed = window_bytes(base as u16, limit as u16);
    let closed_64 = window_bytes(
        base as u16 | PREFETCHABLE_64_BIT,
        limit as u16 | PREFETCHABLE_64_BIT,
    );
    ConfigSpace::new()
        .with(Area::read_only(VENDOR_ID, &VENDOR.to_le_bytes()))
        .with(Area::read_only(DEVICE_ID, &DEVICE.to_le_bytes()))
        .with(Area::emulated(
            COMMAND,
            &[0; 2],
            &COMMAND_WRITABLE.to_le_bytes(),
        ))
        .with(Area::read_only(STATUS, &STATUS_CAPABILITIES.to_le_bytes()))
        .with(Area::read_only(REVISION_ID, &(CLASS << 8).to_le_bytes()))
        .with(Area::emulated(CACHE_LINE_SIZE, &[0], &all))
        .with(Area::read_only(HEADER_TYPE, &[HEADER_BRIDGE]))
        .with(Area::emulated(
            PRIMARY_BUS,
            &[bus, secondary, secondary],
            &all,
        ))
        .with(io_window(None))
        .with(Area::emulated(MEMORY_WINDOW, &closed, &window_mask))
        .with(Area::emulated(
            PREFETCHABLE_WINDOW,
            &closed_64,
            &window_mask,
        ))
        .with(Area::emulated(PREFETCHABLE_UPPER, &[0; 8], &[0xff; 8]))
        .with(Area::read_only(CAPABILITIES_POINTER, &[EXPRESS as u8]))
        .with(Area::emulated(INTERRUPT_LINE, &[0], &all))
        .with(Area::emulated(
            BRIDGE_CONTROL,
            &[0; 2],
            &BRIDGE_CONTROL_WRITABLE.to_le_bytes(),
        ))
        .with(express(slot))
}

/// The PCI Express capability of a root port (PCI Express Base Specification 6.0, 7.5.3).
fn express(slot: u16) -> Area {
    /// Register offset, width in bytes, value, and the bits that can be written.
    type Register = (usize, usize, u32, u32);
    let link = u32::from(LINK_SPEED | LINK_WIDTH);
    let port = u32::from(slot & 0xff);
    let slot = u32::from(slot & 0x1fff);
    let registers: [Register; 13] = [
        // Capability header, last in the list.
        (0x00, 2, u32::from(CapabilityId::PCI_EXPRESS.0), 0),
        // Capabilities: version 2, root port, slot implemented.
        (0x02, 2, 0x0142, 0),
        // Device capabilities: payloads up to 512 bytes, extended tags, role-based errors.
        (0x04, 4, 0x8022, 0),
        // Device control: relaxed ordering, no snoop, read requests up to 512 bytes.
        (0x08, 2, 0x2810, 0x79ff),
        // Link capabilities: no ASPM and so told, link-active reporting.
        (0x0c, 4, link | 1 << 20 | 1 << 22 | port << 24, 0),
        // Link control: common clock, as firmware leaves it; else Linux retrains the link.
        (0x10, 2, 1 << 6, 0x00c3),
        (0x12, 2, u32::from(LINK_SLOT_CLOCK), 0),
        // Slot capabilities: no command completed, the slot's number, and no hot-plug of its own.
        (0x14, 4, 1 << 18 | slot << 19, 0),
        // Root control: system errors and PME, though none is ever raised.
        (0x1c, 2, 0, 0x000f),
        // Device capabilities 2 and control 2: completion timeouts can be turned off.
        (0x24, 4, 1 << 4, 0),
        (0x28, 2, 0, 1 << 4),
        // Link capabilities 2: 2.5 to 32 GT/s. Link control 2: the highest is aimed for.
        (0x2c, 4, 0x3e, 0),
        (0x30, 2, u32::from(LINK_SPEED), 0xf),
    ];
    let mut bytes = [0; 0x3c];
    let mut writable = [0; 0x3c];
    for (offset, width, value, mask) in registers {
        bytes[offset..offset + width].copy_from_slice(&value.to_le_bytes()[..width]);
        writable[offset..offset + width].copy_from_slice(&mask.to_le_bytes()[..width]);
    }
    Area::emulated(EXPRESS, &bytes, &writable)
}

/// The I/O base and limit registers, for 16-bit ports; hardwired to 0 for a port without.
fn io_window(window: Option<&Range<u64>>) -> Area {
    match window {
        Some(window) => {
            let base = (window.start >> 8) as u8 & 0xf0;
            let limit = (window.end.saturating_sub(1) >> 8) as u8 & 0xf0;
            Area::emulated(IO_WINDOW, &[base, limit], &[0xf0, 0xf0])
        }
        None => Area::read_only(IO_WINDOW, &[0; 2]),
    }
}

/// Base and limit of a memory window in units of 64 KiB, as in the registers: the limit names the
/// last megabyte, and a window is closed by a limit below its base.
fn memory_window(window: Option<&Range<u64>>) -> (u64, u64) {
    let unit = |address: u64| address >> 16 & !0xf;
    match window {
        Some(window) if !window.is_empty() => (unit(window.start), unit(window.end - 1)),
        _ => (0xfff0, 0),
    }
}

fn window_bytes(base: u16, limit: u16) -> [u8; 4] {
    (u32::from(base) | u32::from(limit) << 16).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::super::capability::{walk_extended, walk_standard};
    use super::super::fake::FakeSpace;
    use super::*;

    fn port() -> RootPort {
        RootPort::new(0, 5, 5)
    }

    fn dword(port: &RootPort, offset: u16) -> u32 {
        let mut data = [0; 4];
        port.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(port: &RootPort, offset: u16, value: u32) {
        port.write_config(offset, &value.to_le_bytes());
    }

    #[test]
    fn it_is_found_as_a_root_port() {
        let port = port();
        assert_eq!(dword(&port, 0), 0x000c_1b36);
        assert_eq!(dword(&port, 8) >> 8, 0x06_04_00);
        assert_eq!(dword(&port, 0x0c) >> 16, 1);
        assert_eq!(dword(&port, 0x3c) >> 8 & 0xff, 0, "no interrupt pin");
        let caps = walk_standard(|offset| dword(&port, offset));
        let ids: Vec<_> = caps.iter().map(|cap| cap.id).collect();
        assert_eq!(ids, [CapabilityId::PCI_EXPRESS]);
        assert_eq!(dword(&port, EXPRESS) >> 20 & 0xf, 4, "type of port");
        assert!(walk_extended(|offset| dword(&port, offset)).is_empty());
    }

    #[test]
    fn writes_change_only_what_the_specification_lets_them() {
        let port = port();
        for offset in (0..0x1000).step_by(4) {
            write(&port, offset, u32::MAX);
        }
        let expected: [(u16, u32); 16] = [
            (0x00, 0x000c_1b36),
            (0x04, 0x0010_0547),
            (0x08, 0x0604_0000),
            (0x0c, 0x0001_00ff),
            (0x10, 0),
            (0x14, 0),
            (0x18, 0x00ff_ffff),
            (0x1c, 0),
            (0x20, 0xfff0_fff0),
            (0x24, 0xfff1_fff1),
            (0x28, u32::MAX),
            (0x2c, u32::MAX),
            (0x30, 0),
            (0x34, 0x40),
            (0x38, 0),
            (0x3c, 0x001f_00ff),
        ];
        for (offset, value) in expected {
            assert_eq!(dword(&port, offset), value, "{offset:#x}");
        }
        assert_eq!(dword(&port, EXPRESS + 0x08), 0x79ff);
        assert_eq!(dword(&port, EXPRESS + 0x10) & 0xffff, 0x00c3);
        assert_eq!(dword(&port, 0x100), 0);
    }

    #[test]
    fn the_guest_renumbers_buses() {
        let port = port();
        let buses = |port: &RootPort| dword(port, PRIMARY_BUS) >> 8 & 0xffff;
        assert_eq!((port.secondary_bus(), buses(&port)), (5, 0x0505));
        port.write_config(PRIMARY_BUS + 1, &[0x20, 0x2f]);
        assert_eq!((port.secondary_bus(), buses(&port)), (0x20, 0x2f20));
        port.reset(&FakeSpace::default()).unwrap();
        assert_eq!((port.secondary_bus(), buses(&port)), (5, 0x0505));
    }

    #[test]
    fn windows_are_programmed_and_closed() {
        let port = port();
        let closed = (0x0000_fff0, 0x0001_fff1);
        assert_eq!((dword(&port, 0x20), dword(&port, 0x24)), closed);
        assert_eq!(port.forwards(), PortWindows::default());
        let windows = PortWindows {
            mem32: Some(0xc000_0000..0xc100_0000),
            mem64: Some(0x40_0000_0000..0x60_0000_0000),
            io: Some(0x3000..0x5000),
        };
        port.program(&windows);
        assert_eq!(port.forwards(), windows);
        assert_eq!(dword(&port, 0x04) & 0xffff, 7);
        assert_eq!(dword(&port, 0x20), 0xc0f0_c000);
        assert_eq!(dword(&port, 0x24), 0xfff1_0001);
        assert_eq!((dword(&port, 0x28), dword(&port, 0x2c)), (0x40, 0x5f));
        assert_eq!(dword(&port, 0x1c) & 0xffff, 0x4030);
        write(&port, 0x1c, u32::MAX);
        assert_eq!(dword(&port, 0x1c), 0xf0f0);
        port.program(&PortWindows::default());
        assert_eq!(port.forwards(), PortWindows::default());
        assert_eq!(dword(&port, 0x04) & 0xffff, 6);
        assert_eq!((dword(&port, 0x20), dword(&port, 0x24)), closed);
        assert_eq!(dword(&port, 0x1c), 0);
    }

    #[test]
    fn a_write_says_whether_other_addresses_are_forwarded() {
        let port = port();
        let windows = PortWindows {
            mem32: Some(0xc000_0000..0xc100_0000),
            mem64: Some(0x40_0000_0000..0x60_0000_0000),
            io: Some(0x3000..0x5000),
        };
        port.program(&windows);
        let off = port.write_config(COMMAND, &[4, 0]);
        assert!(off && port.forwards() == PortWindows::default());
        assert!(!port.write_config(MEMORY_WINDOW, &[0, 0xc1]), "it is off");
        let on = port.write_config(COMMAND, &[2, 0]);
        let moved = PortWindows {
            mem32: None,
            io: None,
            ..windows
        };
        assert!(
            on && port.forwards() == moved,
            "its base is above its limit"
        );
        assert!(port.write_config(PREFETCHABLE_UPPER, &[0x41]));
        assert!(!port.write_config(PREFETCHABLE_UPPER, &[0x41]), "as before");
        assert!(!port.write_config(INTERRUPT_LINE, &[9]));
    }

    #[test]
    fn the_slot_shows_its_card_even_after_a_reset() {
        let port = port();
        let status = |port: &RootPort| (dword(port, EXPRESS + 0x10), dword(port, EXPRESS + 0x18));
        let empty = status(&port);
        assert_eq!((empty.0 >> 29 & 1, empty.1 >> 22 & 1), (0, 0));
        port.set_occupied(true);
        port.reset(&FakeSpace::default()).unwrap();
        let full = status(&port);
        assert_eq!((full.0 >> 29 & 1, full.1 >> 22 & 1), (1, 1));
        assert_eq!(full.0 >> 16 & 0x3ff, 0x105, "32 GT/s, 16 lanes");
        port.set_occupied(false);
        assert_eq!(status(&port), empty);
        assert_eq!(dword(&port, EXPRESS + 0x14) >> 19, 5, "slot number");
    }
}
