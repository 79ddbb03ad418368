//! Memory mapped into this process for a guest to use directly: guest RAM and device BARs.
#![allow(unsafe_code)] // mmap and munmap; the only place where the VMM maps memory for guests.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// A range of this process's address space, mapped when it is made and unmapped when it is dropped.
///
/// Its bytes belong to a guest or a device, which change them at any time: they are reached through
/// raw pointers and system calls only, never through references.
#[derive(Debug)]
pub struct HostMapping {
    start: NonNull<u8>,
    len: NonZeroUsize,
}

// SAFETY: the value owns its range; moving it to another thread moves nothing in memory.
unsafe impl Send for HostMapping {}
// SAFETY: `&HostMapping` gives out only the address and the length.
unsafe impl Sync for HostMapping {}

/// `MPOL_PREFERRED_MANY` (linux/mempolicy.h).
const MPOL_PREFERRED_MANY: libc::c_int = 5;
/// Nodes in one word of a mask of nodes.
const MASK_BITS: usize = libc::c_ulong::BITS as usize;

/// A bit for each node (set_mempolicy(2)).
fn node_mask(nodes: &[u32]) -> Vec<libc::c_ulong> {
    let highest = nodes.iter().max().map_or(0, |node| *node as usize);
    let mut mask = vec![0; highest / MASK_BITS + 1];
    for node in nodes {
        let (word, bit) = (*node as usize / MASK_BITS, *node as usize % MASK_BITS);
        if let Some(word) = mask.get_mut(word) {
            *word |= 1 << bit;
        }
    }
    mask
}

/// The memory of a mapping.
enum Backing<'a> {
    Anonymous,
    File(BorrowedFd<'a>, libc::off_t),
}

impl HostMapping {
    /// Maps `len` bytes of private anonymous memory at an address aligned to `align`, asks for
    /// transparent huge pages, and keeps it out of forked children, so that a child never shares or
    /// splits pages that a device may write (pinned pages must not be copied on write), and out of core dumps.
    ///
    /// # Errors
    /// `len` is 0, `align` is no power of two, or the kernel has no address space left.
    pub fn anonymous(len: usize, align: usize) -> io::Result<Self> {
        let mapping = Self::map(len, align, 0, &Backing::Anonymous)?;
        // Without transparent huge pages in the kernel the advice fails and nothing is lost.
        let _ = mapping.advise(libc::MADV_HUGEPAGE);
        mapping.advise(libc::MADV_DONTFORK)?;
        mapping.advise(libc::MADV_DONTDUMP)?;
        Ok(mapping)
    }

    /// Maps `len` bytes of `file` from `offset` on, shared, readable and writable, at an address that is `skew`
    /// bytes behind a multiple of `align`. The kernel backs a part of a large BAR with huge pages only where the
    /// address and the place in the BAR are equally far from a multiple of the huge page's size.
    ///
    /// # Errors
    /// As [`Self::anonymous`], or the file refuses the range.
    pub fn file(
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        align: usize,
        skew: usize,
    ) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        Self::map(len, align, skew, &Backing::File(file, offset))
    }

    /// Allocates pages of the range before their first access (`MADV_POPULATE_WRITE`), as huge pages where
    /// the range has them. The part is cut to the range.
    ///
    /// # Errors
    /// The kernel is older than Linux 5.14, or has no memory left.
    pub fn populate(&self, offset: usize, len: usize) -> io::Result<()> {
        let offset = offset.min(self.len.get());
        let len = len.min(self.len.get() - offset);
        // SAFETY: the part lies inside the range that `self` owns; no byte changes its value.
        let ret = unsafe {
            libc::madvise(
                self.start.as_ptr().wrapping_add(offset).cast(),
                len,
                libc::MADV_POPULATE_WRITE,
            )
        };
        match ret {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sets the NUMA nodes of the host that the range's pages come from (mbind(2)), before any page exists:
    /// only these if `strict`, else these as long as they have memory.
    ///
    /// # Errors
    /// The host has no such nodes, the process may not use them, or the kernel knows no such policy.
    pub fn place(&self, nodes: &[u32], strict: bool) -> io::Result<()> {
        let mask = node_mask(nodes);
        let mode = match (strict, nodes) {
            (true, _) => libc::MPOL_BIND,
            // Kernels before Linux 5.15 have only this one.
            (false, [_]) => libc::MPOL_PREFERRED,
            (false, _) => MPOL_PREFERRED_MANY,
        };
        // The kernel reads one bit less than the number it gets.
        let bits = mask.len() * MASK_BITS + 1;
        // SAFETY: `self` owns the range, no byte of it changes, and the kernel reads the mask only
        // during the call, which `bits` does not exceed.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.start.as_ptr(),
                self.len.get(),
                mode,
                mask.as_ptr(),
                bits,
                0,
            )
        };
        match ret {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// First address of the range.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// First address of the range as a number, for the kernel interfaces that take one.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Length of the range in bytes.
    pub fn size(&self) -> usize {
        self.len.get()
    }

    /// Reserves room for any alignment, maps over the aligned part, and gives the rest back.
    fn map(len: usize, align: usize, skew: usize, backing: &Backing<'_>) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = NonZeroUsize::new(len).ok_or_else(invalid)?;
        if !align.is_power_of_two() {
            return Err(invalid());
        }
        let reserved = NonZeroUsize::new(len.get().checked_add(align).ok_or_else(invalid)?);
        let reserved = reserved.ok_or_else(invalid)?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserved.get(),
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let mut room = HostMapping {
            start: checked(start)?,
            len: reserved,
        };
        let before = skew.wrapping_sub(start as usize) & (align - 1);
        room.trim_front(before);
        room.trim_back(len);
        if let Err(error) = room.fill(backing) {
            // The kernel may have removed the reservation and given its addresses to another thread: the rest
            // of it, addresses without memory, is not worth that risk.
            std::mem::forget(room);
            return Err(error);
        }
        Ok(room)
    }

    /// Replaces the reservation with the backing.
    fn fill(&mut self, backing: &Backing<'_>) -> io::Result<()> {
        let (flags, fd, offset) = match backing {
            Backing::Anonymous => (
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            ),
            Backing::File(file, offset) => (libc::MAP_SHARED, file.as_raw_fd(), *offset),
        };
        // SAFETY: MAP_FIXED replaces exactly the range that `self` owns and nobody has seen yet.
        let start = unsafe {
            libc::mmap(
                self.start.as_ptr().cast(),
                self.len.get(),
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED,
                fd,
                offset,
            )
        };
        checked(start).map(|_| ())
    }

    fn trim_front(&mut self, bytes: usize) {
        let Some(rest) = NonZeroUsize::new(self.len.get().saturating_sub(bytes)) else {
            return;
        };
        if bytes == 0 {
            return;
        }
        // SAFETY: the bytes lie inside the range that `self` owns, and `self` forgets them below.
        unsafe { libc::munmap(self.start.as_ptr().cast(), bytes) };
        // SAFETY: `bytes` is less than the length of the range, so the result stays inside it.
        self.start = unsafe { self.start.add(bytes) };
        self.len = rest;
    }

    fn trim_back(&mut self, keep: NonZeroUsize) {
        let extra = self.len.get().saturating_sub(keep.get());
        if extra == 0 {
            return;
        }
        // SAFETY: `keep` is less than the length of the range, so the result stays inside it.
        let tail = unsafe { self.start.add(keep.get()) };
        // SAFETY: the tail lies inside the range that `self` owns, and `self` forgets it below.
        unsafe { libc::munmap(tail.as_ptr().cast(), extra) };
        self.len = keep;
    }

    fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the advices used here change how pages are kept, not what they hold.
        let done = unsafe { libc::madvise(self.start.as_ptr().cast(), self.len.get(), advice) };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl Drop for HostMapping {
    fn drop(&mut self) {
        // SAFETY: the value owns the range, and whoever mapped it into a guest or an IOMMU holds a
        // reference to the value for as long as that lasts.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len.get()) };
    }
}

fn checked(start: *mut libc::c_void) -> io::Result<NonNull<u8>> {
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn anonymous_memory_is_aligned_zeroed_and_writable() {
        let mapping = HostMapping::anonymous(3 << 20, 2 << 20).unwrap();
        assert_eq!(mapping.address() % (2 << 20), 0);
        assert_eq!(mapping.size(), 3 << 20);
        // SAFETY: the last byte of a mapping that nobody else uses.
        let last = unsafe { mapping.as_ptr().add(mapping.size() - 1) };
        // SAFETY: as above; mapped readable and writable.
        assert_eq!(unsafe { last.read_volatile() }, 0);
        // SAFETY: as above.
        unsafe { last.write_volatile(7) };
    }

    #[test]
    fn anonymous_memory_is_in_no_child_and_no_core_dump() {
        let mapping = HostMapping::anonymous(2 << 20, 2 << 20).unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", mapping.address());
        let own = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let mut flags = own.filter_map(|line| line.strip_prefix("VmFlags:"));
        let flags: Vec<_> = flags.next().unwrap().split_whitespace().collect();
        assert!(flags.contains(&"dc") && flags.contains(&"dd"), "{flags:?}");
    }

    #[test]
    fn a_node_is_a_bit_of_a_mask() {
        for (nodes, mask) in [
            (vec![0], vec![1]),
            (vec![1, 3], vec![0b1010]),
            (vec![64, 2], vec![0b100, 1]),
        ] {
            assert_eq!(node_mask(&nodes), mask, "{nodes:?}");
        }
    }

    #[test]
    fn memory_does_not_come_from_nodes_that_are_not_there() {
        let mapping = HostMapping::anonymous(4096, 4096).unwrap();
        assert!(mapping.place(&[1000], true).is_err());
    }

    #[test]
    fn a_file_is_mapped_from_its_offset() {
        let file = std::fs::File::open("/dev/zero").unwrap();
        assert!(
            HostMapping::file(file.as_fd(), 0, 4096, 4096, 0).is_err(),
            "opened read-only"
        );
    }

    #[test]
    fn a_part_of_a_file_lies_as_far_from_a_huge_page_as_it_does_in_the_file() {
        let mut options = std::fs::File::options();
        let file = options.read(true).write(true).open("/dev/zero").unwrap();
        for skew in [0, 0x6000, (2 << 20) - 4096, (2 << 20) + 4096] {
            let mapping =
                HostMapping::file(file.as_fd(), skew as u64, 1 << 20, 2 << 20, skew).unwrap();
            let behind = mapping.address() % (2 << 20);
            assert_eq!((behind, mapping.size()), (skew as u64 % (2 << 20), 1 << 20));
        }
    }

    #[test]
    fn sizes_and_alignments_that_make_no_sense_are_refused() {
        assert!(HostMapping::anonymous(0, 4096).is_err());
        assert!(HostMapping::anonymous(4096, 3).is_err());
        assert!(HostMapping::anonymous(usize::MAX, 4096).is_err());
    }
}
