//! What is in the two initramfs: the lab host's and its guests'.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::command;
use super::host::Setup;
use super::initramfs::Initramfs;
use super::kernel::Kernel;
use super::packages::find_in;
use super::parts::{PANIC_MODULE, PANIC_MODULE_NEEDS, Parts};

/// Vendors whose names guests get to know: those of the lab's devices.
const GUEST_VENDORS: &[&str] = &["1022", "10de", "1234", "15b3", "1af4", "1b36", "8086"];

/// The kernel of a lab host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum HostKernel {
    /// Debian's own: VFIO groups, no iommufd, no mdev.
    Stock,
    /// The lab's: iommufd, VFIO cdevs, mdev samples.
    Lab,
}

impl HostKernel {
    /// The kernel, if there is one.
    pub fn of(self, parts: &Parts) -> Result<&Kernel> {
        match self {
            Self::Stock => Ok(&parts.stock),
            Self::Lab => parts.lab.as_ref().context("the lab kernel is not built"),
        }
    }
}

/// What of kmod stands in for busybox's.
const KMOD: &[&str] = &["modprobe", "depmod", "insmod", "rmmod", "lsmod", "modinfo"];

/// The lab host's initramfs.
pub fn host(parts: &Parts, setup: &Setup) -> Result<Vec<u8>> {
    let mut archive = Initramfs::default();
    if setup.udev {
        udev(&mut archive, &parts.tools)?;
    }
    base(&mut archive, parts, &["lspci", "ip"])?;
    archive.file("init", 0o755, include_bytes!("../../lab/host-init.sh"));
    // Busybox's knows no virtual functions.
    let ip = find_in(&parts.tools, &["bin/ip", "usr/bin/ip"])?;
    archive.program("bin/ip", &ip, Some(&parts.tools))?;
    archive.program("bin/lab-agent", &parts.agent, None)?;
    archive.program("bin/gantry", &parts.gantry, None)?;
    archive.program(
        "bin/lspci",
        &parts.tools.join("usr/bin/lspci"),
        Some(&parts.tools),
    )?;
    archive.copy(
        "usr/share/misc/pci.ids",
        &parts.tools.join("usr/share/misc/pci.ids"),
    )?;
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.file(
        "etc/profile",
        0o644,
        b"export PS1='lab:\\w\\$ ' HOME=/root\ncd\n",
    );
    let kernel = setup.kernel.of(parts)?;
    modules(&mut archive, kernel)?;
    archive.copy("lab/bzImage-debian", &parts.stock.bzimage)?;
    if let Some(lab) = &parts.lab {
        archive.copy("lab/bzImage-lab", &lab.bzimage)?;
        if let Some(vmlinux) = &lab.vmlinux {
            archive.copy("lab/vmlinux", vmlinux)?;
        }
    }
    archive.file("lab/initramfs-guest", 0o644, &guest(parts)?);
    archive.file("lab/vm.json", 0o644, include_bytes!("../../lab/vm.json"));
    for put in &setup.puts {
        put.add(&mut archive)?;
    }
    Ok(archive.finish())
}

/// A guest's initramfs.
pub fn guest(parts: &Parts) -> Result<Vec<u8>> {
    let mut archive = Initramfs::default();
    base(&mut archive, parts, &["lspci"])?;
    archive.file("init", 0o755, include_bytes!("../../lab/guest-init.sh"));
    archive.file(
        "bin/drive",
        0o755,
        include_bytes!("../../lab/guest-drive.sh"),
    );
    archive.program(
        "bin/lspci",
        &parts.tools.join("usr/bin/lspci"),
        Some(&parts.tools),
    )?;
    for (name, file, _) in parts.stock.modules()? {
        if name == PANIC_MODULE || PANIC_MODULE_NEEDS.contains(&&*name) {
            archive.copy(&format!("lib/{name}.ko"), &file)?;
        }
    }
    let names = parts.tools.join("usr/share/misc/pci.ids");
    let names = fs::read(&names).with_context(|| format!("cannot read {}", names.display()))?;
    let names = trim_names(&String::from_utf8_lossy(&names));
    archive.file("usr/share/misc/pci.ids", 0o644, names.as_bytes());
    Ok(archive.finish())
}

/// Debian's modprobe and udev, with the rule that loads drivers.
fn udev(archive: &mut Initramfs, tools: &Path) -> Result<()> {
    let kmod = find_in(tools, &["bin/kmod", "usr/bin/kmod"])?;
    archive.program("bin/kmod", &kmod, Some(tools))?;
    for name in KMOD {
        archive.link(&format!("bin/{name}"), "kmod");
    }
    let udevadm = find_in(tools, &["bin/udevadm", "usr/bin/udevadm"])?;
    archive.program("bin/udevadm", &udevadm, Some(tools))?;
    archive.link("lib/systemd/systemd-udevd", "/bin/udevadm");
    let rules = "lib/udev/rules.d/80-drivers.rules";
    let place = find_in(tools, &[rules, &format!("usr/{rules}")])?;
    archive.copy(rules, &place)
}

/// Busybox under all its names but those of `others` and those that are taken, and the folders that init
/// mounts things on.
fn base(archive: &mut Initramfs, parts: &Parts, others: &[&str]) -> Result<()> {
    for folder in ["dev", "proc", "sys", "tmp", "run", "root", "etc"] {
        archive.folder(folder);
    }
    archive.console();
    let busybox = parts.busybox()?;
    archive.copy("bin/busybox", &busybox)?;
    let names = command::output(Command::new(&busybox).arg("--list"))?;
    for name in String::from_utf8_lossy(&names).lines() {
        if !["busybox", "init"].contains(&name) && !others.contains(&name) {
            archive.link(&format!("bin/{name}"), "busybox");
        }
    }
    archive.link("sbin", "bin");
    Ok(())
}

fn modules(archive: &mut Initramfs, kernel: &Kernel) -> Result<()> {
    let folder = format!("lib/modules/{}", kernel.release);
    let mut dependencies = String::new();
    for (name, file, needs) in kernel.modules()? {
        archive.copy(&format!("{folder}/{name}.ko"), &file)?;
        let needs: Vec<String> = needs.iter().map(|need| format!("{need}.ko")).collect();
        dependencies.push_str(&format!("{name}.ko: {}\n", needs.join(" ")));
    }
    archive.file(
        &format!("{folder}/modules.dep"),
        0o644,
        dependencies.as_bytes(),
    );
    Ok(())
}

/// `pci.ids` with the vendors of the lab only, and all classes.
fn trim_names(names: &str) -> String {
    let mut kept = String::new();
    let mut keep = false;
    for line in names.lines().filter(|line| !line.starts_with('#')) {
        if !line.starts_with('\t') {
            let word = line.split(' ').next().unwrap_or_default();
            keep = word == "C" || GUEST_VENDORS.contains(&word);
        }
        if keep && !line.is_empty() {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_trimmed_to_the_lab() {
        let names = "# x\n1b36  Red Hat\n\t0010  NVMe\n\t\t1af4 1100  QEMU\n1b37  Other\n\t0001  No\n\nC 01  Storage\n\t08  NVM\n";
        assert_eq!(
            trim_names(names),
            "1b36  Red Hat\n\t0010  NVMe\n\t\t1af4 1100  QEMU\nC 01  Storage\n\t08  NVM\n"
        );
    }
}
