//! Identifies the kind of a kernel's file by its first bytes.

/// Bytes at a file's start that are looked at.
pub const HEAD: usize = 0x270;

/// What a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A 64-bit x86 ELF file.
    Elf,
    /// A Linux kernel with its own decompressor.
    BzImage,
    /// Nothing that can be booted, in words that follow "it is".
    Other(String),
}

/// Identifies the kind by the first [`HEAD`] bytes, fewer where the file is shorter.
pub fn identify(head: &[u8]) -> Kind {
    if head.starts_with(b"\x7fELF") {
        return elf(head);
    }
    // The boot sector's signature and the header's magic number, at fixed places in every
    // version of the protocol (Documentation/arch/x86/boot.rst).
    if at(head, 0x1fe, &[0x55, 0xaa]) && at(head, 0x202, b"HdrS") {
        return Kind::BzImage;
    }
    let known = MAGIC
        .iter()
        .find(|(offset, magic, _)| at(head, *offset, magic));
    Kind::Other(match known {
        Some((_, _, what)) => (*what).to_owned(),
        None if head.is_empty() => "an empty file".to_owned(),
        None if is_text(head) => "a text file".to_owned(),
        None => "of a kind that gantry does not know".to_owned(),
    })
}

const MAGIC: [(usize, &[u8], &str); 16] = [
    (0x38, b"ARM\x64", "a kernel for 64-bit ARM (Image)"),
    (0x38, b"RSC\x05", "a kernel for RISC-V (Image)"),
    (0x04, b"zimg", "a compressed EFI kernel (vmlinuz.efi)"),
    (
        0x24,
        &[0x18, 0x28, 0x6f, 0x01],
        "a kernel for 32-bit ARM (zImage)",
    ),
    (
        0,
        &[0x1f, 0x8b],
        "a gzip-compressed file (unpack it with gunzip)",
    ),
    (
        0,
        b"\xfd7zXZ\0",
        "an xz-compressed file (unpack it with unxz)",
    ),
    (
        0,
        &[0x28, 0xb5, 0x2f, 0xfd],
        "a zstd-compressed file (unpack it with unzstd)",
    ),
    (
        0,
        &[0x02, 0x21, 0x4c, 0x18],
        "an lz4-compressed file (unpack it with unlz4)",
    ),
    (
        0,
        &[0x04, 0x22, 0x4d, 0x18],
        "an lz4-compressed file (unpack it with unlz4)",
    ),
    (
        0,
        b"BZh",
        "a bzip2-compressed file (unpack it with bunzip2)",
    ),
    (0, b"070701", "an initramfs (a cpio archive)"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"!<arch>\n", "a package or archive (unpack it)"),
    (0, &[0xed, 0xab, 0xee, 0xdb], "an RPM package (unpack it)"),
    (
        0,
        b"MZ",
        "an EFI program or Windows file without a Linux boot header",
    ),
    (0x1fe, &[0x55, 0xaa], "a disk image or boot sector"),
];

fn elf(head: &[u8]) -> Kind {
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const X86_64: u16 = 62;
    let machine = head
        .get(0x12..0x14)
        .map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    match (head.get(4), head.get(5), machine) {
        (Some(&CLASS_64), Some(&LITTLE_ENDIAN), Some(X86_64)) => Kind::Elf,
        (Some(_), Some(&LITTLE_ENDIAN), Some(machine)) => Kind::Other(match machine {
            3 => "a 32-bit x86 ELF file".to_owned(),
            183 => "an ELF file for 64-bit ARM".to_owned(),
            243 => "an ELF file for RISC-V".to_owned(),
            X86_64 => "a 32-bit ELF file (x32)".to_owned(),
            other => format!("an ELF file for another processor (machine {other})"),
        }),
        (Some(_), Some(_), Some(_)) => Kind::Other("an ELF file for a big-endian machine".into()),
        _ => Kind::Other("the first bytes of an ELF file".into()),
    }
}

fn at(head: &[u8], offset: usize, magic: &[u8]) -> bool {
    head.get(offset..)
        .is_some_and(|rest| rest.starts_with(magic))
}

fn is_text(head: &[u8]) -> bool {
    head.iter()
        .all(|byte| matches!(byte, b'\t' | b'\n' | b'\r' | 0x20..=0x7e | 0x80..=0xff))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        for (offset, bytes) in parts {
            head[*offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    fn seen(head: &[u8]) -> String {
        match identify(head) {
            Kind::Other(seen) => seen,
            kind => format!("{kind:?}"),
        }
    }

    #[test]
    fn kernels_are_recognised() {
        let elf = file(&[(0, b"\x7fELF\x02\x01\x01"), (0x12, &[62, 0])]);
        assert_eq!(identify(&elf), Kind::Elf);
        let bzimage = file(&[(0, b"MZ"), (0x1fe, &[0x55, 0xaa]), (0x202, b"HdrS")]);
        assert_eq!(identify(&bzimage), Kind::BzImage);
    }

    #[test]
    fn other_files_are_named() {
        assert_eq!(seen(b""), "an empty file");
        assert_eq!(seen(b"#!/bin/sh\necho \xc3\xa4\n"), "a text file");
        assert_eq!(seen(b"\x7fELF"), "the first bytes of an ELF file");
        assert_eq!(seen(&file(&[])), "of a kind that gantry does not know");
        for (parts, word) in [
            (&[(0, &[0x1f_u8, 0x8b][..])][..], "gzip"),
            (&[(0, b"MZ"), (0x38, b"ARM\x64")], "64-bit ARM"),
            (&[(0, b"MZ")], "EFI program"),
            (&[(0, b"MZ"), (4, b"zimg")], "compressed EFI kernel"),
            (&[(0, b"\x7fELF\x02\x01"), (0x12, &[183, 0])], "64-bit ARM"),
            (&[(0, b"\x7fELF\x01\x01"), (0x12, &[3, 0])], "32-bit x86"),
            (&[(0, b"\x7fELF\x02\x02"), (0x12, &[0, 22])], "big-endian"),
            (&[(0, b"\x7fELF\x02\x01"), (0x12, &[1, 1])], "machine 257"),
            (&[(0x1fe, &[0x55, 0xaa])], "disk image"),
            (&[(0, b"070701")], "initramfs"),
        ] {
            assert!(
                seen(&file(parts)).contains(word),
                "{word}: {}",
                seen(&file(parts))
            );
        }
    }
}
