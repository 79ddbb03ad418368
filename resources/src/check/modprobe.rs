//! Which modules the running kernel has, and what modprobe has been told about them
//! (modprobe.d(5)).

use std::collections::BTreeSet;
use std::path::Path;

use super::cmdline::underscored;
use crate::sysfs;

/// Where a module of the kernel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ModuleState {
    /// In the running kernel, loaded or built in.
    There,
    /// On the disk.
    Loadable,
    /// Nowhere.
    Missing,
    /// Not loaded; the modules' directory cannot be read.
    Unknown,
}

/// The modules of the running kernel. All names with underscores.
#[derive(Clone, Debug, Default)]
pub(super) struct Modules {
    present: BTreeSet<String>,
    builtin: BTreeSet<String>,
    loadable: BTreeSet<String>,
}

impl Modules {
    /// `root` is the root directory, where `lib/modules` is.
    pub(super) fn read(sysfs_dir: &Path, root: &Path, release: &str) -> Self {
        let dir = root.join("lib/modules").join(release);
        let table = |name: &str| sysfs::table(&dir.join(name)).unwrap_or_default();
        let loaded = sysfs::entries(&sysfs_dir.join("module")).unwrap_or_default();
        Self {
            present: loaded.into_iter().collect(),
            builtin: table("modules.builtin").lines().map(module_name).collect(),
            loadable: table("modules.dep")
                .lines()
                .filter_map(|line| Some(module_name(line.split_once(':')?.0)))
                .collect(),
        }
    }

    pub(super) fn state(&self, name: &str) -> ModuleState {
        let name = underscored(name);
        if self.present.contains(&name) || self.builtin.contains(&name) {
            ModuleState::There
        } else if self.loadable.contains(&name) {
            ModuleState::Loadable
        } else if self.loadable.is_empty() && self.builtin.is_empty() {
            ModuleState::Unknown
        } else {
            ModuleState::Missing
        }
    }

    /// Part of the kernel's image, so that no setting of modprobe can hold it back.
    pub(super) fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(&underscored(name))
    }
}

/// `kernel/drivers/vfio/pci/vfio-pci.ko.xz` is `vfio_pci`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    underscored(file.split(".ko").next().unwrap_or(file))
}

/// What the files of modprobe.d say. Names with underscores.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Modprobe {
    /// `vendor:device` of each id that vfio-pci is told to take.
    pub(super) vfio_ids: Vec<String>,
    /// Modules that wait for vfio-pci.
    pub(super) after_vfio: BTreeSet<String>,
    /// Modules that switch the safety of interrupts or of the IOMMU off, with the file that says so.
    pub(super) unsafe_options: Vec<(String, String)>,
}

impl Modprobe {
    pub(super) fn read(root: &Path) -> Self {
        let mut all = Self::default();
        for dir in [
            "usr/lib/modprobe.d",
            "lib/modprobe.d",
            "run/modprobe.d",
            "etc/modprobe.d",
        ] {
            let names = sysfs::entries(&root.join(dir)).unwrap_or_default();
            for name in names.iter().filter(|name| name.ends_with(".conf")) {
                let text = sysfs::table(&root.join(dir).join(name)).unwrap_or_default();
                all.parse(&format!("/{dir}/{name}"), &text);
            }
        }
        // With a merged /usr one directory is seen under two names.
        all.unsafe_options.dedup_by(|one, other| {
            one.1 == other.1
                && one.0.trim_start_matches("/usr") == other.0.trim_start_matches("/usr")
        });
        all
    }

    fn parse(&mut self, file: &str, text: &str) {
        let whole = text.replace("\\\n", " ");
        for line in whole.lines() {
            let mut words = line.split_whitespace();
            let (command, module) = (words.next(), words.next().map(underscored));
            match (command, module.as_deref()) {
                (Some("options"), Some("vfio_pci")) => {
                    let ids = words.filter_map(|word| word.strip_prefix("ids="));
                    self.vfio_ids.extend(ids.flat_map(pairs));
                }
                (Some("options"), Some("vfio" | "vfio_iommu_type1")) => {
                    let off = words.filter(|word| {
                        let (name, value) = word.split_once('=').unwrap_or((word, "1"));
                        UNSAFE.contains(&name) && super::cmdline::is_yes(value)
                    });
                    self.unsafe_options
                        .extend(off.map(|word| (file.to_owned(), word.to_owned())));
                }
                (Some("softdep"), Some(module)) => {
                    let before = words
                        .skip_while(|word| *word != "pre:")
                        .take_while(|word| *word != "post:");
                    if before.map(underscored).any(|word| word == "vfio_pci") {
                        self.after_vfio.insert(module.to_owned());
                    }
                }
                _ => {}
            }
        }
    }
}

const UNSAFE: [&str; 2] = ["allow_unsafe_interrupts", "enable_unsafe_noiommu_mode"];

/// The `vendor:device` pairs of a list of ids, which may name subsystem and class as well.
pub(super) fn pairs(ids: &str) -> Vec<String> {
    let pair = |id: &str| {
        let mut parts = id.split(':');
        Some(format!("{}:{}", parts.next()?, parts.next()?).to_lowercase())
    };
    ids.split(',').filter_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_found_where_they_are() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let read = || Modules::read(&root.path().join("sys"), root.path(), "6.1.0");
        assert_eq!(read().state("vfio-pci"), ModuleState::Unknown);
        put("sys/module/kvm/parameters/x", "");
        put(
            "lib/modules/6.1.0/modules.builtin",
            "kernel/drivers/vfio/vfio.ko\n",
        );
        put(
            "lib/modules/6.1.0/modules.dep",
            "kernel/drivers/vfio/pci/vfio-pci.ko.zst: kernel/drivers/vfio/vfio.ko.zst\n",
        );
        let modules = read();
        for (name, state) in [
            ("kvm", ModuleState::There),
            ("vfio", ModuleState::There),
            ("vfio-pci", ModuleState::Loadable),
            ("vfio_iommu_type1", ModuleState::Missing),
        ] {
            assert_eq!(modules.state(name), state, "{name}");
        }
        assert!(modules.is_builtin("vfio") && !modules.is_builtin("kvm"));
    }

    #[test]
    fn modprobes_files_are_understood() {
        let mut seen = Modprobe::default();
        seen.parse(
            "/etc/modprobe.d/a.conf",
            "# softdep no pre: vfio-pci\n\
             options vfio-pci ids=10DE:1c30,10de:10f1:ffff:ffff disable_vga=1\n\
             softdep nouveau pre: drm \\\n vfio-pci post: x\n\
             softdep snd-hda-intel post: vfio-pci\n\
             options vfio_iommu_type1 allow_unsafe_interrupts=1\n\
             options vfio enable_unsafe_noiommu_mode=0\n",
        );
        assert_eq!(seen.vfio_ids, ["10de:1c30", "10de:10f1"]);
        assert_eq!(seen.after_vfio.iter().collect::<Vec<_>>(), ["nouveau"]);
        assert_eq!(
            seen.unsafe_options,
            [(
                "/etc/modprobe.d/a.conf".into(),
                "allow_unsafe_interrupts=1".into()
            )]
        );
    }
}
