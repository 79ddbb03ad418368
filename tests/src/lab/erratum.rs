//! Mends two faults of QEMU's SVM, in the copy that was unpacked for the lab.
//!
//! KVM hands a guest its interrupts through the VMCB's event injection (AMD64 Architecture
//! Programmer's Manual, volume 2, 15.20). QEMU emulates the VMRUN that finds one in `helper_vmrun`:
//! it delivers the interrupt there and then, but leaves its vector noted as a pending exception.
//! Whenever another thread makes the processor leave its loop before the guest's next exit, QEMU
//! takes the note for an exception and delivers the vector again, whether the guest has interrupts
//! switched off or not. Such a guest waits for ever for a lock that it holds itself, or dies by a
//! triple fault: one in some hundred on a busy machine, almost every one where all processors share
//! a thread (`-accel tcg,thread=single`). The mend takes the note away.
//!
//! While a guest runs, QEMU keeps the exception that it delivers to it in EVENTINJ, in case the
//! delivery itself exits (`do_interrupt_all`). After the delivery it clears the valid bit and leaves
//! the type and the vector there; the next exit copies them to EXITINTINFO. Linux 6.14 and later look
//! at the type alone (`svm_check_emulate_instruction`): a guest that faults on a page and then reads
//! a register that KVM does not map, with no exit between, ends with KVM's internal error 3. The mend
//! clears the whole field.

use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use object::read::elf::ElfFile64;
use object::{LittleEndian, Object, ObjectSection, ObjectSymbol};

/// The function that emulates VMRUN, and the one by which it delivers an interrupt.
const VMRUN: &str = "helper_vmrun";
const DELIVER: &str = "do_interrupt_x86_hardirq";
/// The function that delivers every interrupt and exception.
const DELIVER_ANY: &str = "do_interrupt_all";
/// How far before the delivery the note is taken.
const REACH: usize = 96;
/// An instruction of 6 bytes that does nothing.
const NOP: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];
/// `and $0x7fffffff, %eax`, which keeps all but the valid bit, and `and $0, %eax`.
const KEEP_TYPE: [u8; 5] = [0x25, 0xff, 0xff, 0xff, 0x7f];
const KEEP_NOTHING: [u8; 5] = [0x25, 0, 0, 0, 0];

/// Mends the QEMU at `program`. `false`, and nothing is changed, if it is not as QEMU 10.0 to 11.1
/// are: mended by its makers, most likely.
pub fn mend(program: &Path) -> Result<bool> {
    let what = || format!("cannot mend {}", program.display());
    let mut bytes = fs::read(program).with_context(what)?;
    let Some(patches) = patches(&bytes).with_context(what)? else {
        return Ok(false);
    };
    for (at, code) in patches {
        let place = bytes.get_mut(at).filter(|place| place.len() == code.len());
        let Some(place) = place else {
            return Ok(false);
        };
        place.copy_from_slice(code);
    }
    fs::write(program, bytes).with_context(what)?;
    Ok(true)
}

/// Where a program changes, and to what.
type Patch = (Range<usize>, &'static [u8]);

/// What mends the ELF file `bytes`.
fn patches(bytes: &[u8]) -> Result<Option<[Patch; 2]>> {
    let file = ElfFile64::<LittleEndian>::parse(bytes)?;
    let (Some(vmrun), Some(deliver), Some(any)) = (
        function(&file, VMRUN)?,
        function(&file, DELIVER)?,
        function(&file, DELIVER_ANY)?,
    ) else {
        return Ok(None);
    };
    let note = store_before_call(vmrun.code, deliver.address.wrapping_sub(vmrun.address));
    let (Some(note), Some(clear)) = (note, only(any.code, &KEEP_TYPE)) else {
        return Ok(None);
    };
    Ok(Some([
        (vmrun.in_file(note), &NOP),
        (any.in_file(clear), &KEEP_NOTHING),
    ]))
}

/// A function of a program.
struct Function<'a> {
    address: u64,
    code: &'a [u8],
    offset: usize,
}

impl Function<'_> {
    /// The range of the file that the range `of` its code lies in.
    fn in_file(&self, of: Range<usize>) -> Range<usize> {
        self.offset + of.start..self.offset + of.end
    }
}

/// The function that a program exports as `name`.
fn function<'a>(file: &ElfFile64<'a, LittleEndian>, name: &str) -> Result<Option<Function<'a>>> {
    let mut symbols = file.dynamic_symbols();
    let Some(symbol) = symbols.find(|symbol| symbol.name() == Ok(name)) else {
        return Ok(None);
    };
    let mut sections = file.sections();
    let Some(section) = sections.find(|section| symbol.section_index() == Some(section.index()))
    else {
        return Ok(None);
    };
    let address = symbol.address();
    let code = section.data_range(address, symbol.size())?;
    let (Some(code), Some((in_file, _))) = (code, section.file_range()) else {
        return Ok(None);
    };
    let offset = usize::try_from(in_file + (address - section.address()))?;
    Ok(Some(Function {
        address,
        code,
        offset,
    }))
}

/// Where `code` holds `instruction`. `None` unless that is exactly one place.
fn only(code: &[u8], instruction: &[u8]) -> Option<Range<usize>> {
    let windows = code.windows(instruction.len());
    let mut found = windows
        .enumerate()
        .filter(|(_, window)| *window == instruction);
    let (at, _) = found.next()?;
    found.next().is_none().then(|| at..at + instruction.len())
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
    fn an_instruction_is_found_if_it_is_the_only_one() {
        let code = [&[0x90], &KEEP_TYPE[..], &[0x89, 0xc2]].concat();
        assert_eq!(only(&code, &KEEP_TYPE), Some(1..6));
        assert_eq!(only(&code.repeat(2), &KEEP_TYPE), None, "which of the two?");
        assert_eq!(only(&code[2..], &KEEP_TYPE), None);
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
