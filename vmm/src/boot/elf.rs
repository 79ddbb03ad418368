//! Loads a `vmlinux` with a PVH entry: checks its program headers, reads its segments into RAM.

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::BootError;
use super::e820::{self, Entry};
use super::image::Image;

/// Where a loaded kernel is entered and where it ends.
#[derive(Debug, PartialEq, Eq)]
pub struct Loaded {
    /// 32-bit entry point.
    pub entry: GuestAddress,
    /// First guest-physical address beyond the kernel.
    pub end: u64,
}

/// A program header of the file (`Elf64_Phdr`, System V ABI).
struct Segment {
    offset: u64,
    address: u64,
    in_file: u64,
    in_memory: u64,
}

const PHDR_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Reads the kernel's segments into the RAM of `map`, and clears the parts that the file leaves out: at a
/// reboot of the guest they have old contents.
pub fn load<M: GuestMemoryBackend>(
    memory: &M,
    map: &[Entry],
    kernel: &mut Image<'_>,
) -> Result<Loaded, BootError> {
    let segments = segments(kernel)?;
    check(&segments, map, kernel)?;
    let loaded = Elf::load(memory, None, kernel.file, None).map_err(|source| BootError::Load {
        path: kernel.path.to_owned(),
        source,
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry {
            path: kernel.path.to_owned(),
        });
    };
    for segment in &segments {
        clear(
            memory,
            segment.address + segment.in_file,
            segment.in_memory - segment.in_file,
        )?;
    }
    let end = segments
        .iter()
        .map(|segment| segment.address + segment.in_memory)
        .max();
    Ok(Loaded {
        entry,
        end: end.unwrap_or(0),
    })
}

fn segments(kernel: &mut Image<'_>) -> Result<Vec<Segment>, BootError> {
    let size = kernel.size()?;
    let mut header = [0; 64];
    kernel.read_at(0, &mut header)?;
    let start = u64_at(&header, 0x20);
    let count = usize::from(u16::from_le_bytes([header[0x38], header[0x39]]));
    let needed = start.saturating_add((count * PHDR_SIZE) as u64);
    if needed > size {
        return Err(BootError::Truncated {
            path: kernel.path.to_owned(),
            needed,
            size,
        });
    }
    let mut table = vec![0; count * PHDR_SIZE];
    kernel.read_at(start, &mut table)?;
    Ok(table
        .chunks_exact(PHDR_SIZE)
        .filter(|phdr| u64_at(phdr, 0) as u32 == PT_LOAD)
        .map(|phdr| Segment {
            offset: u64_at(phdr, 0x08),
            address: u64_at(phdr, 0x18),
            in_file: u64_at(phdr, 0x20),
            in_memory: u64_at(phdr, 0x28),
        })
        .filter(|segment| segment.in_memory > 0)
        .collect())
}

fn check(segments: &[Segment], map: &[Entry], kernel: &mut Image<'_>) -> Result<(), BootError> {
    let size = kernel.size()?;
    if segments.is_empty() {
        let seen = "an ELF file without anything to load".to_owned();
        return Err(BootError::NotAKernel {
            path: kernel.path.to_owned(),
            seen,
        });
    }
    for segment in segments {
        let needed = segment.offset.saturating_add(segment.in_file);
        if needed > size {
            return Err(BootError::Truncated {
                path: kernel.path.to_owned(),
                needed,
                size,
            });
        }
        if segment.in_file > segment.in_memory {
            let seen = "an ELF file that contradicts itself".to_owned();
            return Err(BootError::NotAKernel {
                path: kernel.path.to_owned(),
                seen,
            });
        }
        let end = segment.address.saturating_add(segment.in_memory);
        e820::check_room(map, segment.address..end, kernel.path)?;
    }
    Ok(())
}

fn clear<M: GuestMemoryBackend>(memory: &M, mut start: u64, mut len: u64) -> Result<(), BootError> {
    while len > 0 {
        let some = len.min(ZEROS.len() as u64);
        let address = GuestAddress(start);
        memory
            .write_slice(&ZEROS[..some as usize], address)
            .map_err(|source| BootError::Write {
                what: "the kernel",
                address,
                source,
            })?;
        start += some;
        len -= some;
    }
    Ok(())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(value)
}
