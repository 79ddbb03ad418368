//! The boot parameters of the 64-bit Linux boot protocol: the zero page (Documentation/arch/x86/zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Address, Bytes, GuestMemoryBackend};

use super::kernel::Handover;
use super::{BootError, CMDLINE, ZERO_PAGE};

/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the zero page around the header that came with the kernel.
pub fn write<M: GuestMemoryBackend>(
    memory: &M,
    handover: &Handover,
    header: setup_header,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: header,
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE.raw_value() as u32;
    if let Some(initramfs) = handover.initramfs {
        params.hdr.ramdisk_image = initramfs.start as u32;
        params.hdr.ramdisk_size = initramfs.size as u32;
        params.ext_ramdisk_image = (initramfs.start >> 32) as u32;
        params.ext_ramdisk_size = (initramfs.size >> 32) as u32;
    }
    params.acpi_rsdp_addr = handover.rsdp.raw_value();
    params.e820_entries = handover.map.len() as u8;
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(&handover.map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.end - entry.start,
            r#type: entry.kind as u32,
        };
    }
    params.e820_table = table;
    memory
        .write_obj(params, ZERO_PAGE)
        .map_err(|source| BootError::Write {
            what: "the zero page",
            address: ZERO_PAGE,
            source,
        })
}
