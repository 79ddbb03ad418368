//! The seam to network interfaces: reading and changing the settings of their virtual functions.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::libc;
use serde::Serialize;
use thiserror::Error;

use crate::pools::vf_settings::{VfSetting, VfState};

/// How long a card may say that it is busy: a function that is being reset takes no settings.
const BUSY_PATIENCE: Duration = Duration::from_secs(10);

/// A network interface of a physical function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// Its present name, for messages.
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

/// The settings of virtual functions could not be read or changed.
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
    /// The kernel did not return the settings.
    #[error("cannot ask the kernel about the virtual functions of {interface}")]
    Ask {
        /// The interface.
        interface: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host is one of files.
    #[error("{sysfs} is not the running host's: its network cards cannot be read or set")]
    Elsewhere {
        /// Its sysfs.
        sysfs: PathBuf,
    },
}

impl LinkError {
    fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } | Self::Ask { source, .. } => source.raw_os_error(),
            Self::Elsewhere { .. } => None,
        }
    }

    /// Whether the same request may succeed a moment later.
    fn is_passing(&self) -> bool {
        matches!(self.errno(), Some(libc::EAGAIN | libc::EBUSY | libc::EINTR))
    }

    /// Whether the driver refuses this value: it will refuse it later too, but may take other settings.
    pub(super) fn is_of_value(&self) -> bool {
        /// Drivers return this in place of EOPNOTSUPP, although the number is internal to the kernel.
        const ENOTSUPP: i32 = 524;
        let of_value = matches!(
            self.errno(),
            Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ERANGE | libc::EADDRNOTAVAIL | ENOTSUPP)
        );
        matches!(self, Self::Refused { .. }) && of_value
    }
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

/// Reads and changes virtual functions of network interfaces.
pub trait VfLinks {
    /// The settings of an interface's functions, by their numbers.
    fn read(&self, interface: &Interface) -> Result<BTreeMap<u16, VfState>, LinkError>;

    /// Makes one change.
    fn set(&self, write: &LinkWrite) -> Result<(), LinkError>;

    /// [`VfLinks::set`], tried again for a while as long as the card is busy.
    fn set_when_ready(&self, write: &LinkWrite) -> Result<(), LinkError> {
        when_ready(|| self.set(write))
    }
}

/// Repeats a request that may be refused for a moment, until it succeeds or [`BUSY_PATIENCE`] is over.
pub(super) fn when_ready<T>(
    mut attempt: impl FnMut() -> Result<T, LinkError>,
) -> Result<T, LinkError> {
    let deadline = Instant::now() + BUSY_PATIENCE;
    let mut pause = Duration::from_millis(10);
    loop {
        match attempt() {
            Err(error) if error.is_passing() && Instant::now() < deadline => {}
            result => return result,
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(500));
    }
}
