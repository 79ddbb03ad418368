//! Why a kernel could not be loaded, in words for the user.

use std::path::PathBuf;

use vm_memory::{GuestAddress, GuestMemoryError};

const MIB: u64 = 1 << 20;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is something else.
    #[error(
        "{path} is not a kernel that can be booted, but {seen}; give an x86-64 bzImage (as \
         /boot/vmlinuz-* mostly are) or an uncompressed vmlinux built with CONFIG_PVH"
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        seen: String,
    },
    /// The file is no firmware.
    #[error(
        "payload.firmware: {path} is not an x86-64 ELF file with a PVH entry, but {seen}; give such a firmware, as \
         rust-hypervisor-firmware's `hypervisor-fw` is"
    )]
    NotAFirmware {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        seen: String,
    },
    /// The file ends before its own headers say.
    #[error(
        "{path} is cut short: it has {size} bytes, and its headers say {needed}; copy it again"
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that there should be at least.
        needed: u64,
        /// Bytes that there are.
        size: u64,
    },
    /// A vmlinux that cannot be entered.
    #[error(
        "{path} has no PVH entry: build the kernel with CONFIG_PVH=y, or give its bzImage \
         (arch/x86/boot/bzImage) instead"
    )]
    NoPvhEntry {
        /// The file.
        path: PathBuf,
    },
    /// A bzImage that cannot be entered in 64-bit mode.
    #[error(
        "{path} has no 64-bit entry (boot protocol {}.{:02}, 2.12 with a 64-bit kernel is needed): \
         it is a 32-bit kernel or older than Linux 3.8", version >> 8, version & 0xff
    )]
    No64BitEntry {
        /// The file.
        path: PathBuf,
        /// Version of the boot protocol.
        version: u16,
    },
    /// The kernel's file contradicts itself.
    #[error("cannot load {path}")]
    Load {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// Guest memory is too small for the kernel, or a hole lies in its place.
    #[error(
        "{path} does not fit into guest memory: it takes {start:#x} to {end:#x} while it starts; \
         give the VM more than {} MiB{}",
        end.div_ceil(MIB),
        if *end < *low_ram { ", or take devices for which the host reserves no addresses there" } else { "" }
    )]
    KernelRoom {
        /// The file.
        path: PathBuf,
        /// First guest-physical address it takes.
        start: u64,
        /// First guest-physical address beyond.
        end: u64,
        /// End of the guest's RAM below 4 GiB.
        low_ram: u64,
    },
    /// Guest memory is too small for the initramfs.
    #[error(
        "{path} of {} MiB does not fit into guest memory below 2 GiB, of which the VM has {} MiB \
         and the kernel takes those up to {} MiB",
        size.div_ceil(MIB), low_ram / MIB, kernel_end.div_ceil(MIB)
    )]
    InitramfsRoom {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// First guest-physical address beyond the kernel.
        kernel_end: u64,
        /// End of the guest's RAM below 4 GiB.
        low_ram: u64,
    },
    /// The initramfs has no bytes.
    #[error("{path} is empty; give a file, or leave the initramfs out")]
    EmptyInitramfs {
        /// The file.
        path: PathBuf,
    },
    /// The kernel would cut the command line off.
    #[error("the kernel command line has {len} bytes, and this kernel reads at most {max}")]
    CmdlineTooLong {
        /// Bytes given.
        len: usize,
        /// Bytes that the kernel reads.
        max: usize,
    },
    /// The kernel would see only the part before a zero byte.
    #[error("the kernel command line contains a zero byte")]
    CmdlineNul,
    /// The memory map has more entries than the boot protocol can pass on.
    #[error("the guest's memory map has {0} entries, more than the {max} that a kernel reads", max = super::e820::MAX_ENTRIES)]
    MemoryMap(usize),
    /// Guest memory could not be written.
    #[error("cannot write {what} at guest address {:#x}", address.0)]
    Write {
        /// What should have been written.
        what: &'static str,
        /// Where.
        address: GuestAddress,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
}
