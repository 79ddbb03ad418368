//! Expansion ROMs with known contents.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::disk;

/// Size of every expansion ROM of the lab in bytes.
pub const ROM_SIZE: usize = 64 << 10;

/// Writes the ROM called `name` to `path`.
pub fn write(name: &str, path: &Path) -> Result<()> {
    fs::write(path, contents(name)).with_context(|| format!("cannot write {}", path.display()))
}

/// SHA-256 of the ROM called `name`, in lower-case hexadecimal.
pub fn checksum(name: &str) -> String {
    disk::hexadecimal(&Sha256::digest(contents(name)))
}

/// Noise with the headers that Linux looks for (PCI Firmware Specification 3.3, 5.1). The code is for no firmware
/// that the lab has, so none runs it.
pub fn contents(name: &str) -> Vec<u8> {
    const DATA: u8 = 0x40;
    const LAST_IMAGE: u8 = 0x80;
    const OPEN_FIRMWARE: u8 = 1;
    let mut rom = disk::noise(name, ROM_SIZE);
    let units = (ROM_SIZE / 512) as u8;
    let mut put = |at: u8, bytes: &[u8]| {
        let at = usize::from(at);
        rom[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &[0x55, 0xaa, units]);
    put(0x18, &[DATA, 0]);
    put(DATA, b"PCIR");
    put(DATA + 0x0a, &[0x18, 0]);
    put(DATA + 0x10, &[units, 0]);
    put(DATA + 0x14, &[OPEN_FIRMWARE, LAST_IMAGE]);
    rom
}
