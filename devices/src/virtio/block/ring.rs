//! Requests that the kernel carries out side by side, by io_uring(7).
#![allow(unsafe_code)] // The kernel reads and writes guest RAM by the addresses in submissions.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

use super::disk::{Operation, Transfer};
use super::vectors::Vectors;

/// The most requests under way at a time.
const DEPTH: usize = 128;

/// A ring, which can do nothing but read, write and flush files that are open.
pub struct Ring(IoUring);

impl Ring {
    /// # Errors
    /// This kernel has no such ring, or forbids it.
    pub fn new() -> io::Result<Self> {
        let ring = Self::disabled()?;
        ring.0.submitter().register_enable_rings()?;
        Ok(ring)
    }

    /// A ring that takes nothing yet.
    fn disabled() -> io::Result<Self> {
        let mut builder = IoUring::builder();
        let ring = builder.setup_r_disabled().build(DEPTH as u32)?;
        let params = ring.params();
        if !params.is_feature_submit_stable() || !params.is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let allowed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
        ];
        let submitter = ring.submitter();
        submitter.register_restrictions(&mut allowed.map(Restriction::sqe_op))?;
        Ok(Self(ring))
    }
}

/// Rings that were made before the process was confined: it can make none later.
#[derive(Clone, Default)]
pub struct Rings(Arc<Mutex<Vec<Ring>>>);

impl Rings {
    /// Makes so many, as far as the kernel lets it: disks without a ring do one request after the other.
    pub fn fill(&self, count: usize) {
        for _ in 0..count {
            match Ring::new() {
                Ok(ring) => self.lock().push(ring),
                Err(error) => {
                    tracing::debug!(%error, "no io_uring for disks: each does one request after the other");
                    return;
                }
            }
        }
    }

    /// One that refuses all until it is enabled.
    #[cfg(test)]
    pub fn disabled() -> Option<LentRing> {
        let ring = Some(Ring::disabled().ok()?);
        let rings = Self::default();
        Some(LentRing { ring, rings })
    }

    /// One that no disk has.
    pub fn take(&self) -> Option<LentRing> {
        let ring = Some(self.lock().pop()?);
        let rings = self.clone();
        Some(LentRing { ring, rings })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Ring>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A ring of a disk. Dropping it gives it back.
pub struct LentRing {
    ring: Option<Ring>,
    rings: Rings,
}

impl LentRing {
    /// Readable when a request is done.
    pub fn fd(&self) -> Option<RawFd> {
        self.ring.as_ref().map(|Ring(ring)| ring.as_raw_fd())
    }

    fn ring(&mut self) -> Option<&mut IoUring> {
        self.ring.as_mut().map(|Ring(ring)| ring)
    }
}

impl Drop for LentRing {
    fn drop(&mut self) {
        if let Some(ring) = self.ring.take() {
            self.rings.lock().push(ring);
        }
    }
}

/// A request that the kernel carries out, with whatever belongs to it.
struct Pending<T> {
    operation: Operation,
    vectors: Vectors,
    belongs: T,
}

/// The requests of a disk that are under way. Dropping it waits for them: the kernel accesses guest RAM until then.
pub struct Flight<'a, T> {
    ring: &'a mut LentRing,
    file: &'a File,
    pending: Vec<Option<Pending<T>>>,
    count: usize,
}

impl<'a, T> Flight<'a, T> {
    /// None yet.
    pub fn new(ring: &'a mut LentRing, file: &'a File) -> Self {
        Self {
            ring,
            file,
            pending: (0..DEPTH).map(|_| None).collect(),
            count: 0,
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether no further request has room.
    pub fn is_full(&self) -> bool {
        self.count >= self.pending.len()
    }

    /// Begins a request, for which there must be room. [`Self::submit`] hands it to the kernel.
    pub fn begin(&mut self, operation: Operation, vectors: Vectors, belongs: T) {
        let free = self.pending.iter().position(Option::is_none);
        let slot = free.and_then(|place| self.pending.get_mut(place));
        if let (Some(place), Some(slot)) = (free, slot) {
            *slot = Some(Pending {
                operation,
                vectors,
                belongs,
            });
            self.count += 1;
            self.enter(place);
        }
    }

    /// Puts what is left of a request into the submission queue, which has an entry for each.
    fn enter(&mut self, place: usize) {
        let pending = self.pending.get_mut(place).and_then(Option::as_mut);
        let (Some(pending), Some(ring)) = (pending, self.ring.ring()) else {
            return;
        };
        let entry = entry(self.file, pending.operation, &mut pending.vectors);
        let entry = entry.user_data(place as u64);
        // SAFETY: what the entry points to is the request's own, on the heap, until its completion is taken; the
        // vectors lie in guest RAM, which the request's segments keep mapped; and the drop of this value waits for
        // all that is under way.
        if unsafe { ring.submission().push(&entry) }.is_err() {
            tracing::error!("the ring of a disk is full: a request stays unanswered");
        }
    }

    /// Hands to the kernel what was begun. Returns whether it has taken all; the rest it may take the next time.
    pub fn submit(&mut self) -> bool {
        self.ring.ring().is_none_or(|ring| {
            let taken = ring.submit();
            taken.is_ok() && ring.submission().is_empty()
        })
    }

    /// Has `done` answer what is done. Returns whether there was any.
    pub fn reap(&mut self, mut done: impl FnMut(T, io::Result<()>)) -> bool {
        let mut any = false;
        while let Some((place, result)) = self.next_completion() {
            any = true;
            let slot = self.pending.get_mut(place);
            let Some(pending) = slot.and_then(Option::as_mut) else {
                continue;
            };
            let outcome = match pending.operation {
                Operation::Flush => result.map(|_| true),
                Operation::Move(_) => pending.vectors.moved(result),
            };
            if matches!(outcome, Ok(false)) {
                self.enter(place);
                continue;
            }
            if let Some(pending) = self.take(place) {
                done(pending.belongs, outcome.map(drop));
            }
        }
        any
    }

    fn take(&mut self, place: usize) -> Option<Pending<T>> {
        let pending = self.pending.get_mut(place)?.take()?;
        self.count -= 1;
        Some(pending)
    }

    /// The place of a request, and how many bytes it has moved.
    fn next_completion(&mut self) -> Option<(usize, io::Result<usize>)> {
        let entry = self.ring.ring()?.completion().next()?;
        let result = usize::try_from(entry.result());
        let result = result.map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        Some((entry.user_data() as usize, result))
    }
}

impl<T> Drop for Flight<'_, T> {
    fn drop(&mut self) {
        while self.count > 0 {
            let waited = self.ring.ring().map(|ring| ring.submit_and_wait(1));
            if !matches!(waited, Some(Ok(_))) {
                std::thread::yield_now();
            }
            while let Some((place, _)) = self.next_completion() {
                drop(self.take(place));
            }
        }
    }
}

fn entry(file: &File, operation: Operation, vectors: &mut Vectors) -> squeue::Entry {
    let (fd, at) = (Fd(file.as_raw_fd()), vectors.offset());
    let front = vectors.front();
    let (start, count) = (front.as_ptr(), front.len() as u32);
    match operation {
        Operation::Move(Transfer::Read) => opcode::Readv::new(fd, start, count).offset(at).build(),
        Operation::Move(Transfer::Write { durable }) => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            let write = opcode::Writev::new(fd, start, count).offset(at);
            write.rw_flags(flags).build()
        }
        Operation::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
    }
}
