//! The layout of the guest-physical address space: RAM, PCI windows and fixed devices.

use std::ops::{Range, RangeInclusive};

use gantry_devices::pci::{CONFIG_PORTS, CONFIG_PORTS_LEN, ECAM_BYTES_PER_BUS};
use gantry_devices::serial;

/// End of RAM below 4 GiB. The rest is room for 32-bit windows. BARs that are 64 bits wide but not prefetchable
/// need these, too: Linux keeps them out of prefetchable windows.
pub const LOW_RAM_END: u64 = 2 * GIB;
/// Room for the PCI Express enhanced configuration space: 1 MiB for each of 256 buses.
pub const ECAM: RangeInclusive<u64> = 0xe000_0000..=0xefff_ffff;
/// Registers of the I/O APIC, in KVM.
pub const IO_APIC: u64 = 0xfec0_0000;
/// Registers of the local APICs, in KVM, and the target of message-signalled interrupts.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Four pages that KVM needs to run real mode on Intel processors, right below the end of the 32-bit
/// address space: an identity map (`KVM_SET_IDENTITY_MAP_ADDR`), then three for `KVM_SET_TSS_ADDR`.
pub const KVM_PAGES: u64 = 0xfffb_c000;
/// First I/O port of the sleep and reset registers (`gantry_devices::power`).
pub const POWER_PORT: u16 = 0x600;
/// First I/O port of the event registers (`gantry_devices::events`).
pub const EVENT_PORT: u16 = 0x610;
/// Interrupt line of the events, on the I/O APIC.
pub const EVENT_GSI: u32 = 5;
/// First I/O port of the serial port.
pub const SERIAL_PORT: u16 = serial::COM1_PORT;
/// Interrupt line of the serial port, on the I/O APIC.
pub const SERIAL_GSI: u32 = serial::COM1_IRQ;
/// The address and data ports of PCI configuration mechanism 1.
pub const PCI_CONFIG_PORTS: RangeInclusive<u16> =
    CONFIG_PORTS..=CONFIG_PORTS + CONFIG_PORTS_LEN - 1;

/// Where a processor begins after a reset, as seen from real mode.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Between conventional memory and 1 MiB; on a PC this is video memory and firmware, not RAM.
pub const LEGACY_HOLE: Range<u64> = 0xa_0000..0x10_0000;

/// HyperTransport's own addresses, where no DMA reaches memory behind an AMD IOMMU. The kernel lists them as
/// reserved for every group there.
pub const HYPERTRANSPORT: RangeInclusive<u64> = 0xfd_0000_0000..=0xff_ffff_ffff;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PAGE: u64 = 4 << 10;
const HUGE_PAGE: u64 = 2 * MIB;
const HIGH_RAM_START: u64 = 4 * GIB;
/// Where old systems look for the RSDP, and of no other use.
const ACPI: RamRange = RamRange {
    start: 0xe_0000,
    len: 64 << 10,
};
const PCI_IO: RangeInclusive<u16> = 0x1000..=0xffff;
/// Room for 32 root ports of 16 MiB each.
const MIN_MEM32: u64 = 512 * MIB;
/// Linux with four-level page tables can give `struct page`s, which peer-to-peer DMA needs, to
/// addresses below 64 TiB only (`MAX_PHYSMEM_BITS`).
const MAX_BITS: u8 = 46;

/// The I/O APIC line of pin `pin` (0 = INTA#) of the function in slot `slot` of a root bus: the
/// eight lines from 16 on, rotated by slot as on most boards. The DSDT's `_PRT` says the same.
pub const fn intx_gsi(slot: u8, pin: u8) -> u32 {
    16 + ((slot as u32 + pin as u32) & 7)
}

/// One contiguous range of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address, a multiple of 4 KiB (of 2 MiB above the first 2 MiB).
    pub start: u64,
    /// Bytes, a multiple of 4 KiB.
    pub len: u64,
}

/// What one PCI host bridge passes on to the buses below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeWindows {
    /// Its root bus.
    pub first_bus: u8,
    /// The last bus number below it.
    pub last_bus: u8,
    /// I/O ports.
    pub io: RangeInclusive<u16>,
    /// Memory below 4 GiB, aligned to 1 MiB.
    pub mem32: RangeInclusive<u64>,
    /// Memory above RAM, aligned to 1 GiB.
    pub mem64: RangeInclusive<u64>,
}

/// What a plan is made from.
#[derive(Debug, Clone, Copy)]
pub struct LayoutInputs<'a> {
    /// PCIe root ports, each with a bus of its own behind it.
    pub root_ports: u8,
    /// Bytes of guest RAM.
    pub ram: u64,
    /// Physical address bits of the guest's processors (`cpu::Features::physical_bits`).
    pub physical_bits: u8,
    /// What the IOMMU can map; empty where no device is passed through.
    pub iova: &'a [RangeInclusive<u64>],
    /// Addresses that must be neither RAM nor BAR, from the devices' `reserved_regions`.
    pub reserved: &'a [RangeInclusive<u64>],
}

/// The guest-physical address space of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// RAM in address order; the sum is the requested size. The first range begins at 0 and includes the legacy
    /// hole below 1 MiB, which the guest's memory map leaves out.
    pub ram: Vec<RamRange>,
    /// Gaps that reserved ranges left inside RAM, in address order.
    pub holes: Vec<RangeInclusive<u64>>,
    /// Part of RAM that holds the ACPI tables.
    pub acpi: RamRange,
    /// Configuration space of segment 0.
    pub ecam: RangeInclusive<u64>,
    /// PCI host bridges, in bus order.
    pub bridges: Vec<BridgeWindows>,
}

/// Why no plan could be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// The size is too small or not made of whole pages.
    #[error("guest memory of {0} bytes: it must be a multiple of 4096 bytes and at least 2 MiB")]
    RamSize(u64),
    /// Not even the guest's first memory may be mapped.
    #[error(
        "the host's IOMMU does not map {start:#x}-{last:#x} for this VM's devices, and a guest \
         needs its first 640 KiB of memory; take other devices"
    )]
    FirstMemory {
        /// First address that is forbidden.
        start: u64,
        /// Last address that is forbidden.
        last: u64,
    },
    /// RAM does not fit below what can be addressed.
    #[error(
        "guest memory of {} MiB does not fit: the guest's processors or the host's IOMMU address \
         only what is below {limit:#x}, which has room for {} MiB; give the VM less memory",
        ram / MIB, room / MIB
    )]
    Ram {
        /// Bytes asked for.
        ram: u64,
        /// Bytes for which there is room.
        room: u64,
        /// The first address beyond.
        limit: u64,
    },
    /// Too little is left for BARs below 4 GiB.
    #[error(
        "no {} MiB of contiguous addresses for PCI devices between {:#x} and {:#x}: this VM's devices \
         reserve too much there; leave one of them out",
        MIN_MEM32 / MIB, LOW_RAM_END, ECAM.start()
    )]
    Window32,
    /// Nothing is left for BARs above RAM.
    #[error(
        "no gigabyte of addresses for PCI devices between the end of guest memory at {start:#x} \
         and {limit:#x}, where the guest's processors or the host's IOMMU end; give the VM less \
         memory"
    )]
    Window64 {
        /// The first address beyond RAM.
        start: u64,
        /// The first address beyond what can be addressed.
        limit: u64,
    },
}

impl Layout {
    /// Plans the address space.
    ///
    /// # Errors
    /// Something does not fit, with what and why.
    pub fn plan(inputs: &LayoutInputs<'_>) -> Result<Self, LayoutError> {
        let forbidden = forbidden(inputs);
        let limit = limit(inputs);
        let ram = place_ram(inputs.ram, &forbidden, limit)?;
        let end = ram.last().map_or(0, RamRange::end);
        let mem32 = largest(free(LOW_RAM_END..*ECAM.start(), &forbidden, MIB))
            .filter(|window| window.end - window.start >= MIN_MEM32)
            .ok_or(LayoutError::Window32)?;
        let start = end.max(HIGH_RAM_START);
        let mem64 = largest(free(start..limit, &forbidden, GIB))
            .ok_or(LayoutError::Window64 { start, limit })?;
        Ok(Self {
            holes: holes(&ram),
            acpi: place_acpi(&ram),
            ram,
            ecam: ecam(inputs.root_ports),
            bridges: vec![BridgeWindows {
                first_bus: 0,
                last_bus: inputs.root_ports,
                io: PCI_IO,
                mem32: mem32.start..=mem32.end - 1,
                mem64: mem64.start..=mem64.end - 1,
            }],
        })
    }
}

/// The configuration space of the buses up to `last_bus`. The MCFG names no more: Linux looks for 32 devices on
/// each bus there that no bridge leads to, which is 16,384 exits for all 256.
fn ecam(last_bus: u8) -> RangeInclusive<u64> {
    let len = (u64::from(last_bus) + 1) * ECAM_BYTES_PER_BUS;
    *ECAM.start()..=*ECAM.start() + len - 1
}

impl RamRange {
    /// The first address beyond.
    pub const fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// The first address beyond what processors, IOMMU and Linux can use.
fn limit(inputs: &LayoutInputs<'_>) -> u64 {
    let cpu = 1 << inputs.physical_bits.min(MAX_BITS);
    let iommu = inputs
        .iova
        .iter()
        .map(|range| range.end().saturating_add(1))
        .max();
    iommu.unwrap_or(cpu).min(cpu)
}

/// Everything that may be neither RAM nor BAR, in order of its start.
fn forbidden(inputs: &LayoutInputs<'_>) -> Vec<Range<u64>> {
    let mut allowed: Vec<_> = inputs
        .iova
        .iter()
        .filter(|range| !range.is_empty())
        .collect();
    allowed.sort_by_key(|range| *range.start());
    let mut forbidden = Vec::new();
    let mut next = 0;
    for range in &allowed {
        if *range.start() > next {
            forbidden.push(next..*range.start());
        }
        next = next.max(range.end().saturating_add(1));
    }
    let reserved = inputs.reserved.iter().filter(|range| !range.is_empty());
    forbidden.extend(reserved.map(|range| *range.start()..range.end().saturating_add(1)));
    forbidden.sort_by_key(|range| range.start);
    forbidden
}

/// What `forbidden`, in order of its start, leaves of `within`, shrunk to multiples of `align`.
pub(crate) fn free(within: Range<u64>, forbidden: &[Range<u64>], align: u64) -> Vec<Range<u64>> {
    let mut pieces = Vec::new();
    let mut next = within.start;
    let end = within.end..within.end;
    for range in forbidden.iter().chain([&end]) {
        let start = next.next_multiple_of(align);
        let last = range.start.min(within.end) / align * align;
        if start < last {
            pieces.push(start..last);
        }
        next = next.max(range.end);
        if next >= within.end {
            break;
        }
    }
    pieces
}

fn largest(pieces: Vec<Range<u64>>) -> Option<Range<u64>> {
    // Of equal ones the first, which needs fewer address bits.
    pieces
        .into_iter()
        .rev()
        .max_by_key(|piece| piece.end - piece.start)
}

/// Lays out RAM from 0 up, around forbidden ranges: in steps of 4 KiB in the first 2 MiB, where firmware often
/// reserves single pages, and of 2 MiB above, so that huge pages stay whole.
fn place_ram(ram: u64, forbidden: &[Range<u64>], limit: u64) -> Result<Vec<RamRange>, LayoutError> {
    if ram < HUGE_PAGE || !ram.is_multiple_of(PAGE) {
        return Err(LayoutError::RamSize(ram));
    }
    let needed = 0..LEGACY_HOLE.start;
    if let Some(range) = forbidden
        .iter()
        .find(|range| range.start < needed.end && range.end > needed.start)
    {
        return Err(LayoutError::FirstMemory {
            start: range.start,
            last: range.end - 1,
        });
    }
    let mut pieces = free(0..HUGE_PAGE, forbidden, PAGE);
    pieces.extend(free(HUGE_PAGE..LOW_RAM_END, forbidden, HUGE_PAGE));
    pieces.extend(free(HIGH_RAM_START..limit, forbidden, HUGE_PAGE));

    let mut ranges: Vec<RamRange> = Vec::new();
    let mut left = ram;
    for piece in pieces {
        let len = left.min(piece.end - piece.start);
        if len == 0 {
            break;
        }
        left -= len;
        // A range that begins within a huge page must not misalign the ranges that follow.
        let joins = |last: &&mut RamRange| {
            last.end() == piece.start && last.start.is_multiple_of(HUGE_PAGE)
        };
        match ranges.last_mut().filter(joins) {
            Some(last) => last.len += len,
            None => ranges.push(RamRange {
                start: piece.start,
                len,
            }),
        }
    }
    match left {
        0 => Ok(ranges),
        _ => Err(LayoutError::Ram {
            ram,
            room: ram - left,
            limit,
        }),
    }
}

/// The gaps between ranges of RAM, without the one that all PCs have between 2 and 4 GiB.
fn holes(ram: &[RamRange]) -> Vec<RangeInclusive<u64>> {
    let pci = LOW_RAM_END..HIGH_RAM_START;
    ram.windows(2)
        .map(|pair| pair[0].end()..pair[1].start)
        .flat_map(|gap| free(gap, std::slice::from_ref(&pci), PAGE))
        .map(|gap| gap.start..=gap.end - 1)
        .collect()
}

/// The usual place, or the top of low RAM if a device forbids a part of that.
fn place_acpi(ram: &[RamRange]) -> RamRange {
    let in_ram = |range: &RamRange| range.start <= ACPI.start && range.end() >= ACPI.end();
    let mut low = ram
        .iter()
        .filter(|range| range.start < LOW_RAM_END && range.len > ACPI.len);
    match low.next_back() {
        Some(last) if !ram.iter().any(in_ram) => RamRange {
            start: last.end() - ACPI.len,
            ..ACPI
        },
        _ => ACPI,
    }
}

#[cfg(test)]
mod tests;
