//! The work of firmware on a real machine: windows for the root ports, addresses for the BARs.
//!
//! Linux keeps an existing assignment if every BAR lies inside its bridge's window and every window inside
//! the host bridge's, as ACPI describes it. Functions keep their decoding off: drivers turn it on. Bridges
//! forward from the start, which saves the guest those writes.

use std::fmt;
use std::ops::Range;

use super::registers::{BARS, COMMAND, EXPANSION_ROM};
pub use super::root_port::IO_GRANULARITY;
use super::root_port::MEMORY_GRANULARITY;
use super::{
    BAR_COUNT, BarKind, BarName, GuestBdf, PciDevice, PciSegment, PortIndex, PortWindows, ROM,
};

/// The least distance of two memory BARs, so that no two share a page.
const PAGE: u64 = 4096;

/// The address ranges of a host bridge, from which its root ports get their windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostWindows {
    /// Memory below 4 GiB.
    pub mem32: Range<u64>,
    /// Prefetchable memory, above 4 GiB as a rule.
    pub mem64: Range<u64>,
    /// I/O ports.
    pub io: Range<u64>,
}

/// The smallest windows of a root port, for devices that are plugged in later. In bytes; 0 gives a window
/// only to a port whose device needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Minimum {
    /// The memory window.
    pub mem32: u64,
    /// The prefetchable memory window. If it is a power of two, its alignment lets one BAR fill it.
    pub mem64: u64,
    /// The I/O window.
    pub io: u64,
}

impl Default for Minimum {
    /// 16 MiB of memory below 4 GiB, and nothing else.
    fn default() -> Self {
        Self {
            mem32: 16 << 20,
            mem64: 0,
            io: 0,
        }
    }
}

/// A BAR that needs an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarRequest {
    /// The function behind the port.
    pub function: u8,
    /// The BAR's register, or [`ROM`].
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Size in bytes, a power of two.
    pub size: u64,
}

/// A root port and the BARs behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRequest {
    /// The port, for messages.
    pub port: GuestBdf,
    /// Its smallest windows.
    pub minimum: Minimum,
    /// All BARs of all functions behind it.
    pub bars: Vec<BarRequest>,
}

/// The address of a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarAddress {
    /// The BAR.
    pub bar: BarRequest,
    /// Its address, a multiple of its size.
    pub address: u64,
}

/// The addresses of a root port and of the functions behind it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortPlan {
    /// The port's windows.
    pub windows: PortWindows,
    /// The addresses of the BARs.
    pub bars: Vec<BarAddress>,
}

/// One of the three windows of a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowKind {
    /// Memory below 4 GiB: 32-bit BARs, 64-bit ones that are not prefetchable, and ROMs.
    Mem32,
    /// 64-bit prefetchable memory.
    Mem64,
    /// I/O ports.
    Io,
}

impl WindowKind {
    const ALL: [Self; 3] = [Self::Mem32, Self::Mem64, Self::Io];

    /// The window for a BAR. A bridge's prefetchable window is the only one above 4 GiB, and only
    /// prefetchable BARs may lie in it.
    const fn of(kind: BarKind) -> Self {
        match kind {
            BarKind::Io => Self::Io,
            BarKind::Memory64 { prefetchable: true } => Self::Mem64,
            _ => Self::Mem32,
        }
    }

    const fn granularity(self) -> u64 {
        match self {
            Self::Io => IO_GRANULARITY,
            _ => MEMORY_GRANULARITY,
        }
    }

    /// The least alignment and distance of BARs.
    const fn spacing(self) -> u64 {
        match self {
            Self::Io => 1,
            _ => PAGE,
        }
    }

    const fn minimum(self, minimum: &Minimum) -> u64 {
        match self {
            Self::Mem32 => minimum.mem32,
            Self::Mem64 => minimum.mem64,
            Self::Io => minimum.io,
        }
    }

    const fn host(self, windows: &HostWindows) -> &Range<u64> {
        match self {
            Self::Mem32 => &windows.mem32,
            Self::Mem64 => &windows.mem64,
            Self::Io => &windows.io,
        }
    }

    const fn port(self, windows: &mut PortWindows) -> &mut Option<Range<u64>> {
        match self {
            Self::Mem32 => &mut windows.mem32,
            Self::Mem64 => &mut windows.mem64,
            Self::Io => &mut windows.io,
        }
    }
}

impl fmt::Display for WindowKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mem32 => "32-bit memory",
            Self::Mem64 => "64-bit prefetchable memory",
            Self::Io => "I/O port",
        })
    }
}

/// Why the devices of a guest do not fit into its address space.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FirmwareError {
    /// A window with a device's BARs in it does not fit.
    #[error(
        "no room for {} ({:#x} bytes) of function {} behind root port {port}: a {kind} window \
         of {size:#x} bytes does not fit into what is left of {:#x}..{:#x}; attach fewer devices or \
         make the windows of other slots smaller",
        BarName(largest.index), largest.size, largest.function, host.start, host.end
    )]
    Bar {
        /// The root port.
        port: GuestBdf,
        /// The largest BAR in the window.
        largest: BarRequest,
        /// Which window.
        kind: WindowKind,
        /// The size of the whole window.
        size: u64,
        /// The host bridge's range.
        host: Range<u64>,
    },
    /// The window of an empty slot does not fit.
    #[error(
        "no room for root port {port}: a {kind} window of {size:#x} bytes does not fit into what \
         is left of {:#x}..{:#x}; ask for fewer slots or smaller windows",
        host.start, host.end
    )]
    Slot {
        /// The root port.
        port: GuestBdf,
        /// Which window.
        kind: WindowKind,
        /// The size of the window.
        size: u64,
        /// The host bridge's range.
        host: Range<u64>,
    },
}

impl FirmwareError {
    /// The window that does not fit.
    pub const fn kind(&self) -> WindowKind {
        match self {
            Self::Bar { kind, .. } | Self::Slot { kind, .. } => *kind,
        }
    }
}

/// Assigns windows and addresses to the root ports of the host bridge at `bridge` in the list of `segment`: at the
/// first start, and after each reset of the functions. Returns the plan of each port, in their order.
///
/// # Errors
/// A window does not fit; nothing is changed then.
pub fn assign(
    segment: &PciSegment,
    bridge: usize,
    host: &HostWindows,
    minimum: impl Fn(PortIndex) -> Minimum,
) -> Result<Vec<(PortIndex, PortPlan)>, FirmwareError> {
    let (ports, requests): (Vec<_>, Vec<_>) = segment
        .ports_of(bridge)
        .map(|(index, port, registers)| {
            let request = PortRequest {
                port,
                minimum: minimum(index),
                bars: probe_behind(segment, index),
            };
            ((index, registers), request)
        })
        .unzip();
    let plans = plan(&requests, host)?;
    let assigned = ports
        .into_iter()
        .zip(plans)
        .map(|((index, registers), plan)| {
            registers.program(&plan.windows);
            for (function, device) in segment.functions_behind(index) {
                for placed in plan.bars.iter().filter(|bar| bar.bar.function == function) {
                    program(device.as_ref(), placed);
                }
            }
            (index, plan)
        });
    Ok(assigned.collect())
}

/// A window that a port lacks, or that is too small for a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Misfit {
    /// Which window.
    pub kind: WindowKind,
    /// Bytes that the device needs.
    pub size: u64,
    /// The largest BAR for it.
    pub largest: BarRequest,
}

/// Checks that the BARs of all functions of a device fit into the windows of a port, so that a guest can
/// give them addresses. Linux enables no device that has a BAR without an address; a ROM may be without.
///
/// # Errors
/// They do not fit.
pub fn fit(bars: &[BarRequest], windows: &PortWindows) -> Result<(), Misfit> {
    let request = PortRequest {
        port: GuestBdf::from_bits(0),
        minimum: Minimum {
            mem32: 0,
            mem64: 0,
            io: 0,
        },
        bars: bars
            .iter()
            .filter(|bar| bar.kind != BarKind::Rom)
            .copied()
            .collect(),
    };
    let mut windows = windows.clone();
    for kind in WindowKind::ALL {
        let Some(need) = WindowNeed::of(kind, &request) else {
            continue;
        };
        let window = kind.port(&mut windows).clone();
        let fits = window.is_some_and(|window| {
            place(window.start, &need).is_some_and(|placed| placed.end <= window.end)
        });
        match need.bars.first() {
            Some(&(largest, _)) if !fits => {
                let size = need.size;
                return Err(Misfit {
                    kind,
                    size,
                    largest,
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// The BARs of all functions behind a port.
fn probe_behind(segment: &PciSegment, port: PortIndex) -> Vec<BarRequest> {
    segment
        .functions_behind(port)
        .iter()
        .flat_map(|(function, device)| probe(*function, device.as_ref()))
        .collect()
}

/// Turns the decoding of a function off and sizes its BARs, which keep their addresses
/// (PCI Express Base Specification 6.0, 7.5.1.2.1).
pub fn probe(function: u8, device: &dyn PciDevice) -> Vec<BarRequest> {
    // With decoding off, a write to a BAR maps nothing.
    device.write_config(COMMAND, &[0; 2]);
    let mut found = Vec::new();
    let mut index = 0;
    while index < BAR_COUNT as u8 {
        let low = size_mask(device, index);
        let kind = BarKind::from_register(low);
        let mut mask = u64::from(low & !kind.flag_mask());
        let present = mask != 0 || kind.is_64_bit();
        if kind.is_64_bit() && usize::from(index) + 1 < BAR_COUNT {
            mask |= u64::from(size_mask(device, index + 1)) << 32;
        }
        if present && mask != 0 {
            found.push(BarRequest {
                function,
                index,
                kind,
                size: 1 << mask.trailing_zeros(),
            });
        }
        index += 1 + u8::from(kind.is_64_bit());
    }
    let mask = size_mask(device, ROM) & !BarKind::Rom.flag_mask();
    if mask != 0 {
        found.push(BarRequest {
            function,
            index: ROM,
            kind: BarKind::Rom,
            size: 1 << mask.trailing_zeros(),
        });
    }
    found
}

fn register(index: u8) -> u16 {
    match index {
        ROM => EXPANSION_ROM.start,
        _ => BARS.start + 4 * u16::from(index),
    }
}

fn size_mask(device: &dyn PciDevice, index: u8) -> u32 {
    let (mut before, mut mask) = ([0; 4], [0; 4]);
    device.read_config(register(index), &mut before);
    device.write_config(register(index), &[0xff; 4]);
    device.read_config(register(index), &mut mask);
    device.write_config(register(index), &before);
    u32::from_le_bytes(mask)
}

/// Gives windows to the ports and addresses to the BARs behind them, in the order of `ports`.
///
/// # Errors
/// A window does not fit into the host bridge's range.
pub fn plan(ports: &[PortRequest], host: &HostWindows) -> Result<Vec<PortPlan>, FirmwareError> {
    let mut plans = vec![PortPlan::default(); ports.len()];
    for kind in WindowKind::ALL {
        let mut needs: Vec<(usize, WindowNeed)> = ports
            .iter()
            .enumerate()
            .filter_map(|(index, port)| Some((index, WindowNeed::of(kind, port)?)))
            .collect();
        // Large alignments first: each window then ends at an address where the next can begin.
        needs.sort_by_key(|(_, need)| std::cmp::Reverse(need.align));
        let range = kind.host(host);
        let mut next = range.start;
        for (index, need) in needs {
            let window = place(next, &need)
                .filter(|window| window.end <= range.end)
                .ok_or_else(|| need.refused(kind, ports[index].port, range))?;
            next = window.end;
            let plan = &mut plans[index];
            plan.bars
                .extend(need.bars.iter().map(|&(bar, offset)| BarAddress {
                    bar,
                    address: window.start + offset,
                }));
            *kind.port(&mut plan.windows) = Some(window);
        }
    }
    Ok(plans)
}

/// What one window of a port has to hold.
struct WindowNeed {
    size: u64,
    align: u64,
    /// The BARs and their offsets in the window, largest first.
    bars: Vec<(BarRequest, u64)>,
}

impl WindowNeed {
    /// `None` if no window is needed. A size that no window can have saturates, and fits nowhere.
    fn of(kind: WindowKind, port: &PortRequest) -> Option<Self> {
        let mut wanted: Vec<BarRequest> = port
            .bars
            .iter()
            .copied()
            .filter(|bar| WindowKind::of(bar.kind) == kind)
            .collect();
        // Each size divides the ones before it, so offsets are aligned without gaps.
        wanted.sort_by_key(|bar| std::cmp::Reverse(bar.size));
        let mut end = 0_u64;
        let bars: Vec<(BarRequest, u64)> = wanted
            .into_iter()
            .map(|bar| {
                let offset = end;
                end = end.saturating_add(bar.size.max(kind.spacing()));
                (bar, offset)
            })
            .collect();
        let size = end.max(kind.minimum(&port.minimum));
        if size == 0 {
            return None;
        }
        let size = size
            .checked_next_multiple_of(kind.granularity())
            .unwrap_or(u64::MAX);
        let align = 1 << size.ilog2();
        Some(Self { size, align, bars })
    }

    fn refused(&self, kind: WindowKind, port: GuestBdf, host: &Range<u64>) -> FirmwareError {
        let (size, host) = (self.size, host.clone());
        match self.bars.first() {
            Some(&(largest, _)) => FirmwareError::Bar {
                port,
                largest,
                kind,
                size,
                host,
            },
            None => FirmwareError::Slot {
                port,
                kind,
                size,
                host,
            },
        }
    }
}

/// The first range for a window from `next` on.
fn place(next: u64, need: &WindowNeed) -> Option<Range<u64>> {
    let start = next.checked_next_multiple_of(need.align)?;
    Some(start..start.checked_add(need.size)?)
}

fn program(device: &dyn PciDevice, placed: &BarAddress) {
    let at = register(placed.bar.index);
    device.write_config(at, &(placed.address as u32).to_le_bytes());
    if placed.bar.kind.is_64_bit() {
        let high = (placed.address >> 32) as u32;
        device.write_config(at + 4, &high.to_le_bytes());
    }
}

#[cfg(test)]
mod tests;
