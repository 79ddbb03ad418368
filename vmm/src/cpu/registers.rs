//! The registers of the boot vCPU at the kernel's entry, and the tables that they point to.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

/// Segment descriptors of the 64-bit entry.
const GDT: GuestAddress = GuestAddress(0x500);
/// Page tables of the 64-bit entry: one page of each upper level, then a directory for each GiB.
const PAGE_TABLES: u64 = 0x9000;
const PAGE: u64 = 0x1000;
/// Identity-mapped by the 64-bit entry: all memory that can hold the kernel's boot parameters.
const MAPPED_GIB: u64 = 4;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The one bit of RFLAGS that is always set.
const RFLAGS: u64 = 1 << 1;

/// `__BOOT_CS` and `__BOOT_DS` of the Linux boot protocol.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

/// PVH (Xen's `docs/misc/pvh`): 32-bit protected mode, flat segments, no paging.
pub fn pvh(sregs: &mut kvm_sregs, entry: GuestAddress, start_info: GuestAddress) -> kvm_regs {
    segments(sregs, code(false), task());
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    kvm_regs {
        rflags: RFLAGS,
        rip: entry.0,
        rbx: start_info.0,
        ..kvm_regs::default()
    }
}

/// The 64-bit Linux boot protocol: long mode, identity mapping. [`write_tables`] writes what the
/// registers refer to.
pub fn linux64(sregs: &mut kvm_sregs, entry: GuestAddress, boot_params: GuestAddress) -> kvm_regs {
    segments(sregs, code(true), task());
    sregs.gdt.base = GDT.0;
    sregs.gdt.limit = (size_of_val(&descriptors()) - 1) as u16;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    kvm_regs {
        rflags: RFLAGS,
        rip: entry.0,
        rsi: boot_params.0,
        ..kvm_regs::default()
    }
}

/// Writes the descriptors and page tables of the 64-bit entry.
pub fn write_tables<M: GuestMemoryBackend>(memory: &M) -> Result<(), GuestMemoryError> {
    memory.write_obj(descriptors(), GDT)?;
    let (top, pointers) = (PAGE_TABLES, PAGE_TABLES + PAGE);
    let directories = pointers + PAGE;
    write_table(memory, top, &[pointers | PRESENT_WRITABLE])?;
    let directory = |index| directories + index * PAGE;
    let entries: Vec<_> = (0..MAPPED_GIB)
        .map(|index| directory(index) | PRESENT_WRITABLE)
        .collect();
    write_table(memory, pointers, &entries)?;
    for index in 0..MAPPED_GIB {
        let pages = (0..512).map(|page| index << 30 | page << 21 | PRESENT_WRITABLE | LARGE);
        write_table(memory, directory(index), &pages.collect::<Vec<_>>())?;
    }
    Ok(())
}

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

fn write_table<M: GuestMemoryBackend>(
    memory: &M,
    address: u64,
    entries: &[u64],
) -> Result<(), GuestMemoryError> {
    let mut page = [0; PAGE as usize];
    for (bytes, entry) in page.chunks_mut(8).zip(entries) {
        bytes.copy_from_slice(&entry.to_le_bytes());
    }
    memory.write_slice(&page, GuestAddress(address))
}

fn segments(sregs: &mut kvm_sregs, code: kvm_segment, task: kvm_segment) {
    let data = data();
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = task;
}

/// Flat code, executable, readable and accessed, of 64 or 32 bits.
fn code(long: bool) -> kvm_segment {
    kvm_segment {
        selector: CODE_SELECTOR,
        type_: 0b1011,
        l: long.into(),
        db: (!long).into(),
        ..data()
    }
}

/// Flat data, writable and accessed.
fn data() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: DATA_SELECTOR,
        type_: 0b0011,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    }
}

/// A busy task state segment: VM entry insists on one.
fn task() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        type_: 0b1011,
        present: 1,
        ..kvm_segment::default()
    }
}

/// The null descriptor, one more that Linux leaves out, then code and data.
fn descriptors() -> [u64; 4] {
    [0, 0, descriptor(&code(true)), descriptor(&data())]
}

/// A segment descriptor as it is in memory (Intel, volume 3, 3.4.5); its limit in pages, its base 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    let bits = [
        (segment.type_, 40),
        (segment.s, 44),
        (segment.dpl, 45),
        (segment.present, 47),
        (segment.l, 53),
        (segment.db, 54),
        (segment.g, 55),
    ];
    let limit = u64::from(segment.limit >> 12);
    let fields = bits
        .iter()
        .fold(0, |all, (value, shift)| all | u64::from(*value) << shift);
    limit & 0xffff | (limit >> 16) << 48 | fields
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    #[test]
    fn pvh_enters_in_protected_mode_without_paging() {
        let mut sregs = kvm_sregs {
            cr0: 0x6000_0010,
            cr4: 0x20,
            efer: 0x500,
            apic_base: 0xfee0_0900,
            ..kvm_sregs::default()
        };
        let regs = pvh(&mut sregs, GuestAddress(0x100_0110), GuestAddress(0x6000));
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0110, 0x6000, 2));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
        assert_eq!(sregs.apic_base, 0xfee0_0900, "kept");
        let cs = sregs.cs;
        assert_eq!(
            (cs.base, cs.limit, cs.type_, cs.db, cs.l, cs.s),
            (0, u32::MAX, 11, 1, 0, 1)
        );
        for segment in [sregs.ds, sregs.es, sregs.ss] {
            assert_eq!(
                (segment.base, segment.limit, segment.type_),
                (0, u32::MAX, 3)
            );
        }
        assert_eq!((sregs.tr.limit, sregs.tr.type_, sregs.tr.s), (0x67, 11, 0));
    }

    #[test]
    fn linux64_enters_in_long_mode() {
        let mut sregs = kvm_sregs::default();
        let regs = linux64(&mut sregs, GuestAddress(0x100_0200), GuestAddress(0x7000));
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0200, 0x7000, 2));
        assert_eq!(
            (sregs.cr0, sregs.cr3, sregs.cr4),
            (0x8000_0011, 0x9000, 0x20)
        );
        assert_eq!(sregs.efer, 0x500);
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
        assert_eq!((sregs.ds.selector, sregs.ss.selector), (0x18, 0x18));
        assert_eq!((sregs.gdt.base, sregs.gdt.limit), (0x500, 31));
    }

    #[test]
    fn tables_map_four_gib_to_themselves() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        // What a reboot finds there.
        memory
            .write_slice(&[0xff; 0x6000], GuestAddress(PAGE_TABLES))
            .unwrap();
        write_tables(&memory).unwrap();
        let read = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(
            [0x510, 0x518].map(read),
            [0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
        );

        let walk = |address: u64| {
            let level = |table: u64, shift: u64| read(table + (address >> shift & 511) * 8);
            let pointers = level(0x9000, 39);
            let directory = level(pointers & !0xfff, 30);
            let page = level(directory & !0xfff, 21);
            let all = pointers & directory & page & 0b11;
            (all == 0b11 && page & LARGE != 0).then_some(page & !0x1f_ffff | address & 0x1f_ffff)
        };
        for address in [0, 0x7000, 0x100_0200, 0x7fff_ffff, 0xffff_ffff] {
            assert_eq!(walk(address), Some(address), "{address:#x}");
        }
        assert_eq!(read(0xa000 + 4 * 8), 0, "nothing beyond 4 GiB");
        assert_eq!(read(0x9008), 0);
    }
}
