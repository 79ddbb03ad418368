//! The directories of the host.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use crate::base::bdf::HostBdf;
use crate::base::name::DeviceName;
use crate::base::sysfs;
use crate::base::uuid::{Uuid, UuidError};

/// The directories that everything in this crate is read from and written to.
///
/// The default is the running host. A test points all six into a temporary directory with
/// [`HostPaths::under`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPaths {
    /// Mount point of sysfs.
    pub sysfs: PathBuf,
    /// Device nodes; `vfio/N` is looked for here.
    pub dev: PathBuf,
    /// Mount point of procfs.
    pub proc: PathBuf,
    /// Run-time files (locks), emptied by a host reboot.
    pub run: PathBuf,
    /// Definitions: `groups.json` and `groups.d/*.json`.
    pub config: PathBuf,
    /// State that outlives a reboot: quarantine, maintenance.
    pub state: PathBuf,
    /// The visible devices of a tenant; none if all devices are visible.
    pub only: Option<BTreeSet<DeviceName>>,
}

/// Where definitions, run-time files and state of tenants lie, below those of the host.
pub(crate) const TENANTS: &str = "tenants";

/// An argument for all devices.
const ALL: &str = "all";

impl Default for HostPaths {
    fn default() -> Self {
        Self {
            sysfs: "/sys".into(),
            dev: "/dev".into(),
            proc: "/proc".into(),
            run: "/run/gantry".into(),
            config: "/etc/gantry".into(),
            state: "/var/lib/gantry".into(),
            only: None,
        }
    }
}

impl HostPaths {
    /// All six directories below one root, as `sys`, `dev`, `proc`, `run`, `etc` and `var`.
    pub fn under(root: &Path) -> Self {
        Self {
            sysfs: root.join("sys"),
            dev: root.join("dev"),
            proc: root.join("proc"),
            run: root.join("run"),
            config: root.join("etc"),
            state: root.join("var"),
            only: None,
        }
    }

    /// The arguments that pass these paths to a helper process, for [`HostPaths::from_args`].
    pub(crate) fn to_args(&self) -> Vec<OsString> {
        let Self {
            sysfs,
            dev,
            proc,
            run,
            config,
            state,
            only,
        } = self;
        let only = only.as_ref().map(|only| {
            let only: Vec<String> = only.iter().map(DeviceName::to_string).collect();
            only.join(",")
        });
        let dirs = [sysfs, dev, proc, run, config, state].map(|dir| dir.clone().into_os_string());
        let only = only.unwrap_or_else(|| ALL.to_owned());
        dirs.into_iter().chain([only.into()]).collect()
    }

    /// Reads the arguments of [`HostPaths::to_args`], and returns the arguments after them.
    pub(crate) fn from_args(args: &[String]) -> Option<(Self, &[String])> {
        let [sysfs, dev, proc, run, config, state, only, rest @ ..] = args else {
            return None;
        };
        let addresses = only.split(',').filter_map(|text| text.parse().ok());
        let paths = Self {
            sysfs: sysfs.into(),
            dev: dev.into(),
            proc: proc.into(),
            run: run.into(),
            config: config.into(),
            state: state.into(),
            only: (only != ALL).then(|| addresses.collect()),
        };
        Some((paths, rest))
    }

    /// The host's directory for state that outlives a reboot, also if these paths are a tenant's.
    pub(crate) fn state_of_host(&self) -> &Path {
        self.of_host(&self.state)
    }

    /// The host's directory of definitions, also if these paths are a tenant's.
    pub(crate) fn config_of_host(&self) -> &Path {
        self.of_host(&self.config)
    }

    fn of_host<'a>(&self, dir: &'a Path) -> &'a Path {
        let tenants = dir.parent().filter(|_| self.only.is_some());
        let tenants = tenants.filter(|dir| dir.ends_with(TENANTS));
        tenants.and_then(Path::parent).unwrap_or(dir)
    }

    /// A new UUID, from the kernel.
    pub(crate) fn random_uuid(&self) -> io::Result<Uuid> {
        let path = self.proc.join("sys/kernel/random/uuid");
        let text = sysfs::text(&path)?.unwrap_or_default();
        let wrong = |error| io::Error::other(format!("{}: {error}", path.display()));
        text.parse().map_err(|error: UuidError| wrong(error))
    }

    /// The sysfs directory of one PCI function.
    pub fn pci_device(&self, bdf: HostBdf) -> PathBuf {
        self.sysfs.join("bus/pci/devices").join(bdf.to_string())
    }

    /// The sysfs directory of one mediated device.
    pub(crate) fn mdev(&self, uuid: Uuid) -> PathBuf {
        self.sysfs.join("bus/mdev/devices").join(uuid.to_string())
    }

    /// Whether a device is visible.
    pub(crate) fn shows(&self, name: impl Into<DeviceName>) -> bool {
        let name = name.into();
        self.only.as_ref().is_none_or(|only| only.contains(&name))
    }

    /// The VFIO node of an IOMMU group.
    pub(crate) fn vfio_group(&self, group: u32) -> PathBuf {
        self.dev.join("vfio").join(group.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_is_told_where_things_are_and_what_is_in_sight() {
        let told = |only: Option<BTreeSet<DeviceName>>| {
            let paths = HostPaths {
                only,
                ..HostPaths::default()
            };
            let mut args: Vec<String> = paths
                .to_args()
                .into_iter()
                .map(|arg| arg.into_string().unwrap())
                .collect();
            args.push("more".to_owned());
            let (read, rest) = HostPaths::from_args(&args).unwrap();
            assert_eq!((read, rest), (paths, &["more".to_owned()][..]));
        };
        let two =
            ["01:00.0", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"].map(|text| text.parse().unwrap());
        told(None);
        told(Some(two.into()));
        told(Some(BTreeSet::new()));
        assert_eq!(HostPaths::from_args(&[]), None);
    }
}
