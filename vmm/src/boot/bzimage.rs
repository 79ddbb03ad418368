//! Loads a `bzImage` that is entered in 64-bit mode (Documentation/arch/x86/boot.rst).

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

use super::BootError;
use super::e820::{self, Entry};
use super::image::Image;

/// The offset of the header, in the file and in the zero page.
const HEADER: u64 = 0x1f1;
/// The first version of the protocol that has `xloadflags`.
const VERSION_2_12: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry, from where the kernel was loaded.
const ENTRY_64: u64 = 0x200;

/// A kernel in memory.
#[derive(Debug)]
pub struct Loaded {
    /// 64-bit entry point.
    pub entry: GuestAddress,
    /// First guest-physical address beyond what the kernel takes while it unpacks itself.
    pub end: u64,
    /// The header, for the zero page.
    pub header: setup_header,
}

/// Reads the kernel into the RAM of `map`, at its preferred address, to which it would move itself otherwise.
pub fn load<M: GuestMemoryBackend>(
    memory: &M,
    map: &[Entry],
    kernel: &mut Image<'_>,
) -> Result<Loaded, BootError> {
    let mut header = setup_header::default();
    kernel.read_at(HEADER, header.as_mut_slice())?;
    let version = header.version;
    if version < VERSION_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry {
            path: kernel.path.to_owned(),
            version,
        });
    }
    check_whole(&header, kernel)?;
    let start = header.pref_address;
    let end = start.saturating_add(u64::from(header.init_size));
    e820::check_room(map, start..end, kernel.path)?;
    let loaded =
        BzImage::load(memory, Some(GuestAddress(start)), kernel.file, None).map_err(|source| {
            BootError::Load {
                path: kernel.path.to_owned(),
                source,
            }
        })?;
    Ok(Loaded {
        entry: GuestAddress(start + ENTRY_64),
        end: end.max(loaded.kernel_end),
        header: loaded.setup_header.unwrap_or(header),
    })
}

fn check_whole(header: &setup_header, kernel: &mut Image<'_>) -> Result<(), BootError> {
    let sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let setup = (sectors + 1) * 512;
    // `syssize` counts units of 16 bytes; the last one may be a part.
    let needed = setup + (u64::from(header.syssize) * 16).saturating_sub(15);
    let size = kernel.size()?;
    if size < needed {
        return Err(BootError::Truncated {
            path: kernel.path.to_owned(),
            needed,
            size,
        });
    }
    Ok(())
}
