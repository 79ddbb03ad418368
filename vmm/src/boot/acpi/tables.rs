//! The fixed tables: FADT, MADT and MCFG.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;
use gantry_devices::power;

use super::{AcpiInputs, OEM, OEM_REVISION, OEM_TABLE};
use crate::layout::{IO_APIC, LOCAL_APIC, Layout, POWER_PORT, SERIAL_GSI};

/// `IAPC_BOOT_ARCH`: neither VGA nor CMOS clock; no bit says that there is a keyboard controller
/// or any other legacy device.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// The FADT (5.2.9) of a machine without ACPI hardware.
pub fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Buttons are devices in the DSDT, not bits in a register.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.finalize()
}

fn port(register: u64) -> GAS {
    let address = u64::from(POWER_PORT) + register;
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        address,
    )
}

/// The MADT (5.2.12). Of its entries the crate knows two, and an old revision, so the bytes are
/// written here.
pub fn madt(inputs: &AcpiInputs<'_>) -> Sdt {
    const REVISION: u8 = 5;
    const HEADER_LEN: u32 = 36;

    let mut entries = Vec::new();
    entries.extend((LOCAL_APIC as u32).to_le_bytes());
    // Flags: there is no dual 8259.
    entries.extend(0_u32.to_le_bytes());
    // Up to 254 processors, so that none needs an x2APIC entry.
    entries.extend((0..inputs.cpus).flat_map(local_apic));
    entries.extend(io_apic());
    if inputs.serial {
        entries.extend(serial_line());
    }
    // NMIs come in at LINT1 of all processors.
    entries.extend([4, 6, 0xff, 0, 0, 1]);

    let mut madt = Sdt::new(*b"APIC", HEADER_LEN, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&entries);
    madt
}

/// Processor Local APIC (5.2.12.2), enabled. The processor's UID in the DSDT is its APIC id.
fn local_apic(id: u8) -> [u8; 8] {
    [0, 8, id, id, 1, 0, 0, 0]
}

/// I/O APIC (5.2.12.3) number 0, with the lines from 0 on.
fn io_apic() -> [u8; 12] {
    let [a, b, c, d] = (IO_APIC as u32).to_le_bytes();
    [1, 12, 0, 0, a, b, c, d, 0, 0, 0, 0]
}

/// Interrupt Source Override (5.2.12.5) that changes nothing, but keeps Linux from giving the serial port's
/// line an unusual number.
fn serial_line() -> [u8; 10] {
    let [a, b, c, d] = SERIAL_GSI.to_le_bytes();
    [2, 10, 0, a, a, b, c, d, 0, 0]
}

/// The MCFG (PCI Firmware Specification 3.3, 4.1.2): segment 0, the buses that exist.
pub fn mcfg(layout: &Layout) -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    let last_bus = layout.bridges.iter().map(|bridge| bridge.last_bus).max();
    mcfg.add_ecam(*layout.ecam.start(), 0, 0, last_bus.unwrap_or(0));
    mcfg
}
