//! The next boot: how this machine's boot loader is told, and whether it has been told already.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cmdline::{Change, CommandLine};
use super::facts::{Facts, text};
use super::{Advice, CommandLineChange, Finding, Level};
use crate::atomic;
use crate::host::HostPaths;
use crate::sysfs;

/// What is known of the boot loader, and what has been noted about a reboot.
#[derive(Clone, Debug, Default)]
pub(super) struct Boot {
    /// This boot's id, random for each (/proc/sys/kernel/random/boot_id).
    pub(super) id: String,
    pub(super) loader: Loader,
    /// `GRUB_CMDLINE_LINUX_DEFAULT` and `GRUB_CMDLINE_LINUX` of /etc/default/grub, or the line of
    /// /etc/kernel/cmdline.
    pub(super) configured: Vec<(&'static str, CommandLine)>,
    /// The command line of the first entry of the boot loader's menu, and the file that has it.
    pub(super) installed: Option<(String, CommandLine)>,
    pub(super) note: Option<Note>,
    /// A package has asked for a reboot: Debian's and Ubuntu's mark.
    pub(super) asked_for: bool,
    pub(super) initramfs: Initramfs,
}

/// What writes the boot loader's menu here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Loader {
    /// GRUB of Debian and Ubuntu.
    UpdateGrub,
    /// Fedora's and Red Hat's tool.
    Grubby,
    /// GRUB of others, with the place of its menu.
    GrubMkconfig(&'static str),
    /// systemd-boot of Proxmox.
    Proxmox,
    /// systemd-boot and whatever else kernel-install serves.
    KernelInstall,
    #[default]
    Unknown,
}

/// What writes the initramfs here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Initramfs {
    /// initramfs-tools of Debian and Ubuntu.
    Tools,
    Dracut,
    Mkinitcpio,
    #[default]
    Unknown,
}

impl Initramfs {
    pub(super) fn command(self) -> Option<&'static str> {
        match self {
            Self::Tools => Some("update-initramfs -u"),
            Self::Dracut => Some("dracut --force"),
            Self::Mkinitcpio => Some("mkinitcpio -P"),
            Self::Unknown => None,
        }
    }
}

/// That the host was told to come up otherwise, in `reboot.json` of the configuration directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// The boot in which that was.
    boot_id: String,
    /// Words that the next one is to have.
    #[serde(default)]
    add: Vec<String>,
    /// Words that it is not to have.
    #[serde(default)]
    remove: Vec<String>,
}

impl Note {
    fn change(&self) -> Change {
        Change {
            add: self.add.clone(),
            remove: self.remove.clone(),
        }
    }
}

const GRUB_DEFAULT: &str = "GRUB_CMDLINE_LINUX_DEFAULT";
const GRUB_ALWAYS: &str = "GRUB_CMDLINE_LINUX";
const KERNEL_CMDLINE: &str = "/etc/kernel/cmdline";

impl Boot {
    pub(super) fn read(paths: &HostPaths, root: &Path) -> Self {
        let loader = loader(root);
        let note = fs::read(note_path(paths)).ok();
        Self {
            id: text(&paths.proc.join("sys/kernel/random/boot_id")),
            configured: configured(root, loader),
            installed: installed(root),
            note: note.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
            asked_for: root.join("run/reboot-required").exists(),
            initramfs: initramfs(root),
            loader,
        }
    }

    /// All words that the boot loader's configuration has.
    fn configured_words(&self) -> CommandLine {
        let mut all = CommandLine::default();
        for (_, line) in &self.configured {
            all.extend(line.clone());
        }
        all
    }
}

fn has_program(root: &Path, name: &str) -> bool {
    let mut dirs = ["usr/sbin", "usr/bin", "sbin", "bin"].into_iter();
    dirs.any(|dir| root.join(dir).join(name).exists())
}

fn loader(root: &Path) -> Loader {
    if root.join("etc/kernel/proxmox-boot-uuids").exists() {
        Loader::Proxmox
    } else if has_program(root, "update-grub") {
        Loader::UpdateGrub
    } else if has_program(root, "grubby") {
        Loader::Grubby
    } else if has_program(root, "grub2-mkconfig") {
        Loader::GrubMkconfig("grub2-mkconfig -o /boot/grub2/grub.cfg")
    } else if has_program(root, "grub-mkconfig") {
        Loader::GrubMkconfig("grub-mkconfig -o /boot/grub/grub.cfg")
    } else if has_program(root, "kernel-install") && root.join("etc/kernel/cmdline").exists() {
        Loader::KernelInstall
    } else {
        Loader::Unknown
    }
}

fn initramfs(root: &Path) -> Initramfs {
    let tools = [
        ("update-initramfs", Initramfs::Tools),
        ("dracut", Initramfs::Dracut),
        ("mkinitcpio", Initramfs::Mkinitcpio),
    ];
    let found = tools.into_iter().find(|(name, _)| has_program(root, name));
    found.map_or(Initramfs::Unknown, |(_, tool)| tool)
}

fn configured(root: &Path, loader: Loader) -> Vec<(&'static str, CommandLine)> {
    let table = |path: &str| sysfs::table(&root.join(path)).unwrap_or_default();
    match loader {
        Loader::Proxmox | Loader::KernelInstall => {
            vec![(
                KERNEL_CMDLINE,
                CommandLine::parse(&table("etc/kernel/cmdline")),
            )]
        }
        Loader::UpdateGrub | Loader::GrubMkconfig(_) => {
            let file = table("etc/default/grub");
            let value = |name| Some((name, CommandLine::parse(&assigned(&file, name)?)));
            [GRUB_DEFAULT, GRUB_ALWAYS]
                .into_iter()
                .filter_map(value)
                .collect()
        }
        Loader::Grubby | Loader::Unknown => Vec::new(),
    }
}

/// The value of the last `NAME="..."` of a file of shell assignments.
fn assigned(file: &str, name: &str) -> Option<String> {
    let mut values = file.lines().filter_map(|line| {
        let value = line
            .trim_start()
            .strip_prefix(name)?
            .strip_prefix('=')?
            .trim();
        let quote = value.chars().next().filter(|first| "\"'".contains(*first));
        Some(match quote {
            Some(quote) => value[1..]
                .rsplit_once(quote)
                .map_or(&value[1..], |(inside, _)| inside),
            None => value,
        })
    });
    values.next_back().map(str::to_owned)
}

/// The first entry of the menu that boots Linux: `linux /vmlinuz... words` of GRUB's, `options words`
/// of the others (the Boot Loader Specification).
fn installed(root: &Path) -> Option<(String, CommandLine)> {
    let found = |path: &str, key: &[&str]| {
        let text = sysfs::table(&root.join(path)).ok()?;
        let line = text.lines().map(str::trim).find_map(|line| {
            let (first, rest) = line.split_once(char::is_whitespace)?;
            key.contains(&first).then_some(rest)
        });
        Some((format!("/{path}"), CommandLine::parse(line?)))
    };
    let entries = sysfs::entries(&root.join("boot/loader/entries")).unwrap_or_default();
    let mut entries = entries
        .iter()
        .rev()
        .map(|name| format!("boot/loader/entries/{name}"));
    let grub = ["boot/grub/grub.cfg", "boot/grub2/grub.cfg"];
    grub.iter()
        .find_map(|path| found(path, &["linux", "linuxefi"]))
        .or_else(|| entries.find_map(|path| found(&path, &["options"])))
}

/// Whether a reboot would bring what is asked for, or was to have brought it.
pub(super) fn reboot(facts: &Facts, change: &Change) -> Finding {
    let boot = &facts.boot;
    let finding = |level, reason: String| Finding::new("reboot", "Reboot", level, reason);
    let waiting =
        |reason: String| finding(Level::Warn, reason).lines("restart the host:", ["reboot"]);
    if let Some(note) = &boot.note {
        if note.boot_id == boot.id && !boot.id.is_empty() {
            return waiting(
                "waiting: the host has not been restarted since it was set up anew".into(),
            );
        }
        let lost = note.change().against(&facts.cmdline);
        if !change.is_empty() && !lost.is_empty() {
            return finding(
                Level::Warn,
                format!("restarted since it was set up anew, and still the command line {}", words(&lost, "lacks", "has")),
            )
            .fix("see whether the boot loader's menu was written, and whether another entry of it was started");
        }
    }
    match &boot.installed {
        Some((file, line)) if !change.is_empty() && line.follows(change) => waiting(format!(
            "waiting: {file} has been changed, the running kernel was started before"
        )),
        _ if boot.asked_for => waiting("waiting: /run/reboot-required asks for it".into()),
        _ => finding(Level::Ok, "none is waiting".into()),
    }
}

fn words(change: &Change, add: &str, remove: &str) -> String {
    let part = |verb: &str, words: &[String]| {
        (!words.is_empty()).then(|| format!("{verb} {}", words.join(" ")))
    };
    let parts = [part(add, &change.add), part(remove, &change.remove)];
    parts
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(" and ")
}

/// The change as it is made on this machine; none where there is nothing to change.
pub(super) fn how(facts: &Facts, change: Change) -> Option<CommandLineChange> {
    if change.is_empty() {
        return None;
    }
    let boot = &facts.boot;
    let line = |text: String| vec![text];
    let (what, mut lines) = match boot.loader {
        _ if boot.installed.as_ref().is_some_and(|(_, line)| line.follows(&change)) => {
            ("the boot loader has it already; restart the host:".to_owned(), Vec::new())
        }
        Loader::UpdateGrub => edited(boot, &change, "/etc/default/grub", "update-grub"),
        Loader::GrubMkconfig(command) => edited(boot, &change, "/etc/default/grub", command),
        Loader::Proxmox => edited(boot, &change, KERNEL_CMDLINE, "proxmox-boot-tool refresh"),
        Loader::KernelInstall => edited(boot, &change, KERNEL_CMDLINE, "kernel-install add-all"),
        Loader::Grubby => ("change all entries and restart the host:".to_owned(), line(grubby(&change))),
        Loader::Unknown => (
            "the boot loader was not recognised: change its entry (Debian and Ubuntu: GRUB_CMDLINE_LINUX_DEFAULT in \
             /etc/default/grub, then update-grub; Fedora: grubby --update-kernel=ALL --args=...; systemd-boot: \
             /etc/kernel/cmdline, then kernel-install add-all), and restart the host:"
                .to_owned(),
            Vec::new(),
        ),
    };
    lines.push("reboot".to_owned());
    Some(CommandLineChange {
        add: change.add,
        remove: change.remove,
        how: Advice { text: what, lines },
    })
}

/// The configuration's lines as they should be, and the command that carries them to the menu.
fn edited(boot: &Boot, change: &Change, file: &str, command: &str) -> (String, Vec<String>) {
    if !boot.configured.is_empty() && boot.configured_words().follows(change) {
        return (
            format!("{file} has it already; write the boot loader's menu and restart the host:"),
            vec![command.to_owned()],
        );
    }
    let removal = Change {
        add: Vec::new(),
        remove: change.remove.clone(),
    };
    let mut lines = Vec::new();
    if file == KERNEL_CMDLINE {
        lines.extend(boot.configured.iter().map(|(_, line)| line.with(change)));
    } else {
        let of = |name| boot.configured.iter().find(|(own, _)| *own == name);
        let usual = of(GRUB_DEFAULT)
            .map(|(_, line)| line.clone())
            .unwrap_or_default();
        lines.push(format!("{GRUB_DEFAULT}=\"{}\"", usual.with(change)));
        let always =
            of(GRUB_ALWAYS).filter(|(_, line)| !line.is_empty() && !line.follows(&removal));
        lines.extend(always.map(|(name, line)| format!("{name}=\"{}\"", line.with(&removal))));
    }
    lines.push(command.to_owned());
    (
        format!("make the line of {file} this, write the boot loader's menu and restart the host:"),
        lines,
    )
}

fn grubby(change: &Change) -> String {
    let mut command = "grubby --update-kernel=ALL".to_owned();
    for (option, words) in [("args", &change.add), ("remove-args", &change.remove)] {
        if !words.is_empty() {
            command += &format!(" --{option}=\"{}\"", words.join(" "));
        }
    }
    command
}

fn note_path(paths: &HostPaths) -> PathBuf {
    paths.config.join("reboot.json")
}

/// Writes the note as a whole, or not at all.
pub(super) fn note(
    paths: &HostPaths,
    change: Option<&CommandLineChange>,
) -> Result<PathBuf, (PathBuf, io::Error)> {
    let note = Note {
        boot_id: text(&paths.proc.join("sys/kernel/random/boot_id")),
        add: change.map(|change| change.add.clone()).unwrap_or_default(),
        remove: change
            .map(|change| change.remove.clone())
            .unwrap_or_default(),
    };
    let path = note_path(paths);
    let written = serde_json::to_vec_pretty(&note)
        .map_err(io::Error::from)
        .and_then(|mut text| {
            text.push(b'\n');
            atomic::replace(&path, &text)
        });
    match written {
        Ok(()) => Ok(path),
        Err(error) => Err((path, error)),
    }
}
