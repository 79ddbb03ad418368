//! The state of a device before it was detached, which reattaching restores.

use serde::{Deserialize, Serialize};

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::facts::nvme::Nvme;
use crate::holding::restore::{Change, RestoreRecord};
use crate::inventory::device::{HostDevice, is_vfio_driver};

/// The record of a device that is moved from its driver: removed after reattaching.
///
/// It counts only while sysfs shows that the device at this address is still the one that was detached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DriverRecord {
    /// Vendor and device id at that time, as they are shown.
    id: String,
    /// Device serial number at that time.
    dsn: Option<String>,
    /// The NVMe serial number, which only the host's driver can read.
    pub(crate) serial: Option<String>,
    /// The rest of the NVMe controller's description.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) nvme: Option<Nvme>,
    /// The driver that had the device.
    pub(crate) driver: Option<String>,
    /// The override that was set.
    pub(crate) driver_override: Option<String>,
    /// The network interfaces that it had, which `devname` names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) interfaces: Vec<String>,
    /// A VM took the device while it runs: the host gets it back when the VM ends.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) demand: bool,
}

impl RestoreRecord for DriverRecord {
    const CHANGE: Change = Change::Driver;
}

impl DriverRecord {
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

    /// The record, if there is one about the hardware that is there now.
    ///
    /// A device that was put in the place of another one has not the override that detaching sets.
    pub(crate) fn of_detached(paths: &HostPaths, device: &HostDevice) -> Option<Self> {
        let set = device.driver_override.as_deref();
        set.filter(|driver| is_vfio_driver(driver))?;
        Self::of_hardware(paths, device)
    }

    /// The record of a device that a VM took and that is not fully restored yet, even if restoring was cut
    /// short.
    pub(crate) fn of_lent(paths: &HostPaths, device: &HostDevice) -> Option<Self> {
        let former = Self::of_hardware(paths, device).filter(|former| former.demand)?;
        let with_host = match &former.driver {
            Some(_) => device.driver.is_some() && !device.on_vfio(),
            None => device.driver.is_none(),
        };
        let back = with_host && device.driver_override == former.driver_override;
        (!back).then_some(former)
    }

    /// The record of a device that was moved, or is being moved.
    pub(crate) fn of_moved(paths: &HostPaths, device: &HostDevice) -> Option<Self> {
        Self::of_detached(paths, device).or_else(|| Self::of_lent(paths, device))
    }

    /// The host driver that a device was taken from, until it is bound to one again.
    pub(crate) fn driver_of(paths: &HostPaths, device: &HostDevice) -> Option<String> {
        let away = device.driver.is_none() || device.on_vfio();
        Self::of_hardware(paths, device).filter(|_| away)?.driver
    }

    /// The function that had a network interface before it was moved.
    pub(crate) fn of_interface(paths: &HostPaths, name: &str) -> Option<HostBdf> {
        let has = |bdf: &HostBdf| {
            let record = Self::load(paths, *bdf);
            record.is_some_and(|record| record.interfaces.iter().any(|one| one == name))
        };
        Self::all(paths).find(has)
    }

    /// The devices that VMs took, in whatever state.
    pub(crate) fn on_demand(paths: &HostPaths) -> impl Iterator<Item = HostBdf> {
        let marked = |bdf: &HostBdf| Self::load(paths, *bdf).is_some_and(|record| record.demand);
        Self::all(paths).filter(marked)
    }

    fn all(paths: &HostPaths) -> impl Iterator<Item = HostBdf> {
        let names = Change::Driver.recorded(paths).into_iter();
        names.filter_map(DeviceName::pci)
    }

    fn of_hardware(paths: &HostPaths, device: &HostDevice) -> Option<Self> {
        let former = Self::load(paths, device.bdf)?;
        let same_dsn = former.dsn.is_none() || device.dsn.is_none() || former.dsn == device.dsn;
        (former.id == device.id.to_string() && same_dsn).then_some(former)
    }

    /// Removes the mark of a VM, since an operator wants the device detached for good.
    pub(crate) fn keep_detached(paths: &HostPaths, device: &HostDevice) {
        let Some(former) = Self::of_lent(paths, device) else {
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

    /// Removes the record of a device that was restored, unless the record is older than the attempt and so
    /// still needed.
    pub(crate) fn forget_unless_older(paths: &HostPaths, before: &HostDevice) {
        if Self::of_detached(paths, before).is_none() {
            Change::Driver.forget(paths, before.bdf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    use crate::fixture::{Fake, FakeHost};

    #[test]
    fn a_record_counts_only_for_the_hardware_that_was_detached() {
        let host = FakeHost::new(&[Fake::nvme("01:00.0", 1)
            .driver("nvme")
            .with("nvme/nvme0/serial", "GN-1")]);
        let before = host.read("01:00.0");
        DriverRecord::of(&before)
            .store(&host.paths, before.bdf)
            .unwrap();
        let load = |device: &HostDevice| DriverRecord::of_detached(&host.paths, device);
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
        DriverRecord::of(&with_dsn("00-01"))
            .store(&host.paths, detached.bdf)
            .unwrap();
        assert!(load(&with_dsn("00-01")).is_some() && load(&with_dsn("00-02")).is_none());
        fs::write(Change::Driver.path(&host.paths, detached.bdf), "{\"id\": ").unwrap();
        assert_eq!(load(&detached), None, "a record cut short");
        Change::Driver.forget(&host.paths, detached.bdf);
        Change::Driver.forget(&host.paths, detached.bdf);
        assert!(Change::Driver.recorded(&host.paths).is_empty());
    }
}
