//! Generates what binds devices to vfio-pci at every boot: udev rules, options for modprobe, or a unit.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::io;
use std::path::Path;

use crate::base::atomic;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::inventory::device::{HostDevice, is_vfio_driver};
use crate::inventory::driver_record::DriverRecord;
use crate::inventory::guard::host_uses;
use crate::inventory::modules::{KernelModules, loaded_module};
use crate::inventory::scan::scan;
use crate::moving::bind::{BindError, members};
use crate::pools::group::ResourceGroup;

/// The two ways to name devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PersistBy {
    /// A rule that names each device by its address and ids.
    Udev,
    /// Options that name devices by their ids alone.
    Modprobe,
}

/// A file of the host that binds devices at boot.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Persistent {
    /// Its path on the host.
    pub file: &'static str,
    /// Its content.
    pub text: String,
    /// The command that makes it effective from the next boot.
    pub then: &'static str,
    /// Other effects of it.
    pub warnings: Vec<String>,
}

impl Persistent {
    /// Writes the file as a whole, or leaves it unchanged.
    pub fn save(&self, file: &Path) -> io::Result<()> {
        // A pipe or a terminal has no content to lose.
        match std::fs::metadata(file) {
            Ok(found) if !found.is_file() => std::fs::write(file, &self.text),
            _ => atomic::replace(file, self.text.as_bytes()),
        }
    }
}

/// Generates what binds devices, with all endpoints of their IOMMU groups, to vfio-pci at boot. Refused for devices
/// that the host uses.
pub fn persist(
    paths: &HostPaths,
    devices: &[HostBdf],
    overrides: &[HostBdf],
    by: PersistBy,
) -> Result<Persistent, BindError> {
    let all = scan(paths)?;
    let members = members(&all, devices)?;
    // Options for modprobe name ids: other devices with the same ids are bound too.
    let twin = |device: &HostDevice| {
        let same = members.iter().any(|member| member.id == device.id);
        by == PersistBy::Modprobe && same && !device.is_bridge()
    };
    let concerned = |device: &&HostDevice| {
        let chosen = members.iter().any(|member| member.bdf == device.bdf);
        (chosen || twin(device)) && !device.on_vfio()
    };
    let on_host: Vec<HostDevice> = all.iter().filter(concerned).cloned().collect();
    let mut guarded = host_uses(paths, &on_host).map_err(BindError::Guard)?;
    guarded.retain(|guarded| !overrides.contains(&guarded.bdf));
    if !guarded.is_empty() {
        return Err(BindError::Guarded(guarded));
    }
    Ok(match by {
        PersistBy::Udev => udev(&members),
        PersistBy::Modprobe => modprobe(paths, &members, &all),
    })
}

/// The udev rules that activate groups when a driver binds their physical functions. `gantry` is the program to
/// run.
pub fn persist_functions(groups: &[&ResourceGroup], gantry: &Path) -> String {
    let mut text = String::new();
    for group in groups {
        if let Some(spec) = &group.sriov {
            let _ = writeln!(
                text,
                "ACTION==\"add|bind\", SUBSYSTEM==\"pci\", KERNEL==\"{}\", DRIVER==\"?*\", RUN+=\"{} group activate {}\"",
                spec.pf,
                gantry.display(),
                group.name
            );
        }
    }
    text
}

/// A unit that runs `gantry boot`. It names no device: the groups are read at each boot.
pub fn persist_unit(gantry: &Path) -> Persistent {
    let text = format!(
        "# Made by `gantry device persist`: devices for VMs, and what else a boot undoes.\n\
         [Unit]\n\
         Description=Devices for VMs\n\
         After=systemd-udev-settle.service systemd-modules-load.service\n\
         Wants=systemd-udev-settle.service\n\n\
         [Service]\n\
         Type=oneshot\n\
         ExecStartPre=-/sbin/modprobe vfio-pci\n\
         ExecStart={} boot\n\n\
         [Install]\n\
         WantedBy=multi-user.target\n",
        gantry.display()
    );
    Persistent {
        file: "/etc/systemd/system/gantry.service",
        text,
        then: "systemctl enable gantry",
        warnings: Vec::new(),
    }
}

fn udev(devices: &[HostDevice]) -> Persistent {
    let mut text = "# Made by `gantry device persist`: these devices are for VMs.\n\
        # A driver that is built into the kernel or loaded in the initramfs comes before udev: put this\n\
        # file into the initramfs too, or use `gantry device persist --by modprobe`.\n\
        # Whichever PCI device comes first marks them all, as a driver loaded for it looks at them too.\n"
        .to_owned();
    for HostDevice { bdf, id, .. } in devices {
        let _ = writeln!(
            text,
            "ACTION==\"add\", SUBSYSTEM==\"pci\", TEST!=\"[pci/{bdf}]driver\", \
             ATTR{{[pci/{bdf}]vendor}}==\"{:#06x}\", ATTR{{[pci/{bdf}]device}}==\"{:#06x}\", \
             ATTR{{[pci/{bdf}]driver_override}}=\"vfio-pci\"",
            id.vendor, id.device
        );
    }
    for HostDevice { bdf, .. } in devices {
        let _ = writeln!(
            text,
            "ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"{bdf}\", ATTR{{driver_override}}==\"vfio-pci\", \
             RUN{{builtin}}+=\"kmod load vfio-pci\", \
             RUN+=\"/bin/sh -c 'echo $kernel >/sys/bus/pci/drivers_probe'\""
        );
    }
    Persistent {
        file: "/etc/udev/rules.d/10-gantry.rules",
        text,
        then: "udevadm control --reload",
        warnings: Vec::new(),
    }
}

fn modprobe(paths: &HostPaths, devices: &[HostDevice], all: &[HostDevice]) -> Persistent {
    let ids: BTreeSet<String> = devices.iter().map(|device| device.id.to_string()).collect();
    let ids_text = ids.iter().cloned().collect::<Vec<_>>().join(",");
    let mut text = format!(
        "# Made by `gantry device persist`: these devices are for VMs.\noptions vfio-pci ids={ids_text}\n"
    );
    let Rivals { modules, built_in } = Rivals::of(paths, devices);
    for module in modules {
        let _ = writeln!(text, "softdep {module} pre: vfio-pci");
    }
    let built_in = built_in.iter().map(|driver| {
        format!(
            "{driver} is built into the kernel, and binds its devices before options take effect: leave --by out for a udev rule, or let `--by systemd` take them from it"
        )
    });
    let chosen = |device: &&HostDevice| devices.iter().any(|one| one.bdf == device.bdf);
    let others = all.iter().filter(|device| !chosen(device));
    let also = others.filter(|device| ids.contains(&device.id.to_string()));
    Persistent {
        file: "/etc/modprobe.d/gantry.conf",
        text,
        then: "update-initramfs -u",
        warnings: also
            .map(|device| format!("{} has the same ids and is bound too", device.bdf))
            .chain(built_in)
            .collect(),
    }
}

/// Other drivers that would take devices at boot.
#[derive(Default)]
struct Rivals {
    /// Modules, whose names need not be those of their drivers.
    modules: BTreeSet<String>,
    /// Drivers that are no modules.
    built_in: BTreeSet<String>,
}

impl Rivals {
    /// The modules that claim the devices, loaded or not, and the drivers that the devices have or had before
    /// they were detached.
    fn of(paths: &HostPaths, devices: &[HostDevice]) -> Self {
        let known = KernelModules::read(paths);
        let mut rivals = Self::default();
        for device in devices {
            let claim = known.of(device).into_iter().map(str::to_owned);
            rivals.modules.extend(claim);
            let has = device.driver.clone().filter(|name| !is_vfio_driver(name));
            let had = || DriverRecord::of_detached(paths, device).and_then(|former| former.driver);
            if let Some(driver) = has.or_else(had) {
                rivals.add(paths, driver);
            }
        }
        rivals
    }

    fn add(&mut self, paths: &HostPaths, driver: String) {
        let folder = paths.sysfs.join("bus/pci/drivers").join(&driver);
        match loaded_module(paths, &driver) {
            Some(module) => {
                self.modules.insert(module);
            }
            // A module that is not there any more was unloaded.
            None if folder.exists() => {
                self.built_in.insert(driver);
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost, FakeKernel, bdf};
    use crate::moving::bind::{BindRequest, detach};

    fn host() -> FakeHost {
        FakeHost::new(&[
            Fake::nvme("01:00.0", 7).class(0x03_02_00).driver("nouveau"),
            Fake::nvme("01:00.1", 7)
                .class(0x04_03_00)
                .driver("snd_hda_intel"),
            Fake::nvme("02:00.0", 2).driver("nvme"),
        ])
    }

    /// The module of a driver, which has an `initstate` only if it was loaded.
    fn module(host: &FakeHost, driver: &str, module: &str, loaded: bool) {
        let sysfs = &host.paths.sysfs;
        let folder = sysfs.join("module").join(module);
        std::fs::create_dir_all(&folder).unwrap();
        if loaded {
            std::fs::write(folder.join("initstate"), "live\n").unwrap();
        }
        let link = sysfs.join("bus/pci/drivers").join(driver).join("module");
        std::os::unix::fs::symlink(folder, link).unwrap();
    }

    #[test]
    fn udev_rules_mark_each_device_of_the_group_and_then_bind_it() {
        let text = persist(&host().paths, &[bdf("01:00.0")], &[], PersistBy::Udev)
            .unwrap()
            .text;
        let rules: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(rules.len(), 4);
        for (number, address) in ["0000:01:00.0", "0000:01:00.1"].iter().enumerate() {
            let mark = format!(
                "TEST!=\"[pci/{address}]driver\", ATTR{{[pci/{address}]vendor}}==\"0x1b36\", \
                 ATTR{{[pci/{address}]device}}==\"0x0010\", ATTR{{[pci/{address}]driver_override}}=\"vfio-pci\""
            );
            assert!(rules[number].ends_with(&mark), "{text}");
            let bind = rules[number + 2];
            assert!(bind.contains(&format!("KERNEL==\"{address}\"")), "{bind}");
            // Where vfio-pci is loaded already, nothing else makes it look at the device.
            assert!(
                bind.contains("echo $kernel >/sys/bus/pci/drivers_probe"),
                "{bind}"
            );
        }
    }

    #[test]
    fn options_come_before_the_drivers_and_name_what_goes_along() {
        let host = host();
        module(&host, "nouveau", "nouveau", true);
        module(&host, "snd_hda_intel", "snd_hda", true);
        let options = persist(&host.paths, &[bdf("01:00.0")], &[], PersistBy::Modprobe).unwrap();
        assert!(
            options.text.contains("\noptions vfio-pci ids=1b36:0010\n"),
            "{}",
            options.text
        );
        assert!(options.text.contains("softdep nouveau pre: vfio-pci\n"));
        // By its module, whatever the driver is called.
        assert!(options.text.contains("softdep snd_hda pre: vfio-pci\n"));
        assert_eq!(
            options.warnings,
            ["0000:02:00.0 has the same ids and is bound too"]
        );
    }

    #[test]
    fn options_know_drivers_that_do_not_have_the_device_now() {
        let host = FakeHost::new(&[Fake::nvme("01:00.0", 7).driver("nouveau")]);
        host.file("proc/sys/kernel/osrelease", "6.12.1\n");
        let aliases = "alias pci:v00001B36d*sv*sd*bc*sc*i* nvidia\n";
        host.file("proc/self/root/lib/modules/6.12.1/modules.alias", aliases);
        module(&host, "nouveau", "nouveau", true);
        let disk = [bdf("01:00.0")];
        detach(
            &host.paths,
            &FakeKernel::new(&host),
            &BindRequest::of(&disk),
        )
        .unwrap();
        let made = persist(&host.paths, &[bdf("01:00.0")], &[], PersistBy::Modprobe).unwrap();
        let soft = "softdep nouveau pre: vfio-pci\nsoftdep nvidia pre: vfio-pci\n";
        assert!(made.text.ends_with(soft), "{}", made.text);
        assert!(made.warnings.is_empty(), "{:?}", made.warnings);
    }

    #[test]
    fn functions_are_made_when_the_driver_has_the_card() {
        let group = serde_json::from_str(
            r#"{"name": "vfs", "sriov": {"pf": "03:00.0", "count": 2}, "bind": "boot"}"#,
        );
        let text = persist_functions(&[&group.unwrap()], "/usr/local/bin/gantry".as_ref());
        assert_eq!(
            text,
            "ACTION==\"add|bind\", SUBSYSTEM==\"pci\", KERNEL==\"0000:03:00.0\", DRIVER==\"?*\", \
             RUN+=\"/usr/local/bin/gantry group activate vfs\"\n"
        );
    }

    #[test]
    fn a_driver_that_is_built_in_is_told_of() {
        let host = host();
        // It has parameters.
        module(&host, "nvme", "nvme", false);
        let made = persist(&host.paths, &[bdf("02:00.0")], &[], PersistBy::Modprobe).unwrap();
        let told = |warning: &String| warning.starts_with("nvme is built into the kernel");
        assert!(made.warnings.iter().any(told), "{:?}", made.warnings);
        assert!(!made.text.contains("softdep"), "{}", made.text);
    }

    #[test]
    fn a_file_is_written_as_a_whole_or_stays() {
        let host = host();
        let made = persist(&host.paths, &[bdf("01:00.0")], &[], PersistBy::Udev).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("10-gantry.rules");
        std::fs::write(&file, "what was there, and is longer than nothing").unwrap();
        made.save(&file).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), made.text);
        // Nothing is left beside it, nor is it touched where the new one cannot be made.
        assert_eq!(crate::base::sysfs::entries(dir.path()).unwrap().len(), 1);
        assert!(made.save(&file.join("below/a/file")).is_err());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), made.text);
        made.save(Path::new("/dev/null")).unwrap();
    }

    #[test]
    fn what_the_host_needs_is_refused() {
        let host = host();
        std::fs::write(host.dir(bdf("01:00.0")).join("boot_vga"), "1").unwrap();
        let persisted = |overrides: &[HostBdf]| {
            persist(&host.paths, &[bdf("01:00.1")], overrides, PersistBy::Udev)
        };
        assert!(matches!(persisted(&[]), Err(BindError::Guarded(_))));
        assert!(persisted(&[bdf("01:00.0")]).is_ok());
    }

    #[test]
    fn a_twin_that_the_host_needs_is_refused_where_ids_take_it_along() {
        let host = host();
        std::fs::write(host.dir(bdf("01:00.0")).join("boot_vga"), "1").unwrap();
        let persisted =
            |overrides: &[HostBdf], by| persist(&host.paths, &[bdf("02:00.0")], overrides, by);
        assert!(persisted(&[], PersistBy::Udev).is_ok());
        let refused = persisted(&[], PersistBy::Modprobe).unwrap_err().to_string();
        assert!(refused.contains("0000:01:00.0"), "{refused}");
        assert!(persisted(&[bdf("01:00.0")], PersistBy::Modprobe).is_ok());
    }
}
