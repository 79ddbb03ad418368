//! Loads a kernel and its initramfs into guest memory, by the boot protocol of its file.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::e820;
use super::identify::Kind;
use super::image::Image;
use super::params::{BootParams, Initramfs};
use super::{BootError, CMDLINE, START_INFO, ZERO_PAGE, bzimage, elf, linux64, pvh, reset};
use crate::layout::Layout;

/// `COMMAND_LINE_SIZE` of x86, less the zero at the end; a bzImage says it itself.
const CMDLINE_MAX: usize = 2047;
/// What there is room for.
const CMDLINE_ROOM: usize = 0xffff;
const PAGE: u64 = 4096;

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
    let mut params = BootParams {
        map: e820::map(layout),
        initramfs: None,
        rsdp,
    };
    if params.map.len() > e820::MAX_ENTRIES {
        return Err(BootError::MemoryMap(params.map.len()));
    }
    reset::write(memory, layout)?;
    let place = |end, last| match initramfs {
        Some(image) => load_initramfs(memory, &params.map, image, end, last).map(Some),
        None => Ok(None),
    };
    match kernel.kind()? {
        Kind::Elf => {
            let loaded = elf::load(memory, &params.map, kernel)?;
            write_cmdline(memory, cmdline, CMDLINE_MAX)?;
            params.initramfs = place(loaded.end, u64::from(u32::MAX))?;
            pvh::write(memory, &params)?;
            Ok(Entry::Pvh {
                entry: loaded.entry,
                start_info: START_INFO,
            })
        }
        Kind::BzImage => {
            let loaded = bzimage::load(memory, &params.map, kernel)?;
            write_cmdline(
                memory,
                cmdline,
                (loaded.header.cmdline_size as usize).min(CMDLINE_ROOM),
            )?;
            let last = u64::from(loaded.header.initrd_addr_max);
            params.initramfs = place(loaded.end, last)?;
            linux64::write(memory, &params, loaded.header)?;
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

/// Loads a firmware, which is entered by PVH and finds what to boot itself.
///
/// # Errors
/// The file is something else, or does not fit.
pub fn load_firmware<M: GuestMemoryBackend>(
    memory: &M,
    layout: &Layout,
    image: &mut Image<'_>,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    let not = |path, seen: &str| {
        let seen = seen.to_owned();
        BootError::NotAFirmware { path, seen }
    };
    if image.kind()? == Kind::BzImage {
        let seen = "a Linux kernel, which `payload.kernel` boots";
        return Err(not(image.path.to_owned(), seen));
    }
    load(memory, layout, image, None, "", rsdp).map_err(|error| match error {
        BootError::NoPvhEntry { path } => not(path, "an ELF file without one"),
        BootError::NotAKernel { path, seen } => not(path, &seen),
        error => error,
    })
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
