//! Accesses past the host's page cache (`O_DIRECT`), which the kernel takes only aligned.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::super::Segments;

/// What the kernel may ask for, the least first: sectors of 512 bytes or of 4096.
const ALIGNMENTS: [usize; 2] = [512, 4096];
/// The most bytes that are moved at once by a buffer.
const PIECE: u64 = 1 << 20;

/// From now on accesses to `file` go past the page cache. Returns what they must be multiples of.
///
/// # Errors
/// The file system has no such accesses.
pub fn bypass_cache(file: &File) -> io::Result<usize> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT))?;
    let mut refused = io::ErrorKind::Unsupported.into();
    for alignment in ALIGNMENTS {
        let mut buffer = Buffer::new(alignment);
        match file.read_at(buffer.bytes(), alignment as u64) {
            Ok(_) => return Ok(alignment),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

/// Bytes at an address that any device takes.
struct Buffer {
    bytes: Vec<u8>,
    range: Range<usize>,
}

impl Buffer {
    fn new(len: usize) -> Self {
        let most = ALIGNMENTS[1];
        let bytes = vec![0; len + most];
        let start = bytes.as_ptr().align_offset(most).min(most);
        let range = start..start + len;
        Self { bytes, range }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.range.clone()]
    }
}

/// Fills segments that are not aligned from the disk.
///
/// # Errors
/// The disk fails.
pub fn read(
    file: &File,
    alignment: usize,
    offset: u64,
    segments: &Segments<'_>,
    is_stopping: impl Fn() -> bool,
) -> io::Result<()> {
    let mut rest = segments.clone();
    pieces(
        alignment,
        offset,
        segments.bytes(),
        is_stopping,
        |from, buffer, inner| {
            file.read_exact_at(buffer, from)?;
            let piece = rest.take_front(inner.len() as u64);
            piece.map(|piece| piece.write(&buffer[inner]));
            Ok(())
        },
    )
}

/// Writes `len` bytes from `offset` on, which need not be aligned. `fill` gets each piece in turn.
///
/// # Errors
/// The disk fails.
pub fn write(
    file: &File,
    alignment: usize,
    (offset, len): (u64, u64),
    is_stopping: impl Fn() -> bool,
    mut fill: impl FnMut(&mut [u8]),
) -> io::Result<()> {
    pieces(
        alignment,
        offset,
        len,
        is_stopping,
        |from, buffer, inner| {
            if inner.len() < buffer.len() {
                file.read_exact_at(buffer, from)?;
            }
            fill(&mut buffer[inner]);
            file.write_all_at(buffer, from)
        },
    )
}

/// Calls `with` for each piece of a range of the disk: with its aligned beginning, an aligned buffer of its aligned
/// length, and the place of the piece in that.
fn pieces(
    alignment: usize,
    offset: u64,
    len: u64,
    is_stopping: impl Fn() -> bool,
    mut with: impl FnMut(u64, &mut [u8], Range<usize>) -> io::Result<()>,
) -> io::Result<()> {
    let unit = alignment as u64;
    let (mut at, end) = (offset, offset + len);
    while at < end {
        if is_stopping() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let from = at / unit * unit;
        let here = (from + PIECE).min(end) - at;
        let skip = (at - from) as usize;
        let whole = (at + here).next_multiple_of(unit) - from;
        let mut buffer = Buffer::new(whole as usize);
        with(from, buffer.bytes(), skip..skip + here as usize)?;
        at += here;
    }
    Ok(())
}
