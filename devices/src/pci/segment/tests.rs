//! The segment: who answers at which address, and what comes and goes.

use super::super::BarKind;
use super::super::fake::{Endpoint, Event, FakeSpace, bar};
use super::*;

fn bdf(bus: u8, device: u8, function: u8) -> GuestBdf {
    GuestBdf::new(bus, device, function).unwrap()
}

fn segment(ports: usize) -> PciSegment {
    let mut segment = PciSegment::new([0..=0xff]).unwrap();
    for _ in 0..ports {
        segment.add_root_port(0).unwrap();
    }
    segment
}

fn dword(segment: &PciSegment, at: GuestBdf, offset: u16) -> u32 {
    let mut data = [0; 4];
    segment.read_config(at, offset, &mut data);
    u32::from_le_bytes(data)
}

fn header_type(segment: &PciSegment, at: GuestBdf) -> u8 {
    let byte = |offset, len| {
        let mut data = [0; 4];
        segment.read_config(at, offset, &mut data[..len]);
        data[len - 1]
    };
    let seen = [byte(0x0e, 1), (dword(segment, at, 0x0c) >> 16) as u8];
    assert_eq!(seen[0], seen[1]);
    seen[0]
}

#[test]
fn ports_fill_multifunction_slots() {
    let segment = segment(9);
    let at: Vec<_> = segment.ports().map(|(_, at, _)| at.to_string()).collect();
    assert_eq!(at[0], "0000:00:01.0");
    assert_eq!(at[7], "0000:00:01.7");
    assert_eq!(at[8], "0000:00:02.0");
    assert_eq!(header_type(&segment, bdf(0, 0, 0)), 0);
    assert_eq!(header_type(&segment, bdf(0, 1, 0)), 0x81);
    assert_eq!(header_type(&segment, bdf(0, 1, 7)), 0x81);
    assert_eq!(header_type(&segment, bdf(0, 2, 0)), 1);
    for empty in [bdf(0, 0, 1), bdf(0, 2, 1), bdf(0, 3, 0), bdf(1, 0, 0)] {
        assert_eq!(dword(&segment, empty, 0), u32::MAX, "{empty}");
    }
}

#[test]
fn functions_are_reached_through_the_bus_number_of_their_port() {
    let segment = segment(2);
    let ports: Vec<_> = segment.ports().map(|(index, ..)| index).collect();
    let at = segment
        .attach(ports[1], 0, Endpoint::new(0x77, []))
        .unwrap();
    assert_eq!(at, bdf(2, 0, 0));
    assert_eq!(dword(&segment, at, 0), 0x0077_1234);
    for empty in [bdf(2, 1, 0), bdf(2, 0, 1), bdf(1, 0, 0), bdf(9, 0, 0)] {
        assert_eq!(dword(&segment, empty, 0), u32::MAX, "{empty}");
    }
    let _ = segment.write_config(bdf(0, 1, 1), 0x19, &[9]);
    assert_eq!(dword(&segment, at, 0), u32::MAX);
    assert_eq!(dword(&segment, bdf(9, 0, 0), 0), 0x0077_1234);
    let all: Vec<_> = segment.functions().iter().map(|(at, _)| *at).collect();
    let ports = [bdf(0, 1, 0), bdf(0, 1, 1)];
    assert_eq!(all, [bdf(0, 0, 0), ports[0], ports[1], bdf(9, 0, 0)]);
}

#[test]
fn the_multifunction_bit_follows_what_is_attached() {
    let segment = segment(1);
    let port = PortIndex(0);
    segment.attach(port, 0, Endpoint::new(1, [])).unwrap();
    assert_eq!(header_type(&segment, bdf(1, 0, 0)), 0);
    segment.attach(port, 1, Endpoint::new(2, [])).unwrap();
    assert_eq!(header_type(&segment, bdf(1, 0, 0)), 0x80);
    assert_eq!(dword(&segment, bdf(1, 0, 1), 0), 0x0002_1234);
    assert!(segment.detach(port, 1).is_some());
    assert!(segment.detach(port, 1).is_none());
    assert_eq!(header_type(&segment, bdf(1, 0, 0)), 0);
}

#[test]
fn the_slot_is_occupied_until_the_last_function_goes() {
    let segment = segment(1);
    let port = PortIndex(0);
    let present = || dword(&segment, bdf(0, 1, 0), 0x58) >> 22 & 1;
    assert_eq!(present(), 0);
    segment.attach(port, 0, Endpoint::new(1, [])).unwrap();
    segment.attach(port, 3, Endpoint::new(1, [])).unwrap();
    segment.detach(port, 0);
    assert_eq!(present(), 1);
    segment.detach(port, 3);
    assert_eq!(present(), 0);
}

#[test]
fn a_write_that_moves_bars_asks_for_a_remap() {
    let segment = segment(1);
    let kind = BarKind::Memory32 {
        prefetchable: false,
    };
    let device = Endpoint::new(1, [bar(0, kind, 0x1000)]);
    let at = segment.attach(PortIndex(0), 0, device).unwrap();
    let address = 0xc000_0000_u32.to_le_bytes();
    assert!(matches!(
        segment.write_config(at, 0x10, &address),
        Effect::None
    ));
    let space = FakeSpace::default();
    open_windows(&segment);
    write(&segment, at, 4, &[2, 0], &space);
    assert_eq!(space.events(), [Event::Map(0xc000_0000)]);
    assert!(matches!(segment.write_config(at, 4, &[2, 0]), Effect::None));
}

/// Has the ports forward the memory below and above 4 GiB, 1 MiB and 4 GiB for each, and the ports 0x1000 to 0x1fff.
fn open_windows(segment: &PciSegment) {
    for (index, _, port) in segment.ports() {
        let start = 0xc000_0000 + ((index.get() as u64) << 20);
        let start64 = (16 + 4 * index.get() as u64) << 30;
        port.program(&PortWindows {
            mem32: Some(start..start + (1 << 20)),
            mem64: Some(start64..start64 + (4 << 30)),
            io: Some(0x1000..0x2000),
        });
    }
}

/// Takes a write as the owner of the address space does.
fn write(segment: &PciSegment, at: GuestBdf, offset: u16, data: &[u8], space: &FakeSpace) {
    if let Effect::Remap(port) = segment.write_config(at, offset, data) {
        segment.remap(port, space);
    }
}

#[test]
fn a_bar_is_mapped_only_in_an_open_window_of_its_port() {
    let segment = segment(2);
    let prefetchable = false;
    let bars = [
        bar(0, BarKind::Memory64 { prefetchable }, 0x1000),
        bar(2, BarKind::Io, 16),
    ];
    let at = segment
        .attach(PortIndex(0), 0, Endpoint::new(1, bars))
        .unwrap();
    let port = bdf(0, 1, 0);
    let space = FakeSpace::default();
    let write = |at, offset, value: u32| {
        write(&segment, at, offset, &value.to_le_bytes(), &space);
        space.events()
    };
    let enable = |command: u8| {
        self::write(&segment, at, 4, &[command, 0], &space);
        space.events()
    };
    write(at, 0x10, 0xc008_0000);
    write(at, 0x18, 0x1100);
    assert_eq!(enable(3), [], "the port forwards nothing");
    open_windows(&segment);
    assert_eq!(
        enable(3),
        [Event::Map(0xc008_0000), Event::Map(0x1100)],
        "it forwards both"
    );
    // Outside of the window, in that of another port, across its end, above 4 GiB.
    assert_eq!(write(at, 0x10, 0xc020_0000), [Event::Unmap(0xc008_0000)]);
    assert_eq!(write(at, 0x10, 0xc010_0000), []);
    assert_eq!(write(at, 0x14, 5), []);
    assert_eq!(write(at, 0x10, 0), []);
    assert_eq!(write(at, 0x14, 4), [Event::Map(4 << 32)]);
    // The port's windows move, and it stops and begins to forward.
    let prefetchable_base = 0x28;
    assert_eq!(
        write(port, prefetchable_base, 5),
        [Event::Unmap(4 << 32)],
        "its base is above its limit"
    );
    assert_eq!(write(port, prefetchable_base, 4), [Event::Map(4 << 32)]);
    self::write(&segment, port, 4, &[1, 0], &space);
    assert_eq!(space.events(), [Event::Unmap(4 << 32)]);
    self::write(&segment, port, 4, &[2, 0], &space);
    assert_eq!(space.events(), [Event::Unmap(0x1100), Event::Map(4 << 32)]);
    self::write(&segment, port, 4, &[3, 0], &space);
    assert_eq!(space.events(), [Event::Map(0x1100)]);
    assert_eq!(write(port, 0x1c, 0x2020), [Event::Unmap(0x1100)]);
}

#[test]
fn a_refused_bar_is_mapped_once_its_place_is_free() {
    let segment = segment(2);
    open_windows(&segment);
    let space = FakeSpace::default();
    let prefetchable = true;
    let [one, two] = [0, 1].map(|port| {
        let bars = [bar(0, BarKind::Memory64 { prefetchable }, 0x1000)];
        let device = Endpoint::new(1, bars);
        segment.attach(PortIndex(port), 0, device).unwrap()
    });
    // The windows overlap, as no sane guest has them.
    let (_, _, port) = segment.ports().nth(1).unwrap();
    port.program(&PortWindows {
        mem64: Some(16 << 30..20 << 30),
        ..PortWindows::default()
    });
    for at in [one, two] {
        write(&segment, at, 0x14, &[4], &space);
        write(&segment, at, 4, &[2, 0], &space);
        space.taken.lock().unwrap().push(4 << 32);
    }
    let refused = Event::Refused(4 << 32);
    assert_eq!(space.events()[..2], [Event::Map(4 << 32), refused]);
    // A device that leaves without a write of the guest.
    segment.retry_refused(&space);
    assert_eq!(space.events(), [refused]);
    space.taken.lock().unwrap().clear();
    write(&segment, one, 0x10, &[0, 0, 1, 0], &space);
    let moved = [
        Event::Unmap(4 << 32),
        Event::Map((4 << 32) + 0x1_0000),
        Event::Map(4 << 32),
    ];
    assert_eq!(space.events(), moved);
    segment.retry_refused(&space);
    assert_eq!(space.events(), []);
}

#[test]
fn accesses_that_functions_do_not_take_are_refused() {
    let segment = segment(1);
    for (offset, len) in [
        (1, 2),
        (2, 4),
        (3, 2),
        (0, 3),
        (0, 8),
        (0xffe, 4),
        (0x1000, 1),
    ] {
        let mut data = vec![0; len];
        segment.read_config(bdf(0, 0, 0), offset, &mut data);
        assert_eq!(data, vec![0xff; len], "{offset:#x}");
        let _ = segment.write_config(bdf(0, 1, 0), offset, &data);
    }
    assert_eq!(dword(&segment, bdf(0, 1, 0), 4) & 0xffff, 0);
}

#[test]
fn host_bridges_share_out_the_buses() {
    let mut segment = PciSegment::new([0..=0x0f, 0x80..=0x81]).unwrap();
    segment.add_root_port(0).unwrap();
    let far = segment.add_root_port(1).unwrap();
    let full = SegmentError::Full {
        bridge: 1,
        ports: 1,
    };
    assert_eq!(segment.add_root_port(1), Err(full));
    let missing = SegmentError::NoBridge { bridge: 2 };
    assert_eq!(segment.add_root_port(2), Err(missing));
    let at = segment.attach(far, 0, Endpoint::new(5, [])).unwrap();
    assert_eq!(at, bdf(0x81, 0, 0));
    assert_eq!(dword(&segment, bdf(0x80, 0, 0), 0), 0x0008_1b36);
    assert_eq!(dword(&segment, at, 0), 0x0005_1234);
    // A port cannot reach into the buses of another host bridge.
    let _ = segment.write_config(bdf(0, 1, 0), 0x19, &[0x81]);
    assert_eq!(dword(&segment, at, 0), 0x0005_1234);
    assert_eq!(
        segment.bridges().collect::<Vec<_>>(),
        [0..=0x0f, 0x80..=0x81]
    );
}

#[test]
fn hierarchies_that_make_no_sense_are_refused() {
    for bridges in [vec![0..=0x10, 0x10..=0x20], vec![RangeInclusive::new(5, 4)]] {
        assert!(matches!(
            PciSegment::new(bridges),
            Err(SegmentError::Buses { .. })
        ));
    }
    let mut full = segment(248);
    let refused = SegmentError::Full {
        bridge: 0,
        ports: 248,
    };
    assert_eq!(full.add_root_port(0), Err(refused));
    let (last, at, port) = full.ports().last().unwrap();
    assert_eq!(
        (last.get(), at, port.secondary_bus()),
        (247, bdf(0, 31, 7), 248)
    );
    let device = || Endpoint::new(1, []);
    full.attach(last, 0, device()).unwrap();
    for function in [0, 8, 255] {
        let refused = SegmentError::Function {
            port: 247,
            function,
        };
        assert_eq!(full.attach(last, function, device()), Err(refused));
    }
    let missing = full.attach(PortIndex(248), 0, device());
    assert_eq!(missing, Err(SegmentError::NoPort { port: 248 }));
}

#[test]
fn any_function_is_in_its_slot_until_its_guard_is_dropped() {
    let segment = Arc::new(segment(1));
    let (port, ..) = segment.ports().next().unwrap();
    let guard = segment.plug(port, 0, Endpoint::new(9, [])).unwrap();
    assert_eq!(dword(&segment, bdf(1, 0, 0), 0), 0x0009_1234);
    assert!(segment.plug(port, 0, Endpoint::new(8, [])).is_err());
    assert_eq!(dword(&segment, bdf(1, 0, 0), 0), 0x0009_1234);
    drop(guard);
    assert_eq!(dword(&segment, bdf(1, 0, 0), 0), u32::MAX);
    segment.plug(port, 0, Endpoint::new(8, [])).unwrap();
}
