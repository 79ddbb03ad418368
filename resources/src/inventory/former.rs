//! What a device was before it was detached, so that reattaching restores it.

use std::fs;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::base::atomic;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::facts::nvme::Nvme;
use crate::inventory::device::HostDevice;

/// A record in the run directory: written before the first change, removed after reattaching.
///
/// It is a memory, never the truth: it counts only while sysfs shows that the device at this address
/// is still the one that was detached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Former {
    /// Vendor and device id at that time, in their shown form.
    id: String,
    /// Device serial number at that time.
    dsn: Option<String>,
    /// The NVMe serial, which only the host's driver can ask for.
    pub(crate) serial: Option<String>,
    /// What else it said of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) nvme: Option<Nvme>,
    /// The driver that had the device.
    pub(crate) driver: Option<String>,
    /// The override that was set.
    pub(crate) driver_override: Option<String>,
    /// The network interfaces that it had, which `devname` names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) interfaces: Vec<String>,
    /// A VM took the device for as long as it runs: the host gets it back without being asked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) demand: bool,
}

impl Former {
    pub(crate) fn of(device: &HostDevice) -> Self {
        Self {
            id: device.id.to_string(),
            dsn: device.dsn.clone(),
            serial: device.serial.clone(),
            nvme: device.nvme.clone(),
            driver: device.driver.clone(),
            driver_override: device.driver_override.clone(),
            interfaces: Vec::new(),
            demand: false,
        }
    }

    /// The record, if there is one that speaks of the hardware that is there now.
    ///
    /// A device put in the place of another one comes up without the override that detaching sets.
    pub(crate) fn load(paths: &HostPaths, device: &HostDevice) -> Option<Self> {
        if !device
            .driver_override
            .as_deref()
            .is_some_and(crate::inventory::device::is_vfio_driver)
        {
            return None;
        }
        Self::recorded(paths, device)
    }

    /// The record of a device that a VM took and that is not yet back as it was, in whichever state
    /// the giving back was cut short.
    pub(crate) fn owed(paths: &HostPaths, device: &HostDevice) -> Option<Self> {
        let former = Self::recorded(paths, device).filter(|former| former.demand)?;
        let with_host = match &former.driver {
            Some(_) => device.driver.is_some() && !device.on_vfio(),
            None => device.driver.is_none(),
        };
        let back = with_host && device.driver_override == former.driver_override;
        (!back).then_some(former)
    }

    /// What is known of a device that was moved, or is on its way.
    pub(crate) fn of_moved(paths: &HostPaths, device: &HostDevice) -> Option<Self> {
        Self::load(paths, device).or_else(|| Self::owed(paths, device))
    }

    /// The driver of the host's that a device was taken from, while none has it.
    pub(crate) fn driver_of(paths: &HostPaths, device: &HostDevice) -> Option<String> {
        let away = device.driver.is_none() || device.on_vfio();
        Self::recorded(paths, device).filter(|_| away)?.driver
    }

    /// The function that had a network interface before it was moved.
    pub(crate) fn of_interface(paths: &HostPaths, name: &str) -> Option<HostBdf> {
        let records = crate::base::sysfs::entries(&paths.run.join("former")).unwrap_or_default();
        let mut records = records.iter().filter_map(|name| name.parse().ok());
        records.find(|bdf| {
            let text = fs::read(path(paths, *bdf)).unwrap_or_default();
            let former = serde_json::from_slice::<Self>(&text);
            former.is_ok_and(|former| former.interfaces.iter().any(|one| one == name))
        })
    }

    fn recorded(paths: &HostPaths, device: &HostDevice) -> Option<Self> {
        let former: Self = serde_json::from_slice(&fs::read(path(paths, device.bdf)).ok()?).ok()?;
        let same_dsn = former.dsn.is_none() || device.dsn.is_none() || former.dsn == device.dsn;
        (former.id == device.id.to_string() && same_dsn).then_some(former)
    }

    /// Takes the mark away from a device that somebody wants detached for good.
    pub(crate) fn keep_detached(paths: &HostPaths, device: &HostDevice) {
        let Some(former) = Self::owed(paths, device) else {
            return;
        };
        let former = Self {
            demand: false,
            ..former
        };
        if let Err((path, error)) = former.store(paths, device.bdf) {
            tracing::warn!("cannot write {}: {error}", path.display());
        }
    }

    /// Writes the record, replacing an older one as a whole.
    pub(crate) fn store(
        &self,
        paths: &HostPaths,
        bdf: HostBdf,
    ) -> Result<(), (PathBuf, io::Error)> {
        let path = path(paths, bdf);
        let text = serde_json::to_vec(self).map_err(io::Error::from);
        let written = text.and_then(|text| atomic::replace(&path, &text));
        written.map_err(|error| (path, error))
    }

    /// Forgets a device that was put back as it was, unless the record is older than the attempt and so
    /// still needed.
    pub(crate) fn forget_unless_older(paths: &HostPaths, before: &HostDevice) {
        if Self::load(paths, before).is_none() {
            Self::forget(paths, before.bdf);
        }
    }

    /// Forgets a device. One that was never remembered is forgotten already.
    pub(crate) fn forget(paths: &HostPaths, bdf: HostBdf) {
        let path = path(paths, bdf);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove {}: {error}", path.display());
            }
            _ => {}
        }
    }
}

fn path(paths: &HostPaths, bdf: HostBdf) -> PathBuf {
    paths.run.join("former").join(bdf.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost};

    #[test]
    fn a_record_counts_only_for_the_hardware_that_was_detached() {
        let host = FakeHost::new(&[Fake::nvme("01:00.0", 1)
            .driver("nvme")
            .with("nvme/nvme0/serial", "GN-1")]);
        let before = host.read("01:00.0");
        Former::of(&before).store(&host.paths, before.bdf).unwrap();
        let load = |device: &HostDevice| Former::load(&host.paths, device);
        assert_eq!(load(&before), None, "it was not detached yet");
        let detached = HostDevice {
            driver_override: Some("vfio-pci".to_owned()),
            ..before
        };
        assert_eq!(load(&detached).unwrap().serial.as_deref(), Some("GN-1"));
        let replaced = HostDevice {
            id: crate::facts::ids::PciId {
                vendor: 0x8086,
                device: 1,
            },
            ..detached.clone()
        };
        assert_eq!(load(&replaced), None);
        let with_dsn = |dsn: &str| HostDevice {
            dsn: Some(dsn.to_owned()),
            ..detached.clone()
        };
        Former::of(&with_dsn("00-01"))
            .store(&host.paths, detached.bdf)
            .unwrap();
        assert!(load(&with_dsn("00-01")).is_some() && load(&with_dsn("00-02")).is_none());
        fs::write(path(&host.paths, detached.bdf), "{\"id\": ").unwrap();
        assert_eq!(load(&detached), None, "a record cut short");
        Former::forget(&host.paths, detached.bdf);
        Former::forget(&host.paths, detached.bdf);
        assert_eq!(
            sysfs_entries(&host),
            Vec::<String>::new(),
            "nothing is left behind"
        );
    }

    fn sysfs_entries(host: &FakeHost) -> Vec<String> {
        crate::base::sysfs::entries(&host.paths.run.join("former")).unwrap()
    }
}
