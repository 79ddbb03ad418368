//! Who is measured: gantry and its peers, and how each is told to run the same guest.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;

use crate::devices::Backend;
use crate::lab::Host;
use crate::lab::put::Put;

/// Folder of the peers' programs and of the VMs' files in the lab host.
const FOLDER: &str = "/bench";

/// Slots of a VM that devices are attached to while it runs.
const SLOTS: u8 = 32;

/// A guest, the same for all.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its kernel, in the lab host.
    pub kernel: String,
    /// Its initramfs, in the lab host.
    pub initramfs: String,
    /// Its kernel's command line.
    pub cmdline: String,
    /// Its RAM.
    pub memory_mib: u64,
    /// Addresses of its devices, bound to vfio-pci.
    pub devices: Vec<String>,
    /// How its VMM is controlled.
    pub api: Api,
    /// What its devices are opened by, where the VMM can be told.
    pub backend: Backend,
}

/// How a VMM is controlled while its guest runs.
#[derive(Debug, Clone, Default)]
pub enum Api {
    /// As it is without a word about it.
    #[default]
    Usual,
    /// Not at all.
    None,
    /// Over this socket, with no devices to come.
    Bare {
        /// Where, in the lab host.
        path: String,
    },
    /// Over this socket, with devices to come.
    Socket {
        /// Where, in the lab host.
        path: String,
        /// Groups that devices will come from, told to the VMM beforehand if it can be told.
        declared: Vec<String>,
    },
}

/// How a program is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Gantry,
    CloudHypervisor,
}

/// A VMM to measure.
#[derive(Debug, Clone)]
pub struct Contender {
    /// Its name in tables and files.
    pub name: String,
    kind: Kind,
    /// Its program in the lab host, unlike any other's.
    pub program: String,
    /// Its program here, if the lab does not have it anyway.
    file: Option<PathBuf>,
}

impl Contender {
    /// The gantry of the lab.
    pub fn gantry() -> Self {
        Self {
            name: "gantry".to_owned(),
            kind: Kind::Gantry,
            program: "/bin/gantry".to_owned(),
            file: None,
        }
    }

    /// A peer as on the command line: `cloud-hypervisor=FILE`, or `gantry=FILE` for another build.
    pub fn peer(text: &str) -> Result<Self, String> {
        let (name, file) = text.split_once('=').ok_or("it is NAME=FILE")?;
        let kind = match name {
            "cloud-hypervisor" => Kind::CloudHypervisor,
            "gantry" => Kind::Gantry,
            _ => {
                return Err(
                    "known peers are cloud-hypervisor, and gantry for another build".into(),
                );
            }
        };
        let file = PathBuf::from(file);
        if !file.is_file() {
            return Err(format!("there is no file {}", file.display()));
        }
        Ok(Self {
            name: name.to_owned(),
            kind,
            program: format!("{FOLDER}/{name}"),
            file: Some(file),
        })
    }

    /// Whether it is gantry, in whichever build.
    pub fn is_gantry(&self) -> bool {
        self.kind == Kind::Gantry
    }

    /// What the lab has to be given.
    pub fn to_bring(&self) -> Option<Put> {
        Some(Put {
            from: self.file.clone()?,
            place: self.program.clone(),
        })
    }

    /// The command that runs `guest`; what it reads is written to the lab host.
    pub fn command(&self, guest: &Guest, host: &Host) -> Result<Vec<String>> {
        let paths = guest
            .devices
            .iter()
            .map(|bdf| format!("/sys/bus/pci/devices/{bdf}"));
        match self.kind {
            Kind::Gantry => {
                let mut vm = json!({
                    "payload": {
                        "kernel": guest.kernel,
                        "initramfs": guest.initramfs,
                        "cmdline": guest.cmdline,
                    },
                    "cpus": {"boot_vcpus": 1},
                    "memory": {"size": format!("{}M", guest.memory_mib)},
                    "devices": paths.map(|path| json!({"path": path, "allow_no_reset": true})).collect::<Vec<_>>(),
                    "serial": {"mode": "Tty"},
                    "platform": {"iommufd": guest.backend == Backend::Cdev},
                });
                match &guest.api {
                    Api::Socket { declared, .. } => {
                        vm["hotplug"] = json!({"slots": SLOTS, "groups": declared});
                    }
                    Api::Bare { .. } => vm["hotplug"] = json!({"slots": 0}),
                    Api::Usual | Api::None => {}
                }
                let task = guest.cmdline.rsplit('=').next().unwrap_or_default();
                let file = format!("{FOLDER}/{task}-{}.json", guest.devices.len());
                host.write(&file, vm.to_string())
                    .context("cannot write the VM's file")?;
                let mut run = vec![self.program.as_str(), "run", "--allow-ungrouped"];
                match &guest.api {
                    Api::Usual => {}
                    Api::None => run.push("--no-api"),
                    Api::Socket { path, .. } | Api::Bare { path } => {
                        run.extend(["--api-socket", path])
                    }
                }
                run.push(&file);
                Ok(run.into_iter().map(str::to_owned).collect())
            }
            Kind::CloudHypervisor => {
                let size = format!("size={}M", guest.memory_mib);
                let mut command = [
                    self.program.as_str(),
                    "--kernel",
                    &guest.kernel,
                    "--initramfs",
                    &guest.initramfs,
                    "--cmdline",
                    &guest.cmdline,
                    "--cpus",
                    "boot=1",
                    "--memory",
                    &size,
                    "--serial",
                    "tty",
                    "--console",
                    "off",
                ]
                .map(str::to_owned)
                .to_vec();
                if let Api::Socket { path, .. } | Api::Bare { path } = &guest.api {
                    command.extend(["--api-socket".to_owned(), path.clone()]);
                }
                for path in paths {
                    command.extend(["--device".to_owned(), format!("path={path}")]);
                }
                Ok(command)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_named_with_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display();
        let peer = Contender::peer(&format!("cloud-hypervisor={path}")).unwrap();
        let put = peer.to_bring().unwrap();
        assert_eq!(put.place, "/bench/cloud-hypervisor");
        assert_eq!(put.from, file.path());
        assert!(Contender::peer("cloud-hypervisor").is_err());
        assert!(Contender::peer("cloud-hypervisor=/no/such/file").is_err());
        assert!(Contender::peer(&format!("other={path}")).is_err());
        assert!(Contender::gantry().to_bring().is_none());
    }
}
