//! The system calls of each role, derived from the code and not from traces.

use gantry_vfio::host::{DMA_REQUESTS, INTERRUPT_REQUESTS, OPEN_REQUESTS, RUNTIME_REQUESTS};
use kvm_bindings as kvm;
use libc::{c_int, c_long, c_ulong};
use seccompiler::{
    SeccompCmpArgLen::{Dword, Qword},
    SeccompCmpOp::{Eq, MaskedEq},
    SeccompCondition, SeccompRule,
};
use vhost::vhost_kern::vhost_binding::{vhost_vring_addr, vhost_vring_file, vhost_vring_state};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

/// Allowed calls; a call with several rules is allowed when one of them holds, with none always.
pub type Rules = Vec<(c_long, Vec<SeccompRule>)>;

/// Calls of any thread: the allocator, locks, logging, panics and the end of the thread.
const EVERY_THREAD: &[c_long] = &[
    // Locks, condition variables, join.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    // The allocator, whose threads share one arena (`trap::install`); mmap and mprotect are below,
    // without PROT_EXEC. glibc asks for a new thread's affinity with the bounds of its stack.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_sched_getaffinity,
    // Hash maps take a seed once a thread.
    libc::SYS_getrandom,
    // Files and eventfds that are open already; fcntl is below.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    // A full log loses its older half, on the thread that logs: see `BoundedFile`.
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_ftruncate,
    // The serial port delays an unfinished line, and waits a moment for a reader.
    libc::SYS_timerfd_settime,
    libc::SYS_poll,
    libc::SYS_ppoll,
    // Logging reads the clock, where the vDSO cannot.
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    // Signals: the kick, the handlers' way back, abort(). tgkill is below, for this process only.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_gettid,
    libc::SYS_getpid,
    // The end restores the terminal, if this job has it.
    libc::SYS_getpgrp,
    // The end of a thread gives its alternate signal stack back.
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// prctl: a thread's name, which the trap asks for too, and its filter; the allocator may name memory.
const PRCTL_OPTIONS: &[libc::c_int] = &[
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_SET_VMA,
];

/// fcntl: descriptors and locks, without the commands that have a signal sent to a process.
const FCNTL_COMMANDS: &[libc::c_int] = &[
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_OFD_SETLK,
    libc::F_OFD_GETLK,
];

/// Making a thread: what glibc and the standard library call in the new one before its own filter, and
/// that filter. clone is in [`rules_with_threads`]; clone3 is answered ENOSYS by the filter of the process.
const MAKES_THREADS: &[c_long] = &[
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_seccomp,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_restrict_self,
];

/// clone: a thread of this process, which ends with it.
const THREAD: c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;
/// clone: flags for a new thread's memory and number, in which C libraries differ.
const THREAD_PLACES: c_int = libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_SETTID
    | libc::CLONE_CHILD_CLEARTID
    | libc::CLONE_DETACHED;

/// Eventfds for vectors of passed-through devices that the guest unmasks.
const VECTORS: &[c_long] = &[libc::SYS_eventfd2];

/// Serving clients over the listening socket and those that it accepts. The HTTP
/// server's event loop wakes itself by an eventfd.
const CLIENTS: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
];

/// The end of a lease clears its record, or tells the opener over its socket. The last lease waits for the
/// opener's end, and each waits for vCPUs that are still in the device.
const LEASES: &[c_long] = &[
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
];

/// Reading and writing a disk at offsets, and waiting for the driver's notifications.
const DISK: &[c_long] = &[
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    // Every ring can only read, write and flush open files: see `Ring`.
    libc::SYS_io_uring_enter,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    // A resize looks at the size of the file.
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
];

/// Looking at the file of a disk, and making the device for it.
const NEW_DISK: &[c_long] = &[libc::SYS_epoll_create1];

/// Waiting for the driver's notifications, and for a source of random numbers.
const QUEUES: &[c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
];

/// The opener sends descriptors, and clients do; what those of clients are is looked at.
const DESCRIPTORS: &[c_long] = &[libc::SYS_recvmsg];
const LOOK: &[c_long] = &[libc::SYS_fstat, libc::SYS_statx, libc::SYS_newfstatat];

/// The control loop, and files that are read again at a reboot of the guest.
const CONTROL: &[c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_readv,
];

const KVMIO: u32 = 0xae;

const fn call(nr: u32) -> c_ulong {
    ioctl_expr(_IOC_NONE, KVMIO, nr, 0)
}

const fn takes<T>(nr: u32) -> c_ulong {
    ioctl_expr(_IOC_WRITE, KVMIO, nr, size_of::<T>() as u32)
}

const fn gives<T>(nr: u32) -> c_ulong {
    ioctl_expr(_IOC_READ, KVMIO, nr, size_of::<T>() as u32)
}

/// BARs are moved and vectors are masked and unmasked, by a vCPU or by a reset.
const VM_REQUESTS: &[c_ulong] = &[
    takes::<kvm::kvm_userspace_memory_region>(0x46), // KVM_SET_USER_MEMORY_REGION
    takes::<kvm::kvm_irqfd>(0x76),                   // KVM_IRQFD
    takes::<kvm::kvm_irq_routing>(0x6a),             // KVM_SET_GSI_ROUTING
    takes::<kvm::kvm_ioeventfd>(0x79),               // KVM_IOEVENTFD
];

const VHOST_VIRTIO: u32 = 0xaf;

const fn vhost<T>(nr: u32) -> c_ulong {
    ioctl_expr(_IOC_WRITE, VHOST_VIRTIO, nr, size_of::<T>() as u32)
}

/// A driver starts or resets a network or a socket device, or moves its interrupts.
const VHOST_REQUESTS: &[c_ulong] = &[
    vhost::<u64>(0x00),               // VHOST_SET_FEATURES
    vhost::<vhost_vring_state>(0x10), // VHOST_SET_VRING_NUM
    vhost::<vhost_vring_addr>(0x11),  // VHOST_SET_VRING_ADDR
    vhost::<vhost_vring_state>(0x12), // VHOST_SET_VRING_BASE
    vhost::<vhost_vring_file>(0x20),  // VHOST_SET_VRING_KICK
    vhost::<vhost_vring_file>(0x21),  // VHOST_SET_VRING_CALL
    vhost::<vhost_vring_file>(0x30),  // VHOST_NET_SET_BACKEND
    vhost::<c_int>(0x61),             // VHOST_VSOCK_SET_RUNNING
    libc::TUNSETOFFLOAD,
];

/// A driver uses more or fewer queues of a tap.
const TAP_REQUESTS: &[c_ulong] = &[libc::TUNSETQUEUE];

const VCPU_REQUESTS: &[c_ulong] = &[call(0x80)]; // KVM_RUN

/// KVM is told of VFIO groups or cdevs that come or go.
const GROUP_REQUESTS: &[c_ulong] = &[
    takes::<kvm::kvm_device_attr>(0xe1), // KVM_SET_DEVICE_ATTR
];

/// Bringing a VM back to its first state.
const CONTROL_REQUESTS: &[c_ulong] = &[
    call(0x80), // KVM_RUN, to complete an access without running the guest
    gives::<kvm::kvm_irqchip>(0x63), // KVM_SET_IRQCHIP, which the kernel declares as a read
    takes::<kvm::kvm_regs>(0x82), // KVM_SET_REGS
    gives::<kvm::kvm_sregs>(0x83), // KVM_GET_SREGS
    takes::<kvm::kvm_sregs>(0x84), // KVM_SET_SREGS
    takes::<kvm::kvm_msrs>(0x89), // KVM_SET_MSRS
    takes::<kvm::kvm_fpu>(0x8d), // KVM_SET_FPU
    takes::<kvm::kvm_lapic_state>(0x8f), // KVM_SET_LAPIC
    takes::<kvm::kvm_mp_state>(0x99), // KVM_SET_MP_STATE
    takes::<kvm::kvm_vcpu_events>(0xa0), // KVM_SET_VCPU_EVENTS
    takes::<kvm::kvm_debugregs>(0xa2), // KVM_SET_DEBUGREGS
    takes::<kvm::kvm_xcrs>(0xa7), // KVM_SET_XCRS
    takes::<kvm::kvm_nested_state>(0xbf), // KVM_SET_NESTED_STATE
    call(0x9a), // KVM_NMI
    call(0xad), // KVM_KVMCLOCK_CTRL
];

/// Logging asks whether stderr is a terminal; the end puts the terminal back, if it is this job's. From glibc 2.42 on,
/// both go by the second set of requests.
const TERMINAL_REQUESTS: &[c_ulong] = &[
    libc::TCGETS2,
    libc::TCSETS2,
    libc::TCSETSW2,
    libc::TCSETSF2,
    libc::TCGETS,
    libc::TCSETS,
    libc::TCSETSW,
    libc::TCSETSF,
    libc::TIOCGWINSZ,
    libc::TIOCGPGRP,
];

/// The first thread, once the VM stands.
pub fn control() -> Rules {
    let requests = [
        VM_REQUESTS,
        CONTROL_REQUESTS,
        GROUP_REQUESTS,
        RUNTIME_REQUESTS,
        VHOST_REQUESTS,
        TAP_REQUESTS,
    ];
    rules_with_threads(&[CONTROL, VECTORS, LEASES], &requests)
}

/// A vCPU thread.
pub fn vcpu() -> Rules {
    rules(
        &[VECTORS],
        &[
            VM_REQUESTS,
            VCPU_REQUESTS,
            INTERRUPT_REQUESTS,
            VHOST_REQUESTS,
            TAP_REQUESTS,
        ],
    )
}

/// A thread that opens, resets or closes a device. Closing takes its BARs and routes away from the guest,
/// and its group away from KVM.
pub fn device() -> Rules {
    let requests = [
        VM_REQUESTS,
        GROUP_REQUESTS,
        OPEN_REQUESTS,
        RUNTIME_REQUESTS,
        VHOST_REQUESTS,
    ];
    rules(&[VECTORS, LEASES], &requests)
}

/// The attach worker. Threads that it starts open, map, close and serve disks: it needs their calls, too.
pub fn attach() -> Rules {
    let requests = [
        VM_REQUESTS,
        GROUP_REQUESTS,
        OPEN_REQUESTS,
        RUNTIME_REQUESTS,
        VHOST_REQUESTS,
    ];
    let calls = [VECTORS, LEASES, DESCRIPTORS, LOOK, DISK, NEW_DISK];
    rules_with_threads(&calls, &requests)
}

/// A thread that maps guest RAM for devices.
pub fn dma() -> Rules {
    rules(&[], &[DMA_REQUESTS])
}

/// A thread that serves a virtual disk, or makes it larger.
pub fn disk() -> Rules {
    rules(&[DISK], &[])
}

/// A thread that serves queues of another virtual device.
pub fn virtio() -> Rules {
    rules(&[QUEUES], &[TAP_REQUESTS])
}

/// The thread that speaks with clients.
pub fn api() -> Rules {
    rules(&[CLIENTS, DESCRIPTORS], &[])
}

/// [`rules`] of a role that makes threads.
fn rules_with_threads(calls: &[&[c_long]], requests: &[&[c_ulong]]) -> Rules {
    let mut rules = rules(calls, requests);
    rules.extend(MAKES_THREADS.iter().map(|&number| (number, Vec::new())));
    let checked = !(THREAD_PLACES as u64);
    let thread = rule(0, Qword, MaskedEq(checked), THREAD as u64);
    rules.push((libc::SYS_clone, thread.into_iter().collect()));
    rules
}

fn rules(calls: &[&[c_long]], requests: &[&[c_ulong]]) -> Rules {
    let always = EVERY_THREAD.iter().chain(calls.iter().copied().flatten());
    let mut rules: Rules = always.map(|&number| (number, Vec::new())).collect();
    let requests = requests.iter().copied().flatten().chain(TERMINAL_REQUESTS);
    let requests = requests
        .filter_map(|&request| rule(1, Qword, Eq, request))
        .collect();
    rules.push((libc::SYS_ioctl, requests));
    // Code is never made while the VM runs.
    let not_executable = || rule(2, Dword, MaskedEq(libc::PROT_EXEC as u64), 0);
    rules.push((libc::SYS_mmap, not_executable().into_iter().collect()));
    rules.push((libc::SYS_mprotect, not_executable().into_iter().collect()));
    let settings = PRCTL_OPTIONS.iter();
    let settings = settings.filter_map(|&option| rule(0, Dword, Eq, option as u64));
    rules.push((libc::SYS_prctl, settings.collect()));
    let commands = FCNTL_COMMANDS.iter();
    let commands = commands.filter_map(|&command| rule(1, Dword, Eq, command as u64));
    rules.push((libc::SYS_fcntl, commands.collect()));
    let own_threads = rule(0, Dword, Eq, std::process::id().into());
    rules.push((libc::SYS_tgkill, own_threads.into_iter().collect()));
    rules
}

/// One condition on argument `index`. `None` only for an argument that no call has.
fn rule(
    index: u8,
    width: seccompiler::SeccompCmpArgLen,
    operator: seccompiler::SeccompCmpOp,
    value: u64,
) -> Option<SeccompRule> {
    let condition = SeccompCondition::new(index, width, operator, value).ok()?;
    SeccompRule::new(vec![condition]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::process::is_never_made;

    fn every_role() -> [Rules; 8] {
        [
            control(),
            vcpu(),
            device(),
            dma(),
            disk(),
            virtio(),
            api(),
            attach(),
        ]
    }

    #[test]
    fn every_role_may_end_itself_and_none_may_open_or_remove_files_or_run_programs() {
        for rules in every_role() {
            let allowed = |number| rules.iter().any(|(call, _)| *call == number);
            assert!(allowed(libc::SYS_exit) && allowed(libc::SYS_exit_group));
            for number in [
                libc::SYS_open,
                libc::SYS_openat,
                libc::SYS_openat2,
                libc::SYS_execve,
                libc::SYS_socket,
                libc::SYS_ptrace,
                libc::SYS_rename,
                libc::SYS_unlink,
                libc::SYS_unlinkat,
                libc::SYS_rmdir,
                libc::SYS_io_uring_setup,
                libc::SYS_io_uring_register,
            ] {
                assert!(!allowed(number), "call {number}");
            }
        }
    }

    #[test]
    fn no_role_may_do_what_is_never_done() {
        for rules in every_role() {
            let allowed = rules.iter().find(|(call, _)| is_never_made(*call));
            assert_eq!(allowed.map(|(call, _)| call), None);
        }
    }

    #[test]
    fn only_roles_that_make_threads_may_clone() {
        for rules in [vcpu(), device(), dma(), disk(), virtio(), api()] {
            let may = |number| rules.iter().any(|(call, _)| *call == number);
            assert!(!may(libc::SYS_clone) && !may(libc::SYS_clone3));
        }
        for rules in [control(), attach()] {
            let clone = rules.iter().find(|(call, _)| *call == libc::SYS_clone);
            assert!(clone.is_some_and(|(_, conditions)| !conditions.is_empty()));
        }
    }

    #[test]
    fn ioctls_executable_memory_and_signals_are_never_free() {
        for rules in every_role() {
            for number in [
                libc::SYS_ioctl,
                libc::SYS_mmap,
                libc::SYS_mprotect,
                libc::SYS_tgkill,
                libc::SYS_prctl,
                libc::SYS_fcntl,
            ] {
                let conditions = rules
                    .iter()
                    .find(|(call, _)| *call == number)
                    .map(|(_, c)| c);
                assert!(conditions.is_some_and(|conditions| !conditions.is_empty()));
            }
        }
    }
}
