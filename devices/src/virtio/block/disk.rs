//! What a disk holds: a file or block device, accessed at offsets and straight from guest RAM, or bytes in memory.
#![allow(unsafe_code)] // preadv2 and pwritev2 on guest RAM.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, TryLockError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::super::Segments;
use super::direct;
use super::vectors::Vectors;

/// Bytes of a sector, the unit of all offsets and lengths (section 5.2).
pub const SECTOR: u64 = 512;

/// An open disk. Only this process writes to it.
#[derive(Debug)]
pub struct Disk {
    contents: Contents,
    len: AtomicU64,
    /// Held by the one that changes the length.
    resizing: Mutex<()>,
    block_size: u32,
    read_only: bool,
    /// What accesses past the host's page cache must be multiples of; `None` if they go through it.
    direct: Option<usize>,
    counters: Counters,
}

/// What a disk did so far.
#[derive(Debug, Default)]
struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    write_bytes: AtomicU64,
    flushes: AtomicU64,
    errors: AtomicU64,
}

#[derive(Debug)]
enum Contents {
    File(File),
    /// Of a disk that is read-only.
    Memory(Box<[u8]>),
}

/// Why a disk does not change its size, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// It has no file.
    #[error("it has no file that could grow")]
    NoFile,
    /// The size is no number of blocks.
    #[error("use a multiple of {0} bytes")]
    Blocks(u32),
    /// It would lose what is at its end.
    #[error(
        "it has {len} bytes, and the guest may use all of them: end the VM to make the disk smaller"
    )]
    Smaller {
        /// Its size.
        len: u64,
    },
    /// Its file is only read.
    #[error("it is read-only, and its file has {len} bytes: make the file larger first")]
    ReadOnly {
        /// The size of the file.
        len: u64,
    },
    /// The block device is smaller.
    #[error("the block device has {len} bytes: make it larger first")]
    Device {
        /// Its size.
        len: u64,
    },
    /// Another resize of it is under way.
    #[error("another resize of it is under way: try again once that has ended")]
    Busy,
    /// No thread can be made for it.
    #[error("cannot start a thread to resize it: {0}")]
    Thread(#[source] io::Error),
    /// The kernel refused.
    #[error("its file cannot be made larger: {0}")]
    Io(#[from] io::Error),
}

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// From the disk into guest RAM.
    Read,
    /// From guest RAM to the disk; the disk has them for good before the call returns if `durable`.
    Write { durable: bool },
}

/// What is done with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Move bytes.
    Move(Transfer),
    /// Have the disk keep for good what was written before.
    Flush,
}

impl Disk {
    /// The first `len` bytes of `file`, a multiple of [`SECTOR`], whose blocks have `block_size` bytes.
    pub fn new(file: File, len: u64, block_size: u32, read_only: bool) -> Self {
        Self {
            contents: Contents::File(file),
            len: AtomicU64::new(len / SECTOR * SECTOR),
            resizing: Mutex::default(),
            block_size,
            read_only,
            direct: None,
            counters: Counters::default(),
        }
    }

    /// A read-only disk of these bytes, as far as they are whole sectors.
    pub fn of_bytes(bytes: impl Into<Box<[u8]>>) -> Self {
        let bytes = bytes.into();
        Self {
            len: AtomicU64::new(bytes.len() as u64 / SECTOR * SECTOR),
            resizing: Mutex::default(),
            contents: Contents::Memory(bytes),
            block_size: SECTOR as u32,
            read_only: true,
            direct: None,
            counters: Counters::default(),
        }
    }

    /// The same disk, accessed past the host's page cache.
    ///
    /// # Errors
    /// Its file system has no such accesses, or the disk is no number of the blocks that they need.
    pub fn past_the_cache(self) -> io::Result<Self> {
        let alignment = direct::bypass_cache(self.file()?)?;
        if !self.len().is_multiple_of(alignment as u64) {
            let what = format!("its length is no multiple of {alignment} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        Ok(Self {
            block_size: self.block_size.max(alignment as u32),
            direct: Some(alignment),
            ..self
        })
    }

    /// Whether the kernel takes these buffers as they are.
    pub fn takes(&self, vectors: &Vectors) -> bool {
        self.direct
            .is_none_or(|alignment| vectors.are_aligned(alignment))
    }

    /// Counts a request, and passes its result on.
    pub fn count<T>(
        &self,
        operation: Operation,
        bytes: u64,
        result: io::Result<T>,
    ) -> io::Result<T> {
        let counters = &self.counters;
        let (requests, moved) = match operation {
            Operation::Move(Transfer::Read) => (&counters.reads, &counters.read_bytes),
            Operation::Move(Transfer::Write { .. }) => (&counters.writes, &counters.write_bytes),
            Operation::Flush => (&counters.flushes, &counters.write_bytes),
        };
        match &result {
            Ok(_) => {
                requests.fetch_add(1, Ordering::Relaxed);
                moved.fetch_add(bytes, Ordering::Relaxed);
            }
            Err(_) => drop(counters.errors.fetch_add(1, Ordering::Relaxed)),
        }
        result
    }

    /// What it did so far, by name.
    pub fn counters(&self) -> [(&'static str, u64); 6] {
        let Counters {
            reads,
            read_bytes,
            writes,
            write_bytes,
            flushes,
            errors,
        } = &self.counters;
        [
            ("read_ops", reads),
            ("read_bytes", read_bytes),
            ("write_ops", writes),
            ("write_bytes", write_bytes),
            ("flush_ops", flushes),
            ("failed_ops", errors),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }

    /// The file, which every disk has that can be written.
    pub fn file(&self) -> nix::Result<&File> {
        match &self.contents {
            Contents::File(file) => Ok(file),
            Contents::Memory(_) => Err(Errno::EROFS),
        }
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Makes the disk larger: its file too, if that is smaller. A block device must have grown before.
    ///
    /// # Errors
    /// The size makes no sense, or the file cannot have it. The disk stays as it is.
    pub fn resize(&self, bytes: u64) -> Result<(), ResizeError> {
        let _resizing = match self.resizing.try_lock() {
            Ok(resizing) => resizing,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(ResizeError::Busy),
        };
        let len = self.len();
        let mut file = self.file().map_err(|_| ResizeError::NoFile)?;
        if !bytes.is_multiple_of(u64::from(self.block_size)) {
            return Err(ResizeError::Blocks(self.block_size));
        }
        if bytes < len {
            return Err(ResizeError::Smaller { len });
        }
        let there = file.seek(SeekFrom::End(0))?;
        match file.metadata()?.is_file() {
            _ if bytes <= there => {}
            true if self.read_only => return Err(ResizeError::ReadOnly { len: there }),
            // By a write: the file was opened without the right to truncate it.
            true => {
                let block = u64::from(self.block_size);
                self.write_zeros(bytes - block, block)?;
            }
            false => return Err(ResizeError::Device { len: there }),
        }
        self.len.store(bytes, Ordering::Release);
        Ok(())
    }

    /// Its size in sectors.
    pub fn sectors(&self) -> u64 {
        self.len() / SECTOR
    }

    /// Bytes of a block: accesses of less cost the disk more.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether it cannot be written.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The offset of a range, if all of the range lies on the disk.
    pub fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (end <= self.len()).then_some(offset)
    }

    /// Moves bytes between the disk from `offset` on and all of `segments`.
    ///
    /// # Errors
    /// The disk fails, or ends early.
    pub fn transfer(
        &self,
        how: Transfer,
        offset: u64,
        segments: &Segments<'_>,
        is_stopping: impl Fn() -> bool,
    ) -> io::Result<()> {
        if let (Contents::Memory(bytes), Transfer::Read) = (&self.contents, how) {
            return read_memory(bytes, offset, segments);
        }
        let file = self.file()?;
        let mut vectors = Vectors::new(segments, offset);
        if let Some(alignment) = self.direct.filter(|_| !self.takes(&vectors)) {
            return match how {
                Transfer::Read => direct::read(file, alignment, offset, segments, is_stopping),
                Transfer::Write { durable } => {
                    let (range, mut rest) = ((offset, segments.bytes()), segments.clone());
                    direct::write(file, alignment, range, is_stopping, |bytes| {
                        let piece = rest.take_front(bytes.len() as u64);
                        piece.map(|piece| piece.read(bytes));
                    })?;
                    if durable { self.flush() } else { Ok(()) }
                }
            };
        }
        while !vectors.is_done() {
            if is_stopping() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let at = vectors.offset();
            let moved = once(file, how, at, vectors.front());
            vectors.moved(moved)?;
        }
        Ok(())
    }

    /// Has the disk keep for good what was written before.
    ///
    /// # Errors
    /// The disk fails.
    pub fn flush(&self) -> io::Result<()> {
        match &self.contents {
            Contents::File(file) => file.sync_data(),
            Contents::Memory(_) => Ok(()),
        }
    }

    /// Gives the space of a range back, where the file system or device can do that.
    ///
    /// # Errors
    /// The disk fails.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self.allocate(punch, offset, len) {
            // A hint that nobody can follow, or not for less than a block.
            Err(Errno::EOPNOTSUPP | Errno::EINVAL) => Ok(()),
            done => Ok(done?),
        }
    }

    /// Makes a range read as zeros. Its space may be given back if `unmap`.
    ///
    /// # Errors
    /// The disk fails.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE | keep;
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep;
        let first = match unmap {
            true => punch,
            false => zero,
        };
        match self.allocate(first, offset, len) {
            Err(Errno::EOPNOTSUPP | Errno::EINVAL) => self.write_zeros(offset, len),
            done => Ok(done?),
        }
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let alignment = self.direct.unwrap_or(1);
        let zero = |bytes: &mut [u8]| bytes.fill(0);
        direct::write(self.file()?, alignment, (offset, len), || false, zero)
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> nix::Result<()> {
        let signed = |value: u64| libc::off_t::try_from(value).map_err(|_| Errno::EFBIG);
        let (offset, len) = (signed(offset)?, signed(len)?);
        let file = self.file()?;
        loop {
            match fallocate(file, flags, offset, len) {
                Err(Errno::EINTR) => {}
                done => return done,
            }
        }
    }
}

/// Copies what is at `offset` to the segments.
fn read_memory(bytes: &[u8], offset: u64, segments: &Segments<'_>) -> io::Result<()> {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| bytes.get(offset..));
    let mut rest = rest.ok_or(io::ErrorKind::UnexpectedEof)?;
    for slice in segments.slices() {
        let (here, after) = rest
            .split_at_checked(slice.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        slice.copy_from(here);
        rest = after;
    }
    Ok(())
}

fn once(file: &File, how: Transfer, offset: u64, vectors: &[libc::iovec]) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    let count = vectors.len() as libc::c_int;
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let moved = match how {
        // SAFETY: each vector lies in guest RAM, which the caller's segments keep mapped during the call and which
        // nobody in this process has references to.
        Transfer::Read => unsafe { libc::preadv2(fd, vectors.as_ptr(), count, offset, 0) },
        Transfer::Write { durable } => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above.
            unsafe { libc::pwritev2(fd, vectors.as_ptr(), count, offset, flags) }
        }
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}
