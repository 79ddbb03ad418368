use std::sync::Mutex;

use proptest::prelude::*;

use super::control::Commands;
use super::*;
use crate::virtio::serve::drain;
use crate::virtio::signals::Signals;
use crate::virtio::testing::{Driver, active_queue, ram};
use crate::virtio::{ActiveQueue, Segments, VirtioBackend};

const SIZE: u16 = 16;
const COMMAND: u64 = 0x8000;
const ANSWER: u64 = 0x9000;
/// Neither answer.
const UNTOUCHED: u8 = 0xee;
const MQ: u64 = 1 << 22;
const CTRL_VQ: u64 = 1 << 17;

/// Notes what it is told.
#[derive(Default)]
struct FakePath {
    started: Mutex<Vec<Vec<u16>>>,
    used: Mutex<Vec<u16>>,
    stops: Mutex<u32>,
    refuses: bool,
}

impl FakePath {
    fn answer<T: Default>(&self) -> io::Result<T> {
        match self.refuses {
            true => Err(io::ErrorKind::InvalidInput.into()),
            false => Ok(T::default()),
        }
    }
}

impl KernelQueues for FakePath {
    fn start(&self, _features: u64, queues: &[ActiveQueue]) -> io::Result<()> {
        let numbers = queues.iter().map(|queue| queue.index).collect();
        self.started.lock().unwrap().push(numbers);
        self.answer()
    }

    fn stop(&self) {
        *self.stops.lock().unwrap() += 1;
    }
}

impl NetPath for FakePath {
    fn use_pairs(&self, pairs: u16) -> io::Result<()> {
        self.used.lock().unwrap().push(pairs);
        self.answer()
    }
}

fn spec(pairs: u16) -> NetSpec {
    NetSpec {
        mac: [2, 0, 0, 0, 0, 9],
        mtu: 9000,
        pairs,
        queue_size: SIZE,
        offloads: Offloads {
            checksum: true,
            tcp: true,
            udp: true,
        },
    }
}

fn device(pairs: u16, refuses: bool) -> (Net, Arc<FakePath>) {
    let path = Arc::new(FakePath {
        refuses,
        ..FakePath::default()
    });
    let (device, thread) = Net::new(spec(pairs), path.clone()).unwrap();
    assert_eq!(thread.is_some(), pairs > 1);
    (device, path)
}

fn activation(signals: &Arc<Signals>, features: u64, queues: &[u16]) -> Activation {
    let queue = |index: &u16| active_queue(signals, *index, SIZE);
    Activation {
        ram: ram(),
        features,
        queues: queues.iter().map(queue).collect(),
    }
}

#[test]
fn a_driver_reads_what_the_device_is() {
    let (device, _) = device(3, false);
    let mut config = [UNTOUCHED; 14];
    device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 9, 1, 0, 3, 0, 0x28, 0x23, 0, 0]);
    assert_eq!(device.queue_sizes(), [16, 16, 16, 16, 16, 16, 64]);
    assert_eq!(device.features() & (MQ | CTRL_VQ), MQ | CTRL_VQ);
}

#[test]
fn one_pair_needs_no_control_queue() {
    let (device, _) = device(1, false);
    assert_eq!(device.queue_sizes(), [16, 16]);
    assert_eq!(device.features() & (MQ | CTRL_VQ), 0);
    assert!(device.is_stopped());
}

#[test]
fn without_checksums_there_are_no_other_offloads() {
    let offloads = |checksum, tcp, udp| Offloads { checksum, tcp, udp }.features();
    assert_eq!(offloads(false, true, true), 0);
    assert_eq!(offloads(true, false, false), 0b11);
    assert_eq!(offloads(true, true, false).count_ones(), 8);
    assert_eq!(offloads(true, true, true).count_ones(), 10);
}

#[test]
fn the_kernel_serves_the_queues_that_carry_packets() {
    let signals = Signals::new(7);
    let all = [0, 1, 2, 3, 4, 5, 6];
    // Without several pairs, the third queue is the one for control.
    for (features, queues, served) in [
        (MQ | CTRL_VQ, &all[..], &all[..6]),
        (CTRL_VQ, &all[..3], &all[..2]),
        (0, &all[..], &all[..2]),
        (MQ, &all[1..2], &all[1..2]),
        (MQ, &[], &[]),
    ] {
        let (device, path) = device(3, false);
        device.start(activation(&signals, features, queues));
        assert_eq!(*path.started.lock().unwrap(), [served]);
        assert_eq!(device.is_stopped(), features & CTRL_VQ == 0);
        device.stop();
        assert!(device.is_stopped());
        assert_eq!(*path.stops.lock().unwrap(), 1);
    }
    assert!(!signals.is_broken());
}

#[test]
fn a_device_that_the_kernel_does_not_serve_needs_a_reset() {
    let signals = Signals::new(7);
    let (device, path) = device(3, true);
    device.start(activation(&signals, MQ | CTRL_VQ, &[0, 1, 6]));
    assert!(signals.is_broken());
    assert!(device.is_stopped());
    assert_eq!(*path.stops.lock().unwrap(), 1);
}

/// A control queue and its driver.
struct Rig {
    path: Arc<FakePath>,
    driver: Driver,
    queue: ActiveQueue,
}

impl Rig {
    fn new(refuses: bool) -> Self {
        let driver = Driver::new(ram(), SIZE);
        driver.write(ANSWER, &[UNTOUCHED]);
        Self {
            path: Arc::new(FakePath {
                refuses,
                ..FakePath::default()
            }),
            driver,
            queue: active_queue(&Signals::new(7), 6, SIZE),
        }
    }

    /// Whether the driver has kept to the rules.
    fn serve(&mut self, several: bool) -> bool {
        let commands = Commands {
            path: self.path.clone(),
            pairs: 3,
        };
        let memory = self.driver.ram.memory();
        let answer = &mut |readable: &Segments<'_>, writable: &Segments<'_>| {
            commands.answer(several, readable, writable)
        };
        drain(&mut self.queue, memory, &|| false, answer).is_ok()
    }

    /// The answer to a command.
    fn command(&mut self, bytes: &[u8], several: bool) -> u8 {
        self.driver.write(COMMAND, bytes);
        self.driver.write(ANSWER, &[UNTOUCHED]);
        self.driver
            .offer(&[(COMMAND, bytes.len() as u32, false), (ANSWER, 1, true)]);
        assert!(self.serve(several));
        assert_eq!(self.driver.written(), 1);
        self.driver.read(ANSWER, 1)[0]
    }
}

#[test]
fn a_driver_uses_as_many_pairs_as_there_are() {
    let mut rig = Rig::new(false);
    for pairs in [1, 2, 3] {
        assert_eq!(rig.command(&[4, 0, pairs, 0], true), 0);
    }
    assert_eq!(*rig.path.used.lock().unwrap(), [1, 2, 3]);
}

#[test]
fn other_commands_are_refused_and_the_driver_goes_on() {
    let mut rig = Rig::new(false);
    for command in [
        &[4, 0, 0, 0][..],
        &[4, 0, 4, 0],
        &[4, 0, 0xff, 0xff],
        &[4, 0, 1],
        &[4, 0, 1, 0, 0],
        &[4, 1, 1, 0],
        &[0, 0, 1, 0],
        &[1, 1, 2, 0, 0, 0, 0, 9],
        &[4],
    ] {
        assert_eq!(rig.command(command, true), 1, "{command:?}");
    }
    assert_eq!(rig.command(&[4, 0, 1, 0], false), 1);
    assert!(rig.path.used.lock().unwrap().is_empty());
    assert_eq!(Rig::new(true).command(&[4, 0, 1, 0], true), 1);
}

#[test]
fn a_command_without_room_for_its_answer_stops_the_queue() {
    let mut rig = Rig::new(false);
    rig.driver.offer(&[(COMMAND, 4, false)]);
    assert!(!rig.serve(true));
    assert_eq!(rig.driver.used(), 0);
}

proptest! {
    /// Whatever a driver writes, there is an answer or a reset, and no number of pairs that the device has not.
    #[test]
    fn no_command_is_too_much(
        bytes in proptest::collection::vec(any::<u8>(), 0..64),
        buffers in proptest::collection::vec((any::<u64>(), any::<u32>(), any::<bool>()), 1..SIZE as usize),
        near: bool,
        several: bool,
    ) {
        let mut rig = Rig::new(false);
        rig.driver.write(COMMAND, &bytes);
        let place = |(at, len, writable): (u64, u32, bool)| match near {
            true => (COMMAND + at % 64, len % 64, writable),
            false => (at, len, writable),
        };
        let buffers: Vec<_> = buffers.into_iter().map(place).collect();
        rig.driver.offer(&buffers);
        rig.serve(several);
        let used = rig.path.used.lock().unwrap();
        prop_assert!(used.iter().all(|pairs| several && (1..=3).contains(pairs)));
    }

    #[test]
    fn the_configuration_ends(offset: u64, len in 0_usize..32) {
        let (device, _) = device(1, false);
        let mut data = vec![UNTOUCHED; len];
        device.read_config(offset, &mut data);
        prop_assert!(offset < 12 || data.iter().all(|byte| *byte == 0));
    }
}
