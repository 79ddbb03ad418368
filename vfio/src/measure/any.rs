//! What every device has: configuration space, registers, memory behind BARs, a reset.

use std::time::Instant;

use super::clock::{latency, latency_after, rate};
use super::registers::{Registers, Word};
use super::{Kind, Sink, Subject, Unit, figure, lacking};
use crate::Result;
use crate::host::Region;

/// Writes that follow each other before a read waits for them.
const BATCH: u64 = 64;
/// Bytes of a BAR that its bandwidth is measured with.
const SPAN: u64 = 64 << 10;
/// The fewest resets that are timed: each takes a tenth of a second.
const RESETS: usize = 3;

/// A register that reads without an effect, and one that takes its own value without one.
struct Harmless {
    bar: u8,
    read: u64,
    write: Option<u64>,
}

/// Runs the tests that need no reset.
///
/// # Errors
/// The configuration space cannot be read, or a BAR cannot be mapped.
pub fn measure(subject: &Subject<'_>, kind: Kind, sink: &mut Sink<'_>) -> Result<()> {
    let time = subject.per_test;
    // What the other figures contain of the clock itself.
    let samples = latency(time / 4, || {
        std::hint::black_box(Instant::now());
        Ok(())
    })?;
    figure("clock", Unit::Nanoseconds, samples, sink);
    let mut word = [0; 4];
    let samples = latency(time, || subject.io.read(Region::CONFIG, 0, &mut word))?;
    figure("config read 4 B", Unit::Nanoseconds, samples, sink);

    let memory = memory_bar(subject)?;
    match harmless(subject, kind, memory) {
        Some(place) => registers(subject, &place, sink)?,
        None => lacking("MMIO read 4 B", "none of its BARs can be mapped", sink),
    }
    match memory {
        Some(bar) => bandwidth(subject, bar, sink),
        None => Ok(()),
    }
}

/// The first BAR of prefetchable memory that can be mapped: reads of it have no effect, and writes only that of memory.
fn memory_bar(subject: &Subject<'_>) -> Result<Option<u8>> {
    const BARS: u64 = 0x10;
    const PREFETCHABLE: u8 = 0b1000;
    const IO_PORTS: u8 = 0b1;
    let mut bar = 0;
    while bar < 6 {
        let [low, ..] = subject.config::<4>(BARS + u64::from(bar) * 4)?;
        let is_memory = low & (PREFETCHABLE | IO_PORTS) == PREFETCHABLE;
        if is_memory && mappable(subject, bar) {
            return Ok(Some(bar));
        }
        // One of 64 bits takes two registers.
        bar += if low & 0b111 == 0b100 { 2 } else { 1 };
    }
    Ok(None)
}

fn mappable(subject: &Subject<'_>, bar: u8) -> bool {
    let first = Region::bar(bar).and_then(|region| subject.io.region(region).areas.first());
    first.is_some_and(|area| area.offset == 0)
}

/// Where MMIO is measured. Of a device of which nothing else is known it is the begin of a BAR, which is only read,
/// unless it is memory.
fn harmless(subject: &Subject<'_>, kind: Kind, memory: Option<u8>) -> Option<Harmless> {
    let at = |bar, read, write| Some(Harmless { bar, read, write });
    match (kind, memory) {
        // Version; Controller Configuration.
        (Kind::Nvme, _) => at(0, 0x8, Some(0x14)),
        // Identification; liveness check.
        (Kind::Edu, _) => at(0, 0x0, Some(0x4)),
        (_, Some(bar)) => at(bar, 0, Some(0)),
        // Device status, where it is one of Intel's.
        (Kind::Nic, None) if mappable(subject, 0) => at(0, 0x8, None),
        (_, None) => {
            let bar = (0..6).find(|bar| mappable(subject, *bar))?;
            at(bar, 0, None)
        }
    }
}

fn registers(subject: &Subject<'_>, place: &Harmless, sink: &mut Sink<'_>) -> Result<()> {
    let bar = place.bar;
    let Some(registers) = Registers::map(subject.io, bar)? else {
        lacking("MMIO read 4 B", format!("BAR{bar} cannot be mapped"), sink);
        return Ok(());
    };
    let read = |at| std::hint::black_box(registers.read::<u32>(at)).unwrap_or_default();
    let samples = latency(subject.per_test, || {
        read(place.read);
        Ok(())
    })?;
    figure("MMIO read 4 B", Unit::Nanoseconds, samples, sink);
    let Some(write) = place.write else {
        let why = "no register is known that may be written";
        lacking("MMIO write 4 B", why, sink);
        return Ok(());
    };
    let value = read(write);
    let samples = rate(subject.per_test, || {
        (0..BATCH).for_each(|_| registers.write(write, value));
        // Writes are posted: a read returns once the device has them.
        read(place.read);
        Ok(BATCH)
    })?;
    figure("MMIO write 4 B", Unit::PerSecond, samples, sink);
    Ok(())
}

/// Bandwidth of memory behind a BAR, by the width of the accesses. It is written with what it holds.
fn bandwidth(subject: &Subject<'_>, bar: u8, sink: &mut Sink<'_>) -> Result<()> {
    let Some(memory) = Registers::map(subject.io, bar)? else {
        return Ok(());
    };
    reads::<u8>(subject, &memory, bar, sink)?;
    reads::<u16>(subject, &memory, bar, sink)?;
    reads::<u32>(subject, &memory, bar, sink)?;
    reads::<u64>(subject, &memory, bar, sink)?;
    let span = memory.len().min(SPAN);
    let held: Vec<u64> = words::<u64>(span)
        .filter_map(|at| memory.read(at))
        .collect();
    let samples = rate(subject.per_test, || {
        words::<u64>(span)
            .zip(&held)
            .for_each(|(at, word)| memory.write(at, *word));
        std::hint::black_box(memory.read::<u32>(0));
        Ok(span)
    })?;
    let test = format!("BAR{bar} write by 8 B");
    figure(test, Unit::BytesPerSecond, samples, sink);
    Ok(())
}

fn reads<T: Word>(
    subject: &Subject<'_>,
    memory: &Registers,
    bar: u8,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let span = memory.len().min(SPAN);
    let samples = rate(subject.per_test, || {
        for at in words::<T>(span) {
            std::hint::black_box(memory.read::<T>(at));
        }
        Ok(span)
    })?;
    let test = format!("BAR{bar} read by {} B", size_of::<T>());
    figure(test, Unit::BytesPerSecond, samples, sink);
    Ok(())
}

/// The offsets of the words of a span.
fn words<T>(span: u64) -> impl Iterator<Item = u64> {
    (0..span).step_by(size_of::<T>())
}

/// Times the device's own reset.
///
/// # Errors
/// It fails.
pub fn reset(subject: &Subject<'_>, sink: &mut Sink<'_>) -> Result<()> {
    match latency_after(subject.per_test, RESETS, || Ok(()), || subject.io.reset()) {
        Ok(samples) => figure("reset", Unit::Nanoseconds, samples, sink),
        Err(error) if error.is_unsupported() => {
            lacking(
                "reset",
                "it has no reset of its own, or must not be reset",
                sink,
            );
        }
        Err(error) => return Err(error),
    }
    Ok(())
}
