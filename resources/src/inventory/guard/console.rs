//! Consoles and keyboards: the devices behind active consoles, and the last keyboard.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::HostUse;
use crate::base::host::HostPaths;
use crate::base::sysfs;

/// The keys from Esc to S, which every keyboard has; udev's `input_id` checks the same ones.
const TYPED: u64 = 0xffff_fffe;

/// The devices of the host's consoles and keyboards.
pub(super) struct Consoles {
    /// Terminals of kernel messages, with their paths in the device tree.
    consoles: Vec<(String, PathBuf)>,
    /// Such terminals of a hypervisor, which have no path of their own.
    hypervisor: Option<String>,
    /// Keyboards with their paths.
    keyboards: Vec<(String, PathBuf)>,
}

impl Consoles {
    pub(super) fn read(paths: &HostPaths) -> io::Result<Self> {
        let class = paths.sysfs.join("class");
        let active = sysfs::text(&class.join("tty/console/active"))?.unwrap_or_default();
        let mut seats = Self {
            consoles: Vec::new(),
            hypervisor: None,
            keyboards: keyboards(&class.join("input"))?,
        };
        for name in active.split_whitespace() {
            // A terminal on a screen is drawn in the first framebuffer.
            let place = match name.strip_prefix("tty") {
                Some(number) if number.bytes().all(|digit| digit.is_ascii_digit()) => {
                    class.join("graphics/fb0")
                }
                _ => class.join("tty").join(name).join("device"),
            };
            if let Ok(place) = fs::canonicalize(place) {
                seats.consoles.push((name.to_owned(), place));
            } else if name.starts_with("hvc") {
                seats.hypervisor = Some(name.to_owned());
            }
        }
        Ok(seats)
    }

    /// The uses of a device with this path.
    pub(super) fn uses(&self, device: &Path) -> io::Result<Vec<HostUse>> {
        let behind = self.consoles.iter();
        let behind = behind.filter(|(_, place)| place.starts_with(device));
        let mut uses: Vec<HostUse> = behind
            .map(|(name, _)| HostUse::Console {
                terminal: name.clone(),
            })
            .collect();
        if let Some(terminal) = &self.hypervisor
            && has_virtio_console(device)?
        {
            uses.push(HostUse::Console {
                terminal: terminal.clone(),
            });
        }
        let own = |(_, place): &&(String, PathBuf)| place.starts_with(device);
        let last = self.keyboards.iter().all(|one| own(&one));
        let keyboard = self.keyboards.first().filter(|_| last);
        uses.extend(keyboard.map(|(name, _)| HostUse::Keyboard { name: name.clone() }));
        Ok(uses)
    }
}

/// Whether a device is a virtio device whose driver makes terminals.
fn has_virtio_console(device: &Path) -> io::Result<bool> {
    for name in sysfs::entries(device)? {
        let driver = device.join(&name).join("driver");
        if name.starts_with("virtio")
            && sysfs::link_name(&driver)?.as_deref() == Some("virtio_console")
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Input devices with the keys of a keyboard.
fn keyboards(class: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in sysfs::entries(class)? {
        let dir = class.join(&entry);
        let keys = sysfs::text(&dir.join("capabilities/key"))?.unwrap_or_default();
        // The last word has the keys with the smallest numbers.
        let first = keys.split_whitespace().next_back();
        let first = first.and_then(|word| u64::from_str_radix(word, 16).ok());
        if first.is_none_or(|word| word & TYPED != TYPED) {
            continue;
        }
        if let Ok(place) = fs::canonicalize(&dir) {
            let name = sysfs::text(&dir.join("name"))?;
            found.push((name.unwrap_or(entry), place));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost, bdf};
    use crate::inventory::guard::host_uses;
    use std::os::unix::fs::symlink;

    fn host() -> FakeHost {
        FakeHost::new(&[
            Fake::nvme("01:00.0", 1)
                .class(0x07_80_00)
                .driver("virtio-pci"),
            Fake::nvme("02:00.0", 2)
                .class(0x0c_03_30)
                .driver("xhci_hcd"),
            Fake::nvme("03:00.0", 3)
                .class(0x0c_03_30)
                .driver("xhci_hcd"),
            Fake::nvme("04:00.0", 4)
                .class(0x03_80_00)
                .driver("bochs-drm"),
        ])
    }

    fn uses(host: &FakeHost) -> Vec<String> {
        let uses = host_uses(&host.paths, &host.scan()).unwrap();
        uses.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_console_of_the_hypervisors_keeps_its_device() {
        let host = host();
        let virtio = host.dir(bdf("01:00.0")).join("virtio3");
        fs::create_dir_all(&virtio).unwrap();
        symlink(
            "/sys/bus/virtio/drivers/virtio_console",
            virtio.join("driver"),
        )
        .unwrap();
        host.file("sys/class/tty/console/active", "ttyS0 hvc0\n");
        assert_eq!(
            uses(&host),
            ["0000:01:00.0 is behind hvc0, a console of the host (/sys/class/tty/console/active)"]
        );
        host.file("sys/class/tty/console/active", "ttyS0\n");
        assert!(uses(&host).is_empty());
        host.file("sys/class/tty/console/active", "hvc0\n");
        fs::remove_file(virtio.join("driver")).unwrap();
        symlink("/sys/bus/virtio/drivers/virtio_net", virtio.join("driver")).unwrap();
        assert!(uses(&host).is_empty());
    }

    #[test]
    fn devices_behind_consoles_stay() {
        let host = host();
        let serial = host.dir(bdf("02:00.0")).join("usb1/1-1/ttyUSB0");
        fs::create_dir_all(&serial).unwrap();
        let tty = host.paths.sysfs.join("class/tty/ttyUSB0");
        fs::create_dir_all(&tty).unwrap();
        symlink(serial, tty.join("device")).unwrap();
        fs::create_dir_all(host.paths.sysfs.join("class/graphics")).unwrap();
        host.child(bdf("04:00.0"), "graphics/fb0", "class/graphics/fb0");
        host.file("sys/class/tty/console/active", "ttyS0\n");
        assert!(uses(&host).is_empty());
        host.file("sys/class/tty/console/active", "tty0 ttyUSB0\n");
        let said = uses(&host);
        assert!(
            said.len() == 2
                && said[0].starts_with("0000:02:00.0 is behind ttyUSB0")
                && said[1].starts_with("0000:04:00.0 is behind tty0"),
            "{said:?}"
        );
    }

    #[test]
    fn the_last_keyboard_stays() {
        let host = host();
        fs::create_dir_all(host.paths.sysfs.join("class/input")).unwrap();
        let plug = |address: &str, name: &str, keys: &str| {
            let path = format!("usb1/input/{name}");
            let dir = host.child(bdf(address), &path, &format!("class/input/{name}"));
            fs::create_dir_all(dir.join("capabilities")).unwrap();
            fs::write(dir.join("capabilities/key"), keys).unwrap();
            fs::write(dir.join("name"), format!("the {name}\n")).unwrap();
        };
        // A mouse has buttons, and a power button one key.
        plug("03:00.0", "input1", "1f0000 0 0 0 0\n");
        assert!(uses(&host).is_empty());
        plug(
            "02:00.0",
            "input2",
            "1000000000007 ff9f207ac14057ff febeffdfffefffff fffffffffffffffe\n",
        );
        assert_eq!(
            uses(&host),
            ["0000:02:00.0 has the host's only keyboard, the input2"]
        );
        plug("03:00.0", "input3", "ffff fffffffffffffffe\n");
        assert!(uses(&host).is_empty());
    }
}
