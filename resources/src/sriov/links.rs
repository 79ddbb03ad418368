//! The seam to network interfaces: what their virtual functions have, and changes of that.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use nix::libc;
use serde::Serialize;
use thiserror::Error;

use super::settings::{VfSetting, VfState};

/// A network interface of a physical function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// Its name now, for people.
    pub name: String,
    /// Its number, which no renaming changes.
    #[serde(skip)]
    pub index: u32,
}

/// One change of one virtual function. Shown as the command that does the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LinkWrite {
    /// The interface of the physical function.
    pub interface: Interface,
    /// Number of the virtual function, from 0.
    pub vf: u16,
    /// The change.
    pub setting: VfSetting,
}

impl std::fmt::Display for LinkWrite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            interface,
            vf,
            setting,
        } = self;
        write!(f, "ip link set {} vf {vf} {setting}", interface.name)
    }
}

/// Virtual functions could not be asked about or changed.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The kernel refused a change.
    #[error("the kernel refused `{write}`{}", advice(source, &.write.setting))]
    Refused {
        /// The change.
        write: LinkWrite,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel did not say what the functions have.
    #[error("cannot ask the kernel about the virtual functions of {interface}")]
    Ask {
        /// The interface.
        interface: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host is one of files.
    #[error("{sysfs} is not the running host's: its network cards cannot be asked or set")]
    Elsewhere {
        /// Where its sysfs is.
        sysfs: PathBuf,
    },
}

fn advice(error: &io::Error, setting: &VfSetting) -> String {
    let key = setting.key();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => {
            format!(": its driver cannot do that; take \"{key}\" out of the group")
        }
        Some(libc::EPERM) => ": run as root (it takes CAP_NET_ADMIN)".to_owned(),
        Some(libc::EINVAL) if matches!(setting, VfSetting::Rate { .. }) => {
            ": some cards take a rate only while their link is up, and none above its speed"
                .to_owned()
        }
        _ => String::new(),
    }
}

/// Asks about virtual functions of network interfaces and changes them.
pub trait VfLinks {
    /// What the functions of an interface have, by their numbers.
    fn read(&self, interface: &Interface) -> Result<BTreeMap<u16, VfState>, LinkError>;

    /// Makes one change.
    fn set(&self, write: &LinkWrite) -> Result<(), LinkError>;
}
