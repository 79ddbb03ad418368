//! Which device the console is drawn on, where the firmware's framebuffer goes on being used (EFI, VESA).

use std::collections::BTreeSet;

use crate::base::bdf::HostBdf;

/// What the kernel calls the memory of such a framebuffer, from its reservation at boot to its drivers.
const NAMES: [&str; 5] = [
    "BOOTFB",
    "efifb",
    "vesafb",
    "simplefb",
    "simple-framebuffer",
];

/// The devices in whose BARs a framebuffer of the firmware lies, from /proc/iomem, where what lies within
/// something follows it two blanks deeper.
pub(super) fn owners(iomem: &str) -> BTreeSet<HostBdf> {
    let mut above: Vec<Option<HostBdf>> = Vec::new();
    let mut found = BTreeSet::new();
    for line in iomem.lines() {
        let depth = line.bytes().take_while(|byte| *byte == b' ').count() / 2;
        let Some((_, name)) = line.split_once(" : ") else {
            continue;
        };
        above.truncate(depth);
        if NAMES.contains(&name) {
            found.extend(above.iter().rev().find_map(|owner| *owner));
        }
        above.resize(depth, None);
        above.push(name.parse().ok());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_around_the_framebuffer_is_found() {
        let iomem = "00000000-00000fff : Reserved\n\
            c0000000-feafffff : PCI Bus 0000:00\n\
            \x20 c0000000-d1ffffff : PCI Bus 0000:0b\n\
            \x20   c0000000-cfffffff : 0000:0b:00.0\n\
            \x20     c0000000-c07e8fff : BOOTFB\n\
            \x20   d0000000-d1ffffff : 0000:0b:00.1\n\
            \x20 e0000000-e0ffffff : 0000:00:02.0\n\
            fee00000-fee00fff : Local APIC\n\
            100000000-1ffffffff : System RAM\n\
            \x20 100000000-1000fffff : efifb\n";
        let owners: Vec<String> = owners(iomem).iter().map(HostBdf::to_string).collect();
        assert_eq!(owners, ["0000:0b:00.0"]);
        assert!(super::owners("").is_empty());
    }
}
