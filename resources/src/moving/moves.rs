//! The move of one device between drivers: its writes, and the way back.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::holding::quarantine::{Until, quarantine};
use crate::holding::restore::RestoreRecord;
use crate::inventory::device::HostDevice;
use crate::inventory::driver_record::DriverRecord;
use crate::inventory::error::InventoryError;
use crate::moving::writer::{SysfsWrite, SysfsWriter, WriteError};
use crate::pools::nova::devname;

/// The driver that devices are detached to.
pub(crate) const VFIO_PCI: &str = "vfio-pci";

/// Where a device goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// To vfio-pci; a variant driver built on it counts as vfio-pci.
    Vfio,
    /// To this driver.
    Driver(String),
    /// To the driver that the kernel chooses for it, if there is one.
    Natural,
    /// To no driver.
    Nothing,
}

/// A device and where it goes.
#[derive(Clone, Debug)]
pub(crate) struct Move {
    /// The device before the move.
    pub(crate) device: HostDevice,
    pub(crate) to: Target,
    /// The override after the move.
    pub(crate) driver_override: Option<String>,
}

/// Why a device did not arrive.
#[derive(Debug, Error)]
pub enum MoveError {
    /// A write failed.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// All writes succeeded, but the device has another driver than the one wanted.
    #[error(
        "its driver is now {found}, not {wanted}: see dmesg, and whether a vfio-pci.ids option claims it"
    )]
    Driver {
        /// The driver wanted.
        wanted: String,
        /// The driver that it has.
        found: String,
    },
    /// The record of the device's state cannot be written, so the device was not touched.
    #[error("cannot record its former driver in {path}")]
    NotRecorded {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The device could not be looked at.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
}

impl MoveError {
    /// Whether the kernel still works on the device, which must then be left alone.
    pub(crate) fn is_hung(&self) -> bool {
        matches!(self, Self::Write(WriteError::Hung { .. }))
    }
}

impl Move {
    /// The move that puts the device back.
    pub(crate) fn back(&self) -> Self {
        Self::to_where_it_was(&self.device)
    }

    /// The move that restores a device's recorded state.
    pub(crate) fn to_where_it_was(device: &HostDevice) -> Self {
        let to = device.driver.clone();
        Self {
            device: device.clone(),
            to: to.map_or(Target::Nothing, Target::Driver),
            driver_override: device.driver_override.clone(),
        }
    }

    /// Records the state of a device before it is detached. The record of an attempt that was cut short is
    /// kept: it has the original state.
    pub(crate) fn remember(&self, paths: &HostPaths, demand: bool) -> Result<(), MoveError> {
        if DriverRecord::of_moved(paths, &self.device).is_some() {
            return Ok(());
        }
        let mut former = DriverRecord::of(&self.device);
        former.interfaces = devname::interfaces(paths, self.device.bdf);
        former.demand = demand;
        let stored = former.store(paths, self.device.bdf);
        stored.map_err(|(path, source)| MoveError::NotRecorded { path, source })
    }

    /// The writes of the move for a device whose state is `now`.
    pub(crate) fn writes(&self, paths: &HostPaths, now: &HostDevice) -> Vec<SysfsWrite> {
        let dir = paths.pci_device(now.bdf);
        let bdf = now.bdf.to_string();
        let mut writes = Vec::new();
        let mut write = |path: PathBuf, value: &str| {
            writes.push(SysfsWrite {
                path,
                value: value.to_owned(),
            })
        };
        // Keeps the kernel from resetting the device when VFIO opens it.
        if self.to == Target::Vfio && now.must_not_reset.is_some() && !now.reset_methods.is_empty()
        {
            write(dir.join("reset_method"), "\n");
        }
        let mut allowed = now.driver_override.as_deref();
        if !self.needs_nothing(now) {
            let during = self.override_during();
            if allowed != during {
                write(dir.join("driver_override"), override_text(during));
                allowed = during;
            }
            if now.driver.is_some() {
                write(dir.join("driver/unbind"), &bdf);
            }
            if self.to != Target::Nothing {
                write(paths.sysfs.join("bus/pci/drivers_probe"), &bdf);
            }
        }
        if allowed != self.driver_override.as_deref() {
            write(
                dir.join("driver_override"),
                override_text(self.driver_override.as_deref()),
            );
        }
        writes
    }

    /// Whether the device has its driver already. A device without a driver may find one when it is probed.
    fn needs_nothing(&self, now: &HostDevice) -> bool {
        self.has_arrived(now) && (self.to != Target::Natural || now.driver.is_some())
    }

    fn has_arrived(&self, now: &HostDevice) -> bool {
        match &self.to {
            Target::Vfio => now.on_vfio(),
            Target::Driver(driver) => now.driver.as_deref() == Some(driver),
            Target::Natural => !now.on_vfio(),
            Target::Nothing => now.driver.is_none(),
        }
    }

    /// The override during the probe: only the driver wanted may bind.
    fn override_during(&self) -> Option<&str> {
        match &self.to {
            Target::Vfio => Some(VFIO_PCI),
            Target::Driver(driver) => Some(driver),
            Target::Natural | Target::Nothing => self.driver_override.as_deref(),
        }
    }

    fn wanted(&self) -> &str {
        match &self.to {
            Target::Vfio => VFIO_PCI,
            Target::Driver(driver) => driver,
            Target::Natural => "one of the host's",
            Target::Nothing => "none",
        }
    }
}

/// An empty line clears the override.
fn override_text(driver: Option<&str>) -> &str {
    driver.unwrap_or("\n")
}

/// Makes moves and collects their writes.
pub(crate) struct Mover<'a> {
    pub(crate) paths: &'a HostPaths,
    pub(crate) writer: &'a dyn SysfsWriter,
    pub(crate) writes: Vec<SysfsWrite>,
}

impl Mover<'_> {
    /// Makes one move and checks that the device arrived.
    pub(crate) fn make(&mut self, one: &Move) -> Result<(), MoveError> {
        let bdf = one.device.bdf;
        for write in one.writes(self.paths, &HostDevice::read(self.paths, bdf)?) {
            self.writer.write(&write.path, &write.value)?;
            self.writes.push(write);
        }
        let now = HostDevice::read(self.paths, bdf)?;
        if one.has_arrived(&now) {
            return Ok(());
        }
        let found = now.driver.unwrap_or_else(|| "none".to_owned());
        Err(MoveError::Driver {
            wanted: one.wanted().to_owned(),
            found,
        })
    }

    /// Puts a device into quarantine if a write to it hangs.
    pub(crate) fn set_aside_if_hung(&self, device: &HostDevice, why: &MoveError) {
        if !why.is_hung() {
            return;
        }
        let reason = format!("it hung: {why}");
        if let Err(error) = quarantine(self.paths, device.bdf, device.id, &reason, Until::Boot) {
            tracing::error!("{} cannot be put into quarantine: {error}", device.bdf);
        }
    }

    /// Undoes moves, the last one first. Returns the devices that could not be put back.
    pub(crate) fn undo(&mut self, moves: &[Move]) -> Vec<HostBdf> {
        let mut left = Vec::new();
        for one in moves.iter().rev() {
            if let Err(error) = self.make(&one.back()) {
                tracing::error!("{} cannot be put back: {error}", one.device.bdf);
                self.set_aside_if_hung(&one.device, &error);
                left.push(one.device.bdf);
            }
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost};
    use std::path::Path;

    /// The writes in short: the override with its value, `unbind`, `probe`.
    fn written(one: &Move, now: &HostDevice) -> String {
        let paths = HostPaths::default();
        let dir = paths.pci_device(now.bdf);
        let short = |SysfsWrite { path, value }| {
            if path == dir.join("driver_override") {
                return format!("override={}", value.trim());
            }
            assert_eq!(value, now.bdf.to_string());
            match path {
                path if path == dir.join("driver/unbind") => "unbind".to_owned(),
                path if path == Path::new("/sys/bus/pci/drivers_probe") => "probe".to_owned(),
                path => panic!("nothing should write {}", path.display()),
            }
        };
        one.writes(&paths, now)
            .into_iter()
            .map(short)
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn the_kernel_is_kept_from_resetting_what_must_not_be_reset() {
        let host = FakeHost::new(&[Fake::nvme("01:00.0", 1).driver("nvme")]);
        let mut device = host.read("01:00.0");
        let writes = |device: &HostDevice, to| -> Vec<String> {
            let one = Move {
                device: device.clone(),
                to,
                driver_override: None,
            };
            let writes = one.writes(&HostPaths::default(), device).into_iter();
            let name = |write: SysfsWrite| write.path.file_name()?.to_str().map(str::to_owned);
            writes.filter_map(name).collect()
        };
        assert!(!writes(&device, Target::Vfio).contains(&"reset_method".to_owned()));
        device.must_not_reset = Some("it hangs".to_owned());
        assert_eq!(writes(&device, Target::Vfio)[0], "reset_method");
        assert!(!writes(&device, Target::Natural).contains(&"reset_method".to_owned()));
        device.reset_methods.clear();
        assert!(!writes(&device, Target::Vfio).contains(&"reset_method".to_owned()));
    }

    #[test]
    fn each_way_has_its_writes() {
        let host = FakeHost::new(&[
            Fake::nvme("01:00.0", 1).driver("nvme"),
            Fake::nvme("02:00.0", 2).unbound(),
            Fake::nvme("03:00.0", 3).with("driver_override", "vfio-pci"),
            Fake::nvme("04:00.0", 4),
        ]);
        let [on_host, unbound, detached, by_ids] =
            ["01:00.0", "02:00.0", "03:00.0", "04:00.0"].map(|bdf| host.read(bdf));
        let nvme = || Target::Driver("nvme".to_owned());
        for (now, to, in_the_end, expected) in [
            (
                &on_host,
                Target::Vfio,
                Some(VFIO_PCI),
                "override=vfio-pci unbind probe",
            ),
            (&on_host, nvme(), None, ""),
            (&on_host, Target::Natural, None, ""),
            (&on_host, Target::Nothing, None, "unbind"),
            (
                &unbound,
                Target::Vfio,
                Some(VFIO_PCI),
                "override=vfio-pci probe",
            ),
            (&unbound, Target::Natural, None, "probe"),
            (&unbound, Target::Nothing, None, ""),
            (&detached, Target::Vfio, Some(VFIO_PCI), ""),
            (
                &detached,
                nvme(),
                None,
                "override=nvme unbind probe override=",
            ),
            (
                &detached,
                nvme(),
                Some("nvme"),
                "override=nvme unbind probe",
            ),
            (&detached, Target::Natural, None, "override= unbind probe"),
            (&detached, Target::Nothing, None, "override= unbind"),
            (&by_ids, Target::Natural, None, "unbind probe"),
        ] {
            let driver_override = in_the_end.map(str::to_owned);
            let one = Move {
                device: now.clone(),
                to,
                driver_override,
            };
            assert_eq!(
                written(&one, now),
                expected,
                "{:?} to {:?}",
                now.driver,
                one.to
            );
        }
    }

    #[test]
    fn the_way_back_leads_to_where_the_device_was() {
        let host = FakeHost::new(&[
            Fake::nvme("01:00.0", 1)
                .driver("nvme")
                .with("driver_override", "nvme"),
            Fake::nvme("02:00.0", 2).unbound(),
        ]);
        let there = |bdf| Move {
            device: host.read(bdf),
            to: Target::Vfio,
            driver_override: Some(VFIO_PCI.to_owned()),
        };
        let back = there("01:00.0").back();
        assert_eq!(
            (back.to, back.driver_override.as_deref()),
            (Target::Driver("nvme".to_owned()), Some("nvme"))
        );
        let back = there("02:00.0").back();
        assert_eq!((back.to, back.driver_override), (Target::Nothing, None));
    }
}
