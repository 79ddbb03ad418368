//! Loading whole kernels, made up here, into a small guest.

use std::fs::File;
use std::io::Write;
use std::ops::RangeInclusive;
use std::path::Path;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::layout::{Layout, LayoutInputs};

const MIB: u64 = 1 << 20;
const RSDP: GuestAddress = GuestAddress(0xe_0000);
const PVH_ENTRY: u32 = 0x20_0010;

struct Guest {
    layout: Layout,
    memory: GuestMemoryMmap,
}

impl Guest {
    /// RAM full of what a former kernel left there.
    fn new(ram: u64, reserved: &[RangeInclusive<u64>]) -> Self {
        let inputs = LayoutInputs {
            root_ports: 255,
            ram,
            physical_bits: 40,
            iova: &[],
            reserved,
        };
        let layout = Layout::plan(&inputs).unwrap();
        let ranges = layout
            .ram
            .iter()
            .map(|r| (GuestAddress(r.start), r.len as usize));
        let memory = GuestMemoryMmap::from_ranges(&ranges.collect::<Vec<_>>()).unwrap();
        for range in &layout.ram {
            memory
                .write_slice(&vec![0xff; range.len as usize], GuestAddress(range.start))
                .unwrap();
        }
        Self { layout, memory }
    }

    fn load(&self, kernel: &[u8], initramfs: Option<&[u8]>) -> Result<Entry, BootError> {
        self.load_with(kernel, initramfs, "console=ttyS0")
    }

    fn load_with(
        &self,
        kernel: &[u8],
        initramfs: Option<&[u8]>,
        cmdline: &str,
    ) -> Result<Entry, BootError> {
        let mut kernel = file(kernel);
        let mut kernel = Image {
            path: Path::new("/k/vmlinux"),
            file: &mut kernel,
        };
        let mut initramfs = initramfs.map(file);
        let mut initramfs = initramfs.as_mut().map(|file| Image {
            path: Path::new("/k/initrd"),
            file,
        });
        load(
            &self.memory,
            &self.layout,
            &mut kernel,
            initramfs.as_mut(),
            cmdline,
            RSDP,
        )
    }

    fn object<T: ByteValued>(&self, address: u64) -> T {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

/// A segment of `content` at `address`, `memory` bytes long once loaded.
struct Segment<'a> {
    kind: u32,
    address: u64,
    content: &'a [u8],
    memory: u64,
}

fn elf(segments: &[Segment<'_>]) -> Vec<u8> {
    let mut header = vec![0; 64];
    header[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    header[0x10..0x14].copy_from_slice(&[2, 0, 62, 0]);
    header[0x20] = 64;
    header[0x36] = 56;
    header[0x38] = segments.len() as u8;
    let mut contents = Vec::new();
    let start = 64 + 56 * segments.len();
    for segment in segments {
        let (offset, len) = (start + contents.len(), segment.content.len());
        header.extend(segment.kind.to_le_bytes());
        header.extend(7_u32.to_le_bytes());
        let (address, len) = (segment.address, len as u64);
        for field in [offset as u64, address, address, len, segment.memory, 4] {
            header.extend(field.to_le_bytes());
        }
        contents.extend(segment.content);
    }
    [header, contents].concat()
}

fn pvh_note() -> Vec<u8> {
    let fields = [4_u32, 4, 18].map(u32::to_le_bytes).concat();
    [&fields[..], b"Xen\0", &PVH_ENTRY.to_le_bytes()].concat()
}

fn vmlinux_at(address: u64, memory: u64, note: &[u8]) -> Vec<u8> {
    elf(&[
        Segment {
            kind: 1,
            address,
            content: &[0x90; 0x1801],
            memory,
        },
        Segment {
            kind: 4,
            address: 0,
            content: note,
            memory: 0,
        },
    ])
}

fn vmlinux() -> Vec<u8> {
    vmlinux_at(2 * MIB, 0x2_3000, &pvh_note())
}

/// One sector of boot code, one of set-up code with the header, then the kernel.
fn bzimage(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        syssize: 0x1000 / 16,
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        version: 0x20f,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x20_0000,
        relocatable_kernel: 1,
        xloadflags: 1,
        cmdline_size: 2047,
        pref_address: 2 * MIB,
        init_size: 0x10_0000,
        ..setup_header::default()
    };
    change(&mut header);
    let mut image = vec![0; 1024];
    image[0x1f1..0x1f1 + header.as_slice().len()].copy_from_slice(header.as_slice());
    [image, vec![0x90; 0x1000]].concat()
}

#[test]
fn a_vmlinux_is_loaded_and_told_by_pvh() {
    let guest = Guest::new(8 * MIB, &[]);
    let initramfs = [7; 5000];
    let entry = guest.load(&vmlinux(), Some(&initramfs)).unwrap();
    let start_info = GuestAddress(0x6000);
    assert_eq!(
        entry,
        Entry::Pvh {
            entry: GuestAddress(PVH_ENTRY.into()),
            start_info
        }
    );

    assert_eq!(guest.bytes(2 * MIB, 0x1801), [0x90; 0x1801]);
    let cleared = 0x2_3000 - 0x1801;
    assert_eq!(
        guest.bytes(2 * MIB + 0x1801, cleared),
        vec![0; cleared],
        "old contents"
    );
    assert_eq!(guest.bytes(2 * MIB + 0x2_3000, 1), [0xff], "nothing beyond");
    assert_eq!(guest.bytes(0x2_0000, 14), b"console=ttyS0\0");

    let info: hvm_start_info = guest.object(0x6000);
    assert_eq!((info.magic, info.version, info.flags), (0x336e_c578, 1, 0));
    assert_eq!((info.cmdline_paddr, info.rsdp_paddr), (0x2_0000, 0xe_0000));
    assert_eq!(info.nr_modules, 1);
    let module: hvm_modlist_entry = guest.object(info.modlist_paddr);
    assert_eq!((module.paddr, module.size), (8 * MIB - 0x2000, 5000));
    assert_eq!(guest.bytes(module.paddr, 5000), initramfs);
    let map: Vec<_> = (0..u64::from(info.memmap_entries))
        .map(|index| guest.object::<hvm_memmap_table_entry>(info.memmap_paddr + index * 24))
        .map(|entry| (entry.addr, entry.size, entry.type_))
        .collect();
    let expected = [
        (0, 0xa_0000, 1),
        (0xe_0000, 0x1_0000, 3),
        (MIB, 7 * MIB, 1),
        (0xe000_0000, 256 * MIB, 2),
    ];
    assert_eq!(map, expected);
}

#[test]
fn a_bzimage_is_loaded_and_told_by_the_zero_page() {
    let guest = Guest::new(8 * MIB, &[]);
    let entry = guest.load(&bzimage(|_| {}), Some(&[7; 0x1000])).unwrap();
    let boot_params = GuestAddress(0x7000);
    assert_eq!(
        entry,
        Entry::Linux64 {
            entry: GuestAddress(2 * MIB + 0x200),
            boot_params
        }
    );
    assert_eq!(guest.bytes(2 * MIB, 0x1000), [0x90; 0x1000]);

    let params: boot_params = guest.object(0x7000);
    let header = params.hdr;
    let (magic, loader) = (header.header, header.type_of_loader);
    assert_eq!((magic, loader), (0x5372_6448, 0xff));
    let initramfs = (header.ramdisk_image, header.ramdisk_size);
    assert_eq!(initramfs, ((8 * MIB - 0x1000) as u32, 0x1000));
    let (cmdline, rsdp) = (header.cmd_line_ptr, params.acpi_rsdp_addr);
    assert_eq!((cmdline, rsdp), (0x2_0000, 0xe_0000));
    assert_eq!(params.e820_entries, 4);
    let table = params.e820_table;
    let (address, size, kind) = (table[2].addr, table[2].size, table[2].r#type);
    assert_eq!((address, size, kind), (MIB, 7 * MIB, 1));
    assert_eq!(params.sentinel, 0, "or Linux takes the page for garbage");
}

#[test]
fn a_reboot_loads_the_same_again() {
    let guest = Guest::new(8 * MIB, &[]);
    let first = guest.load(&vmlinux(), Some(&[7; 5000])).unwrap();
    guest
        .memory
        .write_slice(&vec![0xee; 7 << 20], GuestAddress(MIB))
        .unwrap();
    let second = guest.load(&vmlinux(), None).unwrap();
    assert_eq!(first, second);
    assert_eq!(guest.bytes(2 * MIB + 0x1801, 0x1000), [0; 0x1000]);
    let info: hvm_start_info = guest.object(0x6000);
    assert_eq!((info.nr_modules, info.modlist_paddr), (0, 0));
}

#[test]
fn the_initramfs_stays_below_what_the_kernel_reads_and_out_of_holes() {
    let guest = Guest::new(32 * MIB, &[20 * MIB..=22 * MIB - 1]);
    guest
        .load(
            &bzimage(|header| header.initrd_addr_max = 0x17f_ffff),
            Some(&[7; 10]),
        )
        .unwrap();
    let params: boot_params = guest.object(0x7000);
    let start = params.hdr.ramdisk_image;
    assert_eq!(u64::from(start), 24 * MIB - 0x1000);
    guest
        .load(&bzimage(|_| {}), Some(&vec![7; 13 << 20]))
        .unwrap();
    let params: boot_params = guest.object(0x7000);
    let start = params.hdr.ramdisk_image;
    assert_eq!(
        u64::from(start),
        7 * MIB,
        "12 MiB above the hole are too few"
    );
}

#[test]
fn what_is_no_kernel_is_refused_by_name() {
    let guest = Guest::new(8 * MIB, &[]);
    let text = guest.load(b"#!/bin/sh\n", None).unwrap_err().to_string();
    assert!(text.starts_with("/k/vmlinux is not a kernel"), "{text}");
    assert!(text.contains("a text file"), "{text}");
    let nothing = elf(&[]);
    assert!(matches!(
        guest.load(&nothing, None),
        Err(BootError::NotAKernel { .. })
    ));
    let no_note = vmlinux_at(2 * MIB, 0x2000, &[]);
    assert!(matches!(
        guest.load(&no_note, None),
        Err(BootError::NoPvhEntry { .. })
    ));
    for change in [
        |h: &mut setup_header| h.xloadflags = 0,
        |h: &mut setup_header| h.version = 0x20b,
    ] {
        let old = guest.load(&bzimage(change), None);
        assert!(
            matches!(old, Err(BootError::No64BitEntry { .. })),
            "{old:?}"
        );
    }
    let text = guest
        .load(&bzimage(|header| header.version = 0x20b), None)
        .unwrap_err();
    assert!(text.to_string().contains("boot protocol 2.11"), "{text}");
}

#[test]
fn what_is_no_firmware_is_refused_by_name() {
    let load = |content: &[u8]| {
        let guest = Guest::new(64 * MIB, &[]);
        let mut file = file(content);
        let mut image = Image {
            path: Path::new("fw"),
            file: &mut file,
        };
        load_firmware(&guest.memory, &guest.layout, &mut image, RSDP)
    };
    let entered = Entry::Pvh {
        entry: GuestAddress(PVH_ENTRY.into()),
        start_info: START_INFO,
    };
    assert_eq!(load(&vmlinux()).unwrap(), entered);
    for (content, seen) in [
        (bzimage(|_| {}), "a Linux kernel"),
        (
            vmlinux_at(2 * MIB, 0x2_3000, &[]),
            "an ELF file without one",
        ),
        (b"#!/bin/sh\n".to_vec(), "a text file"),
    ] {
        let refused = load(&content).unwrap_err().to_string();
        assert!(
            refused.starts_with("payload.firmware: fw is not"),
            "{refused}"
        );
        assert!(refused.contains(seen), "{refused}");
    }
}

#[test]
fn files_that_are_cut_short_are_noticed() {
    let guest = Guest::new(8 * MIB, &[]);
    for kernel in [vmlinux(), bzimage(|_| {})] {
        for len in [0x210, kernel.len() / 2, kernel.len() - 40] {
            let refused = guest.load(&kernel[..len], None);
            assert!(
                matches!(refused, Err(BootError::Truncated { .. })),
                "{len:#x}: {refused:?}"
            );
        }
    }
    let refused = guest.load(&vmlinux()[..100], None);
    assert!(matches!(
        refused,
        Err(BootError::Truncated {
            needed: 176,
            size: 100,
            ..
        })
    ));
}

#[test]
fn kernels_that_do_not_fit_say_how_much_they_need() {
    let guest = Guest::new(8 * MIB, &[4 * MIB..=4 * MIB]);
    let big = guest
        .load(&vmlinux_at(6 * MIB, 14 * MIB + 1, &pvh_note()), None)
        .unwrap_err();
    assert!(
        big.to_string().ends_with("give the VM more than 21 MiB"),
        "{big}"
    );
    let in_hole = guest
        .load(&vmlinux_at(3 * MIB, 2 * MIB, &pvh_note()), None)
        .unwrap_err();
    assert!(
        in_hole.to_string().contains("take devices for which"),
        "{in_hole}"
    );
    for address in [0, 0xb_0000, u64::MAX - 0x1900] {
        let odd = guest.load(&vmlinux_at(address, 0x10_0000, &pvh_note()), None);
        assert!(
            matches!(odd, Err(BootError::KernelRoom { .. })),
            "{address:#x}: {odd:?}"
        );
    }
    let big = guest.load(&bzimage(|header| header.init_size = 0x4000_0000), None);
    assert!(matches!(big, Err(BootError::KernelRoom { .. })), "{big:?}");
}

#[test]
fn initramfs_that_does_not_fit_is_refused() {
    let guest = Guest::new(8 * MIB, &[]);
    let big = guest.load(&vmlinux(), Some(&vec![7; 6 << 20])).unwrap_err();
    let text = "/k/initrd of 6 MiB does not fit into guest memory below 2 GiB, of which the VM has \
                8 MiB and the kernel takes those up to 3 MiB";
    assert_eq!(big.to_string(), text);
    let empty = guest.load(&vmlinux(), Some(&[]));
    assert!(matches!(empty, Err(BootError::EmptyInitramfs { .. })));
}

#[test]
fn command_lines_are_whole_or_refused() {
    let guest = Guest::new(8 * MIB, &[]);
    let long = "x".repeat(2047);
    guest.load_with(&vmlinux(), None, &long).unwrap();
    assert_eq!(
        guest.bytes(0x2_0000, 2048),
        [long.as_bytes(), b"\0"].concat()
    );
    let longer = guest.load_with(&vmlinux(), None, &"x".repeat(2048));
    assert!(matches!(
        longer,
        Err(BootError::CmdlineTooLong {
            len: 2048,
            max: 2047
        })
    ));
    let short = bzimage(|header| header.cmdline_size = 255);
    let longer = guest.load_with(&short, None, &"x".repeat(256));
    assert!(matches!(
        longer,
        Err(BootError::CmdlineTooLong { len: 256, max: 255 })
    ));
    let zero = guest.load_with(&vmlinux(), None, "a\0b");
    assert!(matches!(zero, Err(BootError::CmdlineNul)));
}

#[test]
fn damaged_headers_never_panic() {
    use proptest::test_runner::{Config, TestRunner};
    let guest = Guest::new(4 * MIB, &[]);
    let damage = proptest::collection::vec((0..0x300_usize, proptest::num::u8::ANY), 1..6);
    let config = Config {
        failure_persistence: None,
        ..Config::with_cases(300)
    };
    TestRunner::new(config)
        .run(&damage, |damage| {
            for mut kernel in [vmlinux(), bzimage(|_| {})] {
                for (offset, byte) in &damage {
                    kernel[*offset] = *byte;
                }
                // Whether the kernel still boots is not what is asked here.
                let _ = guest.load(&kernel, Some(&[7; 10]));
            }
            Ok(())
        })
        .unwrap();
}
