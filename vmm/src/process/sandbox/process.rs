//! The filters of the whole process and of every helper: calls that nothing in gantry makes.

use libc::{c_int, c_long};
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq, Ne};
use seccompiler::{BpfProgram, SeccompCondition, SeccompRule, sock_filter};
use syscalls::Sysno;

use super::filters::Rules;

/// The newest call that [`NEVER`] was reviewed for. Newer ones do not exist for the process.
const NEWEST: c_long = Sysno::lsm_list_modules.id() as c_long;

/// Calls that no thread and no helper makes, with any arguments.
const NEVER: &[c_long] = &[
    // Copies of this process. Programs are started by clone with CLONE_VM, see below.
    libc::SYS_fork,
    libc::SYS_vfork,
    // Other processes: their memory, their files, their scheduling, signals beside kill. Landlock limits what
    // kill can reach.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_kcmp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_get_robust_list,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_setattr,
    // Programs that no Landlock rule names.
    libc::SYS_execveat,
    libc::SYS_memfd_create,
    libc::SYS_memfd_secret,
    libc::SYS_uselib,
    libc::SYS_personality,
    // The kernel itself, and its less used interfaces.
    Sysno::create_module.id() as c_long,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    // Disks have rings that were made and restricted before: no other can be made.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_register,
    libc::SYS_io_setup,
    libc::SYS_io_submit,
    libc::SYS_fanotify_init,
    libc::SYS_fanotify_mark,
    Sysno::lsm_set_self_attr.id() as c_long,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_vhangup,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS__sysctl,
    // Mounts and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    Sysno::statmount.id() as c_long,
    Sysno::listmount.id() as c_long,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    // Files by something else than their path, and changes by path that Landlock does not check. gantry changes
    // modes and owners of open files only.
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_chmod,
    libc::SYS_fchmodat,
    libc::SYS_fchmodat2,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_fchownat,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    // Users, keys, time and names of the host.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    // Memory and queues that outlive the process.
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_shmctl,
    libc::SYS_msgget,
    libc::SYS_msgsnd,
    libc::SYS_msgctl,
    libc::SYS_semget,
    libc::SYS_semctl,
    libc::SYS_mq_open,
    libc::SYS_mq_unlink,
];

/// clone: new namespaces, and children of another parent.
const NEVER_CLONED: &[c_int] = &[
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_PARENT,
    libc::CLONE_PTRACE,
];

/// ioctl: input typed into a terminal, another terminal, signals to others.
const NEVER_REQUESTED: &[u64] = &[
    libc::TIOCSTI,
    libc::TIOCLINUX,
    libc::TIOCSCTTY,
    libc::TIOCSETD,
    libc::TIOCSPGRP,
    0x8901, // FIOSETOWN
    0x8902, // SIOCSPGRP
];

/// fcntl: signals to others, and leases, which hold up others who open the file.
const NEVER_COMMANDED: &[c_int] = &[
    libc::F_SETOWN,
    15, // F_SETOWN_EX
    10, // F_SETSIG
    libc::F_SETLEASE,
    libc::F_NOTIFY,
];

/// The calls that are refused, with the arguments for which they are; none for all.
pub fn never() -> Rules {
    let any = |call: &c_long| (*call, Vec::new());
    let mut rules: Rules = NEVER.iter().map(any).collect();
    let each = |conditions: Vec<Option<Vec<SeccompCondition>>>| -> Vec<SeccompRule> {
        let rules = conditions.into_iter().flatten();
        rules.filter_map(|all| SeccompRule::new(all).ok()).collect()
    };
    let flags = NEVER_CLONED.iter().map(|&flag| flag as u64);
    let mut cloned: Vec<_> = flags
        .map(|flag| all([SeccompCondition::new(0, Qword, MaskedEq(flag), flag)]))
        .collect();
    let shares_memory = libc::CLONE_VM as u64;
    cloned.push(all([SeccompCondition::new(
        0,
        Qword,
        MaskedEq(shares_memory),
        0,
    )]));
    rules.push((libc::SYS_clone, each(cloned)));
    let requests = NEVER_REQUESTED.iter();
    let requests = requests.map(|&request| all([SeccompCondition::new(1, Dword, Eq, request)]));
    rules.push((libc::SYS_ioctl, each(requests.collect())));
    let commands = NEVER_COMMANDED.iter();
    let commands =
        commands.map(|&command| all([SeccompCondition::new(1, Dword, Eq, command as u64)]));
    rules.push((libc::SYS_fcntl, each(commands.collect())));
    let others = all([SeccompCondition::new(0, Dword, Ne, 0)]);
    rules.push((libc::SYS_prlimit64, each(vec![others])));
    let (unix, netlink) = (libc::AF_UNIX as u64, libc::AF_NETLINK as u64);
    let families = all([
        SeccompCondition::new(0, Dword, Ne, unix),
        SeccompCondition::new(0, Dword, Ne, netlink),
    ]);
    let protocols = all([
        SeccompCondition::new(0, Dword, Eq, netlink),
        SeccompCondition::new(2, Dword, Ne, libc::NETLINK_ROUTE as u64),
    ]);
    rules.push((libc::SYS_socket, each(vec![families, protocols])));
    rules
}

/// Conditions that hold together. `None` only for an argument that no call has.
fn all<const N: usize>(
    conditions: [Result<SeccompCondition, seccompiler::BackendError>; N],
) -> Option<Vec<SeccompCondition>> {
    conditions.into_iter().map(Result::ok).collect()
}

/// Kills a process that calls as a 32-bit program does, and answers ENOSYS to calls that [`NEVER`] was not
/// reviewed for, those of x32 among them, and to clone3: its flags lie in memory that no filter sees, and
/// the C library then uses clone.
pub fn known_calls() -> BpfProgram {
    const X86_64: u32 = 0xc000_003e; // AUDIT_ARCH_X86_64
    // Offsets in `struct seccomp_data`.
    const NUMBER: u32 = 0;
    const ARCH: u32 = 4;
    let step = |code: u32, jt, jf, k| sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let load = |offset| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let test = |how, value, jt, jf| step(libc::BPF_JMP | how | libc::BPF_K, jt, jf, value);
    let end = |action| step(libc::BPF_RET | libc::BPF_K, 0, 0, action);
    vec![
        load(ARCH),
        test(libc::BPF_JEQ, X86_64, 1, 0),
        end(libc::SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
        test(libc::BPF_JGT, NEWEST as u32, 2, 0),
        test(libc::BPF_JEQ, libc::SYS_clone3 as u32, 1, 0),
        end(libc::SECCOMP_RET_ALLOW),
        end(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
    ]
}

/// Whether the process is refused this call whatever its arguments.
#[cfg(test)]
pub fn is_never_made(call: c_long) -> bool {
    NEVER.contains(&call)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_that_were_not_reviewed_do_not_exist() {
        let newer: Vec<_> = Sysno::iter()
            .filter(|call| c_long::from(call.id()) > NEWEST)
            .collect();
        assert!(newer.is_empty(), "review {newer:?} for NEVER");
    }

    #[test]
    fn no_call_is_named_twice() {
        let mut calls: Vec<_> = never().into_iter().map(|(call, _)| call).collect();
        let named = calls.len();
        calls.sort_unstable();
        calls.dedup();
        assert_eq!(calls.len(), named);
    }

    #[test]
    fn a_call_with_conditions_has_them() {
        let bare: Vec<_> = never()
            .into_iter()
            .filter(|(call, rules)| rules.is_empty() && !is_never_made(*call))
            .collect();
        assert!(bare.is_empty());
    }
}
