//! What a VM is at the moment: status by the thread that owns it, and seen by any other without waking it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gantry_devices::events::{PlatformEvents, SlotState};
use gantry_devices::pci::{GuestBdf, PciSegment, PortIndex};
use gantry_resources::base::DeviceName;
use gantry_resources::inventory::Allow;

use crate::command::{DeviceInfo, DeviceState, VmInfo, VmState};
use crate::config::VmConfig;
use crate::placement::VmPlacement;
use crate::vm::Leaving;

/// The place where it is status. Its owner shows a change before it tells anyone of it.
#[derive(Default)]
pub struct SharedStatus(Mutex<Option<VmStatus>>);

/// What is status of a VM.
#[derive(Clone)]
pub struct VmStatus {
    /// What it was made from.
    pub config: Arc<VmConfig>,
    /// Where it is on the host; anywhere if it does not run.
    pub placement: VmPlacement,
    /// What it is doing.
    pub state: VmState,
    /// Why it has ended, if it has.
    pub ended: Option<String>,
    /// The devices that it has.
    pub devices: Vec<DeviceStatus>,
    /// Where they are plugged in; `None` if it does not run.
    pub slots: Option<SlotTable>,
}

/// A device in its slot.
#[derive(Debug, Clone)]
pub struct DeviceStatus {
    /// What it is called.
    pub id: String,
    /// What it is called on the host.
    pub name: DeviceName,
    /// The group or alias that it was asked for by.
    pub group: Option<String>,
    /// What it may lack.
    pub allow: Allow,
    /// How far it has come.
    pub state: DeviceState,
    /// The port that it is behind.
    pub port: PortIndex,
    /// Its number there.
    pub function: u8,
}

/// The slots of a VM that runs. Where they are and which are empty is the guest's doing as well: that is
/// seen as of now.
#[derive(Clone)]
pub struct SlotTable {
    /// The ports whose slots can be filled and emptied.
    pub ports: Arc<[PortIndex]>,
    /// The ports as the guest has set them up.
    pub pci: Arc<PciSegment>,
    /// What the guest was told of the slots.
    pub events: Arc<PlatformEvents>,
    /// SlotTable that something is still on its way out of.
    pub leaving: Leaving,
}

impl SlotTable {
    /// The slots that have nothing in them any more, as far as the guest has heard too, the surest first.
    pub fn free<'a>(
        &self,
        devices: impl Iterator<Item = &'a DeviceStatus> + Clone,
    ) -> Vec<PortIndex> {
        let empty = self.ports.iter().filter(|port| {
            devices.clone().all(|status| status.port != **port) && !self.leaving.has(**port)
        });
        let known = empty.map(|port| (self.events.slot_state(*port), *port));
        let mut free: Vec<_> = known
            .filter(|(known, _)| *known < SlotState::Unread)
            .collect();
        free.sort();
        free.into_iter().map(|(_, port)| port).collect()
    }

    /// A device as clients know it, one of `devices`.
    pub fn info<'a>(
        &self,
        status: &DeviceStatus,
        devices: impl Iterator<Item = &'a DeviceStatus>,
    ) -> DeviceInfo {
        let beside = devices.filter(|other| other.port == status.port && other.id != status.id);
        let port = self.pci.ports().find(|(port, ..)| *port == status.port);
        let bus = port.map_or(0, |(_, _, port)| port.secondary_bus());
        DeviceInfo {
            id: status.id.clone(),
            name: status.name,
            guest: GuestBdf::from_bits(u16::from(bus) << 8 | u16::from(status.function)),
            group: status.group.clone(),
            allow: status.allow,
            state: status.state,
            together_with: beside.map(|other| other.id.clone()).collect(),
        }
    }
}

impl VmStatus {
    /// A VM that does not run.
    pub fn stopped(config: &Arc<VmConfig>, state: VmState) -> Self {
        Self {
            config: Arc::clone(config),
            placement: VmPlacement::default(),
            state,
            ended: None,
            devices: Vec::new(),
            slots: None,
        }
    }

    fn info(&self) -> VmInfo {
        let slots = self.slots.as_ref();
        let device = |status| slots.map(|slots| slots.info(status, self.devices.iter()));
        VmInfo {
            config: Arc::clone(&self.config),
            nodes: self.placement.nodes.clone(),
            cpus: self.placement.cpus.clone(),
            state: self.state,
            ended: self.ended.clone(),
            devices: self.devices.iter().filter_map(device).collect(),
            slots: slots.map_or(0, |slots| slots.ports.len()),
            free_slots: slots.map_or(0, |slots| slots.free(self.devices.iter()).len()),
        }
    }
}

impl SharedStatus {
    /// Shows a VM, or that there is none.
    pub fn publish(&self, view: Option<VmStatus>) {
        let before = std::mem::replace(&mut *self.lock(), view);
        // Not behind the lock: what only it has left goes now.
        drop(before);
    }

    /// Shows what the VM is doing now.
    pub fn set_state(&self, state: VmState) {
        if let Some(view) = &mut *self.lock() {
            view.state = state;
        }
    }

    /// Shows the devices that it has now.
    pub fn set_devices(&self, devices: Vec<DeviceStatus>) {
        if let Some(view) = &mut *self.lock() {
            view.devices = devices;
        }
    }

    /// The VM as it is; `None` if there is none.
    pub fn info(&self) -> Option<VmInfo> {
        // Copied, so that its owner is not kept by whoever looks.
        let view = self.lock().clone();
        view.map(|view| view.info())
    }

    fn lock(&self) -> MutexGuard<'_, Option<VmStatus>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    fn slots() -> SlotTable {
        let mut pci = PciSegment::new([0..=4]).unwrap();
        let ports: Vec<_> = (0..2).map(|_| pci.add_root_port(0).unwrap()).collect();
        let trigger = EventFd::new(0).unwrap();
        SlotTable {
            events: Arc::new(PlatformEvents::new(ports.iter().copied(), trigger)),
            ports: ports.into(),
            pci: Arc::new(pci),
            leaving: Leaving::default(),
        }
    }

    #[test]
    fn what_was_shown_last_is_seen() {
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
        let slots = slots();
        let device = |id: &str, port: usize, function| DeviceStatus {
            id: id.to_owned(),
            name: format!("01:00.{function}").parse().unwrap(),
            group: None,
            allow: Allow::default(),
            state: DeviceState::Announced,
            port: slots.ports[port],
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
