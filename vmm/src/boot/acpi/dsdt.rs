//! The DSDT: host bridges, processors, the serial port, events, and what belongs to no device.

use acpi_tables::Aml;
use acpi_tables::AmlSink;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, ONE, Or, Package,
    PackageBuilder, Path, ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use gantry_devices::{events as event_registers, panic, power, serial};

use super::{AcpiInputs, OEM, OEM_REVISION, OEM_TABLE, events};
use crate::layout::{
    BridgeWindows, EVENT_PORT, Layout, PCI_CONFIG_PORTS, POWER_PORT, SERIAL_GSI, SERIAL_PORT,
    intx_gsi,
};

/// From revision 2 on, integers have 64 bits.
const REVISION: u8 = 2;
const HEADER_LEN: u32 = 36;

/// The Differentiated System Description Table (5.2.11.1).
pub fn dsdt(inputs: &AcpiInputs<'_>) -> Sdt {
    let mut system_bus = Vec::new();
    for (index, bridge) in (0..).zip(&inputs.layout.bridges) {
        host_bridge(index, bridge, &mut system_bus);
    }
    motherboard(inputs.layout, &mut system_bus);
    if inputs.serial {
        serial(&mut system_bus);
    }
    if inputs.pvpanic {
        panic_register(&mut system_bus);
    }
    events::events(inputs.slots, &mut system_bus);
    for uid in 0..inputs.cpus {
        processor(uid.into(), &mut system_bus);
    }
    let mut bytes = Scope::raw(Path::new("\\_SB_"), system_bus);
    let soft_off = Package::new(vec![&power::S5, &power::S5, &ZERO, &ZERO]);
    Name::new(Path::new("\\_S5_"), &soft_off).to_aml_bytes(&mut bytes);

    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&bytes);
    dsdt
}

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

/// `PCI0`, `PCI1`, ... of segment 0, each with its buses, ports and memory. There is no `_PXM` as long as the
/// guest has one NUMA node.
fn host_bridge(index: u8, bridge: &BridgeWindows, sink: &mut dyn AmlSink) {
    let buses = AddressSpace::new_bus_number(bridge.first_bus.into(), u16::from(bridge.last_bus));
    let config_port = *PCI_CONFIG_PORTS.start();
    let config = IO::new(config_port, config_port, 1, PCI_CONFIG_PORTS.len() as u8);
    let ports = AddressSpace::new_io(*bridge.io.start(), *bridge.io.end(), None);
    // Not prefetchable, so that windows of both kinds may be carved out of them.
    let cacheable = AddressSpaceCacheable::NotCacheable;
    let (start, end) = (*bridge.mem32.start() as u32, *bridge.mem32.end() as u32);
    let mem32 = AddressSpace::new_memory(cacheable, true, start, end, None);
    let (start, end) = (*bridge.mem64.start(), *bridge.mem64.end());
    let mem64 = AddressSpace::new_memory(cacheable, true, start, end, None);
    let mut resources: Vec<&dyn Aml> = vec![&buses, &ports, &mem32, &mem64];
    if index == 0 {
        resources.insert(1, &config);
    }
    Device::new(
        Path::new(&format!("PCI{index:X}")),
        vec![
            &name("_HID", &EISAName::new("PNP0A08")),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_UID", &index),
            &name("_SEG", &ZERO),
            &name("_BBN", &bridge.first_bus),
            &name("_CRS", &ResourceTemplate::new(resources)),
            &name("_PRT", &interrupt_lines()),
            &OperatingSystemCapabilities,
        ],
    )
    .to_aml_bytes(sink);
}

/// `_PRT` (6.2.13): the I/O APIC's line of every pin of every slot.
fn interrupt_lines() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for slot in 0..32_u8 {
        for pin in 0..4_u8 {
            let any_function = u32::from(slot) << 16 | 0xffff;
            let gsi = intx_gsi(slot, pin);
            table.add_element(&Package::new(vec![&any_function, &pin, &ZERO, &gsi]));
        }
    }
    table
}

/// `_OSC` of a host bridge (PCI Firmware Specification 3.3, 4.5.1).
///
/// The guest gets the PCI Express capability structure. It is refused native hot-plug, of PCI
/// Express and of SHPC: Linux leaves ports that have it to their own driver, and hot-plug here goes
/// through ACPI. Power management events, error reporting and latency tolerance are refused since
/// the ports above passed devices are virtual and report none.
struct OperatingSystemCapabilities;

impl Aml for OperatingSystemCapabilities {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const GRANTED: u8 = 1 << 4;
        const UNKNOWN_UUID: u8 = 1 << 2;
        const UNKNOWN_REVISION: u8 = 1 << 3;
        const MASKED: u8 = 1 << 4;

        let status = Path::new("CDW1");
        let control = Path::new("CDW3");
        let host_bridge = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
        Method::new(
            Path::new("_OSC"),
            4,
            true,
            vec![
                &CreateDWordField::new(&status, &Arg(3), &ZERO),
                &If::new(
                    &Equal::new(&Arg(0), &host_bridge),
                    vec![
                        &CreateDWordField::new(&control, &Arg(3), &8_u8),
                        &And::new(&Local(0), &control, &GRANTED),
                        &If::new(
                            &NotEqual::new(&Arg(1), &ONE),
                            vec![&Or::new(&status, &status, &UNKNOWN_REVISION)],
                        ),
                        &If::new(
                            &NotEqual::new(&Local(0), &control),
                            vec![&Or::new(&status, &status, &MASKED)],
                        ),
                        &Store::new(&control, &Local(0)),
                    ],
                ),
                &Else::new(vec![&Or::new(&status, &status, &UNKNOWN_UUID)]),
                &Return::new(&Arg(3)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Resources of no device: Linux uses the ECAM only if a `PNP0C02` device claims it.
fn motherboard(layout: &Layout, sink: &mut dyn AmlSink) {
    let len = layout.ecam.end() - layout.ecam.start() + 1;
    let ecam = Memory32Fixed::new(true, *layout.ecam.start() as u32, len as u32);
    let power = IO::new(POWER_PORT, POWER_PORT, 1, power::LEN as u8);
    let events = IO::new(EVENT_PORT, EVENT_PORT, 1, event_registers::LEN as u8);
    Device::new(
        Path::new("MBRD"),
        vec![
            &name("_HID", &EISAName::new("PNP0C02")),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&ecam, &power, &events])),
        ],
    )
    .to_aml_bytes(sink);
}

/// The register by which the guest's kernel reports a panic, under the name that Linux knows.
fn panic_register(sink: &mut dyn AmlSink) {
    let port = IO::new(panic::PORT, panic::PORT, 1, panic::LEN as u8);
    Device::new(
        Path::new("PVPC"),
        vec![
            &name("_HID", &"QEMU0001"),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&port])),
        ],
    )
    .to_aml_bytes(sink);
}

fn serial(sink: &mut dyn AmlSink) {
    let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, serial::LEN as u8);
    let line = Interrupt::new(true, true, false, false, SERIAL_GSI);
    Device::new(
        Path::new("COM1"),
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &ZERO),
            &name("_DDN", &"COM1"),
            &name("_CRS", &ResourceTemplate::new(vec![&ports, &line])),
        ],
    )
    .to_aml_bytes(sink);
}

/// A processor device (8.4), bound to its MADT entry by its UID.
fn processor(uid: u32, sink: &mut dyn AmlSink) {
    let path = Path::new(&format!("C{uid:03X}"));
    Device::new(path, vec![&name("_HID", &"ACPI0007"), &name("_UID", &uid)]).to_aml_bytes(sink);
}
