//! The 16550 serial port.

use std::cell::Cell;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{BusDevice, Effect};
use crate::warn_limited;

/// The I/O port of a PC's first serial port, COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// The interrupt line of COM1.
pub const COM1_IRQ: u32 = 4;
/// Number of ports.
pub const LEN: u64 = 8;

/// How long an unfinished line is held back.
const LINE_TIMEOUT: Duration = Duration::from_millis(5);
/// The longest unfinished line, in bytes.
const LONGEST_LINE: usize = 1024;

type Port = Uart<IrqLine, Input, Output>;

/// A serial port, usually the guest's console.
///
/// The thread of the vCPU that ends a line writes the line out. An unfinished line (a prompt) is written
/// after 5 ms: the owner watches [`Self::timer`] and calls [`Self::flush`].
/// Dropping the port flushes it.
pub struct Serial {
    uart: Mutex<Port>,
    irq: Arc<EventFd>,
    timer: Arc<TimerFd>,
    room: Arc<EventFd>,
}

impl Serial {
    /// A port that raises its interrupt through `irq` and writes to `output`, while a vCPU waits: use for
    /// output whose reader may stop a [`BoundedWriter`](crate::bounded_writer::BoundedWriter). Output that fails
    /// is logged and lost.
    ///
    /// # Errors
    /// No file descriptor can be made.
    pub fn new(irq: EventFd, output: Box<dyn Write + Send>) -> io::Result<Self> {
        let timer = Arc::new(TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?);
        let room = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let output = Output {
            sink: output,
            line: Vec::with_capacity(LONGEST_LINE),
            timer: Arc::clone(&timer),
            armed: false,
        };
        let irq = Arc::new(irq);
        Ok(Self {
            uart: Mutex::new(power_on(&irq, &room, output)),
            irq,
            timer,
            room,
        })
    }

    /// Resets the port. Output of the guest is still written; input that the guest has not read is lost, and
    /// [`Self::room`] becomes readable for a waiting sender.
    pub fn reset(&self) {
        let mut uart = self.uart();
        uart.writer_mut().send();
        let nothing = Output {
            sink: Box::new(io::sink()),
            line: Vec::new(),
            timer: Arc::clone(&self.timer),
            armed: false,
        };
        let output = std::mem::replace(uart.writer_mut(), nothing);
        uart.events().in_buffer_empty();
        *uart = power_on(&self.irq, &self.room, output);
    }

    /// Readable when [`Self::flush`] is due.
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Writes out an unfinished line, and makes [`Self::timer`] unreadable.
    pub fn flush(&self) {
        self.uart().writer_mut().send();
    }

    /// Gives the guest as much input as its FIFO takes. Returns the number of bytes. [`Self::room`] becomes
    /// readable when there is room for the rest.
    pub fn enqueue(&self, input: &[u8]) -> usize {
        let mut uart = self.uart();
        let room = uart.fifo_capacity();
        let result = uart.enqueue_raw_bytes(input);
        let taken = room - uart.fifo_capacity();
        let taken = match result {
            // The guest has its port in loopback mode: input from outside is lost.
            Ok(0) => input.len(),
            Ok(_) | Err(vm_superio::serial::Error::FullFifo) => taken,
            Err(error) => {
                warn_limited!(%error, "serial input raised no interrupt");
                taken
            }
        };
        if taken < input.len() {
            uart.events().waiting.set(true);
        }
        taken
    }

    /// Readable after the guest has emptied a FIFO that was too small for [`Self::enqueue`]. The waiting sender
    /// reads it.
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    fn uart(&self) -> MutexGuard<'_, Port> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let mut uart = self.uart();
        // Registers are bytes; a wider access reads each of them in turn.
        for (register, byte) in (offset..LEN).zip(data) {
            *byte = uart.read(register as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let mut uart = self.uart();
        for (register, &byte) in (offset..LEN).zip(data) {
            if let Err(error) = uart.write(register as u8, byte) {
                warn_limited!(%error, "serial port");
            }
        }
        Effect::None
    }
}

/// A UART after power-on.
fn power_on(irq: &Arc<EventFd>, room: &Arc<EventFd>, output: Output) -> Port {
    let input = Input {
        room: Arc::clone(room),
        waiting: Cell::new(false),
    };
    Uart::with_events(IrqLine(Arc::clone(irq)), input, output)
}

/// The interrupt line.
struct IrqLine(Arc<EventFd>);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Reports that the guest has emptied the FIFO.
struct Input {
    room: Arc<EventFd>,
    /// Whether a sender may wait for it: a guest can read an empty port at any rate.
    waiting: Cell<bool>,
}

impl SerialEvents for Input {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        if self.waiting.take() {
            // It fails only when the counter is full: then it is readable already.
            let _ = self.room.write(1);
        }
    }
}

/// Collects the bytes of a line.
struct Output {
    sink: Box<dyn Write + Send>,
    line: Vec<u8>,
    timer: Arc<TimerFd>,
    armed: bool,
}

impl Output {
    fn push(&mut self, byte: u8) {
        self.line.push(byte);
        if byte == b'\n' || self.line.len() >= LONGEST_LINE {
            self.write_out();
        } else if !self.armed {
            self.arm();
        }
    }

    fn send(&mut self) {
        if self.armed {
            // Non-blocking: it fails if the timer has not expired.
            let _ = self.timer.wait();
            self.armed = false;
        }
        self.write_out();
    }

    /// The timer keeps running after a line: it serves the next one, and costs one idle wake-up instead of one
    /// system call a line.
    fn arm(&mut self) {
        let when = Expiration::OneShot(TimeSpec::from_duration(LINE_TIMEOUT));
        match self.timer.set(when, TimerSetTimeFlags::empty()) {
            Ok(()) => self.armed = true,
            Err(_) => self.write_out(),
        }
    }

    fn write_out(&mut self) {
        if self.line.is_empty() {
            return;
        }
        let written = self.sink.write_all(&self.line);
        if let Err(error) = written.and_then(|()| self.sink.flush()) {
            warn_limited!(%error, bytes = self.line.len(), "serial output is lost");
        }
        self.line.clear();
    }
}

/// The UART model writes here, byte by byte. A write never fails: a guest cannot repair an output.
impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        for &byte in data {
            self.push(byte);
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.write_out();
    }
}

#[cfg(test)]
mod tests;
