//! The ACPI tables of a hardware-reduced machine with PCI Express (ACPI Specification 6.5).
//!
//! The only ACPI hardware is the sleep and reset registers. There is no PIC, PIT, CMOS clock or keyboard
//! controller; an unmodified kernel uses KVM's paravirtual clock and the local APIC's TSC deadline timer
//! instead.

#[cfg(test)]
mod aml;
mod dsdt;
mod events;
mod tables;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::layout::Layout;
pub use events::HotSlot;

const OEM: [u8; 6] = *b"GANTRY";
const OEM_TABLE: [u8; 8] = *b"GANTRYVM";
const OEM_REVISION: u32 = 1;
/// Tables begin at multiples of a cache line.
const ALIGN: usize = 64;

/// What the tables describe.
#[derive(Debug, Clone, Copy)]
pub struct AcpiInputs<'a> {
    /// The address space.
    pub layout: &'a Layout,
    /// Number of vCPUs; their APIC ids are 0 to `cpus - 1`.
    pub cpus: u8,
    /// Whether there is a serial port.
    pub serial: bool,
    /// Whether there is a register for a kernel that panics.
    pub pvpanic: bool,
    /// Slots that can be filled and emptied while the guest runs.
    pub slots: &'a [HotSlot],
}

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They are longer than the part of RAM set aside for them.
    #[error("the ACPI tables take {needed} bytes, and only {available} are set aside for them")]
    TooLong {
        /// Bytes that the tables take.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// Guest memory could not be written.
    #[error("cannot write the ACPI tables at guest address {address:#x}")]
    Write {
        /// Guest-physical address.
        address: u64,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
}

/// Writes the tables and returns where the RSDP lies. Called again at every reboot of the guest,
/// which may have written over them.
///
/// # Errors
/// They do not fit, or guest memory is not there.
pub fn build<M: GuestMemoryBackend>(
    memory: &M,
    inputs: &AcpiInputs<'_>,
) -> Result<GuestAddress, AcpiError> {
    let place = inputs.layout.acpi;
    let bytes = image(inputs);
    let needed = bytes.len() as u64;
    if needed > place.len {
        return Err(AcpiError::TooLong {
            needed,
            available: place.len,
        });
    }
    let rsdp = GuestAddress(place.start);
    memory
        .write_slice(&bytes, rsdp)
        .map_err(|source| AcpiError::Write {
            address: place.start,
            source,
        })?;
    Ok(rsdp)
}

/// All tables as they lie in memory, the RSDP first.
fn image(inputs: &AcpiInputs<'_>) -> Vec<u8> {
    let base = inputs.layout.acpi.start;
    let mut image = vec![0; Rsdp::len()];
    let mut add = |table: &dyn Aml| {
        image.resize(image.len().next_multiple_of(ALIGN), 0);
        let address = base + image.len() as u64;
        table.to_aml_bytes(&mut image);
        address
    };
    let dsdt = add(&dsdt::dsdt(inputs));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(add(&tables::fadt(dsdt)));
    xsdt.add_entry(add(&tables::madt(inputs)));
    xsdt.add_entry(add(&tables::mcfg(inputs.layout)));
    let xsdt = add(&xsdt);
    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    image[..Rsdp::len()].copy_from_slice(&rsdp);
    image
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use gantry_devices::pci::PciSegment;

    use super::*;
    use crate::config::VcpuCount;
    use crate::layout::LayoutInputs;

    const MIB: u64 = 1 << 20;

    fn layout() -> Layout {
        let ram = 64 * MIB;
        let inputs = LayoutInputs {
            root_ports: 255,
            ram,
            physical_bits: 40,
            iova: &[],
            reserved: &[],
        };
        Layout::plan(&inputs).unwrap()
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap()
    }

    fn read(memory: &GuestMemoryMmap, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn number(bytes: &[u8]) -> u64 {
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// A table by its address, its checksum verified.
    fn table(memory: &GuestMemoryMmap, address: u64) -> Vec<u8> {
        let len = number(&read(memory, address + 4, 4)) as usize;
        let table = read(memory, address, len);
        assert_eq!(sum(&table), 0, "{}", String::from_utf8_lossy(&table[..4]));
        table
    }

    /// RSDP, then XSDT, then its tables in order, then the DSDT.
    fn walk(memory: &GuestMemoryMmap, rsdp: GuestAddress) -> Vec<Vec<u8>> {
        let rsdp = read(memory, rsdp.0, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(memory, number(&rsdp[24..32]));
        assert_eq!(&xsdt[..4], b"XSDT");
        let mut tables: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|address| table(memory, number(address)))
            .collect();
        let dsdt = number(&tables[0][140..148]);
        tables.push(table(memory, dsdt));
        tables
    }

    fn tables(cpus: u8, serial: bool) -> Vec<Vec<u8>> {
        let (memory, layout) = (memory(), layout());
        let rsdp = build(
            &memory,
            &AcpiInputs {
                layout: &layout,
                cpus,
                serial,
                pvpanic: serial,
                slots: &[],
            },
        )
        .unwrap();
        assert_eq!(rsdp, GuestAddress(0xe_0000));
        walk(&memory, rsdp)
    }

    #[test]
    fn tables_are_found_from_the_rsdp_and_checksummed() {
        let tables = tables(2, true);
        let signatures: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
        assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG", b"DSDT"]);
    }

    #[test]
    fn the_fadt_names_the_power_registers() {
        let fadt = &tables(1, true)[0];
        assert_eq!(number(&fadt[109..111]), 0x24, "boot architecture");
        let hardware_reduced = 1 << 20 | 1 << 10;
        assert_eq!(number(&fadt[112..116]) & hardware_reduced, hardware_reduced);
        let register = |port: u8| [1, 8, 0, 1, port, 6, 0, 0, 0, 0, 0, 0];
        assert_eq!(fadt[116..128], register(2), "reset");
        assert_eq!(fadt[128], 1, "reset value");
        assert_eq!(fadt[244..256], register(0), "sleep control");
        assert_eq!(fadt[256..268], register(1), "sleep status");
    }

    /// The entries of a MADT: type and content.
    fn entries(madt: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut entries = Vec::new();
        let mut rest = &madt[44..];
        while let [kind, len, ..] = *rest {
            entries.push((kind, rest[2..len.into()].to_vec()));
            rest = &rest[len.into()..];
        }
        assert!(rest.is_empty());
        entries
    }

    #[test]
    fn the_madt_lists_every_processor() {
        let madt = &tables(3, true)[1];
        assert_eq!(number(&madt[36..40]), 0xfee0_0000);
        let expected: [(u8, &[u8]); 6] = [
            (0, &[0, 0, 1, 0, 0, 0]),
            (0, &[1, 1, 1, 0, 0, 0]),
            (0, &[2, 2, 1, 0, 0, 0]),
            (1, &[0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]),
            (2, &[0, 4, 4, 0, 0, 0, 0, 0]),
            (4, &[0xff, 0, 0, 1]),
        ];
        assert_eq!(
            entries(madt),
            expected.map(|(kind, bytes)| (kind, bytes.to_vec()))
        );

        let many = entries(&tables(VcpuCount::MAX, false)[1]);
        let count = |wanted| many.iter().filter(|(kind, _)| *kind == wanted).count();
        assert_eq!((count(0), count(1), count(2), count(4)), (254, 1, 0, 1));
        assert_eq!(many[253], (0, vec![253, 253, 1, 0, 0, 0]));
    }

    #[test]
    fn the_mcfg_covers_all_buses() {
        let mcfg = &tables(1, true)[2];
        assert_eq!(
            mcfg[44..60],
            [0, 0, 0, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0, 0, 0, 0]
        );
    }

    #[test]
    fn the_dsdt_has_what_linux_looks_for() {
        let contains =
            |table: &[u8], bytes: &[u8]| table.windows(bytes.len()).any(|window| window == bytes);
        let dsdt = &tables(2, true)[3];
        for name in [
            "PCI0", "_OSC", "_PRT", "_CRS", "MBRD", "COM1", "C000", "C001", "_S5_", "QEMU0001",
        ] {
            assert!(contains(dsdt, name.as_bytes()), "{name}");
        }
        let window = [0x8000_0000_u32, 0xdfff_ffff]
            .map(u32::to_le_bytes)
            .concat();
        assert!(contains(dsdt, &window), "32-bit window");
        let window = [4 << 30, (1_u64 << 40) - 1].map(u64::to_le_bytes).concat();
        assert!(contains(dsdt, &window), "64-bit window");
        for absent in ["COM1", "QEMU0001"] {
            assert!(!contains(&tables(1, false)[3], absent.as_bytes()));
        }
    }

    fn dsdt_with(slots: &[HotSlot]) -> std::collections::BTreeMap<String, aml::Object> {
        let mut bytes = Vec::new();
        let inputs = AcpiInputs {
            layout: &layout(),
            cpus: 2,
            serial: true,
            pvpanic: true,
            slots,
        };
        dsdt::dsdt(&inputs).to_aml_bytes(&mut bytes);
        aml::objects(&bytes[36..])
    }

    #[test]
    fn the_dsdt_declares_each_slot_with_its_way_out() {
        let mut segment = PciSegment::new([0..=0xff]).unwrap();
        for _ in 0..40 {
            segment.add_root_port(0).unwrap();
        }
        let slots: Vec<HotSlot> = segment
            .ports()
            .map(|(port, at, _)| HotSlot { port, at })
            .collect();
        let objects = dsdt_with(&slots);
        let tell = match &objects["._SB_.TELL"] {
            aml::Object::Method(code) => code,
            other => panic!("{other:?}"),
        };
        for (slot, number) in slots.iter().zip(1_u64..) {
            let port = format!("._SB_.PCI0.S{number:03X}");
            assert_eq!(objects[&port], aml::Object::Device);
            let at = &slot.at;
            let address = u64::from(at.device()) << 16 | u64::from(at.function());
            let integer = |name: &str| match objects[&format!("{port}.{name}")] {
                aml::Object::Integer(value) => value,
                ref other => panic!("{name}: {other:?}"),
            };
            assert_eq!(integer("_ADR"), address);
            assert_eq!((integer("CARD._ADR"), integer("CARD._SUN")), (0, number));
            // Store(number, \\_SB.EVTS.EJCT)
            let mut eject = vec![0x70];
            match number {
                1 => eject.push(1),
                _ => eject.extend([0x0a, number as u8]),
            }
            eject.extend(b"\\\x2f\x03_SB_EVTSEJCT");
            let method = &objects[&format!("{port}.CARD._EJ0")];
            assert_eq!(*method, aml::Object::Method(eject));
            for answers in ["_OST", "CARD._OST"] {
                let method = &objects[&format!("{port}.{answers}")];
                let aml::Object::Method(code) = method else {
                    panic!("{method:?}");
                };
                let register = b"\\\x2f\x03_SB_EVTSANSW";
                assert!(code.windows(register.len()).any(|part| part == register));
            }
            let name = &port.as_bytes()[11..];
            // If (kind == 1) Notify(port, kind) Else Notify(card, kind)
            let notify = [
                b"\x93\x69\x01\x86\\\x2f\x03_SB_PCI0",
                name,
                b"i\xa1\x16\x86\\\x2f\x04_SB_PCI0",
                name,
                b"CARDi",
            ]
            .concat();
            let told = tell.windows(notify.len()).filter(|part| *part == notify);
            assert_eq!(told.count(), 1, "{port}");
        }
        let method = |name: &str| matches!(objects[name], aml::Object::Method(_));
        assert!(method("._SB_.EVTS._EVT") && method("._SB_.PCI0._OSC"));
        assert_eq!(objects["._SB_.PWRB"], aml::Object::Device);
    }

    #[test]
    fn a_vm_without_slots_has_a_power_button_and_no_ports() {
        let objects = dsdt_with(&[]);
        assert!(objects.contains_key("._SB_.PWRB"));
        let ports = objects.keys().filter(|path| path.contains("PCI0.S"));
        assert_eq!(ports.count(), 0);
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        let (memory, mut layout) = (memory(), layout());
        layout.acpi.len = 0x400;
        let refused = build(
            &memory,
            &AcpiInputs {
                layout: &layout,
                cpus: 1,
                serial: true,
                pvpanic: true,
                slots: &[],
            },
        );
        assert!(matches!(
            refused,
            Err(AcpiError::TooLong {
                available: 0x400,
                ..
            })
        ));
    }
}
