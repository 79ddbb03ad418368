//! Boot without firmware: kernel, initramfs, memory map and ACPI tables put straight into RAM.

pub mod acpi;
mod kernel;

pub use kernel::{BootError, Entry, Image, load};
