//! `cargo xtask lab`: a shell or one command in a lab host.

use std::collections::BTreeSet;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use super::images::HostKernel;
use super::parts::Options;
use super::put::Put;
use super::{Host, Parts, Setup, shell};
use crate::ui;

/// `cargo xtask lab`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask lab --kernel lab -- gantry device list
  cargo xtask lab --put target/debug/examples/client -- ./client /run/gantry/vm.sock
  cargo xtask lab --put ch-remote:/bin/ --put guests:/lab/guests
  cargo xtask lab --qemu '-device e1000e,addr=0x5' --memory 4G
  cargo xtask lab --qemu '-device ahci,id=sata' \\
      --qemu '-drive if=none,id=d,file=disk.raw,format=raw -device ide-hd,bus=sata.0,drive=d'
  cargo xtask lab --qemu '-device qemu-xhci -device usb-kbd'

Slots 03 to 0f of bus 0 are free for devices. The lab itself uses 00:02.0, the
console of its agent, and 00:10.0 and above.

Commands run in /root as root. The exit status is that of COMMAND, or 1 if the
lab ends first.")]
pub struct LabArguments {
    /// The host's kernel.
    #[arg(long, value_enum, default_value = "stock")]
    kernel: HostKernel,
    /// Put this program there as gantry, instead of the one of this tree.
    #[arg(long, value_name = "FILE")]
    gantry: Option<PathBuf>,
    /// Add a disk with Debian 12, built once: `gantry run /lab/debian/vm.json` boots it.
    #[arg(long)]
    debian: bool,
    /// Put a file, or a folder with all it holds, into the lab; can be repeated.
    ///
    /// FILE goes to /root, FILE:/PLACE to that path, and FILE:/FOLDER/ into that folder. It keeps its mode
    /// and replaces what is there. A program comes with the shared libraries that it needs.
    #[arg(long, value_name = "FILE[:PLACE]")]
    put: Vec<Put>,
    /// Add these arguments to QEMU's, split into words as a shell does; can be repeated.
    #[arg(long, value_name = "ARGUMENTS", allow_hyphen_values = true, value_parser = words)]
    qemu: Vec<Words>,
    /// The host's memory, in MiB (M) or GiB (G).
    #[arg(long, value_name = "SIZE", default_value = "8G", value_parser = mebibytes)]
    memory: u32,
    /// Added to the host kernel's command line.
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        hide_default_value = true
    )]
    append: String,
    /// Run this there instead of a shell, and exit with its status.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Words that were one argument.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Words(Vec<String>);

fn words(text: &str) -> Result<Words> {
    let words = shlex::split(text).context("a quote has no end")?;
    ensure!(!words.is_empty(), "there are no arguments in it");
    Ok(Words(words))
}

/// The least memory that a lab boots with, in MiB.
const LEAST_MEMORY: u32 = 1024;

fn mebibytes(text: &str) -> Result<u32> {
    let example = "give a number of MiB or GiB, 4096M or 4G for example";
    let (number, unit) = text
        .strip_suffix('G')
        .map(|number| (number, 1024))
        .or_else(|| text.strip_suffix('M').map(|number| (number, 1)))
        .context(example)?;
    let number: u32 = number.parse().context(example)?;
    let size = number.checked_mul(unit).context("that is too much")?;
    ensure!(size >= LEAST_MEMORY, "a lab needs {LEAST_MEMORY}M");
    Ok(size)
}

/// What a newcomer to the lab may want to do first.
const WELCOME: &str = "\
A shell in the lab host; `exit` or ^D ends it. To begin with:
  gantry device list
  gantry group create nvme --device 0000:01:00.0 --device 0000:02:00.0
  gantry device detach 0000:01:00.0 0000:02:00.0
  gantry run /lab/vm.json             a guest with a disk and a shell; ctrl-a x ends it
  gantry run /lab/vm.json &           the same beside this shell, for `gantry vm`; `fg` and Enter go to it
Kernels and an initramfs for guests are in /lab. You are root here, and there is no sudo.
";

/// What else there is to try, which depends on the host's kernel.
fn extras(kernel: HostKernel) -> &'static str {
    match kernel {
        HostKernel::Stock => {
            "The driver of the network cards 03:00.0 and 04:00.0 comes with `cargo xtask lab --kernel lab`."
        }
        HostKernel::Lab => {
            "The network cards 03:00.0 and 04:00.0 make virtual functions; after `modprobe mtty` there are \
             vGPUs to be made, in name: `gantry device mdev`."
        }
    }
}

impl LabArguments {
    /// Boots a lab, runs the shell or the command in it, and returns the exit status.
    pub fn run(self) -> Result<i32> {
        if self.command.is_empty() && !io::stdin().is_terminal() {
            bail!("a shell needs a terminal; `cargo xtask lab -- COMMAND` runs one command");
        }
        let mut places = BTreeSet::new();
        if let Some(twice) = self.put.iter().find(|put| !places.insert(&put.place)) {
            bail!("two files are to be put at {}", twice.place);
        }
        let parts = Parts::prepare(&Options {
            gantry: self.gantry,
            lab_kernel: self.kernel == HostKernel::Lab,
        })?;
        let mut setup = Setup {
            kernel: self.kernel,
            append: self.append,
            memory_mib: self.memory,
            puts: self.put,
            qemu: self.qemu.into_iter().flat_map(|words| words.0).collect(),
            ..Setup::default()
        };
        if self.debian {
            parts.debian()?.add_to(&mut setup);
        }
        let step = ui::Step::begin("Booting the lab");
        let host = Host::boot(&parts, &setup)?;
        step.done();
        let messages = host.messages();
        if !messages.is_empty() {
            // It warns of what it cannot do as it was told.
            eprintln!("{messages}");
        }
        if self.command.is_empty() {
            eprintln!("{WELCOME}{}", extras(self.kernel));
            shell::interactive(&host, &["sh", "-l"])
        } else {
            shell::batch(&host, &self.command)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_split_as_a_shell_splits_them() {
        let split = words("-device 'edu,id=a b'  -S").unwrap();
        assert_eq!(split.0, ["-device", "edu,id=a b", "-S"]);
        let error = words("-device 'edu").unwrap_err().to_string();
        assert!(error.contains("quote"), "{error}");
        assert!(words(" ").is_err());
    }

    #[test]
    fn memory_has_a_unit() {
        assert_eq!(mebibytes("4G").unwrap(), 4096);
        assert_eq!(mebibytes("1536M").unwrap(), 1536);
        for wrong in ["4", "G", "4K", "-1G", "4g", "64M", "9999999G", ""] {
            assert!(mebibytes(wrong).is_err(), "{wrong}");
        }
    }
}
