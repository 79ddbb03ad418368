//! What a disk holds: a file or block device, accessed at offsets and straight from guest RAM, or bytes in memory.
#![allow(unsafe_code)] // preadv2 and pwritev2 on guest RAM.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::super::Segments;

/// Bytes of a sector, the unit of all offsets and lengths (section 5.2).
pub const SECTOR: u64 = 512;
/// The most buffers that one system call takes (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;
/// The most bytes that one system call moves: between two, the disk looks whether it has to stop.
const CHUNK: usize = 16 << 20;
/// Zeros that are written where the file cannot make a range read as zeros.
const ZEROS: usize = 64 << 10;

/// An open disk. Only this process writes to it.
#[derive(Debug)]
pub struct Disk {
    contents: Contents,
    len: AtomicU64,
    block_size: u32,
    read_only: bool,
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
    #[error("it has {len} bytes, and the guest may use all of them: end the VM to make the disk smaller")]
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

impl Disk {
    /// The first `len` bytes of `file`, a multiple of [`SECTOR`], whose blocks have `block_size` bytes.
    pub fn new(file: File, len: u64, block_size: u32, read_only: bool) -> Self {
        Self {
            contents: Contents::File(file),
            len: AtomicU64::new(len / SECTOR * SECTOR),
            block_size,
            read_only,
        }
    }

    /// A read-only disk of these bytes, as far as they are whole sectors.
    pub fn of_bytes(bytes: impl Into<Box<[u8]>>) -> Self {
        let bytes = bytes.into();
        Self {
            len: AtomicU64::new(bytes.len() as u64 / SECTOR * SECTOR),
            contents: Contents::Memory(bytes),
            block_size: SECTOR as u32,
            read_only: true,
        }
    }

    /// The file, which every disk has that can be written.
    fn file(&self) -> nix::Result<&File> {
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
            true => file.set_len(bytes)?,
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
        let mut vectors: Vec<libc::iovec> = segments
            .slices()
            .iter()
            .filter(|slice| !slice.is_empty())
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        let (mut at, mut rest) = (offset, vectors.as_mut_slice());
        while !rest.is_empty() {
            if is_stopping() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let done = once(file, how, at, &front(rest))?;
            at += done as u64;
            rest = advance(rest, done);
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
        use std::os::unix::fs::FileExt;
        let (file, zeros) = (self.file()?, vec![0; ZEROS]);
        let mut done = 0;
        while done < len {
            let here = (len - done).min(ZEROS as u64);
            file.write_all_at(&zeros[..here as usize], offset + done)?;
            done += here;
        }
        Ok(())
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
    loop {
        let moved = match how {
            // SAFETY: each vector lies in guest RAM, which the caller's segments keep mapped during the call
            // and which nobody in this process has references to.
            Transfer::Read => unsafe { libc::preadv2(fd, vectors.as_ptr(), count, offset, 0) },
            Transfer::Write { durable } => {
                let flags = match durable {
                    true => libc::RWF_DSYNC,
                    false => 0,
                };
                // SAFETY: as above.
                unsafe { libc::pwritev2(fd, vectors.as_ptr(), count, offset, flags) }
            }
        };
        match usize::try_from(moved) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => return Ok(moved),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// The first [`CHUNK`] bytes of the vectors, or fewer.
fn front(vectors: &[libc::iovec]) -> Vec<libc::iovec> {
    let mut left = CHUNK;
    let mut front = Vec::new();
    for vector in vectors.iter().take(MAX_VECTORS) {
        let iov_len = vector.iov_len.min(left);
        front.push(libc::iovec { iov_len, ..*vector });
        left -= iov_len;
        if left == 0 {
            break;
        }
    }
    front
}

/// The vectors without their first `done` bytes.
fn advance(vectors: &mut [libc::iovec], done: usize) -> &mut [libc::iovec] {
    let (mut left, mut whole) = (done, 0);
    for vector in vectors.iter_mut() {
        if left < vector.iov_len {
            vector.iov_base = vector.iov_base.wrapping_byte_add(left);
            vector.iov_len -= left;
            break;
        }
        left -= vector.iov_len;
        whole += 1;
    }
    &mut vectors[whole..]
}
