//! The kernel modules that could drive a device, by depmod's table (modules.alias).

use std::collections::BTreeMap;

use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::facts::ids::PciId;
use crate::inventory::device::HostDevice;

/// The lines of modules.alias that are about PCI.
#[derive(Debug, Default)]
pub struct KernelModules {
    /// Patterns such as `v00008086d*sv*sd*bc02sc00i*` with their modules, by vendor; those for all vendors are
    /// under none.
    patterns: BTreeMap<Option<u16>, Vec<(String, String)>>,
}

impl KernelModules {
    /// Reads the table of the running kernel; a host without it has no modules.
    pub fn read(paths: &HostPaths) -> Self {
        let release = sysfs::text(&paths.proc.join("sys/kernel/osrelease"));
        let release = release.ok().flatten().unwrap_or_default();
        let dir = paths.proc.join("self/root/lib/modules").join(release);
        Self::parse(&sysfs::table(&dir.join("modules.alias")).unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let mut modules = Self::default();
        for line in text.lines() {
            let Some(rest) = line.strip_prefix("alias pci:") else {
                continue;
            };
            let Some((pattern, module)) = rest.split_once(' ') else {
                continue;
            };
            let vendor = pattern.get(5..9).filter(|_| pattern.starts_with("v0000"));
            let vendor = vendor.and_then(|digits| u16::from_str_radix(digits, 16).ok());
            let entry = (pattern.to_owned(), module.to_owned());
            modules.patterns.entry(vendor).or_default().push(entry);
        }
        modules
    }

    /// The modules for a device, in the order of their names.
    pub fn of(&self, device: &HostDevice) -> Vec<&str> {
        let none = PciId {
            vendor: 0,
            device: 0,
        };
        let (id, subsystem) = (device.id, device.subsystem.unwrap_or(none));
        let class = device.class.code();
        let text = format!(
            "v{:08X}d{:08X}sv{:08X}sd{:08X}bc{:02X}sc{:02X}i{:02X}",
            id.vendor,
            id.device,
            subsystem.vendor,
            subsystem.device,
            class >> 16,
            class >> 8 & 0xff,
            class & 0xff
        );
        let patterns = [Some(id.vendor), None]
            .into_iter()
            .filter_map(|vendor| self.patterns.get(&vendor))
            .flatten();
        let mut found: Vec<&str> = patterns
            .filter(|(pattern, _)| matches(pattern.as_bytes(), text.as_bytes()))
            .map(|(_, module)| module.as_str())
            .collect();
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// Why a device has no driver, according to the kernel's modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoDriver {
    /// This module can drive it, and is not loaded.
    NotLoaded(String),
    /// A module that can drive it is loaded.
    Loaded,
    /// No known module supports it.
    NoModule,
}

impl NoDriver {
    /// Looks for the modules of a device.
    pub fn of(paths: &HostPaths, device: &HostDevice) -> Self {
        let modules = KernelModules::read(paths);
        let modules = modules.of(device);
        let loaded = paths.sysfs.join("module");
        let is_loaded = |name: &&str| loaded.join(name.replace('-', "_")).exists();
        match modules.first() {
            None => Self::NoModule,
            Some(_) if modules.iter().any(is_loaded) => Self::Loaded,
            Some(first) => Self::NotLoaded((*first).to_owned()),
        }
    }
}

/// The module of a PCI driver; none if the driver is part of the kernel's image, and so binds before any
/// configuration of modprobe is read. A built-in module with parameters has a folder too, but no state.
pub(crate) fn loaded_module(paths: &HostPaths, driver: &str) -> Option<String> {
    let drivers = paths.sysfs.join("bus/pci/drivers");
    let module = drivers.join(driver).join("module");
    let loaded = module.join("initstate").exists();
    let name = sysfs::link_name(&module).ok().flatten();
    name.filter(|_| loaded)
}

/// Whether a shell pattern of depmod or modprobe.d matches a text (glob(7)).
pub(crate) fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern, text) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => (0..=text.len()).any(|skip| matches(rest, &text[skip..])),
        ([b'?', pattern @ ..], [_, text @ ..]) => matches(pattern, text),
        ([b'[', rest @ ..], [first, text @ ..]) => match class(rest) {
            Some((members, pattern)) => members(*first) && matches(pattern, text),
            None => *first == b'[' && matches(rest, text),
        },
        ([one, pattern @ ..], [other, text @ ..]) => one == other && matches(pattern, text),
        _ => false,
    }
}

/// The class that a bracket opens, and the rest of the pattern; none if the bracket is not closed.
fn class(pattern: &[u8]) -> Option<(impl Fn(u8) -> bool + '_, &[u8])> {
    let negated = matches!(pattern.first(), Some(b'!' | b'^'));
    let members = &pattern[usize::from(negated)..];
    // A closing bracket that comes first is a member.
    let length = 1 + members.get(1..)?.iter().position(|byte| *byte == b']')?;
    let (members, rest) = (&members[..length], &members[length + 1..]);
    let has = move |byte: u8| {
        let range = |three: &[u8]| three[1] == b'-' && (three[0]..=three[2]).contains(&byte);
        members.contains(&byte) || members.windows(3).any(range)
    };
    Some((move |byte| has(byte) != negated, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost};

    #[test]
    fn patterns_are_those_of_the_shell() {
        for (pattern, text, expected) in [
            ("nvidia*", "nvidia_drm", true),
            ("nvidia*", "nvidia", true),
            ("nvidia*", "nouveau", false),
            ("snd_h?a_*", "snd_hda_intel", true),
            ("ix[fg]b*", "ixgbe", true),
            ("i[!g]b", "igb", false),
            ("x[a-c]", "xb", true),
            ("x[a-c]", "xd", false),
            ("x[]a]", "x]", true),
            ("x[", "x[", true),
            ("x[a", "xa", false),
            ("", "x", false),
        ] {
            let said = matches(pattern.as_bytes(), text.as_bytes());
            assert_eq!(said, expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_device_has_the_modules_that_claim_it() {
        let host = FakeHost::new(&[
            Fake::nvme("01:00.0", 1),
            Fake::nvme("02:00.0", 2).class(0x03_00_00),
        ]);
        host.file("proc/sys/kernel/osrelease", "6.12.1\n");
        host.file(
            "proc/self/root/lib/modules/6.12.1/modules.alias",
            "# Aliases\nalias pci:v*d*sv*sd*bc01sc08i02* nvme\n\
             alias pci:v00001B36d00000010sv*sd*bc*sc*i* nvme\n\
             alias pci:v00001B36d00000011sv*sd*bc*sc*i* other\n\
             alias pci:v*d*sv*sd*bc03sc*i* vga\nalias usb:v1D6Bp* hub\n",
        );
        let modules = KernelModules::read(&host.paths);
        assert_eq!(modules.of(&host.read("01:00.0")), ["nvme"]);
        assert_eq!(modules.of(&host.read("02:00.0")), ["nvme", "vga"]);
        let why = |bdf| NoDriver::of(&host.paths, &host.read(bdf));
        assert_eq!(why("02:00.0"), NoDriver::NotLoaded("nvme".to_owned()));
        host.file("sys/module/vga/refcnt", "0");
        assert_eq!(why("02:00.0"), NoDriver::Loaded);
        let other = FakeHost::new(&[]);
        let why = NoDriver::of(&other.paths, &host.read("01:00.0"));
        assert_eq!(why, NoDriver::NoModule);
        let none = KernelModules::read(&FakeHost::new(&[]).paths);
        assert!(none.of(&host.read("01:00.0")).is_empty());
    }
}
