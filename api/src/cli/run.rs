//! `gantry run`: one VM in the foreground.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use gantry_resources::{ChildWriter, Holder, HostPaths, Maintenance, announce, maintenance, reap};

use crate::config::{self, Extras, Source};
use crate::report::{BY_SIGNAL, Failure, GUEST_DIED, STOPPED, SUCCESS, USAGE};
use gantry_vmm::{Options, Outcome, SeccompMode, Vmm};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry run vm.json
  gantry run --name web-1 - < vm.json

A VM with one device of the group \"nvme\":
  {
    \"payload\": {\"kernel\": \"vmlinuz\", \"initramfs\": \"initrd.img\", \"cmdline\": \"console=ttyS0\"},
    \"cpus\": {\"boot_vcpus\": 2},
    \"memory\": {\"size\": \"1G\"},
    \"devices\": [{\"group\": \"nvme\", \"count\": 1}]
  }

With the serial port on the terminal, ctrl-a x stops the VM.

Exit status:
  0      the guest powered off
  1      gantry or the host failed
  2      the command line or the file is wrong
  3      the guest died (a triple fault, say)
  4      stopped from the console with ctrl-a x
  128+n  ended by signal n")]
pub struct RunArgs {
    /// JSON file that describes the VM, or - for standard input; `gantry schema` tells its keys
    #[arg(value_name = "VM.JSON")]
    file: PathBuf,
    /// Name of the VM in locks, lists and logs [default: the file's name without its extension]
    #[arg(long)]
    name: Option<String>,
    /// Give the VM devices named by path that are in no group
    #[arg(long)]
    allow_ungrouped: bool,
    /// What happens to system calls that gantry should never make
    #[arg(long, value_enum, default_value_t = Seccomp::On)]
    seccomp: Seccomp,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Seccomp {
    /// They end the process, by name
    On,
    /// They are logged by the kernel and done
    Log,
    /// They are done
    Off,
}

impl From<Seccomp> for SeccompMode {
    fn from(mode: Seccomp) -> Self {
        match mode {
            Seccomp::On => Self::On,
            Seccomp::Log => Self::Log,
            Seccomp::Off => Self::Off,
        }
    }
}

impl From<config::Error> for Failure {
    fn from(error: config::Error) -> Self {
        let help = error.help().map(str::to_owned);
        let failure = Self::new(USAGE, error);
        match help {
            Some(help) => failure.help(help),
            None => failure,
        }
    }
}

pub fn run(args: RunArgs, paths: &HostPaths) -> Result<ExitCode, Failure> {
    let RunArgs {
        file,
        name,
        allow_ungrouped,
        seccomp,
    } = args;
    let config = config::load(
        &Source::from(file),
        &Extras {
            name,
            allow_ungrouped,
            host: paths.clone(),
        },
    )?;
    // Announced first: whoever switches maintenance on in between sees the VM.
    let _running = announce(
        paths,
        &Holder {
            vm: config.name.clone(),
            pid: std::process::id(),
        },
    );
    may_start(paths)?;
    let options = Options {
        seccomp: seccomp.into(),
        ..Options::default()
    };
    let vmm = Vmm::new(paths, options).map_err(Failure::host)?;
    let outcome = vmm.run(Some(config)).map_err(Failure::host)?;
    exit_code(outcome).map(ExitCode::from)
}

/// Refuses in maintenance, and gives back to the host what killed VMs could not.
fn may_start(paths: &HostPaths) -> Result<(), Failure> {
    if let Some(Maintenance { reason, .. }) = maintenance(paths).map_err(Failure::host)? {
        let what = format!("this host is in maintenance, no VM starts: {reason}");
        return Err(Failure::host(what).help("`gantry maintenance off` ends it"));
    }
    if let Err(error) = reap(paths, &ChildWriter::default()) {
        tracing::warn!("devices of VMs that are gone stay with vfio-pci: {error}");
    }
    Ok(())
}

fn exit_code(outcome: Outcome) -> Result<u8, Failure> {
    match outcome {
        Outcome::PowerOff | Outcome::Asked => Ok(SUCCESS),
        Outcome::Stopped => Ok(STOPPED),
        Outcome::Signal(signal) => Ok(BY_SIGNAL.saturating_add(u8::try_from(signal).unwrap_or(0))),
        Outcome::GuestFault(what) => {
            Err(Failure::new(GUEST_DIED, format!("the guest died: {what}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_exit_code() {
        assert_eq!(exit_code(Outcome::PowerOff).unwrap(), 0);
        assert_eq!(exit_code(Outcome::Stopped).unwrap(), 4);
        assert_eq!(exit_code(Outcome::Signal(15)).unwrap(), 143);
        let died = exit_code(Outcome::GuestFault("triple fault".to_owned())).unwrap_err();
        assert_eq!(died.exit, 3);
    }
}
