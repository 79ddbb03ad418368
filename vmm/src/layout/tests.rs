//! The address map: RAM, windows, and what must stay free.

use proptest::prelude::*;

use super::*;

const TIB: u64 = 1 << 40;
const MSI: RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;

fn plan(ram: u64, bits: u8, reserved: &[RangeInclusive<u64>]) -> Result<Layout, LayoutError> {
    Layout::plan(&LayoutInputs {
        root_ports: 255,
        ram,
        physical_bits: bits,
        iova: &[],
        reserved,
    })
}

fn ram(layout: &Layout) -> Vec<(u64, u64)> {
    layout
        .ram
        .iter()
        .map(|range| (range.start, range.len))
        .collect()
}

#[test]
fn small_and_large_guests() {
    let small = plan(512 * MIB, 40, &[MSI]).unwrap();
    assert_eq!(ram(&small), [(0, 512 * MIB)]);
    assert_eq!(
        small.acpi,
        RamRange {
            start: 0xe_0000,
            len: 0x1_0000
        }
    );
    let bridge = &small.bridges[0];
    assert_eq!((bridge.first_bus, bridge.last_bus), (0, 255));
    assert_eq!(bridge.mem32, 0x8000_0000..=0xdfff_ffff);
    assert_eq!(bridge.mem64, 4 * GIB..=TIB - 1);

    let large = plan(9 * GIB, 40, &[MSI]).unwrap();
    assert_eq!(ram(&large), [(0, 2 * GIB), (4 * GIB, 7 * GIB)]);
    assert_eq!(large.bridges[0].mem64, 11 * GIB..=TIB - 1);
    assert_eq!(large.holes, []);
}

#[test]
fn the_guest_is_told_of_as_many_buses_as_lead_somewhere() {
    for (root_ports, last) in [(0, 0xe00f_ffff), (2, 0xe02f_ffff), (255, 0xefff_ffff)] {
        let layout = Layout::plan(&LayoutInputs {
            root_ports,
            ram: GIB,
            physical_bits: 40,
            iova: &[],
            reserved: &[],
        })
        .unwrap();
        assert_eq!(layout.ecam, 0xe000_0000..=last);
        assert_eq!(layout.bridges[0].last_bus, root_ports);
    }
}

#[test]
fn ram_steps_over_the_hypertransport_hole() {
    let layout = plan(1100 * GIB, 48, &[HYPERTRANSPORT, MSI]).unwrap();
    let before = 1012 * GIB - 4 * GIB;
    assert_eq!(
        ram(&layout),
        [
            (0, 2 * GIB),
            (4 * GIB, before),
            (TIB, 1100 * GIB - 2 * GIB - before)
        ]
    );
    assert_eq!(layout.holes, [HYPERTRANSPORT]);
    assert_eq!(*layout.bridges[0].mem64.end(), 64 * TIB - 1);
    let small = plan(GIB, 40, &[HYPERTRANSPORT]).unwrap();
    assert_eq!(small.bridges[0].mem64, 4 * GIB..=1012 * GIB - 1);
}

#[test]
fn a_narrow_iommu_bounds_windows_and_ram() {
    let iova = [0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff];
    let inputs = LayoutInputs {
        root_ports: 255,
        ram: 8 * GIB,
        physical_bits: 46,
        iova: &iova,
        reserved: &[],
    };
    let layout = Layout::plan(&inputs).unwrap();
    assert_eq!(layout.bridges[0].mem64, 10 * GIB..=512 * GIB - 1);
    let too_much = Layout::plan(&LayoutInputs {
        ram: 600 * GIB,
        ..inputs
    });
    let room = 510 * GIB;
    assert_eq!(
        too_much,
        Err(LayoutError::Ram {
            ram: 600 * GIB,
            room,
            limit: 512 * GIB
        })
    );
    assert_eq!(
        Layout::plan(&LayoutInputs {
            ram: room,
            ..inputs
        }),
        Err(LayoutError::Window64 {
            start: 512 * GIB,
            limit: 512 * GIB
        })
    );
}

#[test]
fn firmware_ranges_become_holes() {
    let graphics = 0x7b80_0000..=0x7fff_ffff;
    let layout = plan(3 * GIB, 39, &[graphics.clone(), MSI]).unwrap();
    assert_eq!(
        ram(&layout),
        [(0, 0x7b80_0000), (4 * GIB, 3 * GIB - 0x7b80_0000)]
    );
    assert_eq!(layout.holes, [graphics]);

    let odd = plan(64 * MIB, 39, &[0x100_1000..=0x100_1fff]).unwrap();
    assert_eq!(ram(&odd), [(0, 16 * MIB), (18 * MIB, 48 * MIB)]);
    assert_eq!(odd.holes, [16 * MIB..=18 * MIB - 1]);
}

#[test]
fn acpi_tables_move_out_of_a_forbidden_legacy_hole() {
    let layout = plan(64 * MIB, 39, &[0xe_8000..=0xe_8fff]).unwrap();
    assert_eq!(
        ram(&layout),
        [
            (0, 0xe_8000),
            (0xe_9000, HUGE_PAGE - 0xe_9000),
            (HUGE_PAGE, 62 * MIB + 0x1000)
        ]
    );
    assert_eq!(
        layout.acpi,
        RamRange {
            start: 64 * MIB - 0xf000,
            len: 0x1_0000
        }
    );
    assert_eq!(layout.holes, [0xe_8000..=0xe_8fff]);
}

#[test]
fn what_cannot_be_is_said() {
    for size in [0, 4096, 3 * MIB + 1, HUGE_PAGE - PAGE] {
        assert_eq!(plan(size, 39, &[]), Err(LayoutError::RamSize(size)));
    }
    assert_eq!(
        plan(GIB, 39, &[0x9_f000..=0x9_ffff]),
        Err(LayoutError::FirstMemory {
            start: 0x9_f000,
            last: 0x9_ffff
        })
    );
    assert_eq!(
        plan(
            GIB,
            39,
            &[0x9000_0000..=0x90ff_ffff, 0xb000_0000..=0xc7ff_ffff]
        ),
        Err(LayoutError::Window32)
    );
    assert_eq!(
        plan(66 * GIB, 36, &[]).unwrap_err().to_string(),
        "guest memory of 67584 MiB does not fit: the guest's processors or the host's IOMMU \
         address only what is below 0x1000000000, which has room for 63488 MiB; give the VM less memory"
    );
}

/// TRAPS 19: below what the guest's processors and the IOMMU reach both, and refused where there is no room.
#[test]
fn a_bar_of_128_gib_lies_within_reach_of_guest_and_iommu() {
    use gantry_devices::pci::firmware::{self, BarRequest, HostWindows, Minimum, PortRequest};
    use gantry_devices::pci::{BarKind, GuestBdf};

    let size = 128 * GIB;
    let request = PortRequest {
        port: GuestBdf::from_bits(8),
        minimum: Minimum::default(),
        bars: vec![BarRequest {
            function: 0,
            index: 0,
            kind: BarKind::Memory64 { prefetchable: true },
            size,
        }],
    };
    for (guest, iommu, reach) in [(46, 39, 39), (39, 48, 39), (38, 39, 38), (37, 48, 37)] {
        let layout = Layout::plan(&LayoutInputs {
            root_ports: 1,
            ram: 8 * GIB,
            physical_bits: guest,
            iova: &[0..=(1 << iommu) - 1],
            reserved: &[],
        });
        let bridge = &layout.unwrap().bridges[0];
        let host = HostWindows {
            mem32: *bridge.mem32.start()..bridge.mem32.end() + 1,
            mem64: *bridge.mem64.start()..bridge.mem64.end() + 1,
            io: 0x1000..0x2000,
        };
        let plans = firmware::plan(std::slice::from_ref(&request), &host);
        if reach == 37 {
            let refused = plans.unwrap_err().to_string();
            assert!(refused.contains("BAR 0 (0x2000000000 bytes)"), "{refused}");
            continue;
        }
        let address = plans.unwrap()[0].bars[0].address;
        assert!(
            address.is_multiple_of(size) && address >= 10 * GIB,
            "{address:#x}"
        );
        assert!(address + size <= 1 << reach, "{address:#x}");
    }
}

#[test]
fn interrupt_lines_rotate_by_slot() {
    assert_eq!(intx_gsi(0, 0), 16);
    assert_eq!(intx_gsi(3, 1), 20);
    assert_eq!(intx_gsi(31, 3), 18);
}

fn overlaps(a: &RangeInclusive<u64>, b: &RangeInclusive<u64>) -> bool {
    a.start() <= b.end() && b.start() <= a.end()
}

fn spans(layout: &Layout) -> Vec<RangeInclusive<u64>> {
    let ram = layout.ram.iter().map(|range| range.start..=range.end() - 1);
    let windows = layout
        .bridges
        .iter()
        .flat_map(|b| [b.mem32.clone(), b.mem64.clone()]);
    ram.chain(windows).collect()
}

fn range() -> impl Strategy<Value = RangeInclusive<u64>> {
    let start = prop_oneof![
        LEGACY_HOLE.start..HUGE_PAGE,
        HUGE_PAGE..HIGH_RAM_START,
        0..TIB
    ];
    let len = prop_oneof![1..64 * PAGE, 1..GIB, 1..64 * GIB];
    (start, len).prop_map(|(start, len)| start.max(0xa_0000)..=start.max(0xa_0000) + len)
}

proptest! {
    #[test]
    fn plans_are_exact_and_disjoint(
        pages in 512..(64 * GIB / PAGE),
        bits in 36u8..=52,
        reserved in proptest::collection::vec(range(), 0..6),
        iova_end in prop_oneof![Just(u64::MAX), (64 * GIB)..TIB],
    ) {
        let iova = [0..=iova_end];
        let inputs = LayoutInputs {
            root_ports: 255,
            ram: pages * PAGE,
            physical_bits: bits,
            iova: &iova,
            reserved: &reserved,
        };
        let Ok(layout) = Layout::plan(&inputs) else { return Ok(()) };
        prop_assert_eq!(layout.ram.iter().map(|range| range.len).sum::<u64>(), inputs.ram);
        let spans = spans(&layout);
        let fixed = [ECAM, IO_APIC..=0xffff_ffff];
        for (index, span) in spans.iter().enumerate() {
            let others = spans[index + 1..].iter();
            for other in others.chain(&reserved).chain(&fixed).chain(&layout.holes) {
                prop_assert!(!overlaps(span, other), "{span:x?} meets {other:x?}");
            }
            prop_assert!(*span.end() <= iova_end);
            prop_assert!(*span.end() < 1 << bits);
            prop_assert_eq!(span.start() % PAGE, 0);
        }
        for bridge in &layout.bridges {
            prop_assert_eq!(bridge.mem64.start() % GIB, 0);
            prop_assert_eq!((bridge.mem64.end() + 1) % GIB, 0);
        }
        for range in &layout.ram {
            prop_assert!(range.start < HUGE_PAGE || range.start % HUGE_PAGE == 0);
        }
        let acpi = layout.acpi;
        prop_assert!(layout.ram.iter().any(|r| r.start <= acpi.start && r.end() >= acpi.end()));
    }

    #[test]
    fn without_restrictions_everything_that_fits_is_planned(pages in 512..(60 * GIB / PAGE)) {
        let layout = plan(pages * PAGE, 36, &[]);
        prop_assert!(layout.is_ok(), "{layout:?}");
    }
}
