//! Loads a kernel and its initramfs into guest memory, by the protocol its file calls for.

use std::fs::File;
use std::path::Path;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::layout::Layout;

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

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Placeholder of the first draft.
    #[error("kernel loading is not there yet")]
    Missing,
}

/// Loads kernel and initramfs and writes what the kernel is told at its entry. Called again, with
/// the same files, at every reboot of the guest.
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
    let _ = (memory, layout, kernel, initramfs, cmdline, rsdp);
    Err(BootError::Missing)
}
