//! Buffers in guest RAM as system calls take them, and how far a request has come.

use std::io;

use super::super::Segments;

/// The most buffers that one system call takes (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;
/// The most bytes that one system call moves: between two, the disk looks whether it has to stop.
const CHUNK: usize = 16 << 20;

/// The buffers of a request, without what was moved already.
#[derive(Default)]
pub struct Vectors {
    left: Vec<libc::iovec>,
    /// Those before this one were moved as a whole.
    first: usize,
    offset: u64,
    front: Vec<libc::iovec>,
}

impl Vectors {
    /// The buffers of `segments`, for bytes of the disk from `offset` on.
    pub fn new(segments: &Segments<'_>, offset: u64) -> Self {
        let slices = segments.slices().iter().filter(|slice| !slice.is_empty());
        let vectors = slices.map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        });
        Self {
            left: vectors.collect(),
            offset,
            ..Self::default()
        }
    }

    /// Where on the disk the next byte is.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether all was moved.
    pub fn is_done(&self) -> bool {
        self.first >= self.left.len()
    }

    /// Whether the place on the disk and each buffer is a multiple of so many bytes.
    pub fn are_aligned(&self, to: usize) -> bool {
        let mut vectors = self.left.iter();
        self.offset.is_multiple_of(to as u64)
            && vectors.all(|one| (one.iov_base as usize | one.iov_len).is_multiple_of(to))
    }

    /// What the next system call is to move: [`CHUNK`] bytes, or fewer.
    pub fn front(&mut self) -> &[libc::iovec] {
        self.front.clear();
        let mut room = CHUNK;
        let rest = self.left.iter().skip(self.first);
        for vector in rest.take(MAX_VECTORS) {
            let iov_len = vector.iov_len.min(room);
            self.front.push(libc::iovec { iov_len, ..*vector });
            room -= iov_len;
            if room == 0 {
                break;
            }
        }
        &self.front
    }

    /// Takes in what a system call has moved. Returns whether that was all.
    ///
    /// # Errors
    /// The call has failed, or the disk has ended.
    pub fn moved(&mut self, result: io::Result<usize>) -> io::Result<bool> {
        let mut moved = match result {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        self.offset += moved as u64;
        for vector in self.left.iter_mut().skip(self.first) {
            if moved < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(moved);
                vector.iov_len -= moved;
                break;
            }
            moved -= vector.iov_len;
            self.first += 1;
        }
        Ok(self.is_done())
    }
}
