//! The modules of the running kernel, and modprobe's configuration of them (modprobe.d(5)).

use std::collections::BTreeSet;
use std::path::Path;

use super::cmdline::{is_yes, underscored};
use crate::base::sysfs;
use crate::inventory::modules;

/// Where a kernel module is.
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

/// The content of modprobe.d, where patterns name modules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Modprobe {
    /// `vendor:device` of each id that vfio-pci is told to take.
    pub(super) vfio_ids: Vec<String>,
    /// Modules that wait for vfio-pci.
    after_vfio: Vec<String>,
    /// Modules that are not loaded for their devices (`blacklist`, `install`, `alias`), with the file that
    /// configures it.
    held_back: Vec<(String, String)>,
    /// Modules whose options switch safety of interrupts or of the IOMMU off, with the file that has them.
    pub(super) unsafe_options: Vec<(String, String)>,
}

impl Modprobe {
    pub(super) fn read(root: &Path) -> Self {
        let mut all = Self::default();
        let mut seen = BTreeSet::new();
        // A file hides files of the same name in the directories after it.
        for dir in [
            "etc/modprobe.d",
            "run/modprobe.d",
            "usr/local/lib/modprobe.d",
            "usr/lib/modprobe.d",
            "lib/modprobe.d",
        ] {
            let names = sysfs::entries(&root.join(dir)).unwrap_or_default();
            for name in names.into_iter().filter(|name| name.ends_with(".conf")) {
                if seen.insert(name.clone()) {
                    let text = sysfs::table(&root.join(dir).join(&name)).unwrap_or_default();
                    all.parse(&format!("/{dir}/{name}"), &text);
                }
            }
        }
        all
    }

    fn parse(&mut self, file: &str, text: &str) {
        let whole = text.replace("\\\n", " ");
        for line in whole.lines() {
            let mut words = line.split_whitespace();
            let (Some(command), Some(module)) = (words.next(), words.next()) else {
                continue;
            };
            let is = |name| is_module(module, name);
            match command {
                "options" => {
                    for word in words {
                        let (name, value) = word.split_once('=').unwrap_or((word, "1"));
                        if is("vfio_pci") && name == "ids" {
                            self.vfio_ids.extend(pairs(value));
                        }
                        let can_be_unsafe = is("vfio") || is("vfio_iommu_type1");
                        if can_be_unsafe && UNSAFE.contains(&name) && is_yes(value) {
                            let unsafe_option = (file.to_owned(), word.to_owned());
                            self.unsafe_options.push(unsafe_option);
                        }
                    }
                }
                "softdep" => {
                    let mut before = words
                        .skip_while(|word| *word != "pre:")
                        .take_while(|word| *word != "post:");
                    if before.any(|word| is_module(word, "vfio_pci")) {
                        self.after_vfio.push(module.to_owned());
                    }
                }
                "blacklist" => self.held_back.push((module.to_owned(), file.to_owned())),
                "install" | "alias" => {
                    let instead = words.next().unwrap_or_default();
                    let program = instead.rsplit('/').next().unwrap_or_default();
                    if matches!(
                        (command, program),
                        ("install", "true" | "false") | ("alias", "off")
                    ) {
                        self.held_back.push((module.to_owned(), file.to_owned()));
                    }
                }
                _ => {}
            }
        }
    }

    /// Whether a module waits for vfio-pci.
    pub(super) fn waits(&self, module: &str) -> bool {
        let mut patterns = self.after_vfio.iter();
        patterns.any(|pattern| is_module(pattern, module))
    }

    /// The file that keeps a module from being loaded for its devices.
    pub(super) fn held_back_by(&self, module: &str) -> Option<&str> {
        let mut patterns = self.held_back.iter();
        let found = patterns.find(|(pattern, _)| is_module(pattern, module));
        found.map(|(_, file)| file.as_str())
    }
}

/// Whether a pattern matches a module. `-` and `_` are the same, outside of brackets.
fn is_module(pattern: &str, module: &str) -> bool {
    let mut inside = false;
    let pattern: String = pattern
        .chars()
        .map(|symbol| {
            inside = (inside || symbol == '[') && symbol != ']';
            match symbol {
                '-' if !inside => '_',
                symbol => symbol,
            }
        })
        .collect();
    modules::matches(pattern.as_bytes(), underscored(module).as_bytes())
}

const UNSAFE: [&str; 2] = ["allow_unsafe_interrupts", "enable_unsafe_noiommu_mode"];

/// The `vendor:device` pairs of a list of ids, whose entries may have subsystem and class as well.
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
        assert_eq!(seen.after_vfio, ["nouveau"]);
        assert_eq!(
            seen.unsafe_options,
            [(
                "/etc/modprobe.d/a.conf".into(),
                "allow_unsafe_interrupts=1".into()
            )]
        );
    }

    #[test]
    fn modules_are_named_by_patterns() {
        let mut seen = Modprobe::default();
        seen.parse(
            "/etc/modprobe.d/a.conf",
            "softdep nvidia* pre: vfio-pci\nsoftdep snd[-_]hda-* pre: drm vfio?pci\n\
             options vfio[-_]pci ids=10de:1c30\noptions vfio* enable_unsafe_noiommu_mode=1\n\
             blacklist nouv*\ninstall i2c-* /bin/false\ninstall xhci_hcd /sbin/modprobe x\n\
             alias amdgpu off\nalias eth0 e1000\n",
        );
        for module in ["nvidia", "nvidia-drm", "snd-hda-intel", "snd_hda_intel"] {
            assert!(seen.waits(module), "{module}");
        }
        assert!(!seen.waits("nouveau") && !seen.waits("snd_usb"));
        assert_eq!(seen.vfio_ids, ["10de:1c30"]);
        let (file, option) = &seen.unsafe_options[0];
        assert_eq!(file, "/etc/modprobe.d/a.conf");
        assert_eq!(option, "enable_unsafe_noiommu_mode=1");
        for module in ["nouveau", "i2c_i801", "amdgpu"] {
            assert_eq!(seen.held_back_by(module), Some("/etc/modprobe.d/a.conf"));
        }
        for module in ["xhci-hcd", "eth0", "nvidia"] {
            assert_eq!(seen.held_back_by(module), None, "{module}");
        }
    }

    #[test]
    fn a_file_hides_those_of_its_name_in_other_directories() {
        let root = tempfile::tempdir().unwrap();
        for (dir, text) in [
            ("etc", "# nothing\n"),
            ("usr/lib", "softdep nouveau pre: vfio-pci\n"),
        ] {
            let dir = root.path().join(dir).join("modprobe.d");
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join("a.conf"), text).unwrap();
        }
        assert!(!Modprobe::read(root.path()).waits("nouveau"));
        std::fs::remove_file(root.path().join("etc/modprobe.d/a.conf")).unwrap();
        assert!(Modprobe::read(root.path()).waits("nouveau"));
    }
}
