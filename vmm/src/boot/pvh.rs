//! The boot parameters of a PVH kernel (Xen's public `hvm/start_info.h`, version 1).

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Address, ByteValued, Bytes, GuestAddress, GuestMemoryBackend};

use super::params::BootParams;
use super::{BootError, CMDLINE, START_INFO};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const MODULES: GuestAddress = GuestAddress(START_INFO.0 + 0x40);
const MEMORY_MAP: GuestAddress = GuestAddress(START_INFO.0 + 0x80);

/// Writes start info, list of modules (the initramfs is the only one) and memory map.
pub fn write<M: GuestMemoryBackend>(memory: &M, params: &BootParams) -> Result<(), BootError> {
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: CMDLINE.raw_value(),
        rsdp_paddr: params.rsdp.raw_value(),
        memmap_paddr: MEMORY_MAP.raw_value(),
        memmap_entries: params.map.len() as u32,
        ..hvm_start_info::default()
    };
    if let Some(initramfs) = params.initramfs {
        info.nr_modules = 1;
        info.modlist_paddr = MODULES.raw_value();
        let module = hvm_modlist_entry {
            paddr: initramfs.start,
            size: initramfs.size,
            ..hvm_modlist_entry::default()
        };
        put(memory, MODULES, module)?;
    }
    for (index, entry) in params.map.iter().enumerate() {
        let address =
            MEMORY_MAP.unchecked_add((index * size_of::<hvm_memmap_table_entry>()) as u64);
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.end - entry.start,
            type_: entry.kind as u32,
            ..hvm_memmap_table_entry::default()
        };
        put(memory, address, entry)?;
    }
    put(memory, START_INFO, info)
}

fn put<M: GuestMemoryBackend, T: ByteValued>(
    memory: &M,
    address: GuestAddress,
    value: T,
) -> Result<(), BootError> {
    memory
        .write_obj(value, address)
        .map_err(|source| BootError::Write {
            what: "the PVH start info",
            address,
            source,
        })
}
