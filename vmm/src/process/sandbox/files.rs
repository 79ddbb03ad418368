//! Landlock: which files a process can reach while it builds a VM, and in the helpers that it starts.
//!
//! These rules hold while a VM is built, and in the helpers as long as they live: access to the files that the
//! VM's file names, to KVM, to VFIO's nodes, to sysfs, and to gantry's own directories as far as it changes
//! them. No TCP, and no signals to other processes. Once the VM runs, none of its threads can open a file. An
//! older kernel enforces the rules that it knows.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use gantry_resources::base::HostPaths;
use gantry_resources::facts::VfioBackEnd;
use gantry_resources::holding::{own_files, shared_quarantine};
use gantry_resources::pools::Groups;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};

/// The newest interface that the rules are written for.
const ABI_KNOWN: ABI = ABI::V6;

/// The files of one VM.
#[derive(Debug, Default)]
pub struct VmFiles {
    /// Files and folders that it reads.
    pub read: Vec<PathBuf>,
    /// Files that it reads and writes.
    pub write: Vec<PathBuf>,
    /// Nodes of devices that it drives, by their paths in `/dev`.
    pub nodes: Vec<&'static str>,
    /// Where its output goes, if anywhere.
    pub output: Option<Output>,
}

/// Where a VM's output goes.
#[derive(Debug)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// A file, which is made if it is missing.
    File(PathBuf),
    /// A file in this folder, which is made if it is missing.
    Below(PathBuf),
}

/// A path, and the accesses that are allowed there and below.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    path: PathBuf,
    access: BitFlags<AccessFs>,
}

/// Confines the calling thread, and every thread and process that it makes from now on, to what building
/// the VM needs.
///
/// # Errors
/// The kernel refused the rules.
pub fn confine(files: &VmFiles, host: &HostPaths) -> io::Result<()> {
    let maps = fs::read_to_string(host.proc.join("self/maps")).unwrap_or_default();
    let mut rules = rules(files, host);
    // gantry checks whether a disk is in use before it leaves the host, and the disk's node is made anew
    // whenever it returns.
    if Groups::load(host).is_ok_and(|groups| groups.take_on_demand()) {
        rules.push(Rule {
            path: host.dev.clone(),
            access: AccessFs::ReadFile.into(),
        });
    }
    // The link too: if the program's file was replaced since the start, its path leads to the new one.
    let own = host.proc.join("self/exe");
    rules.extend(programs(&maps).into_iter().chain([own]).map(|path| Rule {
        path,
        access: AccessFs::Execute | AccessFs::ReadFile,
    }));
    // No signals to processes of others, and no abstract sockets of others.
    enforce(&rules, Scope::from_all(ABI_KNOWN)).map_err(io::Error::other)
}

/// Confines the calling thread to removing files of `folder` and opening the file `lock`.
///
/// # Errors
/// The kernel refused the rules.
pub fn confine_removal(folder: &Path, lock: &Path) -> io::Result<()> {
    let rule = |path: &Path, access| Rule {
        path: path.to_owned(),
        access,
    };
    let rules = [
        rule(folder, AccessFs::RemoveFile.into()),
        rule(lock, AccessFs::WriteFile.into()),
    ];
    enforce(&rules, Scope::from_all(ABI_KNOWN)).map_err(io::Error::other)
}

/// Keeps the calling thread from all files that are not open.
///
/// # Errors
/// The kernel refused the rules.
pub fn confine_to_nothing() -> io::Result<()> {
    // Without a scope for signals, as the threads of the process signal each other.
    enforce(&[], BitFlags::EMPTY).map_err(io::Error::other)
}

fn enforce(rules: &[Rule], scope: BitFlags<Scope>) -> Result<(), RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI_KNOWN))?
        .handle_access(AccessNet::from_all(ABI_KNOWN))?;
    if !scope.is_empty() {
        ruleset = ruleset.scope(scope)?;
    }
    let mut ruleset = ruleset.create()?;
    for rule in rules {
        add(&mut ruleset, rule)?;
    }
    ruleset.restrict_self().map(drop)
}

/// A missing path needs no rule.
fn add(ruleset: &mut RulesetCreated, rule: &Rule) -> Result<(), RulesetError> {
    let Ok(file) = PathFd::new(&rule.path) else {
        return Ok(());
    };
    let access = match rule.path.is_dir() {
        true => rule.access,
        false => rule.access & AccessFs::from_file(ABI_KNOWN),
    };
    match ruleset.add_rule(PathBeneath::new(file, access)) {
        // A pipe or a socket, to which Landlock does not apply.
        Err(error) if errno(&error) == Some(libc::EBADFD) => Ok(()),
        added => added.map(drop),
    }
}

/// The kernel's answer behind an error.
fn errno(error: &(dyn Error + 'static)) -> Option<i32> {
    let kernel = error.downcast_ref::<io::Error>();
    let errno = kernel.and_then(io::Error::raw_os_error);
    errno.or_else(|| self::errno(error.source()?))
}

fn rules(files: &VmFiles, host: &HostPaths) -> Vec<Rule> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let write = AccessFs::WriteFile | AccessFs::Truncate;
    // Regular files alone: root reads and replaces records too.
    let record = read | write | AccessFs::MakeReg | AccessFs::RemoveFile;
    let lock = read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeReg;
    let rule = |path: &Path, access: BitFlags<AccessFs>| Rule {
        path: path.to_owned(),
        access,
    };
    let mut rules = vec![
        rule(&host.dev.join("kvm"), device),
        rule(&host.dev.join("vfio"), device | AccessFs::ReadDir),
        rule(&VfioBackEnd::Iommufd.node(host), device),
        // Helpers' standard streams.
        rule(&host.dev.join("null"), device),
        rule(&host.sysfs, read),
        // Helpers bind drivers and make mediated devices.
        rule(&host.sysfs.join("bus"), write),
        rule(&host.proc, read),
        rule(&host.config, read),
        rule(&host.run, read),
        rule(&host.state, read),
        // The dynamic linker's.
        rule(Path::new("/etc/ld.so.cache"), AccessFs::ReadFile.into()),
    ];
    // Its entries are the roots of buses, and the processors and memory of the host.
    let roots = fs::read_dir(host.sysfs.join("devices"))
        .into_iter()
        .flatten();
    let roots = roots.flatten().filter(|root| root.file_name() != "system");
    rules.extend(roots.map(|root| rule(&root.path(), write)));
    // A rule applies to the target of a link: a tenant's links lead to the host's directories.
    let granted = fs::canonicalize(host.run.join("restore/granted"));
    rules.extend(granted.iter().map(|path| rule(path, read)));
    let own = own_files(host);
    rules.extend(own.records.iter().map(|path| rule(path, record)));
    let locks = own.locks.iter().chain(&own.lock_files);
    rules.extend(locks.map(|path| rule(path, lock)));
    rules.extend(shared_quarantine(host).map(|path| rule(&path, read)));
    let named = files.read.iter();
    rules.extend(named.map(|path| rule(path, AccessFs::ReadFile.into())));
    let written = files.write.iter();
    rules.extend(written.map(|path| rule(path, AccessFs::ReadFile | AccessFs::WriteFile)));
    let nodes = files.nodes.iter();
    rules.extend(nodes.map(|node| rule(&host.dev.join(node), device)));
    let make = write | AccessFs::ReadFile | AccessFs::MakeReg;
    match &files.output {
        None => {}
        Some(Output::Stdout) => rules.push(rule(&host.proc.join("self/fd/1"), device)),
        Some(Output::Below(folder)) => rules.push(rule(folder, make)),
        Some(Output::File(path)) if path.exists() => {
            rules.push(rule(path, write | AccessFs::ReadFile));
        }
        Some(Output::File(path)) => {
            let folder = path.parent().filter(|folder| *folder != Path::new(""));
            let folder = folder.unwrap_or(Path::new("."));
            rules.push(rule(folder, make));
        }
    }
    rules
}

/// The program and libraries of this process and its helpers, from `/proc/self/maps` (proc_pid_maps(5)).
fn programs(maps: &str) -> BTreeSet<PathBuf> {
    let lines = maps.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let executable = words.nth(1)?.contains('x');
        let path = words.nth(3)?;
        (executable && path.starts_with('/')).then(|| PathBuf::from(path))
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::thread;

    use super::*;

    fn files(folder: &Path, output: Option<Output>) -> VmFiles {
        VmFiles {
            read: vec![folder.join("vmlinux")],
            write: Vec::new(),
            nodes: Vec::new(),
            output,
        }
    }

    #[test]
    fn libraries_are_found_where_they_are_mapped_to_run() {
        let maps = "\
55d0-55d1 r--p 00000000 08:01 1 /usr/bin/gantry
55d1-55d2 r-xp 00001000 08:01 1 /usr/bin/gantry
7f00-7f01 r-xp 00000000 08:01 2 /usr/lib/x86_64-linux-gnu/libc.so.6
7f01-7f02 rw-p 00000000 00:00 0
7f02-7f03 r-xp 00000000 00:00 0 [vdso]
7f03-7f04 rw-p 00000000 08:01 3 /etc/data
";
        let expected = ["/usr/bin/gantry", "/usr/lib/x86_64-linux-gnu/libc.so.6"];
        assert_eq!(programs(maps), expected.map(PathBuf::from).into());
    }

    /// Whether this kernel has Landlock: a ruleset that must be whole can be made, or not.
    fn has_landlock() -> bool {
        let strict = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        let made = strict
            .handle_access(AccessFs::from_all(ABI::V1))
            .and_then(Ruleset::create);
        let there = made.is_ok();
        if !there {
            eprintln!("this kernel has no Landlock");
        }
        there
    }

    #[test]
    fn who_speaks_with_clients_reaches_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("file");
        fs::write(&own, "text").unwrap();
        let confined = thread::spawn(move || {
            confine_to_nothing().unwrap();
            if has_landlock() {
                fs::read(&own).unwrap_err();
                fs::write(own.with_extension("new"), "text").unwrap_err();
                fs::remove_file(&own).unwrap_err();
            }
        });
        confined.join().unwrap();
    }

    /// A record that is there, seen from a confined thread.
    fn is_a_place_for_regular_files_alone(record: &Path) {
        let other = record.with_file_name("y");
        fs::rename(record, &other).unwrap();
        fs::rename(&other, record).unwrap();
        fs::remove_file(record).unwrap();
        std::os::unix::fs::symlink("/", record).unwrap_err();
        nix::unistd::mkfifo(record, nix::sys::stat::Mode::S_IRWXU).unwrap_err();
        std::os::unix::net::UnixListener::bind(record).unwrap_err();
        fs::create_dir(record).unwrap_err();
    }

    /// Files of others.
    const OTHERS: [&str; 6] = [
        "run/web.sock",
        "run/vms/7.lock",
        "run/leases/0000:01:00.0.lock",
        "run/allocate.lock",
        "var/maintenance.json",
        "sys/devices/system/cpu/online",
    ];

    fn devices_are_written(dev: &Path) {
        for node in ["vfio/7", "vfio/devices/vfio0", "iommu"] {
            let mut open = fs::OpenOptions::new();
            open.read(true).write(true).open(dev.join(node)).unwrap();
        }
    }

    /// On a thread of its own, as the rules cannot be undone. Checks nothing if the kernel has no Landlock.
    #[test]
    fn only_what_was_named_is_reached_and_nothing_of_others_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let host = HostPaths::under(folder.path());
        let own = [
            "run/leases/0000:01:00.0.lock",
            "run/restore/driver/x",
            "var/quarantine/x",
            "sys/bus/pci/drivers_probe",
            "sys/devices/pci0000:00/driver_override",
        ];
        let files = ["vmlinux", "secret", "program"];
        let nodes = ["dev/vfio/7", "dev/vfio/devices/vfio0", "dev/iommu"];
        let files = files
            .iter()
            .chain(&nodes)
            .chain(&OTHERS)
            .chain(&own)
            .copied();
        for path in files.chain(["proc/x", "proc/self/maps"]) {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "text").unwrap();
        }
        // What runs, under whatever name.
        let exe = folder.path().join("proc/self/exe");
        std::os::unix::fs::symlink(folder.path().join("program"), exe).unwrap();
        let logs = folder.path().join("logs");
        fs::create_dir(&logs).unwrap();
        let files = self::files(folder.path(), Some(Output::File(logs.join("new"))));
        // A pipe has no path for a rule.
        let (pipe, _writer) = io::pipe().unwrap();
        let link = format!("/proc/self/fd/{}", pipe.as_raw_fd());
        std::os::unix::fs::symlink(link, folder.path().join("etc")).unwrap();
        let root = folder.path().to_owned();
        let confined = thread::spawn(move || {
            confine(&files, &host).unwrap();
            if !has_landlock() {
                return;
            }
            fs::read(root.join("secret")).unwrap_err();
            fs::remove_file(root.join("vmlinux")).unwrap_err();
            for path in OTHERS {
                fs::remove_file(root.join(path)).unwrap_err();
            }
            fs::write(root.join("sys/devices/system/cpu/online"), "0").unwrap_err();
            fs::write(root.join("var/maintenance.json"), "x").unwrap_err();
            fs::write(root.join("run/vms/7.lock"), "x").unwrap_err();
            fs::write(root.join("run/new.sock"), "x").unwrap_err();
            for path in own {
                fs::write(root.join(path), "text").unwrap();
            }
            fs::write(root.join("run/leases/new.lock"), "").unwrap();
            for path in ["run/restore/driver/x", "var/quarantine/x"] {
                is_a_place_for_regular_files_alone(&root.join(path));
            }
            for path in ["vmlinux", "program", "run/web.sock", "proc/x"] {
                fs::read(root.join(path)).unwrap();
            }
            devices_are_written(&root.join("dev"));
            fs::write(root.join("logs/new"), "text").unwrap();
            for path in ["vmlinux", "proc/x", "logs/other/x", "new"] {
                fs::write(root.join(path), "text").unwrap_err();
            }
            std::process::Command::new("/bin/true")
                .status()
                .unwrap_err();
        });
        confined.join().unwrap();
    }

    /// The leases of a tenant's VM are the host's files, and disks are checked for use.
    #[test]
    fn a_tenants_links_are_followed_and_nodes_are_read_where_devices_leave_the_host() {
        let folder = tempfile::tempdir().unwrap();
        let mut host = HostPaths::under(folder.path());
        for path in ["vmlinux", "run/leases/1.lock", "dev/nvme0n1", "secret"] {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "text").unwrap();
        }
        let groups =
            r#"{"groups": [{"name": "a", "bind": "demand", "rules": [{"class": "0108"}]}]}"#;
        fs::create_dir_all(&host.config).unwrap();
        fs::write(host.config.join("groups.json"), groups).unwrap();
        host.run = host.run.join("tenants/a");
        fs::create_dir_all(&host.run).unwrap();
        std::os::unix::fs::symlink("../../leases", host.run.join("leases")).unwrap();
        let files = files(folder.path(), None);
        let root = folder.path().to_owned();
        let confined = thread::spawn(move || {
            confine(&files, &host).unwrap();
            if !has_landlock() {
                return;
            }
            fs::read(root.join("secret")).unwrap_err();
            fs::write(host.run.join("leases/1.lock"), "mine").unwrap();
            fs::read(root.join("dev/nvme0n1")).unwrap();
            fs::write(root.join("dev/nvme0n1"), "x").unwrap_err();
        });
        confined.join().unwrap();
    }
}
