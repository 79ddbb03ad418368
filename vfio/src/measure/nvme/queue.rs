//! A pair of an NVMe submission and completion queue (NVM Express Base Specification 2.0, sections 3.3 and 4).

use std::io;
use std::time::Instant;

use super::super::dma::{DmaPages, PAGE, Run};
use super::super::registers::Registers;
use super::{Read, deadline};
use crate::{Error, Result};

/// Entries of a queue: one more than the greatest depth, and a power of two.
pub const ENTRIES: u16 = 128;
/// Bytes of a submission, and of a completion.
const SUBMISSION: usize = 64;
const COMPLETION: usize = 16;
/// Pages of each queue.
const SUBMISSION_PAGES: usize = ENTRIES as usize * SUBMISSION / PAGE;
const COMPLETION_PAGES: usize = 1;
/// How many polls of a completion go by before the clock is asked.
const SPINS: u32 = 1000;

/// A command's 16 words.
pub type Command = [u32; 16];

/// A pair of queues, whose completions are polled for.
pub struct Queue<'a> {
    name: &'a str,
    registers: &'a Registers,
    memory: &'a DmaPages,
    doorbells: (u64, u64),
    /// Number of the pair; 0 is for commands to the controller.
    pub id: u16,
    /// Where the submissions are.
    pub submissions: Run,
    /// Where the completions are.
    pub completions: Run,
    /// The pages for data: so many behind each other for each slot.
    data: usize,
    tail: u16,
    head: u16,
    phase: bool,
}

/// What queues need of their controller.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// The device's name.
    pub name: &'a str,
    /// BAR0.
    pub registers: &'a Registers,
    /// Memory of the device.
    pub memory: &'a DmaPages,
    /// Bytes from doorbell to doorbell.
    pub stride: u64,
}

impl<'a> Queue<'a> {
    /// A pair whose memory begins at a page; `None` if there is too little memory.
    pub fn new(place: Place<'a>, id: u16, page: usize) -> Option<Self> {
        let submissions = place.memory.run(page, SUBMISSION_PAGES)?;
        let completions = place
            .memory
            .run(submissions.page + SUBMISSION_PAGES, COMPLETION_PAGES)?;
        let first = completions.page + COMPLETION_PAGES;
        for page in submissions.page..first {
            let words = (page * PAGE..(page + 1) * PAGE).step_by(4);
            words.for_each(|at| place.memory.write32(at, 0));
        }
        let doorbell = |index| 0x1000 + index * place.stride;
        Some(Self {
            name: place.name,
            registers: place.registers,
            memory: place.memory,
            doorbells: (doorbell(2 * u64::from(id)), doorbell(2 * u64::from(id) + 1)),
            id,
            submissions,
            completions,
            data: first,
            tail: 0,
            head: 0,
            phase: true,
        })
    }

    /// The first page for data.
    pub fn data(&self) -> usize {
        self.data
    }

    /// Begins a read into the pages of a slot.
    ///
    /// # Errors
    /// The memory has no such slot.
    pub fn read(&mut self, slot: usize, read: Read) -> Result<()> {
        let pages = (read.bytes as usize).div_ceil(PAGE);
        // The list of the pages behind the first, then the pages.
        let list = self.data + slot * (pages + usize::from(pages > 2));
        let first = list + usize::from(pages > 2);
        if self.memory.address(first + pages - 1) == 0 {
            return Err(self.failed("finding memory for a read", io::ErrorKind::OutOfMemory));
        }
        let second = match pages {
            1 => 0,
            2 => self.memory.address(first + 1),
            _ => self.list(list, first + 1, pages - 1),
        };
        let blocks = read.bytes / read.disk.block_size;
        let mut command =
            self.command(2, read.disk.namespace, (self.memory.address(first), second));
        command[0] |= (slot as u32) << 16;
        [command[10], command[11]] = halves(read.block);
        command[12] = blocks.saturating_sub(1);
        self.submit(command);
        Ok(())
    }

    /// A command with an opcode, a namespace and the addresses of its data.
    pub fn command(&self, opcode: u8, namespace: u32, data: (u64, u64)) -> Command {
        let mut command = [0; 16];
        command[0] = u32::from(opcode);
        command[1] = namespace;
        [command[6], command[7]] = halves(data.0);
        [command[8], command[9]] = halves(data.1);
        command
    }

    /// Gives a command to the controller.
    pub fn submit(&mut self, command: Command) {
        let at = self.submissions.page * PAGE + usize::from(self.tail) * SUBMISSION;
        for (index, word) in command.into_iter().enumerate() {
            self.memory.write32(at + index * 4, word);
        }
        self.tail = (self.tail + 1) % ENTRIES;
        // The device must not see the doorbell before the command.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.registers.write(self.doorbells.0, u32::from(self.tail));
    }

    /// Waits for the next completion. Returns its command's slot.
    ///
    /// # Errors
    /// The command failed, or none completes.
    pub fn wait(&mut self) -> Result<usize> {
        let at = self.completions.page * PAGE + usize::from(self.head) * COMPLETION;
        let until = deadline();
        let mut spins = 0u32;
        let word = loop {
            let word = self.memory.read32(at + 12);
            if (word >> 16 & 1 != 0) == self.phase {
                break word;
            }
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(SPINS) && Instant::now() > until {
                return Err(self.failed("waiting for a completion", io::ErrorKind::TimedOut));
            }
            std::hint::spin_loop();
        };
        self.head = (self.head + 1) % ENTRIES;
        self.phase ^= self.head == 0;
        self.registers.write(self.doorbells.1, u32::from(self.head));
        match word >> 17 & 0x7fff {
            0 => Ok((word & 0xffff) as usize),
            status => {
                let what = format!("a command ended with status {status:#x}");
                Err(self.failed("an NVMe command", io::Error::other(what)))
            }
        }
    }

    /// Writes the addresses of pages into a page; its address.
    fn list(&self, page: usize, first: usize, count: usize) -> u64 {
        for index in 0..count {
            let [low, high] = halves(self.memory.address(first + index));
            self.memory.write32(page * PAGE + index * 8, low);
            self.memory.write32(page * PAGE + index * 8 + 4, high);
        }
        self.memory.address(page)
    }

    fn failed(&self, place: &str, source: impl Into<io::Error>) -> Error {
        Error::Device {
            device: self.name.to_owned(),
            place: place.to_owned(),
            source: source.into(),
        }
    }
}

/// The low and the high half.
fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}
