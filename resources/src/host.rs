//! Where the host keeps things, and the address of a PCI function on it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::name::DeviceName;

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
    /// What must outlive a reboot: quarantine, maintenance.
    pub state: PathBuf,
    /// The devices in sight, where those of others are none of one's business; none if all are.
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

    /// The arguments that tell a helper process the same, for [`HostPaths::from_args`].
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

    /// What [`HostPaths::to_args`] says, and the arguments behind it.
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

    /// Where the host keeps what must outlive a reboot: not where a tenant does, if these are a tenant's.
    pub(crate) fn state_of_host(&self) -> &Path {
        let tenants = self.state.parent().filter(|_| self.only.is_some());
        let tenants = tenants.filter(|dir| dir.ends_with(TENANTS));
        tenants.and_then(Path::parent).unwrap_or(&self.state)
    }

    /// The sysfs directory of one PCI function.
    pub fn pci_device(&self, bdf: HostBdf) -> PathBuf {
        self.sysfs.join("bus/pci/devices").join(bdf.to_string())
    }

    /// Whether a device is in sight.
    pub(crate) fn shows(&self, name: impl Into<DeviceName>) -> bool {
        let name = name.into();
        self.only.as_ref().is_none_or(|only| only.contains(&name))
    }

    /// The VFIO node of an IOMMU group.
    pub fn vfio_group(&self, group: u32) -> PathBuf {
        self.dev.join("vfio").join(group.to_string())
    }
}

/// The address of a PCI function of the host: domain, bus, device, function.
///
/// Written `0000:01:00.0`; `01:00.0` is read as domain 0. Domains beyond 16 bits exist (VMD).
/// Ordered as the numbers are, which is also the order of allocation.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct HostBdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// Text that is no PCI address.
#[derive(Debug, Error)]
#[error("\"{0}\" is not a PCI address: write it like 0000:01:00.0 or 01:00.0")]
pub struct BdfError(pub(crate) String);

impl HostBdf {
    /// An address from its numbers; none if the device is over 31 or the function over 7.
    pub fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        (device < 32 && function < 8).then_some(Self {
            domain,
            bus,
            device,
            function,
        })
    }

    /// The address that a sysfs path such as `/sys/bus/pci/devices/0000:01:00.0` ends with.
    pub fn from_sysfs_path(path: &Path) -> Result<Self, BdfError> {
        match path.file_name().and_then(|name| name.to_str()) {
            Some(name) => name.parse(),
            None => Err(BdfError(path.display().to_string())),
        }
    }

    /// Whether two functions have domain, bus and device number in common.
    pub fn is_in_slot_of(self, other: Self) -> bool {
        (self.domain, self.bus, self.device) == (other.domain, other.bus, other.device)
    }

    /// PCI domain (segment).
    pub fn domain(self) -> u32 {
        self.domain
    }

    /// Bus number.
    pub fn bus(self) -> u8 {
        self.bus
    }

    /// Device number, below 32.
    pub fn device(self) -> u8 {
        self.device
    }

    /// Function number, below 8.
    pub fn function(self) -> u8 {
        self.function
    }
}

impl fmt::Display for HostBdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!(
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.domain, self.bus, self.device, self.function
        );
        f.pad(&text)
    }
}

impl FromStr for HostBdf {
    type Err = BdfError;

    fn from_str(text: &str) -> Result<Self, BdfError> {
        parse(text).ok_or_else(|| BdfError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<HostBdf> {
    let (rest, function) = text.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = match rest.rsplit_once(':') {
        Some((domain, bus)) => (hex(domain, 4..=8)?, bus),
        None => (0, rest),
    };
    HostBdf::new(
        domain,
        u8::try_from(hex(bus, 2..=2)?).ok()?,
        u8::try_from(hex(device, 2..=2)?).ok()?,
        u8::try_from(hex(function, 1..=1)?).ok()?,
    )
}

/// Hex digits only, as many as `digits` allows: `from_str_radix` alone would take a sign.
pub(crate) fn hex(text: &str, digits: std::ops::RangeInclusive<usize>) -> Option<u32> {
    let fits = digits.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    fits.then(|| u32::from_str_radix(text, 16).ok())?
}

impl TryFrom<String> for HostBdf {
    type Error = BdfError;

    fn try_from(text: String) -> Result<Self, BdfError> {
        text.parse()
    }
}

impl From<HostBdf> for String {
    fn from(bdf: HostBdf) -> Self {
        bdf.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn long_and_short_addresses_are_read() {
        for (text, shown) in [
            ("0000:01:00.0", "0000:01:00.0"),
            ("01:00.0", "0000:01:00.0"),
            ("0001:AF:1f.7", "0001:af:1f.7"),
            ("10000:e1:00.0", "10000:e1:00.0"),
        ] {
            assert_eq!(text.parse::<HostBdf>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "nvme",
            "01:00",
            "01:20.0",
            "01:00.8",
            "1:00.0",
            "0000:01:00.0 ",
            "+000:01:00.0",
            "000:01:00.0",
        ] {
            let error = text.parse::<HostBdf>().unwrap_err().to_string();
            assert!(error.contains("0000:01:00.0"), "{error}");
        }
    }

    #[test]
    fn a_sysfs_path_names_its_device() {
        let path = Path::new("/sys/bus/pci/devices/0000:01:00.0/");
        assert_eq!(HostBdf::from_sysfs_path(path).unwrap().bus(), 1);
        assert!(HostBdf::from_sysfs_path(Path::new("/")).is_err());
    }

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

    proptest! {
        #[test]
        fn printed_addresses_read_back(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let bdf = HostBdf::new(domain, bus, device, function).unwrap();
            prop_assert_eq!(bdf.to_string().parse::<HostBdf>().unwrap(), bdf);
        }

        #[test]
        fn order_is_that_of_the_numbers(a: (u16, u8), b: (u16, u8)) {
            let of = |(domain, bus): (u16, u8)| HostBdf::new(u32::from(domain), bus, 0, 0).unwrap();
            prop_assert_eq!(of(a).cmp(&of(b)), a.cmp(&b));
        }
    }
}
