//! Loads a kernel and its initramfs into guest memory, by the boot protocol of its file.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::e820;
use super::identify::{self, Kind, identify};
use super::{BootError, CMDLINE, START_INFO, ZERO_PAGE, bzimage, elf, linux64, pvh, reset};
use crate::layout::Layout;

/// `COMMAND_LINE_SIZE` of x86, less the zero at the end; a bzImage says it itself.
const CMDLINE_MAX: usize = 2047;
/// What there is room for.
const CMDLINE_ROOM: usize = 0xffff;
const PAGE: u64 = 4096;

/// A file to load, and its name for error messages.
#[derive(Debug)]
pub struct Image<'a> {
    /// Where the user said it is.
    pub path: &'a Path,
    /// The file, open for reading.
    pub file: &'a mut File,
}

/// How the boot vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32-bit protected mode without paging, `ebx` = `start_info`.
    Pvh {
        /// First instruction.
        entry: GuestAddress,
        /// The `hvm_start_info`.
        start_info: GuestAddress,
    },
    /// The 64-bit Linux boot protocol, `rsi` = `boot_params`.
    Linux64 {
        /// First instruction.
        entry: GuestAddress,
        /// The zero page.
        boot_params: GuestAddress,
    },
}

/// What a kernel is told at its entry, whatever the protocol.
pub(super) struct Handover {
    pub map: Vec<e820::Entry>,
    pub initramfs: Option<Initramfs>,
    pub rsdp: GuestAddress,
}

/// Where the initramfs lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Initramfs {
    pub start: u64,
    pub size: u64,
}

/// Loads kernel and initramfs and writes the kernel's boot parameters. Called again, with the same files, at
/// every reboot of the guest.
///
/// # Errors
/// The kernel is not one that can be booted, or something does not fit.
pub fn load<M: GuestMemoryBackend>(
    memory: &M,
    layout: &Layout,
    kernel: &mut Image<'_>,
    initramfs: Option<&mut Image<'_>>,
    cmdline: &str,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    let mut handover = Handover {
        map: e820::map(layout),
        initramfs: None,
        rsdp,
    };
    if handover.map.len() > e820::MAX_ENTRIES {
        return Err(BootError::MemoryMap(handover.map.len()));
    }
    reset::write(memory, layout)?;
    let place = |end, last| match initramfs {
        Some(image) => load_initramfs(memory, &handover.map, image, end, last).map(Some),
        None => Ok(None),
    };
    match kernel.kind()? {
        Kind::Elf => {
            let loaded = elf::load(memory, &handover.map, kernel)?;
            write_cmdline(memory, cmdline, CMDLINE_MAX)?;
            handover.initramfs = place(loaded.end, u64::from(u32::MAX))?;
            pvh::write(memory, &handover)?;
            Ok(Entry::Pvh {
                entry: loaded.entry,
                start_info: START_INFO,
            })
        }
        Kind::BzImage => {
            let loaded = bzimage::load(memory, &handover.map, kernel)?;
            write_cmdline(
                memory,
                cmdline,
                (loaded.header.cmdline_size as usize).min(CMDLINE_ROOM),
            )?;
            let last = u64::from(loaded.header.initrd_addr_max);
            handover.initramfs = place(loaded.end, last)?;
            linux64::write(memory, &handover, loaded.header)?;
            Ok(Entry::Linux64 {
                entry: loaded.entry,
                boot_params: ZERO_PAGE,
            })
        }
        Kind::Other(seen) => Err(BootError::NotAKernel {
            path: kernel.path.to_owned(),
            seen,
        }),
    }
}

fn write_cmdline<M: GuestMemoryBackend>(
    memory: &M,
    cmdline: &str,
    max: usize,
) -> Result<(), BootError> {
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    if cmdline.len() > max {
        return Err(BootError::CmdlineTooLong {
            len: cmdline.len(),
            max,
        });
    }
    let bytes = [cmdline.as_bytes(), b"\0"].concat();
    memory
        .write_slice(&bytes, CMDLINE)
        .map_err(|source| BootError::Write {
            what: "the command line",
            address: CMDLINE,
            source,
        })
}

/// Reads the initramfs into the highest place in RAM between the kernel's end and `last`.
fn load_initramfs<M: GuestMemoryBackend>(
    memory: &M,
    map: &[e820::Entry],
    image: &mut Image<'_>,
    kernel_end: u64,
    last: u64,
) -> Result<Initramfs, BootError> {
    let size = image.size()?;
    if size == 0 {
        return Err(BootError::EmptyInitramfs {
            path: image.path.to_owned(),
        });
    }
    let start = highest(map, size, kernel_end, last).ok_or_else(|| BootError::InitramfsRoom {
        path: image.path.to_owned(),
        size,
        kernel_end,
        low_ram: e820::low_ram_end(map),
    })?;
    image.seek(0)?;
    let address = GuestAddress(start);
    memory
        .read_exact_volatile_from(address, image.file, size as usize)
        .map_err(|source| BootError::Write {
            what: "the initramfs",
            address,
            source,
        })?;
    Ok(Initramfs { start, size })
}

fn highest(map: &[e820::Entry], size: u64, kernel_end: u64, last: u64) -> Option<u64> {
    let low = map
        .iter()
        .filter(|entry| entry.kind == e820::Kind::Ram && entry.start < last);
    low.rev().find_map(|entry| {
        let start = entry.end.min(last + 1).checked_sub(size)? / PAGE * PAGE;
        (start >= entry.start.max(kernel_end)).then_some(start)
    })
}

impl Image<'_> {
    fn kind(&mut self) -> Result<Kind, BootError> {
        self.seek(0)?;
        let mut head = Vec::with_capacity(identify::HEAD);
        let read = (&mut *self.file)
            .take(identify::HEAD as u64)
            .read_to_end(&mut head);
        read.map_err(|source| self.unreadable(source))?;
        Ok(identify(&head))
    }

    pub(super) fn size(&mut self) -> Result<u64, BootError> {
        self.file
            .seek(SeekFrom::End(0))
            .map_err(|source| self.unreadable(source))
    }

    /// Fills `buffer` from `offset` of the file on.
    pub(super) fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), BootError> {
        self.seek(offset)?;
        match self.file.read_exact(buffer) {
            Ok(()) => Ok(()),
            Err(short) if short.kind() == ErrorKind::UnexpectedEof => Err(BootError::Truncated {
                path: self.path.to_owned(),
                needed: offset + buffer.len() as u64,
                size: self.size()?,
            }),
            Err(source) => Err(self.unreadable(source)),
        }
    }

    fn seek(&mut self, offset: u64) -> Result<(), BootError> {
        let sought = self.file.seek(SeekFrom::Start(offset));
        sought.map(drop).map_err(|source| self.unreadable(source))
    }

    fn unreadable(&self, source: std::io::Error) -> BootError {
        BootError::Read {
            path: self.path.to_owned(),
            source,
        }
    }
}
