//! The registers of the configuration space header, and the bits of them that matter here.
//!
//! Offsets and bits follow the PCI Express Base Specification 6.0, section 7.5.1.

use std::ops::Range;

/// Size of the configuration space of a PCI Express function in bytes.
pub const CONFIG_SIZE: u16 = 4096;

/// Vendor id, 16 bits.
pub const VENDOR_ID: u16 = 0x00;
/// Device id, 16 bits.
pub const DEVICE_ID: u16 = 0x02;
/// Command, 16 bits.
pub const COMMAND: u16 = 0x04;
/// Status, 16 bits.
pub const STATUS: u16 = 0x06;
/// Revision id, 8 bits, followed by the 24 bits of the class code.
pub const REVISION_ID: u16 = 0x08;
/// Cache line size, 8 bits.
pub const CACHE_LINE_SIZE: u16 = 0x0c;
/// Header type, 8 bits.
pub const HEADER_TYPE: u16 = 0x0e;
/// The six BARs of a type-0 function.
pub const BARS: Range<u16> = 0x10..0x28;
/// Subsystem vendor id of a type-0 function, 16 bits.
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
/// Subsystem id of a type-0 function, 16 bits.
pub const SUBSYSTEM_ID: u16 = 0x2e;
/// Expansion ROM BAR of a type-0 function.
pub const EXPANSION_ROM: Range<u16> = 0x30..0x34;
/// Offset of the first capability, 8 bits.
pub const CAPABILITIES_POINTER: u16 = 0x34;
/// Interrupt line, 8 bits.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Interrupt pin, 8 bits.
pub const INTERRUPT_PIN: u16 = 0x3d;

/// Command: the function answers I/O accesses.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command: the function answers memory accesses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may start accesses of its own (DMA, message interrupts).
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: the function may not raise INTx.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// Status: there is a capability list.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Header type: the device has more than one function.
pub const HEADER_MULTIFUNCTION: u8 = 1 << 7;
/// Header type of bridges, without [`HEADER_MULTIFUNCTION`].
pub const HEADER_BRIDGE: u8 = 1;

/// Bridges: primary, secondary and subordinate bus number, 8 bits each.
pub const PRIMARY_BUS: u16 = 0x18;
/// Bridges: I/O base and limit, 8 bits each.
pub const IO_WINDOW: u16 = 0x1c;
/// Bridges: memory base and limit, 16 bits each.
pub const MEMORY_WINDOW: u16 = 0x20;
/// Bridges: prefetchable memory base and limit, 16 bits each.
pub const PREFETCHABLE_WINDOW: u16 = 0x24;
/// Bridges: upper 32 bits of the prefetchable base, then of the limit.
pub const PREFETCHABLE_UPPER: u16 = 0x28;
/// Bridges: upper 16 bits of the I/O base, then of the limit.
pub const IO_UPPER: u16 = 0x30;
/// Bridges: bridge control, 16 bits.
pub const BRIDGE_CONTROL: u16 = 0x3e;
