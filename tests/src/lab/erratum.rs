//! Mends a fault of QEMU, in the copy that was unpacked for the lab.
//!
//! KVM hands a guest its interrupts through the VMCB's event injection (AMD64 Architecture
//! Programmer's Manual, volume 2, 15.20). QEMU emulates the VMRUN that finds one in `helper_vmrun`:
//! it delivers the interrupt there and then, but leaves its vector noted as a pending exception.
//! Whenever another thread makes the processor leave its loop before the guest's next exit, QEMU
//! takes the note for an exception and delivers the vector again, whether the guest has interrupts
//! switched off or not. Such a guest waits for ever for a lock that it holds itself, or dies by a
//! triple fault: one in some hundred on a busy machine, almost every one where all processors share
//! a thread (`-accel tcg,thread=single`). The mend takes the note away.

use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol};

/// The function that emulates VMRUN, and the one by which it delivers an interrupt.
const VMRUN: &str = "helper_vmrun";
const DELIVER: &str = "do_interrupt_x86_hardirq";
/// How far before the delivery the note is taken.
const REACH: usize = 96;
/// What does nothing, in 6 bytes.
const NOP: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// Mends the QEMU at `program`. `false`, and nothing is changed, if it is not as QEMU 10.0 to 11.1
/// are: mended by its makers, most likely.
pub fn mend(program: &Path) -> Result<bool> {
    let what = || format!("cannot mend {}", program.display());
    let mut bytes = fs::read(program).with_context(what)?;
    let Some(note) = note_in(&bytes).with_context(what)? else {
        return Ok(false);
    };
    let Some(place) = bytes.get_mut(note) else {
        return Ok(false);
    };
    place.copy_from_slice(&NOP);
    fs::write(program, bytes).with_context(what)?;
    Ok(true)
}

/// Where in the ELF file `bytes` the instruction lies that takes the note.
fn note_in(bytes: &[u8]) -> Result<Option<Range<usize>>> {
    let file = ElfFile64::<object::LittleEndian>::parse(bytes)?;
    let find = |name| {
        let mut symbols = file.dynamic_symbols();
        symbols.find(|symbol| symbol.name() == Ok(name))
    };
    let (Some(vmrun), Some(deliver)) = (find(VMRUN), find(DELIVER)) else {
        return Ok(None);
    };
    let mut sections = file.sections();
    let Some(section) = sections.find(|section| vmrun.section_index() == Some(section.index()))
    else {
        return Ok(None);
    };
    let Some(code) = section.data_range(vmrun.address(), vmrun.size())? else {
        return Ok(None);
    };
    let Some((in_file, _)) = section.file_range() else {
        return Ok(None);
    };
    let start = usize::try_from(in_file + (vmrun.address() - section.address()))?;
    let note = store_before_call(code, deliver.address().wrapping_sub(vmrun.address()));
    Ok(note.map(|at| start + at.start..start + at.end))
}

/// Where `code` stores ESI in front of a structure that a register points to (`mov %esi,
/// -N(%register)`: a processor's general state lies before that of its kind), shortly before it
/// calls the function `callee` bytes from its own start. `None` unless that is exactly one place.
fn store_before_call(code: &[u8], callee: u64) -> Option<Range<usize>> {
    let number = |at: usize| {
        let bytes = code.get(at..at + 4)?;
        Some(i32::from_le_bytes(bytes.try_into().ok()?))
    };
    let calls = |at: &usize| {
        let target =
            number(at + 1).map(|offset| (*at as u64 + 5).wrapping_add_signed(offset.into()));
        code.get(*at) == Some(&0xe8) && target == Some(callee)
    };
    let call = (0..code.len()).find(calls)?;
    let stores = |at: &usize| {
        // ModRM: a 32-bit displacement, ESI, and a register that is not RSP.
        let [0x89, modrm @ 0xb0..=0xb7] = code.get(*at..at + 2).unwrap_or_default() else {
            return false;
        };
        *modrm != 0xb4 && number(at + 2).is_some_and(|displacement| displacement < 0)
    };
    let mut found = (call.saturating_sub(REACH)..call.saturating_sub(NOP.len() - 1)).filter(stores);
    let at = found.next()?;
    found.next().is_none().then(|| at..at + NOP.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// movzbl %r12b,%esi; mov %r13d,0x3480(%rbx); the note; mov %rbx,%rdi; the call, at 20, of the
    /// function 0x100 bytes from here.
    const CODE: [u8; 25] = [
        0x41, 0x0f, 0xb6, 0xf4, //
        0x44, 0x89, 0xab, 0x80, 0x34, 0x00, 0x00, //
        0x89, 0xb3, 0x50, 0xc2, 0xff, 0xff, //
        0x48, 0x89, 0xdf, //
        0xe8, 0xe7, 0x00, 0x00, 0x00,
    ];

    #[test]
    fn the_note_is_found() {
        assert_eq!(store_before_call(&CODE, 0x100), Some(11..17));
    }

    #[test]
    fn another_call_a_store_elsewhere_or_two_are_left_alone() {
        assert_eq!(store_before_call(&CODE, 0x101), None, "not that function");
        let mut positive = CODE;
        positive[16] = 0;
        assert_eq!(store_before_call(&positive, 0x100), None, "not in front");
        let twice = [&CODE[11..17], &CODE[..]].concat();
        assert_eq!(store_before_call(&twice, 0x106), None, "which of the two?");
        assert_eq!(store_before_call(&CODE[..20], 0x100), None, "no call");
        assert_eq!(store_before_call(&[], 0), None);
    }

    #[test]
    fn what_is_no_elf_file_is_told_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("qemu");
        fs::write(&file, "no program").unwrap();
        assert!(mend(&file).is_err());
        assert_eq!(fs::read(&file).unwrap(), b"no program");
    }
}
