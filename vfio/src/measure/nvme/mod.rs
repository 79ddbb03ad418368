//! NVMe disks, read by a driver of a few queues: latency one at a time, with and without interrupts, and rates by
//! depth. Nothing is written to them.

mod controller;
mod queue;

use std::time::Instant;

use super::clock::{latency_after, rate};
use super::interrupt::Interrupt;
use super::{NOT_CONNECTED, Sink, Subject, Unit, figure, lacking};
use crate::Result;
use controller::{Bar, Controller, Disk};
use queue::Queue;

/// Depths at which small reads are counted.
const DEPTHS: [usize; 4] = [1, 4, 16, 64];
/// Bytes of a small read.
const SMALL: u32 = 4 << 10;
/// Bytes of a large read, and how many are under way.
const LARGE: (u32, usize) = (128 << 10, 4);
/// The fewest reads that are timed.
const FEWEST: usize = 10;

/// Runs the tests.
///
/// # Errors
/// The controller does not come up, or a read fails.
pub fn measure(subject: &Subject<'_>, sink: &mut Sink<'_>) -> Result<()> {
    let interrupt = Interrupt::connect(subject)?;
    let bar = Bar::map(subject)?;
    let mut controller = Controller::start(subject, &bar)?;
    let disk = controller.disk()?;
    polled(subject, &mut controller, disk, sink)?;
    match &interrupt {
        Some(interrupt) => interrupted(subject, &mut controller, disk, interrupt, sink)?,
        None => lacking("interrupt", NOT_CONNECTED, sink),
    }
    controller.stop()
}

fn polled(
    subject: &Subject<'_>,
    controller: &mut Controller<'_>,
    disk: Disk,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let time = subject.per_test;
    let mut queue = controller.queue(false)?;
    let mut reads = Reads::new(disk, SMALL);
    let samples = latency_after(
        time,
        FEWEST,
        || Ok(()),
        || {
            queue.read(0, reads.next())?;
            queue.wait().map(drop)
        },
    )?;
    figure(
        "read 4 KiB, depth 1, polled",
        Unit::Nanoseconds,
        samples,
        sink,
    );
    for depth in DEPTHS {
        let samples = rate(time, || many(&mut queue, &mut reads, depth))?;
        figure(
            format!("read 4 KiB, depth {depth}"),
            Unit::PerSecond,
            samples,
            sink,
        );
    }
    let (bytes, depth) = LARGE;
    let bytes = bytes.min(controller.longest());
    let mut reads = Reads::new(disk, bytes);
    let samples = rate(time, || {
        Ok(many(&mut queue, &mut reads, depth)? * u64::from(bytes))
    })?;
    let test = format!("read {} KiB, depth {depth}", bytes >> 10);
    figure(test, Unit::BytesPerSecond, samples, sink);
    controller.remove(queue)
}

/// The same read as [`polled`] has, but the thread sleeps until the interrupt; and what the interrupt alone takes, from
/// when the completion is in memory.
fn interrupted(
    subject: &Subject<'_>,
    controller: &mut Controller<'_>,
    disk: Disk,
    interrupt: &Interrupt<'_>,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let mut queue = controller.queue(true)?;
    let mut reads = Reads::new(disk, SMALL);
    let samples = latency_after(
        subject.per_test,
        FEWEST,
        || {
            interrupt.clear();
            Ok(())
        },
        || {
            queue.read(0, reads.next())?;
            interrupt.wait()?;
            queue.wait().map(drop)
        },
    )?;
    let test = format!("read 4 KiB, depth 1, {}", interrupt.kind());
    figure(test, Unit::Nanoseconds, samples, sink);
    let samples = latency_after(
        subject.per_test,
        FEWEST,
        || {
            interrupt.clear();
            queue.read(0, reads.next())?;
            queue.wait().map(drop)
        },
        || interrupt.wait(),
    )?;
    let test = format!("interrupt by {}", interrupt.kind());
    figure(test, Unit::Nanoseconds, samples, sink);
    controller.remove(queue)
}

/// Keeps `depth` reads under way, until each place of the queue has been used twice. Returns how many are done.
fn many(queue: &mut Queue<'_>, reads: &mut Reads, depth: usize) -> Result<u64> {
    let rounds = depth * 2;
    (0..depth).try_for_each(|slot| queue.read(slot, reads.next()))?;
    for _ in depth..rounds {
        let slot = queue.wait()?;
        queue.read(slot, reads.next())?;
    }
    (0..depth).try_for_each(|_| queue.wait().map(drop))?;
    Ok(rounds as u64)
}

/// Where the reads of a test go: blocks in an order that no cache foresees, the same in each round.
struct Reads {
    disk: Disk,
    bytes: u32,
    state: u64,
}

/// A read of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Read {
    /// The disk.
    disk: Disk,
    /// The first block.
    block: u64,
    /// Bytes.
    bytes: u32,
}

impl Reads {
    fn new(disk: Disk, bytes: u32) -> Self {
        Self {
            disk,
            bytes,
            state: 0x9e37_79b9_7f4a_7c15,
        }
    }

    fn next(&mut self) -> Read {
        // xorshift64
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let blocks = u64::from(self.bytes / self.disk.block_size).max(1);
        let places = (self.disk.blocks / blocks).max(1);
        Read {
            disk: self.disk,
            block: self.state % places * blocks,
            bytes: self.bytes,
        }
    }
}

/// A moment by which the device must have answered.
fn deadline() -> Instant {
    Instant::now() + std::time::Duration::from_secs(5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_stay_inside_the_disk_and_are_aligned() {
        let disk = Disk {
            namespace: 1,
            blocks: 1001,
            block_size: 512,
        };
        let mut reads = Reads::new(disk, 4096);
        for _ in 0..1000 {
            let read = reads.next();
            assert!(read.block + 8 <= disk.blocks && read.block.is_multiple_of(8));
        }
        let mut again = Reads::new(disk, 4096);
        let mut first = Reads::new(disk, 4096);
        assert_eq!(again.next(), first.next());
    }
}
