//! The configuration space: areas, writable bits, and the hardware behind them.

use std::sync::Mutex;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const SIZE: usize = CONFIG_SIZE as usize;

/// Hardware that takes every write, and checks that accesses are well-formed.
struct Hardware {
    bytes: Mutex<Vec<u8>>,
    accesses: Mutex<Vec<(char, u16, usize)>>,
}

impl Hardware {
    fn new() -> Self {
        Self {
            bytes: Mutex::new((0..SIZE).map(|at| (at * 7) as u8).collect()),
            accesses: Mutex::default(),
        }
    }

    fn check(&self, kind: char, offset: u16, len: usize) -> Range<usize> {
        let start = usize::from(offset);
        assert!(matches!(len, 1 | 2 | 4) && start.is_multiple_of(len) && start + len <= SIZE);
        self.accesses.lock().unwrap().push((kind, offset, len));
        start..start + len
    }
}

impl Backing for Hardware {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let at = self.check('r', offset, data.len());
        data.copy_from_slice(&self.bytes.lock().unwrap()[at]);
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let at = self.check('w', offset, data.len());
        self.bytes.lock().unwrap()[at].copy_from_slice(data);
    }
}

fn pass_through() -> ConfigSpace {
    ConfigSpace::new().with(Area::pass_through(0, CONFIG_SIZE))
}

#[test]
fn an_access_is_split_over_areas() {
    let mut config = pass_through().with(Area::emulated(0x41, &[0xaa, 0xbb], &[0x0f]));
    let hardware = Hardware::new();
    hardware.bytes.lock().unwrap()[0x40..0x44].copy_from_slice(&[1, 2, 3, 4]);
    let mut data = [0; 4];
    config.read(0x40, &mut data, &hardware);
    assert_eq!(data, [1, 0xaa, 0xbb, 4]);
    config.write(0x40, &[0x11, 0x22, 0x33, 0x44], &hardware);
    config.read(0x40, &mut data, &hardware);
    assert_eq!(data, [0x11, 0xa2, 0xbb, 0x44]);
    assert_eq!(
        hardware.bytes.lock().unwrap()[0x40..0x44],
        [0x11, 2, 3, 0x44]
    );
}

#[test]
fn whole_accesses_reach_the_hardware_whole() {
    let mut config = pass_through().with(Area::read_only(0x52, &[1]));
    let hardware = Hardware::new();
    config.write(0x40, &[0; 4], &hardware);
    config.write(0x50, &[0; 2], &hardware);
    let accesses = std::mem::take(&mut *hardware.accesses.lock().unwrap());
    assert_eq!(accesses, [('w', 0x40, 4), ('w', 0x50, 2)]);
}

#[test]
fn a_later_area_covers_parts_of_earlier_ones() {
    let config = ConfigSpace::new()
        .with(Area::read_only(0x10, &[1; 8]))
        .with(Area::read_only(0x12, &[2; 2]))
        .with(Area::read_only(0x0e, &[3; 3]));
    assert_eq!(config.get(0x0e), [3, 3, 3, 1, 2, 2, 1, 1, 1, 1, 0]);
    assert_eq!(config.get(0x17), [1, 0]);
}

#[test]
fn the_device_sets_what_the_guest_cannot() {
    let mut config = ConfigSpace::new()
        .with(Area::read_only(0, &[1, 2]))
        .with(Area::emulated(2, &[0], &[]));
    config.write(0, &[9, 9, 9, 9], &NoBacking);
    assert_eq!(config.get(0), [1, 2, 0, 0]);
    config.set(1, &[7, 0xff, 0xff]);
    assert_eq!(config.get(0), [1, 7, 0xff, 0]);
}

#[test]
fn past_the_end_there_are_ones_and_areas_are_cut() {
    let mut config = ConfigSpace::new().with(Area::read_only(0xffe, &[1; 8]));
    let mut data = [0; 4];
    config.read(0xffe, &mut data, &NoBacking);
    assert_eq!(data, [1, 1, 0xff, 0xff]);
    config.read(u16::MAX, &mut data, &NoBacking);
    assert_eq!(data, [0xff; 4]);
    config.write(u16::MAX, &data, &NoBacking);
    config.insert(Area::pass_through(u16::MAX, 4));
    config.insert(Area::read_only(0x1000, &[1]));
    assert_eq!(config.areas.len(), 1);
}

/// One step of a test run, near enough to the others that they meet.
#[derive(Debug, Clone)]
enum Step {
    Emulated(u16, Vec<u8>, Vec<u8>),
    PassThrough(u16, u16),
    Read(u16, usize),
    Write(u16, Vec<u8>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = || prop_oneof![0x30_u16..0x60, 0xff0_u16..=0x1008, Just(u16::MAX)];
    let bytes = || vec(prop_oneof![any::<u8>(), Just(0), Just(0xff)], 0..12);
    let step = prop_oneof![
        (at(), bytes(), bytes()).prop_map(|(at, a, b)| Step::Emulated(at, a, b)),
        (at(), 0..12_u16).prop_map(|(at, len)| Step::PassThrough(at, len)),
        (at(), 0..9_usize).prop_map(|(at, len)| Step::Read(at, len)),
        (at(), bytes()).prop_map(|(at, data)| Step::Write(at, data)),
    ];
    vec(step, 0..40)
}

/// The same space, bit by bit: whose it is, whether the guest may write it, and what it is.
struct Naive {
    own: Vec<u8>,
    writable: Vec<u8>,
    value: Vec<u8>,
    hardware: Vec<u8>,
}

impl Naive {
    fn put(&mut self, at: u16, own: &[u8], writable: &[u8], value: &[u8]) {
        for (index, own) in own.iter().enumerate() {
            let at = usize::from(at) + index;
            if at < SIZE {
                self.own[at] = *own;
                self.writable[at] = writable.get(index).copied().unwrap_or(0);
                self.value[at] = value.get(index).copied().unwrap_or(0);
            }
        }
    }

    fn read(&self, at: usize) -> u8 {
        if at >= SIZE {
            return 0xff;
        }
        self.value[at] & self.own[at] | self.hardware[at] & !self.own[at]
    }

    fn write(&mut self, at: usize, new: u8) {
        if at < SIZE {
            let (own, writable) = (self.own[at], self.writable[at] & self.own[at]);
            self.value[at] = self.value[at] & !writable | new & writable;
            self.hardware[at] = self.hardware[at] & own | new & !own;
        }
    }
}

proptest! {
    #[test]
    fn areas_behave_as_the_bits_in_them(steps in steps(), through in any::<bool>()) {
        let hardware = Hardware::new();
        let mut config = if through { pass_through() } else { ConfigSpace::new() };
        let mut naive = Naive {
            own: vec![if through { 0 } else { 0xff }; SIZE],
            writable: vec![0; SIZE],
            value: vec![0; SIZE],
            hardware: hardware.bytes.lock().unwrap().clone(),
        };
        for step in steps {
            match step {
                Step::Emulated(at, bytes, writable) => {
                    config.insert(Area::emulated(at, &bytes, &writable));
                    naive.put(at, &vec![0xff; bytes.len()], &writable, &bytes);
                }
                Step::PassThrough(at, len) => {
                    config.insert(Area::pass_through(at, len));
                    naive.put(at, &vec![0; usize::from(len)], &[], &[]);
                }
                Step::Read(at, len) => {
                    let mut data = vec![0; len];
                    config.read(at, &mut data, &hardware);
                    let expected: Vec<u8> =
                        (0..len).map(|index| naive.read(usize::from(at) + index)).collect();
                    prop_assert_eq!(data, expected);
                }
                Step::Write(at, data) => {
                    config.write(at, &data, &hardware);
                    for (index, byte) in data.into_iter().enumerate() {
                        naive.write(usize::from(at) + index, byte);
                    }
                }
            }
            let bytes = hardware.bytes.lock().unwrap();
            prop_assert_eq!(&*bytes, &naive.hardware);
        }
        let sorted = config.areas.windows(2).all(|pair| {
            pair[0].range().end <= pair[1].range().start
        });
        prop_assert!(sorted && config.areas.iter().all(|area| area.len() > 0));
    }
}
