//! Boot without firmware: kernel, initramfs, memory map and ACPI tables put straight into RAM.
//!
//! The contents of the first megabyte, which the guest may overwrite once it has read them:
//!
//! | address | what |
//! |---|---|
//! | `0x500` | segment descriptors of the 64-bit entry (`cpu::boot_state`) |
//! | [`START_INFO`] | PVH start info, module list, memory map |
//! | [`ZERO_PAGE`] | `boot_params` of the Linux protocol |
//! | `0x9000` | page tables of the 64-bit entry |
//! | [`CMDLINE`] | kernel command line |
//! | `0xe0000` | ACPI tables ([`crate::layout::Layout::acpi`]) |
//! | `0xffff0` | the code of the reset vector |

pub mod acpi;
mod bzimage;
mod e820;
mod elf;
mod error;
mod identify;
mod image;
mod kernel;
mod linux64;
mod params;
mod pvh;
mod reset;

pub use error::BootError;
pub use image::Image;
pub use kernel::{Entry, load, load_firmware};

use vm_memory::GuestAddress;

const START_INFO: GuestAddress = GuestAddress(0x6000);
const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
const CMDLINE: GuestAddress = GuestAddress(0x2_0000);

#[cfg(test)]
mod tests;
