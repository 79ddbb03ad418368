#![allow(unsafe_code)] // A system call on a ring.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::disk::{Disk, ResizeError};
use super::request::{SERIAL_LEN, Service};
use super::ring::{LentRing, Rings};
use super::serve::Server;
use crate::virtio::ActiveQueue;
use crate::virtio::signals::Signals;
use crate::virtio::testing::{
    AVAILABLE, DESCRIPTORS, Driver, INDIRECT, RAM, WRITE, active_queue, ram,
};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x8100;
const DATA: u64 = 0x1_0000;
const SIZE: u16 = 16;
const SECTORS: u64 = 64;
/// Neither a status nor what a disk would write.
const UNTOUCHED: u8 = 0xee;

/// A disk of [`SECTORS`] sectors whose bytes count up, and its driver.
struct Rig {
    driver: Driver,
    queue: ActiveQueue,
    signals: Arc<Signals>,
    disk: Disk,
    file: File,
    stopping: bool,
    ring: Option<LentRing>,
}

impl Rig {
    fn new(read_only: bool) -> Self {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &content()).unwrap();
        let disk = Disk::new(file.try_clone().unwrap(), SECTORS * 512, 512, read_only);
        let signals = Signals::new(1);
        let queue = active_queue(&signals, 0, SIZE);
        let driver = Driver::new(ram(), SIZE);
        driver.write(STATUS, &[UNTOUCHED]);
        Self {
            driver,
            queue,
            signals,
            disk,
            file,
            stopping: false,
            ring: None,
        }
    }

    /// The same, by io_uring where the kernel has it.
    fn with_ring(self) -> Self {
        let rings = Rings::default();
        rings.fill(1);
        let ring = rings.take();
        if ring.is_none() {
            eprintln!("this kernel has no io_uring");
        }
        Self { ring, ..self }
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.write(HEADER, &bytes);
    }

    /// Whether the driver has kept to the rules.
    fn serve(&mut self) -> bool {
        let service = Service {
            disk: &self.disk,
            serial: b"a serial number of 2",
            write_through: true,
            is_stopping: &|| self.stopping,
        };
        let memory = self.driver.ram.memory();
        let server = Server::new(memory, &service, self.ring.as_mut());
        let queues = std::slice::from_mut(&mut self.queue);
        server.serve(queues, |under_way| under_way > 0).is_ok()
    }

    /// The status of a request whose data is in these buffers.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u8 {
        self.header(kind, sector);
        let mut buffers = vec![(HEADER, 16, false)];
        buffers.extend_from_slice(data);
        buffers.push((STATUS, 1, true));
        self.driver.offer(&buffers);
        assert!(self.serve());
        self.driver.read(STATUS, 1)[0]
    }

    fn on_disk(&mut self) -> Vec<u8> {
        // Opened anew: the disk's own descriptor may not pass the cache.
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        std::fs::read(path).unwrap()
    }
}

fn content() -> Vec<u8> {
    (0..SECTORS * 512).map(|at| (at / 3) as u8).collect()
}

#[test]
fn sectors_are_read_into_any_buffers() {
    let mut rig = Rig::new(true);
    let status = rig.request(
        IN,
        2,
        &[
            (DATA, 100, true),
            (DATA + 100, 0, true),
            (DATA + 100, 924, true),
        ],
    );
    assert_eq!(status, OK);
    assert_eq!(rig.driver.read(DATA, 1024), content()[1024..2048]);
    assert_eq!(rig.driver.written(), 1025);
    assert_eq!(rig.driver.used(), 1);
}

#[test]
fn sectors_are_written_and_flushed() {
    let mut rig = Rig::new(false);
    rig.driver.write(DATA, &[7; 512]);
    assert_eq!(rig.request(OUT, SECTORS - 1, &[(DATA, 512, false)]), OK);
    assert_eq!(rig.request(FLUSH, 0, &[]), OK);
    let disk = rig.on_disk();
    assert_eq!(disk[..63 * 512], content()[..63 * 512]);
    assert_eq!(disk[63 * 512..], [7; 512]);
}

#[test]
fn what_does_not_fit_the_disk_fails_and_moves_nothing() {
    let mut rig = Rig::new(false);
    rig.driver.write(DATA, &[7; 2048]);
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (0, 511),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
    ] {
        assert_eq!(
            rig.request(OUT, sector, &[(DATA, len, false)]),
            IO_ERROR,
            "{sector}"
        );
        assert_eq!(
            rig.request(IN, sector, &[(DATA, len, true)]),
            IO_ERROR,
            "{sector}"
        );
    }
    assert_eq!(rig.driver.read(DATA, 2048), [7; 2048]);
    assert_eq!(rig.on_disk(), content());
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut rig = Rig::new(true);
    let mut range = [0; 16];
    range[8] = 1;
    rig.driver.write(DATA, &range);
    assert_eq!(rig.request(OUT, 0, &[(DATA, 512, false)]), IO_ERROR);
    assert_eq!(rig.request(DISCARD, 0, &[(DATA, 16, false)]), IO_ERROR);
    assert_eq!(rig.request(WRITE_ZEROES, 0, &[(DATA, 16, false)]), IO_ERROR);
    assert_eq!(rig.on_disk(), content());
}

#[test]
fn bytes_in_memory_are_a_read_only_disk() {
    let mut rig = Rig::new(true);
    rig.disk = Disk::of_bytes([content(), vec![1; 511]].concat());
    assert_eq!(
        (rig.disk.sectors(), rig.disk.is_read_only()),
        (SECTORS, true)
    );
    let data = [(DATA, 100, true), (DATA + 100, 924, true)];
    assert_eq!(rig.request(IN, SECTORS - 2, &data), OK);
    assert_eq!(rig.driver.read(DATA, 1024), content()[62 * 512..]);
    for (kind, sector) in [(IN, SECTORS), (IN, SECTORS - 1), (IN, u64::MAX / 512)] {
        assert_eq!(rig.request(kind, sector, &data), IO_ERROR, "{sector}");
    }
    assert_eq!(rig.request(OUT, 0, &[(DATA, 512, false)]), IO_ERROR);
    assert_eq!(rig.request(FLUSH, 0, &[]), OK);
}

#[test]
fn the_serial_number_is_told_and_other_requests_are_not_known() {
    let mut rig = Rig::new(true);
    assert_eq!(
        rig.request(GET_ID, 0, &[(DATA, SERIAL_LEN as u32, true)]),
        OK
    );
    assert_eq!(rig.driver.read(DATA, 20), b"a serial number of 2");
    assert_eq!(rig.request(GET_ID, 0, &[(DATA, 3, true)]), IO_ERROR);
    assert_eq!(rig.request(99, 0, &[]), UNSUPPORTED);
}

#[test]
fn ranges_are_filled_with_zeros() {
    for flags in [0, 1] {
        let mut rig = Rig::new(false);
        for (at, (sector, sectors)) in [(1_u64, 2_u32), (10, 0), (60, 4)].into_iter().enumerate() {
            let mut range = [0; 16];
            range[..8].copy_from_slice(&sector.to_le_bytes());
            range[8..12].copy_from_slice(&sectors.to_le_bytes());
            range[12] = flags;
            rig.driver.write(DATA + 16 * at as u64, &range);
        }
        assert_eq!(rig.request(WRITE_ZEROES, 0, &[(DATA, 48, false)]), OK);
        let mut expected = content();
        expected[512..3 * 512].fill(0);
        expected[60 * 512..].fill(0);
        assert_eq!(rig.on_disk(), expected);
    }
}

#[test]
fn a_bad_range_keeps_all_of_a_request_from_the_disk() {
    let mut rig = Rig::new(false);
    let mut ranges = [0; 32];
    ranges[8] = 1;
    ranges[16] = SECTORS as u8;
    ranges[24] = 1;
    rig.driver.write(DATA, &ranges);
    assert_eq!(rig.request(WRITE_ZEROES, 0, &[(DATA, 32, false)]), IO_ERROR);
    assert_eq!(rig.request(WRITE_ZEROES, 0, &[(DATA, 15, false)]), IO_ERROR);
    assert_eq!(rig.request(DISCARD, 0, &[(DATA, 17 * 16, false)]), IO_ERROR);
    ranges[12] = 2;
    rig.driver.write(DATA, &ranges);
    assert_eq!(
        rig.request(WRITE_ZEROES, 0, &[(DATA, 16, false)]),
        UNSUPPORTED
    );
    assert_eq!(rig.on_disk(), content());
}

#[test]
fn a_driver_without_room_for_a_status_waits_for_its_reset() {
    let mut rig = Rig::new(false);
    rig.header(IN, 0);
    rig.driver.offer(&[(HEADER, 16, false)]);
    assert!(!rig.serve());
    assert_eq!(rig.driver.used(), 0);
}

#[test]
fn buffers_outside_of_ram_and_in_the_wrong_order_break_the_queue() {
    for buffers in [
        [(HEADER, 16, false), (RAM - 1, 512, true), (STATUS, 1, true)],
        [
            (HEADER, 16, false),
            (u64::MAX - 1, 512, true),
            (STATUS, 1, true),
        ],
        [(DATA, 512, true), (HEADER, 16, false), (STATUS, 1, true)],
    ] {
        let mut rig = Rig::new(false);
        rig.header(IN, 0);
        rig.driver.offer(&buffers);
        assert!(!rig.serve());
        assert_eq!(rig.driver.used(), 0);
        assert_eq!(rig.on_disk(), content());
    }
}

#[test]
fn a_chain_is_no_longer_than_the_disk_says() {
    const TABLE: u64 = DATA + 0x8000;
    for (buffers, is_taken) in [(254, true), (255, false), (4096, false), (0x7ffe, false)] {
        for mut rig in both(false) {
            rig.header(IN, 0);
            // As much as the disk has, and then nothing.
            let len = |index| if index < SECTORS { 512 } else { 0 };
            let data = (0..buffers).map(|index| (DATA, len(index), true));
            let header = [(HEADER, 16, false)].into_iter();
            let chain = header.chain(data).chain([(STATUS, 1, true)]);
            rig.driver.offer_indirect(TABLE, &chain.collect::<Vec<_>>());
            assert_eq!(rig.serve(), is_taken, "{buffers} buffers");
            assert_eq!(rig.driver.used(), u16::from(is_taken));
            let status = if is_taken { OK } else { UNTOUCHED };
            assert_eq!(rig.driver.read(STATUS, 1), [status]);
        }
    }
}

#[test]
fn a_request_that_the_kernel_refuses_at_first_is_answered() {
    const ENABLE: libc::c_uint = 12; // IORING_REGISTER_ENABLE_RINGS
    let mut rig = Rig::new(false);
    let Some(mut ring) = Rings::disabled() else {
        return eprintln!("this kernel has no io_uring");
    };
    let fd = ring.fd().unwrap();
    rig.header(IN, 0);
    let chain = [(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)];
    rig.driver.offer(&chain);
    let looks = Cell::new(0);
    let enable = || {
        // SAFETY: the ring is open, and the call reads no memory.
        let done = unsafe { libc::syscall(libc::SYS_io_uring_register, fd, ENABLE, 0, 0) };
        assert_eq!(done, 0);
    };
    let slept = Cell::new(false);
    let service = Service {
        disk: &rig.disk,
        serial: &[0; SERIAL_LEN],
        write_through: true,
        is_stopping: &|| {
            looks.set(looks.get() + 1);
            if looks.get() == 50 {
                enable();
            }
            false
        },
    };
    let server = Server::new(rig.driver.ram.memory(), &service, Some(&mut ring));
    let queues = std::slice::from_mut(&mut rig.queue);
    let served = server.serve(queues, |under_way| {
        if looks.get() < 50 {
            slept.set(true);
            looks.set(50);
            enable();
        }
        under_way > 0
    });
    assert!(served.is_ok());
    assert!(!slept.get(), "it slept while no event could come");
    assert_eq!(rig.driver.used(), 1);
    assert_eq!(rig.driver.read(STATUS, 1), [OK]);
    assert_eq!(rig.driver.read(DATA, 512), content()[..512]);
}

#[test]
fn a_disk_never_shrinks_while_several_resize_it() {
    let rig = Rig::new(false);
    let (disk, largest) = (&rig.disk, &AtomicU64::new(0));
    std::thread::scope(|scope| {
        for first in 0..4 {
            scope.spawn(move || {
                for sectors in (SECTORS + first..SECTORS + 800).step_by(4) {
                    let before = largest.load(Ordering::SeqCst);
                    assert!(disk.sectors() >= before);
                    match disk.resize(sectors * 512) {
                        Ok(()) => drop(largest.fetch_max(sectors, Ordering::SeqCst)),
                        Err(ResizeError::Busy) => {}
                        Err(ResizeError::Smaller { len }) => assert!(len > sectors * 512),
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
}

#[test]
fn loops_and_indices_that_make_no_sense_end() {
    // A descriptor that is its own successor: its bytes count as often as the queue is long.
    let mut rig = Rig::new(false);
    rig.header(IN, 0);
    rig.driver.describe(DESCRIPTORS, DATA, 512, (WRITE | 1, 0));
    rig.driver.make_available(0);
    assert!(rig.serve());
    // A head outside of the table.
    rig.driver.make_available(SIZE);
    assert!(!rig.serve());
    // More chains than there are descriptors.
    let mut rig = Rig::new(false);
    rig.driver.set_available(SIZE + 1);
    assert!(!rig.serve());
    // An indirect table in an indirect table.
    let mut rig = Rig::new(false);
    rig.driver.describe(DESCRIPTORS, DATA, 32, (INDIRECT, 0));
    rig.driver.describe(DATA, DATA, 32, (INDIRECT, 0));
    rig.driver.make_available(0);
    assert!(!rig.serve());
    assert!(!rig.signals.is_broken(), "the worker tells, not the queue");
}

/// A disk without a ring, and one with.
fn both(read_only: bool) -> [Rig; 2] {
    [Rig::new(read_only), Rig::new(read_only).with_ring()]
}

#[test]
fn requests_are_done_side_by_side_too() {
    let mut rig = Rig::new(false).with_ring();
    // Twice as often as there are requests under way at a time.
    for round in 0..256_u64 {
        let sector = round % (SECTORS - 1);
        rig.driver.write(DATA, &[round as u8; 1024]);
        assert_eq!(
            rig.request(OUT, sector, &[(DATA, 24, false), (DATA, 1000, false)]),
            OK
        );
        rig.driver.write(DATA, &[0; 1024]);
        assert_eq!(rig.request(IN, sector, &[(DATA, 512, true)]), OK);
        assert_eq!(rig.driver.read(DATA, 512), [round as u8; 512]);
    }
    assert_eq!(rig.request(FLUSH, 0, &[]), OK);
    assert_eq!(rig.request(IN, SECTORS, &[(DATA, 512, true)]), IO_ERROR);
    assert_eq!(rig.request(IN, 1, &[]), OK);
    let counted = rig.disk.counters();
    assert_eq!(counted[0], ("read_ops", 257));
    assert_eq!(counted[3], ("write_bytes", 256 * 1024));
}

#[test]
fn what_is_under_way_ends_before_a_driver_that_breaks_the_rules_is_left() {
    for mut rig in both(false) {
        rig.header(IN, 0);
        rig.driver
            .offer(&[(HEADER, 16, false), (DATA, 4096, true), (STATUS, 1, true)]);
        rig.driver.make_available(SIZE);
        assert!(!rig.serve());
        let read = rig.driver.read(DATA, 4096);
        assert_eq!(read, content()[..4096]);
    }
}

#[test]
fn a_disk_that_grows_has_more_sectors_and_none_that_shrinks_has_less() {
    let mut rig = Rig::new(false);
    assert_eq!(rig.request(IN, SECTORS, &[(DATA, 512, true)]), IO_ERROR);
    for bytes in [512, SECTORS * 512 + 1] {
        rig.disk.resize(bytes).unwrap_err();
    }
    rig.disk.resize((SECTORS + 1) * 512).unwrap();
    assert_eq!(rig.disk.sectors(), SECTORS + 1);
    assert_eq!(rig.request(IN, SECTORS, &[(DATA, 512, true)]), OK);
    assert_eq!(rig.driver.read(DATA, 512), [0; 512]);
    let read_only = Rig::new(true);
    read_only.disk.resize((SECTORS + 1) * 512).unwrap_err();
    read_only.file.set_len((SECTORS + 1) * 512).unwrap();
    read_only.disk.resize((SECTORS + 1) * 512).unwrap();
}

#[test]
fn buffers_that_are_not_aligned_pass_the_cache_too() {
    for rig in both(false) {
        let Rig { disk, .. } = rig;
        let mut rig = match disk.past_the_cache() {
            Ok(disk) => Rig { disk, ..rig },
            Err(error) => return eprintln!("no direct accesses to temporary files: {error}"),
        };
        assert!(rig.disk.block_size() >= 512);
        let status = rig.request(IN, 3, &[(DATA + 1, 511, true), (DATA + 600, 1025, true)]);
        assert_eq!(status, OK);
        let expected = &content()[3 * 512..6 * 512];
        assert_eq!(rig.driver.read(DATA + 1, 511), expected[..511]);
        assert_eq!(rig.driver.read(DATA + 600, 1025), expected[511..]);
        rig.driver.write(DATA + 3, &[7; 1024]);
        assert_eq!(rig.request(OUT, 9, &[(DATA + 3, 1024, false)]), OK);
        let mut expected = content();
        expected[9 * 512..11 * 512].fill(7);
        assert_eq!(rig.on_disk(), expected);
        assert_eq!(rig.request(IN, 0, &[(DATA, 4096, true)]), OK);
        assert_eq!(rig.driver.read(DATA, 4096), expected[..4096]);
    }
}

proptest! {
    /// Whatever is in the rings, the device ends, and the disk is as it was: no request here writes.
    #[test]
    fn any_rings_are_survived(
        rings in proptest::collection::vec(any::<u8>(), 0x400),
        available in 0_u16..=SIZE,
    ) {
        for mut rig in both(true) {
            rig.driver.write(DESCRIPTORS, &rings);
            rig.driver.write(AVAILABLE + 4, &rings[..64]);
            rig.driver.set_available(available);
            rig.serve();
            prop_assert_eq!(rig.on_disk(), content());
        }
    }

    /// Whatever a request says, in whatever buffers, RAM outside of them stays as it is, and so does the disk's
    /// length.
    #[test]
    fn any_request_is_survived(
        kind in prop_oneof![Just(IN), Just(OUT), Just(FLUSH), Just(GET_ID), Just(DISCARD), Just(WRITE_ZEROES), any::<u32>()],
        sector in prop_oneof![0..SECTORS + 2, any::<u64>()],
        data in proptest::collection::vec((0_u64..0x2000, 0_u32..0x2000, any::<bool>()), 0..6),
        ranges in proptest::collection::vec(any::<u8>(), 48),
        indirect in any::<bool>(),
    ) {
        for mut rig in both(false) {
            rig.header(kind, sector);
            rig.driver.write(DATA, &ranges);
            let mut buffers = vec![(HEADER, 16, false)];
            buffers.extend(data.iter().map(|(at, len, write)| (DATA + at, *len, *write)));
            // A driver that keeps to the order.
            buffers.sort_by_key(|(_, _, write)| *write);
            buffers.push((STATUS, 1, true));
            match indirect {
                true => rig.driver.offer_indirect(DATA + 0x8000, &buffers),
                false => rig.driver.offer(&buffers),
            }
            prop_assert!(rig.serve());
            let status = rig.driver.read(STATUS, 1)[0];
            prop_assert!([OK, IO_ERROR, UNSUPPORTED].contains(&status));
            prop_assert_eq!(rig.driver.used(), 1);
            prop_assert_eq!(rig.driver.read(DATA + 0x4000, 64), vec![0; 64]);
            prop_assert_eq!(rig.on_disk().len(), content().len());
        }
    }
}
