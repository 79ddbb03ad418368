//! What becomes of a thread, a process or a helper that makes a system call that it may not make, seen from
//! outside: this program runs itself again as the victim.

#![allow(missing_docs, clippy::expect_used, clippy::panic)] // a test, without the harness's attributes
#![allow(unsafe_code)] // system calls that no library would make

use std::process::{Command, ExitCode, Output};
use std::sync::Arc;

use gantry_vmm::sandbox::{self, Role, Sandbox, SeccompMode};
use gantry_vmm::threads::spawn;
use libc::{c_long, syscall};

const ROLES: [Role; 6] = [
    Role::Control,
    Role::Vcpu(0),
    Role::Device,
    Role::Dma,
    Role::Api,
    Role::Attach,
];
/// A process that builds VMs, and a program that it starts.
const PROCESS: &str = "process";
const HELPER: &str = "helper";
/// The victim's status when its filter ended it, and when the kernel refused a call with an errno.
const ENDED: i32 = 159;
const REFUSED: i32 = 3;

/// A function that makes one call, and its result; below zero the errno, which is the thread's own.
type Call = (&'static str, fn() -> c_long);

/// One call by its number and arguments.
macro_rules! call {
    ($number:expr $(, $argument:expr)*) => {
        || {
            // SAFETY: each call is refused, or does no more than its name says with arguments that are valid
            // or that the kernel turns down.
            told(unsafe { syscall(($number) as c_long $(, ($argument) as c_long)*) })
        }
    };
}

/// A result of [`syscall`] with the errno in it.
fn told(result: c_long) -> c_long {
    match result {
        -1 => -c_long::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(1)),
        result => result,
    }
}

/// What neither a role nor a process that builds VMs does, nor its helpers.
const NEVER: &[Call] = &[
    ("fork", call!(libc::SYS_fork)),
    ("vfork", call!(libc::SYS_vfork)),
    ("clone", call!(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0)),
    (
        "clone-namespace",
        call!(
            libc::SYS_clone,
            libc::CLONE_NEWPID | libc::SIGCHLD,
            0,
            0,
            0,
            0
        ),
    ),
    ("clone3", clone3),
    ("x32", call!(0x4000_0000 | libc::SYS_getpid)),
    ("newer", call!(1000)),
    ("i386", i386),
    (
        "ptrace",
        call!(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0),
    ),
    (
        "process_vm_readv",
        call!(libc::SYS_process_vm_readv, 1, 0, 0, 0, 0, 0),
    ),
    (
        "pidfd_open",
        call!(libc::SYS_pidfd_open, libc::getppid(), 0),
    ),
    ("tkill", call!(libc::SYS_tkill, libc::getppid(), 0)),
    ("userfaultfd", call!(libc::SYS_userfaultfd, 0)),
    ("io_uring_setup", call!(libc::SYS_io_uring_setup, 1, 0)),
    ("bpf", call!(libc::SYS_bpf, 0, 0, 0)),
    ("keyctl", call!(libc::SYS_keyctl, 0, -3, 0)),
    (
        "memfd_create",
        call!(libc::SYS_memfd_create, c"x".as_ptr(), 0),
    ),
    (
        "execveat",
        call!(libc::SYS_execveat, 0, c"".as_ptr(), 0, 0, 0x1000),
    ),
    ("setns", call!(libc::SYS_setns, 0, 0)),
    ("unshare", call!(libc::SYS_unshare, libc::CLONE_FS)),
    ("personality", call!(libc::SYS_personality, 0x0400_0000)),
    (
        "mount_setattr",
        call!(libc::SYS_mount_setattr, -100, c"/".as_ptr(), 0, 0, 0),
    ),
    (
        "open_tree",
        call!(libc::SYS_open_tree, -100, c"/".as_ptr(), 0),
    ),
    ("move_mount", call!(libc::SYS_move_mount, -1, 0, -1, 0, 0)),
    ("fsopen", call!(libc::SYS_fsopen, c"tmpfs".as_ptr(), 0)),
    ("fsconfig", call!(libc::SYS_fsconfig, -1, 0, 0, 0, 0)),
    ("fsmount", call!(libc::SYS_fsmount, -1, 0, 0)),
    ("fspick", call!(libc::SYS_fspick, -100, c"/".as_ptr(), 0)),
    ("pivot_root", call!(libc::SYS_pivot_root, 0, 0)),
    ("chmod", call!(libc::SYS_chmod, c"/nonexistent".as_ptr(), 0)),
    (
        "chown",
        call!(libc::SYS_chown, c"/nonexistent".as_ptr(), 0, 0),
    ),
    (
        "tiocsti",
        call!(libc::SYS_ioctl, 0, libc::TIOCSTI, c"x".as_ptr()),
    ),
    // The kernel looks at 32 bits of a request.
    (
        "tiocsti-high",
        call!(libc::SYS_ioctl, 0, libc::TIOCSTI | 1 << 32, c"x".as_ptr()),
    ),
    (
        "f_setown",
        call!(libc::SYS_fcntl, 0, libc::F_SETOWN, libc::getppid()),
    ),
    (
        "f_setlease",
        call!(libc::SYS_fcntl, 0, libc::F_SETLEASE, libc::F_RDLCK),
    ),
    (
        "prlimit-other",
        call!(
            libc::SYS_prlimit64,
            libc::getppid(),
            libc::RLIMIT_CORE,
            0,
            0
        ),
    ),
    (
        "socket-inet",
        call!(libc::SYS_socket, libc::AF_INET, libc::SOCK_DGRAM, 0),
    ),
    (
        "socket-packet",
        call!(libc::SYS_socket, libc::AF_PACKET, libc::SOCK_RAW, 0),
    ),
    (
        "socket-generic",
        call!(libc::SYS_socket, libc::AF_NETLINK, libc::SOCK_RAW, 16),
    ),
];

/// What no role does. A process that builds VMs opens files and starts programs.
const NEVER_BY_ROLES: &[Call] = &[
    (
        "clone-memory",
        call!(libc::SYS_clone, libc::CLONE_VM | libc::SIGCHLD, 0, 0, 0, 0),
    ),
    (
        "clone-no-thread",
        call!(
            libc::SYS_clone,
            libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND,
            0,
            0,
            0,
            0
        ),
    ),
    (
        "execve",
        call!(libc::SYS_execve, c"/bin/true".as_ptr(), 0, 0),
    ),
    (
        "openat",
        call!(libc::SYS_openat, -100, c"/dev/null".as_ptr(), 0),
    ),
    ("unlink", call!(libc::SYS_unlink, c"/nonexistent".as_ptr())),
    (
        "unlinkat",
        call!(libc::SYS_unlinkat, -100, c"/nonexistent".as_ptr(), 0),
    ),
    (
        "socket",
        call!(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_DGRAM, 0),
    ),
    ("connect", call!(libc::SYS_connect, 0, 0, 0)),
    ("kill", call!(libc::SYS_kill, libc::getppid(), 0)),
    (
        "tgkill-other",
        call!(libc::SYS_tgkill, libc::getppid(), libc::getppid(), 0),
    ),
    (
        "dumpable",
        call!(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0),
    ),
    (
        "mmap-code",
        call!(
            libc::SYS_mmap,
            0,
            4096,
            libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0
        ),
    ),
    (
        "mprotect-code",
        call!(libc::SYS_mprotect, 0, 0, libc::PROT_EXEC),
    ),
    (
        "pkey_mprotect",
        call!(libc::SYS_pkey_mprotect, 0, 0, libc::PROT_EXEC, 0),
    ),
    (
        "setrlimit",
        call!(libc::SYS_prlimit64, 0, libc::RLIMIT_CORE, 0, 0),
    ),
    // Only its clients' sockets are spoken over, and no descriptor is sent.
    ("sendmsg", call!(libc::SYS_sendmsg, 0, 0, 0)),
    ("sendmmsg", call!(libc::SYS_sendmmsg, 0, 0, 0, 0)),
];

/// A child that shares nothing, by the call whose flags no filter sees.
fn clone3() -> c_long {
    // flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls.
    let arguments = [0_u64, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
    // SAFETY: the arguments are a complete `struct clone_args` of the first version.
    told(unsafe {
        syscall(
            libc::SYS_clone3,
            arguments.as_ptr(),
            size_of_val(&arguments),
        )
    })
}

/// getpid as a 32-bit program calls it.
fn i386() -> c_long {
    let mut result: u64 = 20;
    // SAFETY: the call takes no arguments and changes no memory.
    unsafe {
        std::arch::asm!("int 0x80", inout("rax") result, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    result as c_long
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("--victim"), Some(what)) => victim(&what),
        (Some("--deed"), Some(name)) => finish(deed(&name)()),
        _ => {
            check();
            println!("test result: ok. sandbox: all passed");
            ExitCode::SUCCESS
        }
    }
}

fn check() {
    for role in ROLES.map(|role| role.to_string()) {
        for (name, _) in NEVER.iter().chain(NEVER_BY_ROLES) {
            is_refused(&role, name);
        }
    }
    for who in [PROCESS, HELPER] {
        for (name, _) in NEVER {
            is_refused(who, name);
        }
    }
    let (status, stderr) = run("on:vcpu0:socket");
    let sentence = "thread 'vcpu0' made the system call 'socket'";
    assert!(stderr.contains(sentence), "{status:?}: {stderr}");
    for allowed in [
        "on:vcpu0:memory",
        "on:control:thread",
        "on:attach:thread",
        "on:process:thread",
        "on:process:program",
        "on:helper:program",
        "off:vcpu0:socket",
        "log:vcpu0:socket",
        "log:control:thread",
    ] {
        let (status, stderr) = run(allowed);
        assert_eq!(status, Some(0), "{allowed}: {stderr}");
    }
}

/// Its process ended by the filter or by the kernel, or the call's errno was that of a refusal.
fn is_refused(who: &str, name: &str) {
    let (status, stderr) = run(&format!("on:{who}:{name}"));
    let refused = match status {
        Some(ENDED) | None => true,
        Some(REFUSED) => ["errno 1\n", "errno 38\n"].contains(&stderr.as_str()),
        Some(_) => false,
    };
    assert!(refused, "{who} does {name}: {status:?} {stderr}");
}

fn run(what: &str) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = again("--victim", what).output().expect("runs");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

/// This program, with these arguments.
fn again(how: &str, what: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args([how, what]);
    command
}

/// What a name means: a call, or something that is allowed.
fn deed(name: &str) -> fn() -> c_long {
    let calls = NEVER.iter().chain(NEVER_BY_ROLES);
    match name {
        // So much that the allocator gives memory back to the kernel.
        "memory" => || {
            let much = [(); 8].map(|()| vec![1_u8; 100 << 10]);
            drop(std::hint::black_box(much));
            0
        },
        "program" => || {
            let status = again("--deed", "memory").status();
            -c_long::from(!status.is_ok_and(|status| status.success()))
        },
        _ => {
            let mut calls = calls.filter(|(other, _)| *other == name);
            calls.next().expect("a deed").1
        }
    }
}

/// Says what came of a call.
fn finish(result: c_long) -> ExitCode {
    if result >= 0 {
        return ExitCode::SUCCESS;
    }
    eprintln!("errno {}", -result);
    ExitCode::from(REFUSED as u8)
}

/// Does the deed in the place that `what` names, as MODE:PLACE:DEED.
fn victim(what: &str) -> ExitCode {
    let words: Vec<&str> = what.split(':').collect();
    let [mode, place, name] = words[..] else {
        panic!("{what}");
    };
    let mode = match mode {
        "on" => SeccompMode::On,
        "log" => SeccompMode::Log,
        _ => SeccompMode::Off,
    };
    sandbox::install_traps().expect("installs");
    let sandbox = Arc::new(Sandbox::new(mode).expect("compiles"));
    let role = ROLES.into_iter().find(|role| role.to_string() == place);
    // The thread that speaks with clients is made first.
    if role != Some(Role::Api) {
        sandbox.confine_process().expect("confines");
    }
    let inner = Arc::clone(&sandbox);
    let name = name.to_owned();
    let act = move || match name.as_str() {
        "thread" => {
            let thread = spawn(Role::Device, &inner, || ());
            thread.map_or(-1, |thread| {
                thread.join();
                0
            })
        }
        name => deed(name)(),
    };
    match (role, place) {
        (Some(role), _) => finish(spawn(role, &sandbox, act).expect("spawns").join()),
        (None, PROCESS) => finish(act()),
        (None, HELPER) => {
            let status = again("--deed", words[2]).status().expect("runs");
            // A signal ended it, as its filter does.
            ExitCode::from(status.code().map_or(ENDED as u8, |code| code as u8))
        }
        (None, other) => panic!("{other}"),
    }
}
