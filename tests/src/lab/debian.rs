//! A Debian disk image as people boot it, made by mmdebstrap of Debian's own packages: kernel and initrd, systemd,
//! cloud-init, an ssh server. Nothing in it knows of gantry.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::packages::{Apt, Wanted, use_tree};
use super::put::Put;
use super::sources::{self, Release};
use super::{Setup, command};
use crate::ui::Step;

/// Debian 12.
const RELEASE: &str = "bookworm";

/// What is installed, with all that it depends on: much as in Debian's images for clouds, less the boot loader.
const PACKAGES: &[&str] = &[
    "apt-utils",
    "cloud-guest-utils",
    "cloud-init",
    "dbus",
    "e2fsprogs",
    "fdisk",
    "initramfs-tools",
    "iproute2",
    "libpam-systemd",
    "linux-image-cloud-amd64",
    "netplan.io",
    "openssh-server",
    "pciutils",
    "polkitd",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
];

/// One partition with the root file system.
const PARTITIONS: &str = "label: gpt\nstart=2048, type=linux, name=root\n";
/// Done in the image at last: mmdebstrap leaves in it the options that it was given, and this machine's
/// name.
const HOOKS: &[&str] = &[
    "echo 'LABEL=root / ext4 errors=remount-ro 0 1' >\"$1/etc/fstab\"",
    "cd \"$1/etc\" && rm hostname apt/apt.conf.d/99mmdebstrap dpkg/dpkg.cfg.d/99mmdebstrap",
];

const DISK_SIZE: u64 = 2 << 30;
/// Where the partition begins, and what the partition table's copy at the end of the disk takes.
const MARGIN: u64 = 1 << 20;
/// Lines of mmdebstrap's log, for the bar.
const LINES: u64 = 1950;

/// Serial number of the disk in the lab, by which its init finds it.
const SERIAL: &str = "GANTRY-DEBIAN";

/// A disk image with a partition whose file system is labelled `root`, and the kernel and initrd in it.
#[derive(Debug, Clone)]
pub struct DebianImage(PathBuf);

impl DebianImage {
    /// The recipe: images of one recipe are alike, but for the versions of the packages.
    pub fn recipe() -> String {
        format!("{RELEASE} {PACKAGES:?} {PARTITIONS} {HOOKS:?} {DISK_SIZE}")
    }

    /// The image that `build` left in `entry`.
    pub fn open(entry: &Path) -> Self {
        Self(entry.to_owned())
    }

    /// Adds the image to a lab: as a disk of the host, `/dev/debian`, which keeps nothing beyond the lab's end; and in
    /// `/lab/debian` its kernel and initrd, a VM's file and the files of cloud-init.
    pub fn add_to(&self, setup: &mut Setup) {
        let file = self.0.join("disk.raw");
        let file = file.display();
        setup.qemu.extend([
            "-drive".to_owned(),
            format!("if=none,id=debian,file={file},format=raw,snapshot=on"),
            "-device".to_owned(),
            format!("nvme,drive=debian,serial={SERIAL},addr=0x3"),
        ]);
        let of_lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/debian");
        for (folder, names) in [
            (&self.0, &["vmlinuz", "initrd"][..]),
            (&of_lab, &["vm.json", "user-data", "meta-data"]),
        ] {
            setup.puts.extend(names.iter().map(|name| Put {
                from: folder.join(name),
                place: format!("/lab/debian/{name}"),
            }));
        }
    }
}

/// Builds the image: kernel, initrd and disk in `into`. `apt` gets the tools.
pub fn build(apt: &Apt, work: &Path, into: &Path) -> Result<()> {
    let (tools, root) = (work.join("tools"), work.join("root"));
    let wanted = Wanted {
        always: &["mmdebstrap"],
        missing: &["fdisk", "e2fsprogs"],
        backports: false,
    };
    apt.unpack("mmdebstrap", wanted, &tools)?;
    install(&tools, work, &root)?;
    for (name, prefix) in [("vmlinuz", "vmlinuz-"), ("initrd", "initrd.img-")] {
        fs::copy(find(&root.join("boot"), prefix)?, into.join(name))?;
    }
    write_disk(&tools, work, &root, &into.join("disk.raw"))
}

/// Installs the packages into `root`.
fn install(tools: &Path, work: &Path, root: &Path) -> Result<()> {
    let sources = work.join("sources");
    fs::create_dir(&sources)?;
    let release = Release::of_this_machine()?.other(RELEASE);
    sources::derive_all(&release, &sources)?;
    let step = Step::items(
        "Building the Debian image (once; about 2 minutes on 2 processors)",
        LINES,
    );
    let mut mmdebstrap = Command::new("mmdebstrap");
    use_tree(&mut mmdebstrap, tools);
    mmdebstrap
        .args(["--mode=root", "--variant=minbase", "--format=directory"])
        // dpkg need not wait for the disk: an image that is not finished is thrown away.
        .args(["--verbose", "--dpkgopt=force-unsafe-io"])
        .arg("--aptopt=Acquire::Languages \"none\"")
        .arg(format!("--include={}", PACKAGES.join(",")))
        .args(HOOKS.iter().map(|hook| format!("--customize-hook={hook}")))
        .arg(RELEASE)
        .arg(root);
    for entry in fs::read_dir(&sources)? {
        mmdebstrap.arg(entry?.path());
    }
    command::logged(&mut mmdebstrap, &work.join("mmdebstrap.log"), |log| {
        let text = fs::read(log).unwrap_or_default();
        let lines = text.split(|byte| *byte == b'\n').count() as u64;
        step.at(lines.min(LINES));
    })
    .context("cannot build the Debian image")?;
    step.done();
    Ok(())
}

/// Writes a disk with one partition that holds the files below `root`.
fn write_disk(tools: &Path, work: &Path, root: &Path, disk: &Path) -> Result<()> {
    let step = Step::begin("Writing the Debian image's disk");
    fs::File::create(disk)?.set_len(DISK_SIZE)?;
    let script = work.join("partitions");
    fs::write(&script, PARTITIONS)?;
    let mut sfdisk = Command::new("sh");
    use_tree(&mut sfdisk, tools);
    sfdisk.args(["-c", "exec sfdisk -q \"$0\" <\"$1\""]);
    command::output(sfdisk.arg(disk).arg(&script))?;
    let mut mke2fs = Command::new("mke2fs");
    use_tree(&mut mke2fs, tools);
    mke2fs
        .args(["-q", "-t", "ext4", "-L", "root", "-d"])
        .arg(root);
    mke2fs.arg(format!("-Eoffset={MARGIN}")).arg(disk);
    mke2fs.arg(format!("{}k", (DISK_SIZE - 2 * MARGIN) >> 10));
    command::output(&mut mke2fs)?;
    step.done();
    Ok(())
}

/// The file in `folder` whose name begins with `prefix`.
fn find(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder)?.flatten();
    let mut named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    let found = named.next();
    let found = found.with_context(|| format!("{} holds no {prefix}", folder.display()))?;
    Ok(found.path())
}
