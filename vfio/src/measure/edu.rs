//! QEMU's device for teaching (docs/specs/edu.rst): how long an interrupt takes.

use super::clock::latency_after;
use super::interrupt::Interrupt;
use super::registers::Registers;
use super::{NOT_CONNECTED, Sink, Subject, Unit, figure};
use crate::Result;

/// Interrupts that are raised and not acknowledged.
const STATUS: u64 = 0x24;
/// The fewest interrupts that are timed.
const FEWEST: usize = 10;
/// Raises the interrupts that are written to it.
const RAISE: u64 = 0x60;
/// Acknowledges the interrupts that are written to it.
const ACKNOWLEDGE: u64 = 0x64;

/// Measures from the write that raises an interrupt to the return of the call that waits for it.
pub fn measure(subject: &Subject<'_>, sink: &mut Sink<'_>) -> Result<()> {
    let registers = Registers::map(subject.io, 0)?;
    let registers = registers.ok_or_else(|| subject.unusable("its BAR0 cannot be mapped"))?;
    let interrupt = Interrupt::connect(subject)?;
    let interrupt = interrupt.ok_or_else(|| subject.unusable(NOT_CONNECTED))?;
    let acknowledge = || {
        let raised = registers.read::<u32>(STATUS).unwrap_or_default();
        registers.write(ACKNOWLEDGE, raised);
        Ok(())
    };
    let samples = latency_after(subject.per_test, FEWEST, acknowledge, || {
        registers.write(RAISE, 1u32);
        interrupt.wait()
    })?;
    acknowledge()?;
    let test = format!("interrupt by {}", interrupt.kind());
    figure(test, Unit::Nanoseconds, samples, sink);
    Ok(())
}
