//! One request of a driver (section 5.2.6): parsed from its buffers, carried out, and answered.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::MAX_ERASE;
use super::disk::{Disk, Operation, SECTOR, Transfer};
use crate::virtio::Segments;

/// Bytes of a serial number (`VIRTIO_BLK_ID_BYTES`).
pub const SERIAL_LEN: usize = 20;
/// The most ranges in one request that discards or fills with zeros.
pub const MAX_RANGES: u32 = 16;
/// The most bytes that are discarded or filled at once: between two, the disk looks whether it has to stop.
const ERASED_AT_ONCE: u64 = 64 << 20;
/// Bytes of such a range: first sector, number of sectors, flags.
const RANGE_LEN: usize = 16;

/// What the driver reads when the request is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// The disk or the driver has failed.
    IoError,
    /// The device does not know the request.
    Unsupported,
}

impl Status {
    const fn byte(self) -> u8 {
        match self {
            Self::Ok => VIRTIO_BLK_S_OK as u8,
            Self::IoError => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// How requests are carried out.
pub struct Service<'a> {
    /// The disk.
    pub disk: &'a Disk,
    /// What the disk is called.
    pub serial: &'a [u8; SERIAL_LEN],
    /// The driver cannot flush: what it writes is to be there for good at once (section 5.2.6.2).
    pub write_through: bool,
    /// Whether the device has to leave guest RAM: what is under way fails then.
    pub is_stopping: &'a dyn Fn() -> bool,
}

/// A request of a driver.
pub struct Request<'a> {
    /// What is left to be done.
    pub work: Work<'a>,
    /// Where its status goes.
    status: Segments<'a>,
    /// Bytes that the driver reads beside the status, if all goes well.
    room: u64,
}

/// What is left to be done of a request.
pub enum Work<'a> {
    /// Nothing.
    Done(Status),
    /// Bytes are moved between the disk from an offset on and buffers.
    Move(Transfer, u64, Segments<'a>),
    /// The disk is to keep for good what was written before.
    Flush,
}

impl Request<'_> {
    /// Writes the status. Returns how many bytes of the driver's buffers were written; `None` if no driver can have
    /// offered so many.
    pub fn answer(&self, status: Status) -> Option<u32> {
        self.status.write(&[status.byte()]);
        // The status is the last byte, whatever is before it.
        let written = if status == Status::Ok { self.room } else { 0 };
        u32::try_from(written + 1).ok()
    }
}

impl Service<'_> {
    /// Looks at the request in these buffers, those that the device may read and those that it may write, and does
    /// what takes no access to the disk, or a rare one. `None` if there is no room for the status.
    pub fn begin<'a>(&self, readable: Segments<'a>, writable: Segments<'a>) -> Option<Request<'a>> {
        let mut status = writable;
        let room = status.bytes().checked_sub(1)?;
        let data = status.take_front(room)?;
        Some(Request {
            work: self.look_at(readable, data),
            status,
            room,
        })
    }

    /// Does what is left of a request, and waits for it.
    pub fn finish(&self, work: &Work<'_>) -> Status {
        let disk = self.disk;
        match work {
            Work::Done(status) => *status,
            Work::Move(how, offset, segments) => {
                let moved = disk.transfer(*how, *offset, segments, self.is_stopping);
                self.result(Operation::Move(*how), segments.bytes(), moved)
            }
            Work::Flush => self.result(Operation::Flush, 0, disk.flush()),
        }
    }

    /// The status of what was done with the disk.
    pub fn result(&self, operation: Operation, bytes: u64, result: io::Result<()>) -> Status {
        done(self.disk.count(operation, bytes, result))
    }

    fn look_at<'a>(&self, mut readable: Segments<'a>, writable: Segments<'a>) -> Work<'a> {
        let mut header = [0; 16];
        match readable.take_front(header.len() as u64) {
            Some(front) => drop(front.read(&mut header)),
            None => return Work::Done(Status::IoError),
        };
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        Work::Done(match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => return self.transfer(Transfer::Read, sector, writable),
            VIRTIO_BLK_T_OUT if self.disk.is_read_only() => Status::IoError,
            VIRTIO_BLK_T_OUT => {
                let durable = self.write_through;
                return self.transfer(Transfer::Write { durable }, sector, readable);
            }
            VIRTIO_BLK_T_FLUSH => return Work::Flush,
            VIRTIO_BLK_T_GET_ID => {
                let room = writable.write(self.serial) == SERIAL_LEN;
                if room { Status::Ok } else { Status::IoError }
            }
            VIRTIO_BLK_T_DISCARD => self.erase(&readable, 0, |offset, len, _| {
                done(self.disk.discard(offset, len))
            }),
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                self.erase(&readable, unmap, |offset, len, flags| {
                    done(self.disk.write_zeroes(offset, len, flags & unmap != 0))
                })
            }
            _ => Status::Unsupported,
        })
    }

    fn transfer<'a>(&self, how: Transfer, sector: u64, segments: Segments<'a>) -> Work<'a> {
        let len = segments.bytes();
        let offset = self.disk.offset(sector, len);
        match offset.filter(|_| len.is_multiple_of(SECTOR)) {
            Some(offset) => Work::Move(how, offset, segments),
            None => Work::Done(Status::IoError),
        }
    }

    /// Has `erase` do something with each range of a request. `known` are the flags that a range may have.
    fn erase(
        &self,
        ranges: &Segments<'_>,
        known: u32,
        erase: impl Fn(u64, u64, u32) -> Status,
    ) -> Status {
        let mut bytes = [0; RANGE_LEN * MAX_RANGES as usize];
        let len = ranges.bytes() as usize;
        if self.disk.is_read_only() || len > bytes.len() || !len.is_multiple_of(RANGE_LEN) {
            return Status::IoError;
        }
        ranges.read(&mut bytes);
        // All are looked at before the first is erased.
        let mut checked = Vec::new();
        for range in bytes[..len].chunks_exact(RANGE_LEN) {
            let [
                s0,
                s1,
                s2,
                s3,
                s4,
                s5,
                s6,
                s7,
                n0,
                n1,
                n2,
                n3,
                f0,
                f1,
                f2,
                f3,
            ] = *range
            else {
                return Status::IoError;
            };
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            let len = u64::from(sectors) * SECTOR;
            if flags & !known != 0 {
                return Status::Unsupported;
            }
            match self.disk.offset(sector, len) {
                Some(offset) if sectors <= MAX_ERASE => checked.push((offset, len, flags)),
                _ => return Status::IoError,
            }
        }
        let pieces = checked.into_iter().flat_map(|(offset, len, flags)| {
            let starts = (0..len).step_by(ERASED_AT_ONCE as usize);
            starts.map(move |at| (offset + at, ERASED_AT_ONCE.min(len - at), flags))
        });
        let mut results = pieces.map(|(offset, len, flags)| match (self.is_stopping)() {
            true => Status::IoError,
            false => erase(offset, len, flags),
        });
        match results.find(|status| *status != Status::Ok) {
            Some(failed) => failed,
            None if self.write_through => done(self.disk.flush()),
            None => Status::Ok,
        }
    }
}

fn done(result: io::Result<()>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Status::IoError,
        Err(error) => {
            crate::warn_limited!(%error, "a disk of the guest has failed");
            Status::IoError
        }
    }
}
