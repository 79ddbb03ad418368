//! An NVMe controller: brought up, asked for its disk, given queues, shut down.

use std::io;
use std::time::Instant;

use super::super::Subject;
use super::super::dma::PAGE;
use super::super::registers::Registers;
use super::deadline;
use super::queue::{ENTRIES, Place, Queue};
use crate::{Error, Result};

// Registers (NVM Express Base Specification 2.0, section 3.1.3).
const CAPABILITIES: u64 = 0x00;
const CONFIGURATION: u64 = 0x14;
const STATUS: u64 = 0x1c;
const ADMIN_QUEUE_SIZES: u64 = 0x24;
const ADMIN_SUBMISSIONS: u64 = 0x28;
const ADMIN_COMPLETIONS: u64 = 0x30;

// Opcodes of commands to the controller.
const DELETE_SUBMISSIONS: u8 = 0x00;
const CREATE_SUBMISSIONS: u8 = 0x01;
const DELETE_COMPLETIONS: u8 = 0x04;
const CREATE_COMPLETIONS: u8 = 0x05;
const IDENTIFY: u8 = 0x06;
const SET_FEATURES: u8 = 0x09;

/// What [`IDENTIFY`] tells of.
const NAMESPACE: u32 = 0;
const CONTROLLER: u32 = 1;
const ACTIVE_NAMESPACES: u32 = 2;

/// A disk of a controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Its number.
    pub namespace: u32,
    /// How many blocks it has.
    pub blocks: u64,
    /// Bytes of a block.
    pub block_size: u32,
}

/// A controller that is up.
pub struct Controller<'a> {
    subject: &'a Subject<'a>,
    registers: &'a Registers,
    place: Place<'a>,
    admin: Queue<'a>,
    /// The largest transfer.
    longest: u32,
}

/// BAR0 of a controller.
pub struct Bar(Registers);

impl Bar {
    /// Maps it.
    ///
    /// # Errors
    /// It cannot be mapped.
    pub fn map(subject: &Subject<'_>) -> Result<Self> {
        let registers = Registers::map(subject.io, 0)?;
        registers
            .map(Self)
            .ok_or_else(|| subject.unusable("its BAR0 cannot be mapped"))
    }
}

impl<'a> Controller<'a> {
    /// Brings a controller up, with a queue for commands to it.
    ///
    /// # Errors
    /// It does not become ready, or has no memory for its queue.
    pub fn start(subject: &'a Subject<'a>, bar: &'a Bar) -> Result<Self> {
        let registers = &bar.0;
        let capabilities: u64 = registers.read(CAPABILITIES).unwrap_or_default();
        let place = Place {
            name: subject.io.name(),
            registers,
            memory: subject.memory,
            stride: 4 << (capabilities >> 32 & 0xf),
        };
        if capabilities & 0xffff < u64::from(ENTRIES) - 1 {
            return Err(subject.unusable("its queues are shorter than 128 entries"));
        }
        let admin =
            Queue::new(place, 0, 0).ok_or_else(|| subject.unusable("no memory for its queues"))?;
        let mut controller = Self {
            subject,
            registers,
            place,
            admin,
            longest: PAGE as u32,
        };
        controller.enable(false)?;
        let last = u32::from(ENTRIES) - 1;
        registers.write(ADMIN_QUEUE_SIZES, last << 16 | last);
        registers.write(ADMIN_SUBMISSIONS, controller.admin.submissions.address);
        registers.write(ADMIN_COMPLETIONS, controller.admin.completions.address);
        controller.enable(true)?;
        let answer = controller.identify(CONTROLLER, 0)?;
        // As a power of two of pages; 0 is no limit.
        let power = answer(77 / 4) >> 8 & 0xff;
        controller.longest = match power {
            0 | 10.. => u32::MAX,
            power => (PAGE as u32) << power,
        };
        // One pair of queues beside.
        let mut command = controller.admin.command(SET_FEATURES, 0, (0, 0));
        command[10] = 0x07;
        controller.admin.submit(command);
        controller.admin.wait()?;
        Ok(controller)
    }

    /// The most bytes of a transfer.
    pub fn longest(&self) -> u32 {
        self.longest
    }

    /// The first disk.
    ///
    /// # Errors
    /// There is none, or its blocks are larger than a small read.
    pub fn disk(&mut self) -> Result<Disk> {
        let namespace = self.identify(ACTIVE_NAMESPACES, 0)?(0);
        if namespace == 0 {
            return Err(self.subject.unusable("it has no disk"));
        }
        let answer = self.identify(NAMESPACE, namespace)?;
        let blocks = u64::from(answer(1)) << 32 | u64::from(answer(0));
        // Which of the formats from byte 128 on it has.
        let format = answer(26 / 4) >> 16 & 0xf;
        let power = answer(32 + format as usize) >> 16 & 0xff;
        if !(9..=12).contains(&power) {
            return Err(self
                .subject
                .unusable(format!("its blocks have 2^{power} bytes")));
        }
        Ok(Disk {
            namespace,
            blocks,
            block_size: 1 << power,
        })
    }

    /// Makes a pair of queues for reads; with `interrupt`, completions raise vector 0.
    ///
    /// # Errors
    /// The controller refuses.
    pub fn queue(&mut self, interrupt: bool) -> Result<Queue<'a>> {
        // Behind the admin queue and the page of its answers.
        let queue = Queue::new(self.place, 1, self.admin.data() + 1);
        let queue = queue.ok_or_else(|| self.subject.unusable("no memory for its queues"))?;
        let size = (u32::from(ENTRIES) - 1) << 16 | u32::from(queue.id);
        let contiguous = 1;
        let mut command = self
            .admin
            .command(CREATE_COMPLETIONS, 0, (queue.completions.address, 0));
        command[10] = size;
        command[11] = contiguous | u32::from(interrupt) << 1;
        self.ask(command)?;
        let mut command = self
            .admin
            .command(CREATE_SUBMISSIONS, 0, (queue.submissions.address, 0));
        command[10] = size;
        command[11] = contiguous | u32::from(queue.id) << 16;
        self.ask(command)?;
        Ok(queue)
    }

    /// Removes a pair of queues.
    ///
    /// # Errors
    /// The controller refuses.
    pub fn remove(&mut self, queue: Queue<'_>) -> Result<()> {
        for opcode in [DELETE_SUBMISSIONS, DELETE_COMPLETIONS] {
            let mut command = self.admin.command(opcode, 0, (0, 0));
            command[10] = u32::from(queue.id);
            self.ask(command)?;
        }
        Ok(())
    }

    /// Has the controller access memory no more.
    ///
    /// # Errors
    /// It does not stop.
    pub fn stop(self) -> Result<()> {
        self.enable(false)
    }

    /// Asks what a thing is; the words of the answer, by their index.
    fn identify(&mut self, what: u32, namespace: u32) -> Result<impl Fn(usize) -> u32 + use<'a>> {
        let page = self.admin.data();
        let memory = self.subject.memory;
        let mut command = self
            .admin
            .command(IDENTIFY, namespace, (memory.address(page), 0));
        command[10] = what;
        self.ask(command)?;
        Ok(move |word: usize| memory.read32(page * PAGE + word * 4))
    }

    fn ask(&mut self, command: [u32; 16]) -> Result<()> {
        self.admin.submit(command);
        self.admin.wait().map(drop)
    }

    /// Switches the controller on or off, and waits until it is.
    fn enable(&self, on: bool) -> Result<()> {
        // Entries of 64 and 16 bytes, as powers of two.
        let sizes = 4 << 20 | 6 << 16;
        self.registers.write(CONFIGURATION, sizes | u32::from(on));
        let until = deadline();
        loop {
            let status: u32 = self.registers.read(STATUS).unwrap_or(u32::MAX);
            if status & 1 == u32::from(on) {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(Error::Device {
                    device: self.subject.io.name().to_owned(),
                    place: "starting or stopping the NVMe controller".to_owned(),
                    source: io::ErrorKind::TimedOut.into(),
                });
            }
            std::thread::yield_now();
        }
    }
}
