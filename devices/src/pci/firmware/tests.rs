//! The firmware's part: numbers, windows and addresses behind ports.

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::fake::{Endpoint, FakeSpace, bar};
use super::*;

const MEM32: BarKind = BarKind::Memory32 {
    prefetchable: false,
};
const MEM64: BarKind = BarKind::Memory64 {
    prefetchable: false,
};
const PREFETCHABLE: BarKind = BarKind::Memory64 { prefetchable: true };
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn host() -> HostWindows {
    HostWindows {
        mem32: 0x8000_0000..0xe000_0000,
        mem64: 0x40_0000_0000..0x80_0000_0000,
        io: 0x1000..0x1_0000,
    }
}

fn request(index: u8, kind: BarKind, size: u64) -> BarRequest {
    BarRequest {
        function: 0,
        index,
        kind,
        size,
    }
}

fn port(number: u16, bars: Vec<BarRequest>) -> PortRequest {
    PortRequest {
        port: GuestBdf::from_bits(8 + number),
        minimum: Minimum::default(),
        bars,
    }
}

/// Panics unless everything that `ports` ask for is in its place and nothing overlaps.
fn check(ports: &[PortRequest], plans: &[PortPlan], host: &HostWindows) {
    assert_eq!(ports.len(), plans.len());
    for kind in WindowKind::ALL {
        let range = kind.host(host);
        let mut windows = Vec::new();
        for (port, plan) in ports.iter().zip(plans) {
            let wanted: Vec<_> = port
                .bars
                .iter()
                .filter(|bar| WindowKind::of(bar.kind) == kind)
                .collect();
            let window = kind.port(&mut plan.windows.clone()).clone();
            let Some(window) = window else {
                assert!(wanted.is_empty() && kind.minimum(&port.minimum) == 0);
                continue;
            };
            assert!(range.start <= window.start && window.end <= range.end);
            assert_eq!(window.start % kind.granularity(), 0);
            assert_eq!(window.end % kind.granularity(), 0);
            assert!(window.end - window.start >= kind.minimum(&port.minimum));
            let mut bars: Vec<Range<u64>> = Vec::new();
            for bar in wanted {
                let placed = plan.bars.iter().find(|placed| placed.bar == *bar);
                let address = placed.unwrap().address;
                assert_eq!(address % bar.size, 0);
                assert!(window.start <= address && address + bar.size <= window.end);
                bars.push(address..address + bar.size);
            }
            apart(bars);
            windows.push(window);
        }
        apart(windows);
    }
    let placed: usize = plans.iter().map(|plan| plan.bars.len()).sum();
    assert_eq!(
        placed,
        ports.iter().map(|port| port.bars.len()).sum::<usize>()
    );
}

fn apart(mut ranges: Vec<Range<u64>>) {
    ranges.sort_by_key(|range| range.start);
    for pair in ranges.windows(2) {
        assert!(pair[0].end <= pair[1].start, "{pair:x?}");
    }
}

#[test]
fn bars_go_where_bridges_can_forward_to() {
    let ports = [
        port(
            0,
            vec![
                request(0, MEM64, 0x4000), // As NVMe has it: 64 bits, not prefetchable.
                request(2, BarKind::Io, 0x80),
            ],
        ),
        port(
            1,
            vec![
                request(0, MEM32, 16 * MIB),
                request(1, PREFETCHABLE, 128 * GIB),
                request(3, PREFETCHABLE, 32 * MIB),
                request(5, MEM32, 0x1000),
            ],
        ),
        port(2, vec![]),
    ];
    let plans = plan(&ports, &host()).unwrap();
    check(&ports, &plans, &host());
    let address = |port: usize, bar: usize| {
        let placed = plans[port].bars.iter();
        let wanted = ports[port].bars[bar];
        placed
            .clone()
            .find(|bar| bar.bar == wanted)
            .unwrap()
            .address
    };
    assert!(address(0, 0) < 1 << 32);
    assert_eq!(address(0, 1), 0x1000);
    assert_eq!(address(1, 1), 0x40_0000_0000);
    assert_eq!(plans[1].windows.mem32, Some(0x8100_0000..0x8210_0000));
    assert_eq!(plans[1].windows.io, None);
    let empty = &plans[2].windows;
    let size = empty.mem32.as_ref().map(|window| window.end - window.start);
    assert_eq!((size, &empty.mem64), (Some(16 * MIB), &None));
}

#[test]
fn a_device_fits_into_a_slot_whose_windows_hold_its_bars() {
    let windows = PortWindows {
        mem32: Some(0x8000_0000..0x8100_0000),
        mem64: Some(64 * GIB..80 * GIB),
        io: None,
    };
    let misfit = |kind, size, largest| {
        Err(Misfit {
            kind,
            size,
            largest,
        })
    };
    let small = [request(0, MEM64, 0x4000), request(2, BarKind::Io, 0x80)];
    assert_eq!(
        fit(&small, &windows),
        misfit(WindowKind::Io, IO_GRANULARITY, small[1])
    );
    let with_io = PortWindows {
        io: Some(0x3000..0x4000),
        ..windows.clone()
    };
    assert_eq!(fit(&small, &with_io), Ok(()));
    assert_eq!(
        fit(&small, &PortWindows::default()),
        misfit(WindowKind::Mem32, MIB, small[0])
    );
    let large = [
        request(0, PREFETCHABLE, 16 * GIB),
        request(2, MEM32, 16 * MIB),
    ];
    assert_eq!(fit(&large, &windows), Ok(()));
    let with_rom = [large[0], large[1], request(ROM, BarKind::Rom, 0x1_0000)];
    assert_eq!(
        fit(&with_rom, &windows),
        Ok(()),
        "a ROM may go without an address"
    );
    let larger = [
        request(0, PREFETCHABLE, 16 * GIB),
        request(2, PREFETCHABLE, MIB),
    ];
    assert_eq!(
        fit(&larger, &windows),
        misfit(WindowKind::Mem64, 16 * GIB + MIB, larger[0])
    );
}

#[test]
fn what_does_not_fit_is_named() {
    let large = request(4, MEM64, 2 * GIB);
    let error = plan(&[port(3, vec![large])], &host()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no room for BAR 4 (0x80000000 bytes) of function 0 behind root port 0000:00:01.3: a \
         32-bit memory window of 0x80000000 bytes does not fit into what is left of \
         0x80000000..0xe0000000; attach fewer devices or make the windows of other slots \
         smaller"
    );
    let many: Vec<_> = (0..97).map(|number| port(number, vec![])).collect();
    let error = plan(&many, &host()).unwrap_err();
    let expected = FirmwareError::Slot {
        port: GuestBdf::from_bits(8 + 96),
        kind: WindowKind::Mem32,
        size: 16 * MIB,
        host: host().mem32,
    };
    assert_eq!(error, expected);
    assert!(plan(&many[..96], &host()).is_ok());
}

#[test]
fn an_endpoint_is_sized_and_assigned_through_its_registers() {
    let mut segment = PciSegment::new([0..=0xff]).unwrap();
    let first = segment.add_root_port(0).unwrap();
    let second = segment.add_root_port(0).unwrap();
    let bars = [
        bar(0, MEM64, 0x4000),
        bar(2, PREFETCHABLE, 8 * GIB),
        bar(4, BarKind::Io, 0x20),
        bar(5, MEM32, 16),
        bar(ROM, BarKind::Rom, 0x1_0000),
    ];
    let device = Endpoint::new(1, bars);
    segment.attach(second, 2, device.clone()).unwrap();
    let probed = probe(2, device.as_ref());
    let found: Vec<_> = probed
        .iter()
        .map(|bar| (bar.function, bar.index, bar.kind, bar.size))
        .collect();
    assert_eq!(
        found,
        [
            (2, 0, MEM64, 0x4000),
            (2, 2, PREFETCHABLE, 8 * GIB),
            (2, 4, BarKind::Io, 0x20),
            (2, 5, MEM32, 16),
            (2, ROM, BarKind::Rom, 0x1_0000),
        ]
    );
    let minimum = |port| Minimum {
        mem64: if port == first { 16 * GIB } else { 0 },
        ..Minimum::default()
    };
    for _ in 0..2 {
        assign(&segment, 0, &host(), minimum).unwrap();
        let addresses = [0, 2, 4, 5, ROM].map(|index| device.address(index));
        assert_eq!(
            addresses,
            [
                0x8101_0000,
                0x44_0000_0000,
                0x1000,
                0x8101_4000,
                0x8100_0000
            ]
        );
        let mut rom = [0xff; 4];
        device.read_config(EXPANSION_ROM.start, &mut rom);
        assert_eq!(rom[0], 0, "the ROM is not enabled");
        let mut command = [0xff; 2];
        device.read_config(COMMAND, &mut command);
        assert_eq!(command, [0; 2], "decoding is the driver's to turn on");
        for (_, function) in segment.functions() {
            function.reset(&FakeSpace::default()).unwrap();
        }
        assert_eq!(device.address(0), 0);
    }
}

#[test]
fn a_function_that_answers_ones_or_nothing_has_no_bars() {
    struct Constant(u8);
    impl PciDevice for Constant {
        fn read_config(&self, _offset: u16, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write_config(&self, _offset: u16, _data: &[u8]) -> bool {
            false
        }
        fn remap(&self, _space: &dyn super::super::BarSpace) {}
        fn reset(&self, _space: &dyn super::super::BarSpace) -> std::io::Result<()> {
            Ok(())
        }
    }
    assert!(probe(0, &Constant(0)).is_empty());
    for byte in 0..=0xff {
        probe(0, &Constant(byte));
    }
}

fn bars(sizes: std::ops::Range<u32>) -> impl Strategy<Value = Vec<BarRequest>> {
    let kind = prop_oneof![
        Just(MEM32),
        Just(MEM64),
        Just(PREFETCHABLE),
        Just(BarKind::Io)
    ];
    let bar = (0..8_u8, 0..6_u8, kind, sizes).prop_map(|(function, index, kind, size)| {
        let size = if kind == BarKind::Io {
            size.min(8)
        } else {
            size
        };
        BarRequest {
            function,
            index,
            kind,
            size: 1 << size,
        }
    });
    let rom = (0..8_u8, 11..25_u32).prop_map(|(function, size)| BarRequest {
        function,
        index: ROM,
        kind: BarKind::Rom,
        size: 1 << size,
    });
    let bar = prop_oneof![9 => bar, 1 => rom];
    vec(bar, 0..10).prop_map(|mut bars| {
        let mut seen = std::collections::HashSet::new();
        bars.retain(|bar| seen.insert((bar.function, bar.index)));
        bars
    })
}

fn ports(sizes: std::ops::Range<u32>) -> impl Strategy<Value = Vec<PortRequest>> {
    let minimum = (0..20 * MIB, 0..40 * GIB, 0..0x1800_u64)
        .prop_map(|(mem32, mem64, io)| Minimum { mem32, mem64, io });
    let minimum = prop_oneof![Just(Minimum::default()), minimum];
    vec((minimum, bars(sizes)), 0..6).prop_map(|ports| {
        (0..)
            .zip(ports)
            .map(|(number, (minimum, bars))| PortRequest {
                minimum,
                ..port(number, bars)
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn what_fits_is_placed_without_overlaps(ports in ports(4..24)) {
        let plans = plan(&ports, &host()).unwrap();
        check(&ports, &plans, &host());
    }

    #[test]
    fn any_request_is_placed_or_refused(ports in ports(2..64), start in any::<u64>()) {
        let mut host = host();
        host.mem64 = start..u64::MAX;
        if let Ok(plans) = plan(&ports, &host) {
            check(&ports, &plans, &host);
        }
    }
}

#[test]
fn each_host_bridge_gives_its_ports_addresses_of_its_own() {
    let mut segment = PciSegment::new([0..=0x7f, 0x80..=0xff]).unwrap();
    let bars = || vec![bar(0, MEM64, 0x4000), bar(2, PREFETCHABLE, GIB)];
    let devices = [0, 1, 0, 1].map(|bridge| {
        let port = segment.add_root_port(bridge).unwrap();
        let device = Endpoint::new(1, bars());
        segment.attach(port, 0, device.clone()).unwrap();
        (bridge, port, device)
    });
    let half = |bridge: u64| HostWindows {
        mem32: 0x8000_0000 + bridge * 0x2000_0000..0xa000_0000 + bridge * 0x2000_0000,
        mem64: (64 + bridge * 64) * GIB..(128 + bridge * 64) * GIB,
        io: 0x1000 + bridge * 0x1000..0x2000 + bridge * 0x1000,
    };
    for bridge in [0, 1] {
        let assigned = assign(&segment, bridge, &half(bridge as u64), |_| {
            Minimum::default()
        });
        let ports: Vec<_> = assigned
            .unwrap()
            .into_iter()
            .map(|(port, _)| port)
            .collect();
        let own = devices.iter().filter(|(other, ..)| *other == bridge);
        assert!(own.map(|(_, port, _)| *port).eq(ports));
    }
    for (bridge, _, device) in devices {
        let host = half(bridge as u64);
        assert!(host.mem32.contains(&device.address(0)), "{bridge}");
        assert!(host.mem64.contains(&device.address(2)), "{bridge}");
    }
}
