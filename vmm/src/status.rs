//! What a VM is at the moment: published by the thread that owns it, and read by any other without waking it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use gantry_devices::pci::{GuestBdf, PortIndex};
use gantry_devices::serial::Serial;

use crate::command::CommandError;
use crate::config::VmConfig;
use crate::host::placement::VmPlacement;
use crate::info::{DeviceInfo, DeviceKind, DeviceState, VmInfo, VmState};
use crate::machine::SlotTable;

/// Where it is published. Its owner publishes a change before it tells anyone of it.
#[derive(Default)]
pub struct SharedStatus(Mutex<Option<VmStatus>>);

/// What is published of a VM.
#[derive(Clone)]
pub struct VmStatus {
    /// What it was made from.
    pub config: Arc<VmConfig>,
    /// Where it is on the host; anywhere if it does not run.
    pub placement: VmPlacement,
    /// What it is doing.
    pub state: VmState,
    /// When its vCPUs started, if it runs.
    pub started: Option<Instant>,
    /// Why it has ended, if it has.
    pub ended: Option<String>,
    /// The devices that it has.
    pub devices: Vec<DeviceStatus>,
    /// Where they are plugged in; `None` if it does not run.
    pub slots: Option<SlotTable>,
    /// Its serial port, which goes with the VM.
    pub serial: Weak<Serial>,
}

/// A device in its slot.
#[derive(Debug, Clone)]
pub struct DeviceStatus {
    /// What it is called.
    pub id: String,
    /// What it is.
    pub kind: DeviceKind,
    /// How far it has come.
    pub state: DeviceState,
    /// The port that it is behind.
    pub port: PortIndex,
    /// Its number there.
    pub function: u8,
}

impl VmStatus {
    /// A VM that does not run.
    pub fn stopped(config: &Arc<VmConfig>, state: VmState) -> Self {
        Self {
            config: Arc::clone(config),
            placement: VmPlacement::default(),
            state,
            started: None,
            ended: None,
            devices: Vec::new(),
            slots: None,
            serial: Weak::new(),
        }
    }

    fn info(&self) -> VmInfo {
        let slots = self.slots.as_ref();
        let device = |device: &DeviceStatus| slots.map(|slots| device.info(slots, &self.devices));
        let occupied = |port| self.devices.iter().any(|device| device.port == port);
        VmInfo {
            config: Arc::clone(&self.config),
            nodes: self.placement.nodes.clone(),
            cpus: self.placement.cpus.clone(),
            state: self.state,
            uptime: self.started.map(|started| started.elapsed()),
            ended: self.ended.clone(),
            devices: self.devices.iter().filter_map(device).collect(),
            slots: slots.map_or(0, SlotTable::count),
            free_slots: slots.map_or(0, |slots| slots.free(occupied).len()),
        }
    }
}

impl DeviceStatus {
    /// The device as clients know it, one of `all`.
    pub fn info<'a>(
        &self,
        slots: &SlotTable,
        all: impl IntoIterator<Item = &'a Self>,
    ) -> DeviceInfo {
        let beside = all.into_iter();
        let beside = beside.filter(|other| other.port == self.port && other.id != self.id);
        let bus = slots.bus(self.port);
        DeviceInfo {
            id: self.id.clone(),
            kind: self.kind.clone(),
            guest: GuestBdf::from_bits(u16::from(bus) << 8 | u16::from(self.function)),
            state: self.state,
            together_with: beside.map(|other| other.id.clone()).collect(),
        }
    }
}

impl SharedStatus {
    /// Shows a VM, or that there is none.
    pub fn publish(&self, status: Option<VmStatus>) {
        let before = std::mem::replace(&mut *self.lock(), status);
        // Dropped without the lock: it may own the last reference of something.
        drop(before);
    }

    /// Shows what the VM is doing now.
    pub fn set_state(&self, state: VmState) {
        if let Some(status) = &mut *self.lock() {
            status.state = state;
        }
    }

    /// Shows the devices that it has now.
    pub fn set_devices(&self, devices: Vec<DeviceStatus>) {
        if let Some(status) = &mut *self.lock() {
            status.devices = devices;
        }
    }

    /// The VM as it is; `None` if there is none.
    pub fn info(&self) -> Option<VmInfo> {
        // Copied, so that a reader does not block the owner.
        let status = self.lock().clone();
        status.map(|status| status.info())
    }

    /// Types at the serial port of the VM. Returns how many bytes it has taken.
    ///
    /// # Errors
    /// No VM runs, or it has no serial port.
    pub fn type_in(&self, input: &[u8]) -> Result<usize, CommandError> {
        let serial = match &*self.lock() {
            None => return Err(CommandError::NotCreated),
            Some(status) if status.started.is_none() => return Err(CommandError::NotBooted),
            Some(status) if !status.config.serial.is_console() => {
                return Err(CommandError::NoConsole);
            }
            Some(status) => status.serial.upgrade(),
        };
        let serial = serial.ok_or(CommandError::Ending)?;
        Ok(serial.enqueue(input))
    }

    fn lock(&self) -> MutexGuard<'_, Option<VmStatus>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use gantry_devices::events::PlatformEvents;
    use gantry_devices::pci::PciSegment;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::config::DiskConfig;
    use crate::machine::NoSpace;

    fn slots() -> (SlotTable, Vec<PortIndex>) {
        let mut pci = PciSegment::new([0..=4]).unwrap();
        let ports: Vec<_> = (0..2).map(|_| pci.add_root_port(0).unwrap()).collect();
        let trigger = EventFd::new(0).unwrap();
        let events = PlatformEvents::new(ports.iter().copied(), trigger);
        let slots = SlotTable::new(
            ports.iter().copied(),
            &Arc::new(pci),
            Arc::new(NoSpace),
            &Arc::new(events),
        );
        (slots, ports)
    }

    #[test]
    fn what_was_published_last_is_seen() {
        let status = SharedStatus::default();
        assert!(status.info().is_none());
        status.set_state(VmState::Running);
        assert!(status.info().is_none(), "there is still no VM");
        status.publish(Some(VmStatus::stopped(
            &Arc::new(VmConfig::small()),
            VmState::Created,
        )));
        let info = status.info().unwrap();
        assert_eq!((info.state, info.slots), (VmState::Created, 0));
        let (slots, ports) = slots();
        let device = |id: &str, port: usize, function| DeviceStatus {
            id: id.to_owned(),
            kind: DeviceKind::Disk(DiskConfig::small()),
            state: DeviceState::Announced,
            port: ports[port],
            function,
        };
        let devices = vec![
            device("gpu", 1, 0),
            device("audio", 1, 1),
            device("disk", 0, 0),
        ];
        status.publish(Some(VmStatus {
            slots: Some(slots),
            ..VmStatus::stopped(&Arc::new(VmConfig::small()), VmState::Running)
        }));
        assert_eq!(status.info().unwrap().free_slots, 2);
        status.set_devices(devices);
        status.set_state(VmState::Paused);
        let info = status.info().unwrap();
        assert_eq!((info.slots, info.free_slots), (2, 0));
        let together = |index: usize| info.devices[index].together_with.clone();
        assert_eq!(info.devices[0].id, "gpu");
        assert_eq!([together(0), together(1)], [["audio"], ["gpu"]]);
        assert!(together(2).is_empty());
        assert_eq!(info.state, VmState::Paused);
        status.publish(None);
        assert!(status.info().is_none());
    }
}
