//! Disks with known contents: reproducible noise made from a name.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// Size of every disk of the lab in bytes.
pub const DISK_SIZE: usize = 8 << 20;

/// Writes the disk of `serial` to `path`: SHA-256 in counter mode over the serial.
pub fn write(serial: &str, path: &Path) -> Result<()> {
    fs::write(path, contents(serial)).with_context(|| format!("cannot write {}", path.display()))
}

/// SHA-256 of the whole disk of `serial`, in lower-case hexadecimal.
pub fn checksum(serial: &str) -> String {
    hexadecimal(&Sha256::digest(contents(serial)))
}

fn contents(serial: &str) -> Vec<u8> {
    noise(serial, DISK_SIZE)
}

/// So many bytes, a multiple of 32, that depend on the name alone.
pub(super) fn noise(name: &str, size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size);
    let mut counter = 0u64;
    while bytes.len() < size {
        let mut hash = Sha256::new();
        hash.update(name.as_bytes());
        hash.update(counter.to_le_bytes());
        bytes.extend_from_slice(&hash.finalize());
        counter += 1;
    }
    bytes
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_reproducible_and_differ() {
        assert_eq!(contents("A").len(), DISK_SIZE);
        assert_eq!(checksum("A"), checksum("A"));
        assert_ne!(checksum("A"), checksum("B"));
    }
}
