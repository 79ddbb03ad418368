//! Cases about firmware that a VM boots.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use nix::sys::signal::Signal;

use crate::pool::nothing_is_held;
use crate::runner::{Case, cases};
use crate::vm::Vm;

/// For one host kernel.
pub const CASES: &[Case] = cases![a_firmware_is_entered_and_a_kernel_in_its_place_is_refused];

/// Where the firmware is loaded and entered.
const ENTRY: u32 = 0x10_0000;

/// A firmware that writes `words` to the serial port and halts: an ELF file with a PVH entry.
fn firmware(words: &str) -> Vec<u8> {
    // mov esi, words; mov dx, 0x3f8; next: lodsb; test al, al; je end; out dx, al; jmp next; end: hlt; jmp end
    let mut code = vec![0xbe, 0, 0, 0, 0, 0x66, 0xba, 0xf8, 0x03];
    code.extend([
        0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8, 0xf4, 0xeb, 0xfd,
    ]);
    let words_at = ENTRY + code.len() as u32;
    code[1..5].copy_from_slice(&words_at.to_le_bytes());
    code.extend(words.as_bytes());
    code.push(0);
    // The note XEN_ELFNOTE_PHYS32_ENTRY.
    let note = [4, 4, 18].map(u32::to_le_bytes).concat();
    let note = [&note[..], b"Xen\0", &ENTRY.to_le_bytes()].concat();

    let mut elf = vec![0; 64];
    elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    elf[0x10..0x14].copy_from_slice(&[2, 0, 62, 0]);
    elf[0x20] = 64;
    elf[0x36] = 56;
    elf[0x38] = 2;
    let first = 64 + 2 * 56;
    for (kind, offset, address, len) in [
        (1_u32, first, u64::from(ENTRY), code.len()),
        (4, first + code.len(), 0, note.len()),
    ] {
        elf.extend(kind.to_le_bytes());
        elf.extend(7_u32.to_le_bytes());
        let (offset, len) = (offset as u64, len as u64);
        for field in [offset, address, address, len, len, 4] {
            elf.extend(field.to_le_bytes());
        }
    }
    [elf, code, note].concat()
}

fn a_firmware_is_entered_and_a_kernel_in_its_place_is_refused(host: &Host) -> Result<()> {
    host.write("/tmp/firmware", firmware("firmware: here\n"))?;
    let boot = |file: &str| {
        let mut vm = Vm::new("none");
        vm.file["payload"] = serde_json::json!({"firmware": file});
        vm
    };
    let mut running = boot("/tmp/firmware").start(host)?;
    running.until("firmware: here")?;
    running.signal(Signal::SIGTERM)?;
    running.end()?;
    let refused = boot("/lab/bzImage-debian").run(host)?;
    let words = "payload.firmware: /lab/bzImage-debian is not an x86-64 ELF file with a PVH entry";
    ensure!(refused.errors.contains(words), "{refused}");
    nothing_is_held(host)
}
