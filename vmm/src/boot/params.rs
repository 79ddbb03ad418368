//! The parameters that a kernel is booted with.

use vm_memory::GuestAddress;

use super::e820;

/// The boot parameters of a kernel, in any protocol.
pub struct BootParams {
    /// The memory map.
    pub map: Vec<e820::Entry>,
    /// The initramfs, if there is one.
    pub initramfs: Option<Initramfs>,
    /// Where the ACPI tables begin.
    pub rsdp: GuestAddress,
}

/// The place of the initramfs in RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initramfs {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}
