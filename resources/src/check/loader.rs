//! The boot loader that started this kernel, and how to change the kernel's command line.

use std::fs;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use super::cmdline::CommandLine;
use super::grub::{self, Setting};
use crate::base::host::HostPaths;
use crate::base::sysfs;

/// How to change the command line of the next boot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Loader {
    /// Change a line of a file (GRUB, systemd-boot), then run this command, which writes the menu.
    Edited(&'static str),
    /// The tool of Fedora and Red Hat.
    Grubby,
    /// The tool of image-based systems (rpm-ostree).
    Ostree,
    /// Change an entry of systemd-boot that no tool writes.
    Entry,
    #[default]
    Unknown,
}

/// The first entry of the boot loader's menu, or the one that was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Menu {
    /// The file of the entry.
    pub(super) file: String,
    pub(super) line: CommandLine,
    /// Whether it existed already when the running kernel was started.
    pub(super) before_boot: bool,
}

/// The boot loader.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    pub(super) loader: Loader,
    /// The words of the configuration that the menu is made from.
    pub(super) settings: Vec<Setting>,
    pub(super) menu: Option<Menu>,
}

/// The boot loader that started the running kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Started {
    Grub,
    SystemdBoot,
    Unknown,
}

const PROXMOX: &str = "proxmox-boot-tool refresh";
const KERNEL_CMDLINE: &str = "etc/kernel/cmdline";

impl Found {
    /// `running` is the running kernel's command line.
    pub(super) fn read(paths: &HostPaths, root: &Path, running: &CommandLine) -> Self {
        let by = started(paths, running);
        let menu = match by {
            Started::Grub => grub_menu(root).or_else(|| entry(paths, root)),
            Started::SystemdBoot => entry(paths, root),
            Started::Unknown => grub_menu(root).or_else(|| entry(paths, root)),
        };
        let loader = match by {
            _ if has_program(root, "rpm-ostree") && running.named("ostree").next().is_some() => {
                Loader::Ostree
            }
            Started::Grub => of_grub(root),
            Started::SystemdBoot => of_systemd_boot(root, menu.as_ref()),
            Started::Unknown => match of_grub(root) {
                Loader::Unknown => of_systemd_boot(root, menu.as_ref()),
                found => found,
            },
        };
        let of_file = matches!(loader, Loader::Edited(_));
        let settings = match by {
            _ if !of_file => Vec::new(),
            Started::SystemdBoot => kernel_cmdline(root, running),
            Started::Unknown if of_grub(root) == Loader::Unknown => kernel_cmdline(root, running),
            // Proxmox boots by systemd-boot unless something shows another loader.
            Started::Unknown if loader == Loader::Edited(PROXMOX) => kernel_cmdline(root, running),
            _ => grub::settings(root),
        };
        let menu = menu.map(|menu| aged(paths, root, menu));
        Self {
            loader,
            settings,
            menu,
        }
    }
}

/// GRUB begins the command line with the image. systemd-boot names itself in a variable; it and the firmware begin
/// the path of an initrd with a backslash.
fn started(paths: &HostPaths, running: &CommandLine) -> Started {
    let info = efi_variable(paths, "LoaderInfo");
    let backslash = |(_, value): (&str, &str)| value.starts_with('\\');
    if running
        .first()
        .is_some_and(|word| word.starts_with("BOOT_IMAGE="))
    {
        Started::Grub
    } else if info.contains("systemd-boot") || running.named("initrd").any(backslash) {
        Started::SystemdBoot
    } else if info.contains("GRUB") {
        Started::Grub
    } else if efi_variable(paths, "StubInfo").contains("systemd-stub") {
        Started::SystemdBoot
    } else {
        Started::Unknown
    }
}

/// The text of a variable of the boot loader interface; empty if there is none. It is UTF-16, after four bytes of
/// attributes.
fn efi_variable(paths: &HostPaths, name: &str) -> String {
    let vendor = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
    let file = format!("firmware/efi/efivars/{name}-{vendor}");
    let bytes = fs::read(paths.sysfs.join(file)).unwrap_or_default();
    let text = bytes
        .iter()
        .skip(4)
        .filter(|byte| byte.is_ascii_graphic() || **byte == b' ');
    text.map(|byte| char::from(*byte)).collect()
}

pub(super) fn has_program(root: &Path, name: &str) -> bool {
    let mut dirs = ["usr/sbin", "usr/bin", "sbin", "bin"].into_iter();
    dirs.any(|dir| root.join(dir).join(name).exists())
}

fn is_proxmox(root: &Path) -> bool {
    root.join("etc/kernel/proxmox-boot-uuids").exists()
}

fn of_grub(root: &Path) -> Loader {
    if is_proxmox(root) {
        Loader::Edited(PROXMOX)
    } else if has_program(root, "update-grub") {
        Loader::Edited("update-grub")
    } else if has_program(root, "grubby") {
        Loader::Grubby
    } else if has_program(root, "grub2-mkconfig") {
        Loader::Edited("grub2-mkconfig -o /boot/grub2/grub.cfg")
    } else if has_program(root, "grub-mkconfig") {
        Loader::Edited("grub-mkconfig -o /boot/grub/grub.cfg")
    } else {
        Loader::Unknown
    }
}

fn of_systemd_boot(root: &Path, menu: Option<&Menu>) -> Loader {
    let installs =
        root.join(KERNEL_CMDLINE).exists() || menu.is_some_and(|menu| is_made(root, menu));
    if is_proxmox(root) {
        Loader::Edited(PROXMOX)
    } else if has_program(root, "kernel-install") && installs {
        Loader::Edited("kernel-install add-all")
    } else if menu.is_some() {
        Loader::Entry
    } else {
        Loader::Unknown
    }
}

/// Whether kernel-install made an entry: such names begin with the machine's id.
fn is_made(root: &Path, menu: &Menu) -> bool {
    let id = sysfs::table(&root.join("etc/machine-id")).unwrap_or_default();
    let name = menu.file.rsplit('/').next().unwrap_or_default();
    !id.trim().is_empty() && name.starts_with(id.trim())
}

/// The line that kernel-install gives to every kernel. Without a file it takes the running kernel's line, without
/// the words of the boot loader.
fn kernel_cmdline(root: &Path, running: &CommandLine) -> Vec<Setting> {
    let file = ["etc/kernel/cmdline", "usr/lib/kernel/cmdline"];
    let text = file.iter().find_map(|path| {
        let text = sysfs::table(&root.join(path)).ok()?;
        (!text.is_empty()).then_some(text)
    });
    let line = match text {
        Some(text) => CommandLine::parse(&text),
        None => running.without(&["BOOT_IMAGE", "initrd"]),
    };
    vec![Setting {
        file: format!("/{KERNEL_CMDLINE}"),
        variable: None,
        line,
    }]
}

/// The first entry of GRUB's menu that boots Linux: `linux /vmlinuz... words`.
fn grub_menu(root: &Path) -> Option<Menu> {
    ["boot/grub/grub.cfg", "boot/grub2/grub.cfg"]
        .into_iter()
        .find_map(|path| menu(root, path, &["linux", "linuxefi"]))
}

/// An entry of the Boot Loader Specification: the one that systemd-boot started, or the last.
fn entry(paths: &HostPaths, root: &Path) -> Option<Menu> {
    let selected = efi_variable(paths, "LoaderEntrySelected");
    let dirs = [
        "boot/loader/entries",
        "efi/loader/entries",
        "boot/efi/loader/entries",
    ];
    let mut entries: Vec<String> = Vec::new();
    for dir in dirs {
        let names = sysfs::entries(&root.join(dir)).unwrap_or_default();
        entries.extend(names.iter().rev().map(|name| format!("{dir}/{name}")));
    }
    entries.sort_by_key(|path| selected.is_empty() || !path.ends_with(&selected));
    let variables = sysfs::table(&root.join("boot/grub2/grubenv")).unwrap_or_default();
    let options = variables
        .lines()
        .find_map(|line| line.strip_prefix("kernelopts="));
    let mut found = entries
        .iter()
        .find_map(|path| menu(root, path, &["options"]))?;
    if let Some(options) = options.filter(|_| found.line.has("$kernelopts")) {
        found.line.extend(CommandLine::parse(options));
    }
    Some(found)
}

fn menu(root: &Path, path: &str, keys: &[&str]) -> Option<Menu> {
    let text = sysfs::table(&root.join(path)).ok()?;
    let line = text.lines().map(str::trim).find_map(|line| {
        let (first, rest) = line.split_once(char::is_whitespace)?;
        keys.contains(&first).then_some(rest)
    });
    Some(Menu {
        file: format!("/{path}"),
        line: CommandLine::parse(line?),
        before_boot: false,
    })
}

/// Whether a menu is older than this boot (`btime` of /proc/stat, in seconds since 1970).
fn aged(paths: &HostPaths, root: &Path, menu: Menu) -> Menu {
    let stat = sysfs::table(&paths.proc.join("stat")).unwrap_or_default();
    let booted = stat.lines().find_map(|line| line.strip_prefix("btime "));
    let booted = booted.and_then(|seconds| seconds.trim().parse().ok());
    let booted = booted.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
    let about = fs::metadata(root.join(menu.file.trim_start_matches('/')));
    let written = about.and_then(|about| about.modified()).ok();
    Menu {
        before_boot: written
            .zip(booted)
            .is_some_and(|(written, booted)| written < booted),
        ..menu
    }
}
