//! A virtio entropy device (section 5.4).

use std::fs::File;
use std::io::{self, Read};
use std::thread::sleep;
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::serve::serve;
use super::{Activation, Segments, VirtioBackend, VirtioKind, Worker, WorkerHandle, worker};

/// A device of no class.
const CLASS: u32 = 0x00_ff_00;
const SIZES: [u16; 1] = [64];
/// The most bytes that a request gets: a driver asks again.
const MOST: usize = 1024;
/// How long to wait for a source that has nothing yet.
const PAUSE: Duration = Duration::from_millis(10);

/// The device. Its [`RngWorker`] does the work on a thread of its own.
pub struct Rng(WorkerHandle);

/// The thread of the device.
pub struct RngWorker {
    worker: Worker,
    source: File,
}

impl Rng {
    /// The device that gives what `source` gives, and what its thread runs. Reading from `source` must not wait.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new(source: File) -> io::Result<(Self, RngWorker)> {
        let (handle, worker) = worker()?;
        Ok((Self(handle), RngWorker { worker, source }))
    }
}

impl RngWorker {
    /// Serves drivers until the device is dropped.
    pub fn run(self) {
        let mut source = self.source;
        self.worker.run(|worker, activation| {
            serve(worker, activation, |_, writable| {
                fill(&mut source, writable, &|| worker.is_stopping())
            });
        });
    }
}

/// Puts bytes of the source into the buffers of a request. Returns how many: at least one, unless the device stops.
fn fill(
    source: &mut impl Read,
    writable: &Segments<'_>,
    is_stopping: &dyn Fn() -> bool,
) -> Result<u32, String> {
    let mut bytes = [0; MOST];
    let room = writable.bytes().min(MOST as u64) as usize;
    if room == 0 {
        return Err("no room for random numbers".to_owned());
    }
    while !is_stopping() {
        match source.read(&mut bytes[..room]) {
            Ok(0) => return Err("the source of random numbers has ended".to_owned()),
            Ok(read) => return Ok(writable.write(&bytes[..read]) as u32),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(PAUSE),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("cannot read random numbers: {error}")),
        }
    }
    Ok(0)
}

impl VirtioBackend for Rng {
    fn kind(&self) -> VirtioKind {
        VirtioKind {
            id: VIRTIO_ID_RNG as u16,
            class: CLASS,
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn start(&self, activation: Activation) {
        self.0.start(activation);
    }

    fn stop(&self) {
        self.0.stop();
    }

    fn is_stopped(&self) -> bool {
        self.0.is_stopped()
    }

    fn wait_stopped(&self, timeout: Duration) -> bool {
        self.0.wait_stopped(timeout)
    }
}

#[cfg(test)]
mod tests {
    use super::super::serve::drain;
    use super::super::signals::Signals;
    use super::super::testing::{Driver, active_queue, ram};
    use super::*;

    const DATA: u64 = 0x8000;

    /// Gives a byte that counts up, after a pause each.
    struct Source(u8, bool);

    impl Read for Source {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.0 += 1;
            bytes[0] = self.0;
            Ok(1)
        }
    }

    /// Serves a driver that asks for these buffers; how many bytes it got, if it kept to the rules.
    fn ask(source: &mut impl Read, buffers: &[(u64, u32, bool)]) -> Option<(u32, Vec<u8>)> {
        let mut driver = Driver::new(ram(), 16);
        driver.offer(buffers);
        let mut queue = active_queue(&Signals::new(1), 0, 16);
        let memory = driver.ram.memory();
        let answer =
            &mut |_: &Segments<'_>, writable: &Segments<'_>| fill(source, writable, &|| false);
        drain(&mut queue, memory, &|| false, answer).ok()?;
        Some((driver.written(), driver.read(DATA, 4)))
    }

    #[test]
    fn a_driver_gets_what_the_source_gives() {
        let mut source = Source(6, false);
        let got = ask(&mut source, &[(DATA, 4, true)]).unwrap();
        assert_eq!(got, (1, vec![7, 0, 0, 0]));
        let all = &mut &[1, 2, 3, 4][..];
        let got = ask(all, &[(DATA, 1, true), (DATA + 2, 8, true)]).unwrap();
        assert_eq!(got, (4, vec![1, 0, 2, 3]));
        let many = &mut io::repeat(9);
        assert_eq!(ask(many, &[(DATA, 1 << 16, true)]).unwrap().0, MOST as u32);
    }

    #[test]
    fn a_request_without_room_and_a_source_that_ends_stop_the_queue() {
        for buffer in [(DATA, 4, false), (DATA, 0, true), (u64::MAX, 4, true)] {
            assert_eq!(ask(&mut io::repeat(9), &[buffer]), None);
        }
        assert_eq!(ask(&mut io::empty(), &[(DATA, 4, true)]), None);
    }
}
