//! The boot parameters of the 64-bit Linux boot protocol: the zero page (Documentation/arch/x86/zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Address, Bytes, GuestMemoryBackend};

use super::params::BootParams;
use super::{BootError, CMDLINE, ZERO_PAGE};

/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the zero page around the header that came with the kernel.
pub fn write<M: GuestMemoryBackend>(
    memory: &M,
    params: &BootParams,
    header: setup_header,
) -> Result<(), BootError> {
    let mut zero_page = boot_params {
        hdr: header,
        ..boot_params::default()
    };
    zero_page.hdr.type_of_loader = LOADER_UNDEFINED;
    zero_page.hdr.cmd_line_ptr = CMDLINE.raw_value() as u32;
    if let Some(initramfs) = params.initramfs {
        zero_page.hdr.ramdisk_image = initramfs.start as u32;
        zero_page.hdr.ramdisk_size = initramfs.size as u32;
        zero_page.ext_ramdisk_image = (initramfs.start >> 32) as u32;
        zero_page.ext_ramdisk_size = (initramfs.size >> 32) as u32;
    }
    zero_page.acpi_rsdp_addr = params.rsdp.raw_value();
    zero_page.e820_entries = params.map.len() as u8;
    let mut table = zero_page.e820_table;
    for (slot, entry) in table.iter_mut().zip(&params.map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.end - entry.start,
            r#type: entry.kind as u32,
        };
    }
    zero_page.e820_table = table;
    memory
        .write_obj(zero_page, ZERO_PAGE)
        .map_err(|source| BootError::Write {
            what: "the zero page",
            address: ZERO_PAGE,
            source,
        })
}
