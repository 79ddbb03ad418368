//! Signal handlers for a blocked call or a crash: they print one line and restore the terminal.
//!
//! A panic prints its message first, but no backtrace: reading debug information opens files. With
//! `RUST_BACKTRACE=1` the second line is about a blocked `openat`; with `--seccomp off` the backtrace follows.
#![allow(unsafe_code)] // signal handlers, and one setting of the allocator.

use std::io;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use syscalls::Sysno;

use crate::process::terminal::restore_terminal;

/// Makes a vCPU leave the kernel. Its handler does nothing: the signal's only purpose is to interrupt KVM_RUN.
pub const KICK: Signal = Signal::SIGUSR1;

/// Exit status of a process whose filter caught a call, as shells report a death by SIGSYS.
const BLOCKED_CALL_STATUS: libc::c_int = 128 + libc::SIGSYS;

/// Signals that end the process for a fault of its own.
const FAULTS: [Signal; 5] = [
    Signal::SIGABRT,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGILL,
    Signal::SIGSEGV,
];

/// Installs the handlers, for the whole process, and keeps the allocator from a call that no filter
/// allows. To be called before any thread is made.
///
/// # Errors
/// The kernel refused a handler.
pub fn install() -> io::Result<()> {
    handle(
        Signal::SIGSYS,
        SigHandler::SigAction(on_blocked_call),
        SaFlags::SA_SIGINFO,
    )?;
    // Interrupts a vCPU's KVM_RUN, and does nothing else.
    handle(KICK, SigHandler::Handler(on_kick), SaFlags::empty())?;
    for fault in FAULTS {
        // Once: the instruction that faulted runs again, or abort() raises again, and the default
        // action ends the process as it would have without this handler.
        let flags = SaFlags::SA_RESETHAND | SaFlags::SA_ONSTACK;
        handle(fault, SigHandler::Handler(on_fault), flags)?;
    }
    share_one_arena();
    Ok(())
}

/// Before glibc shrinks an arena that is not its first, it opens a file of /proc to learn whether
/// memory may be overcommitted. The first arena shrinks without asking, so all threads use that one.
fn share_one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt sets a number, and has nothing else to hold.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}

fn handle(signal: Signal, handler: SigHandler, flags: SaFlags) -> io::Result<()> {
    let action = SigAction::new(handler, flags, SigSet::empty());
    // SAFETY: the handlers call nothing but async-signal-safe functions.
    unsafe { sigaction(signal, &action) }?;
    Ok(())
}

extern "C" fn on_kick(_signal: libc::c_int) {}

extern "C" fn on_fault(_signal: libc::c_int) {
    restore_terminal();
}

/// `si_syscall` of the SIGSYS layout of `siginfo_t` (signal number, errno and code, padding, then
/// the address of the call), which the C library's bindings leave out.
#[repr(C)]
struct BlockedCall {
    head: [libc::c_int; 4],
    address: *mut libc::c_void,
    number: libc::c_int,
}

extern "C" fn on_blocked_call(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a complete siginfo_t, larger than the part read here, and SIGSYS
    // of a filter fills this layout.
    let number = unsafe { (*info.cast::<BlockedCall>()).number };
    restore_terminal();
    let name = usize::try_from(number)
        .ok()
        .and_then(Sysno::new)
        .map_or("?", |call| call.name());
    let mut thread = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let thread_len = thread
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(thread.len());
    say(b"gantry: thread '");
    say(thread.get(..thread_len).unwrap_or(&[]));
    say(b"' made the system call '");
    say(name.as_bytes());
    if libc::c_long::from(number) == libc::SYS_ioctl {
        say(b"(");
        say(&hexadecimal(second_argument(context)));
        say(b")");
    }
    say(b"', which its filter does not allow\n\
        if the guest runs well with `--seccomp log`, this is a mistake in gantry: please report it\n");
    // SAFETY: ends the process; nothing is unwound.
    unsafe { libc::_exit(BLOCKED_CALL_STATUS) };
}

/// The second argument of the blocked call: an ioctl's request number.
fn second_argument(context: *const libc::c_void) -> u32 {
    // SAFETY: the kernel passes a complete ucontext_t to a handler with SA_SIGINFO.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    registers
        .get(libc::REG_RSI as usize)
        .map_or(0, |&value| value as u32)
}

/// Without the allocator, which a signal handler may not call.
fn hexadecimal(value: u32) -> [u8; 10] {
    let mut text = *b"0x00000000";
    for (place, digit) in text.iter_mut().skip(2).enumerate() {
        let nibble = (value >> (28 - 4 * place)) as u8 & 0xf;
        *digit = if nibble < 10 {
            b'0' + nibble
        } else {
            b'a' + nibble - 10
        };
    }
    text
}

fn say(text: &[u8]) {
    // SAFETY: the buffer is valid for its length; a failed write has nowhere to be reported.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_written_as_programs_print_them() {
        assert_eq!(&hexadecimal(0xae80), b"0x0000ae80");
        assert_eq!(&hexadecimal(0x4018_aee1), b"0x4018aee1");
    }
}
