//! The kernel's command line in the configuration of GRUB: /etc/default/grub and the files that override it.

use std::path::Path;

use super::cmdline::{Change, CommandLine};
use crate::base::sysfs;

pub(super) const USUAL: &str = "GRUB_CMDLINE_LINUX_DEFAULT";
pub(super) const ALWAYS: &str = "GRUB_CMDLINE_LINUX";

/// An assignment to the command line that no later one replaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// Its file.
    pub(super) file: String,
    /// The variable, with the operator, `GRUB_CMDLINE_LINUX=`; none if the file is the command line itself.
    pub(super) variable: Option<String>,
    /// Its words. `$GRUB_CMDLINE_LINUX` refers to the previous value.
    pub(super) line: CommandLine,
}

impl Setting {
    /// The line of the file, with a change made.
    pub(super) fn with(&self, change: &Change) -> String {
        let words = self.line.with(change);
        match &self.variable {
            Some(variable) if variable.ends_with("+=") => format!("{variable}\" {words}\""),
            Some(variable) => format!("{variable}\"{words}\""),
            None => words,
        }
    }

    /// The name of the variable.
    pub(super) fn name(&self) -> Option<&str> {
        let variable = self.variable.as_deref()?;
        Some(variable.trim_end_matches(['+', '=']))
    }
}

/// The effective assignments, in the order in which grub-mkconfig reads them: the file, then the scripts in
/// /etc/default/grub.d.
pub(super) fn settings(root: &Path) -> Vec<Setting> {
    let dir = "etc/default/grub.d";
    let scripts = sysfs::entries(&root.join(dir)).unwrap_or_default();
    let scripts = scripts.iter().filter(|name| name.ends_with(".cfg"));
    let scripts = scripts.map(|name| format!("{dir}/{name}"));
    let mut found: Vec<Setting> = Vec::new();
    for path in ["etc/default/grub".to_owned()].into_iter().chain(scripts) {
        let text = sysfs::table(&root.join(&path)).unwrap_or_default();
        for line in text.replace("\\\n", "").lines() {
            let Some((name, operator, value)) = assignment(line) else {
                continue;
            };
            let refers = operator == "+=" || refers_to(&value, name);
            if !refers {
                found.retain(|one| one.name() != Some(name));
            }
            found.push(Setting {
                file: format!("/{path}"),
                variable: Some(format!("{name}{operator}")),
                line: CommandLine::parse(&value),
            });
        }
    }
    found
}

/// Whether a value has `$name` or `${name}`. The name of one variable is the beginning of the other's.
fn refers_to(value: &str, name: &str) -> bool {
    value.split('$').skip(1).any(|rest| {
        let rest = rest.strip_prefix('{').unwrap_or(rest);
        let after = rest.strip_prefix(name);
        after.is_some_and(|after| {
            !after.starts_with(|next: char| next == '_' || next.is_alphanumeric())
        })
    })
}

/// The variable, the operator and the value of a shell assignment to one of the two variables.
fn assignment(line: &str) -> Option<(&'static str, &'static str, String)> {
    let line = line.trim_start();
    let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
    [USUAL, ALWAYS].into_iter().find_map(|name| {
        let rest = line.strip_prefix(name)?;
        let (operator, value) = match rest.strip_prefix("+=") {
            Some(value) => ("+=", value),
            None => ("=", rest.strip_prefix('=')?),
        };
        Some((name, operator, unquoted(value)))
    })
}

/// A value without its quotes and without the text after them.
fn unquoted(value: &str) -> String {
    let Some(quote) = value.chars().next().filter(|first| "\"'".contains(*first)) else {
        return value
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_owned();
    };
    let mut escaped = false;
    let inside = value[1..].chars().take_while(|&symbol| {
        let ends = symbol == quote && !escaped;
        escaped = symbol == '\\' && !escaped && quote == '"';
        !ends
    });
    inside.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(files: &[(&str, &str)]) -> Vec<String> {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("etc/default/grub.d")).unwrap();
        for (name, text) in files {
            std::fs::write(root.path().join("etc/default").join(name), text).unwrap();
        }
        let nothing = Change::default();
        let found = settings(root.path()).into_iter();
        let name = |file: &str| file.rsplit('/').next().unwrap().to_owned();
        found
            .map(|one| format!("{}: {}", name(&one.file), one.with(&nothing)))
            .collect()
    }

    #[test]
    fn a_later_assignment_replaces_earlier_ones_unless_it_refers_to_them() {
        let file = "# GRUB_CMDLINE_LINUX_DEFAULT=\"no\"\nGRUB_CMDLINE_LINUX_DEFAULT='a b' # \"c\"\n\
            export GRUB_CMDLINE_LINUX=x\nGRUB_CMDLINE_LINUX_RECOVERY=\"y\"\n";
        assert_eq!(
            read(&[("grub", file)]),
            [
                "grub: GRUB_CMDLINE_LINUX_DEFAULT=\"a b\"",
                "grub: GRUB_CMDLINE_LINUX=\"x\""
            ]
        );
        let cloud = "GRUB_CMDLINE_LINUX_DEFAULT=\"console=tty1 \\\n console=ttyS0\"\n";
        let kdump = "GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT crashkernel=1G\"\n\
            GRUB_CMDLINE_LINUX+=\" z\"\n";
        assert_eq!(
            read(&[
                ("grub", file),
                ("grub.d/60-kdump.cfg", kdump),
                ("grub.d/50-cloud.cfg", cloud),
                ("grub.d/70-no.conf", file),
            ]),
            [
                "grub: GRUB_CMDLINE_LINUX=\"x\"",
                "50-cloud.cfg: GRUB_CMDLINE_LINUX_DEFAULT=\"console=tty1 console=ttyS0\"",
                "60-kdump.cfg: GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT crashkernel=1G\"",
                "60-kdump.cfg: GRUB_CMDLINE_LINUX+=\" z\"",
            ]
        );
    }
}
