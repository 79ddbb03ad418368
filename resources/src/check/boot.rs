//! The next boot: how to change this machine's command line, and whether it was changed already.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cmdline::{Change, CommandLine};
use super::facts::{Facts, text};
use super::grub::{self, Setting};
use super::loader::{Found, Loader, Menu, has_program};
use super::{Advice, CommandLineChange, Finding, Level};
use crate::base::atomic;
use crate::base::host::HostPaths;

/// The boot loader, and the record of a pending reboot.
#[derive(Clone, Debug, Default)]
pub(super) struct Boot {
    /// This boot's id, random for each (/proc/sys/kernel/random/boot_id).
    pub(super) id: String,
    /// The boot loader, its configuration and its menu.
    pub(super) found: Found,
    pub(super) note: Option<Note>,
    /// A package asks for a reboot, in the way of Debian and Ubuntu.
    pub(super) asked_for: bool,
    pub(super) initramfs: Initramfs,
}

/// The tool that writes the initramfs.
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

/// The note of a pending change, in `reboot.json` of the configuration directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// The boot in which it was written.
    boot_id: String,
    /// Words to add at the next boot.
    #[serde(default)]
    add: Vec<String>,
    /// Words to remove.
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

/// The usual file of GRUB.
const GRUB_FILE: &str = "/etc/default/grub";

impl Boot {
    /// `running` is the running kernel's command line.
    pub(super) fn read(paths: &HostPaths, root: &Path, running: &CommandLine) -> Self {
        let note = fs::read(note_path(paths)).ok();
        Self {
            id: text(&paths.proc.join("sys/kernel/random/boot_id")),
            note: note.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
            asked_for: root.join("run/reboot-required").exists(),
            initramfs: initramfs(root),
            found: Found::read(paths, root, running),
        }
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

/// Whether a reboot makes the change, or should have made it.
pub(super) fn reboot(facts: &Facts, change: &Change) -> Finding {
    let boot = &facts.boot;
    let finding = |level, reason: String| Finding::new("reboot", "Reboot", level, reason);
    let waiting =
        |reason: String| finding(Level::Warn, reason).lines("restart the host:", ["reboot"]);
    if let Some(note) = &boot.note {
        if note.boot_id == boot.id && !boot.id.is_empty() {
            return waiting(
                "pending: the host has not been restarted since its configuration was changed"
                    .into(),
            );
        }
        let lost = note.change().against(&facts.cmdline);
        if !change.is_empty() && !lost.is_empty() {
            return finding(
                Level::Warn,
                format!("restarted since its configuration was changed, but the command line still {}", words(&lost, "lacks", "has")),
            )
            .fix("check that the boot loader's menu was written, and that no other entry was started");
        }
    }
    match boot.installed(change) {
        Some(menu) if menu.before_boot => finding(
            Level::Warn,
            format!(
                "{} had the words before this boot, but the running kernel was started without them: by another \
                 entry or another boot loader",
                menu.file
            ),
        )
        .lines("see which one was started:", ["cat /proc/cmdline", "efibootmgr"]),
        Some(menu) => waiting(format!(
            "pending: {} has been changed since the running kernel was started",
            menu.file
        )),
        _ if boot.asked_for => waiting("pending: /run/reboot-required asks for it".into()),
        _ => finding(Level::Ok, "none is pending".into()),
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

impl Boot {
    /// The boot loader's menu, if a change has been made there already.
    fn installed(&self, change: &Change) -> Option<&Menu> {
        let menu = self.found.menu.as_ref();
        menu.filter(|menu| !change.is_empty() && menu.line.follows(change))
    }
}

/// The change for this machine; none if there is nothing to change.
pub(super) fn how(facts: &Facts, change: Change) -> Option<CommandLineChange> {
    if change.is_empty() {
        return None;
    }
    let boot = &facts.boot;
    let restart = |what: &str, lines: Vec<String>| {
        let lines = lines.into_iter().chain(["reboot".to_owned()]).collect();
        let text = what.to_owned();
        Advice { text, lines }
    };
    let how = match (&boot.found.loader, boot.installed(&change)) {
        (_, Some(menu)) if menu.before_boot => Advice {
            text: format!(
                "{} has it already, but this boot did not come from there: make the same change in the entry that \
                 was started, or start this one",
                menu.file
            ),
            lines: Vec::new(),
        },
        (_, Some(menu)) => restart(
            &format!("{} has it already; restart the host:", menu.file),
            Vec::new(),
        ),
        (Loader::Edited(command), _) => edited(&boot.found.settings, &change, command),
        (Loader::Grubby, _) => restart(
            "change all entries and restart the host:",
            vec![grubby(&change)],
        ),
        (Loader::Ostree, _) => restart(
            "change the next deployment and restart the host:",
            vec![ostree(&change)],
        ),
        (Loader::Entry, _) => match &boot.found.menu {
            Some(menu) => restart(
                &format!(
                    "make the options line of {} this and restart the host:",
                    menu.file
                ),
                vec![format!("options {}", menu.line.with(&change))],
            ),
            None => unknown(),
        },
        (Loader::Unknown, _) => unknown(),
    };
    Some(CommandLineChange {
        add: change.add,
        remove: change.remove,
        how,
    })
}

fn unknown() -> Advice {
    Advice {
        text: "the boot loader was not recognised: change its entry (Debian and Ubuntu: GRUB_CMDLINE_LINUX_DEFAULT in \
               /etc/default/grub, then update-grub; Fedora: grubby --update-kernel=ALL --args=...; systemd-boot: \
               /etc/kernel/cmdline, then kernel-install add-all), and restart the host:"
            .to_owned(),
        lines: vec!["reboot".to_owned()],
    }
}

/// The new lines of the configuration, and the command that writes the menu from them.
fn edited(settings: &[Setting], change: &Change, command: &str) -> Advice {
    let then = [command.to_owned(), "reboot".to_owned()];
    let mut all = CommandLine::default();
    settings.iter().for_each(|one| all.extend(one.line.clone()));
    let removal = Change {
        add: Vec::new(),
        remove: change.remove.clone(),
    };
    // The variable for normal starts; if no file sets it, the one for all starts.
    let target = [Some(grub::USUAL), Some(grub::ALWAYS), None]
        .into_iter()
        .find_map(|name| settings.iter().position(|one| one.name() == name));
    if let Some(target) = target.filter(|_| all.follows(change)) {
        let file = &settings[target].file;
        return Advice {
            text: format!(
                "{file} has it already; write the boot loader's menu and restart the host:"
            ),
            lines: then.to_vec(),
        };
    }
    let missing = Change {
        add: change
            .add
            .iter()
            .filter(|word| !all.has(word))
            .cloned()
            .collect(),
        remove: change.remove.clone(),
    };
    let mut edits: Vec<(&str, String)> = Vec::new();
    for (index, one) in settings.iter().enumerate() {
        if Some(index) == target && (!missing.add.is_empty() || !one.line.follows(&removal)) {
            edits.push((&one.file, one.with(&missing)));
        } else if !one.line.follows(&removal) {
            edits.push((&one.file, one.with(&removal)));
        }
    }
    if target.is_none() {
        let words = CommandLine::default().with(change);
        edits.push((GRUB_FILE, format!("{}=\"{words}\"", grub::USUAL)));
    }
    let mut files: Vec<&str> = edits.iter().map(|(file, _)| *file).collect();
    files.dedup();
    let mut lines = Vec::new();
    for file in &files {
        // If two files must change, comments name them.
        lines.extend((files.len() > 1).then(|| format!("# {file}")));
        let own = edits.iter().filter(|(other, _)| other == file);
        lines.extend(own.map(|(_, line)| line.clone()));
    }
    lines.extend(then);
    let overrides = match files
        .iter()
        .any(|file| file.starts_with("/etc/default/grub.d/"))
    {
        true => ", which is read after /etc/default/grub,",
        false => "",
    };
    let what = match files.as_slice() {
        [file] => format!("make the line of {file}{overrides} this"),
        files => format!("make the lines of {} these", files.join(" and ")),
    };
    let text = format!("{what}, write the boot loader's menu and restart the host:");
    Advice { text, lines }
}

fn ostree(change: &Change) -> String {
    let mut command = "rpm-ostree kargs".to_owned();
    for (option, words) in [
        ("append-if-missing", &change.add),
        ("delete-if-present", &change.remove),
    ] {
        for word in words {
            command += &format!(" --{option}={word}");
        }
    }
    command
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
