//! The plan of the guest-physical address space: where RAM, PCI windows and fixed devices lie.

use std::ops::RangeInclusive;

/// End of RAM below 4 GiB. What follows is room for 32-bit windows, which BARs that are 64 bits
/// wide but not prefetchable need as well: Linux keeps them out of prefetchable windows.
pub const LOW_RAM_END: u64 = 2 * GIB;
/// The PCI Express enhanced configuration space: 1 MiB for each of 256 buses.
pub const ECAM: RangeInclusive<u64> = 0xe000_0000..=0xefff_ffff;
/// Registers of the I/O APIC, in KVM.
pub const IO_APIC: u64 = 0xfec0_0000;
/// Registers of the local APICs, in KVM, and the target of message-signalled interrupts.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Three pages that KVM needs on Intel processors (`KVM_SET_TSS_ADDR`); one more page before them
/// is for `KVM_SET_IDENTITY_MAP_ADDR`.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// First I/O port of the sleep and reset registers (`gantry_devices::power`).
pub const POWER_PORT: u16 = 0x600;
/// First I/O port of the serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt line of the serial port, on the I/O APIC.
pub const SERIAL_GSI: u32 = 4;
/// The address and data ports of PCI configuration mechanism 1.
pub const PCI_CONFIG_PORTS: RangeInclusive<u16> = 0xcf8..=0xcff;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const HIGH_RAM_START: u64 = 4 * GIB;

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
    /// Bytes of guest RAM.
    pub ram: u64,
    /// Physical address bits of the guest's processors ([`crate::cpu::Features::physical_bits`]).
    pub physical_bits: u8,
    /// What the IOMMU can map; empty where no device is passed through.
    pub iova: &'a [RangeInclusive<u64>],
    /// What must be neither RAM nor BAR, from the devices' `reserved_regions`.
    pub reserved: &'a [RangeInclusive<u64>],
}

/// The guest-physical address space of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// RAM in address order; the sum is exactly what was asked for. The first begins at 0 and runs
    /// through the legacy hole below 1 MiB, which the guest is not told of as RAM.
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
    /// The size is zero or not made of whole pages.
    #[error("guest memory of {0} bytes: must be a multiple of 4096 and at least 2 MiB")]
    RamSize(u64),
}

impl Layout {
    /// Plans the address space.
    ///
    /// # Errors
    /// Something does not fit, with what and why.
    pub fn plan(inputs: &LayoutInputs<'_>) -> Result<Self, LayoutError> {
        let _ = inputs;
        Err(LayoutError::RamSize(inputs.ram))
    }
}
