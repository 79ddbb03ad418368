//! How devices come: a slot is found for what the worker prepared, and the guest is told.

use std::collections::BTreeSet;

use gantry_devices::pci::PortIndex;
use gantry_devices::pci::firmware::{self, Misfit};
use gantry_resources::base::DeviceName;
use gantry_resources::pools::Request;

use super::{Devices, Label};
use crate::command::{Answer, Attach, CommandError, DeviceInfo, Reply, VmEvent};
use crate::config::{NamedRequest, nth_name};
use crate::error::Error;
use crate::vm::attach::{Job, Prepared, tell_steps};
use crate::vm::host_devices::{AttachedDevice, Part, arrange};
use crate::vm::machine::Machine;

impl Devices {
    /// Begins to attach; the reply comes when the guest has been told, or it failed.
    pub fn attach(&mut self, attach: Attach, reply: Reply, machine: &Machine) {
        let free = self.free().len().saturating_sub(self.coming);
        let refused = match (&self.worker, &attach.id) {
            (None, _) => Some(CommandError::NoSlots),
            _ if free == 0 => Some(CommandError::NoFreeSlot {
                slots: machine.slots.len(),
            }),
            (_, Some(id)) if self.has(id) => Some(CommandError::DuplicateId(id.clone())),
            _ => None,
        };
        match (refused, &self.worker) {
            (None, Some(worker)) => {
                self.coming += 1;
                worker.give(Job {
                    attach,
                    reply,
                    slots: free,
                });
            }
            (refused, _) => reply(Err(refused.unwrap_or(CommandError::NoSlots))),
        }
    }

    /// Plugs in what was prepared, and tells the guest.
    pub fn arrive(&mut self, prepared: Prepared, machine: &Machine) {
        let Prepared {
            attach,
            reply,
            devices,
            mut steps,
        } = prepared;
        self.coming = self.coming.saturating_sub(1);
        let begun = self.plugged.len();
        let plugged = match devices {
            Ok((devices, asked)) => self.plug(&attach, devices, &asked, machine),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = plugged {
            let what = attach.id.unwrap_or_else(|| attach.wanted.to_string());
            (self.events)(VmEvent::AttachFailed {
                id: what,
                error: error.to_string(),
            });
            return reply(Err(error));
        }
        let ports = self.ports_from(begun);
        ports.iter().for_each(|port| machine.events.announce(*port));
        self.remind();
        steps.done("announce");
        for new in self.plugged.iter_mut().skip(begun) {
            new.attach = steps.times().to_vec();
        }
        self.publish();
        let infos: Vec<DeviceInfo> = self
            .plugged
            .iter()
            .skip(begun)
            .map(|new| {
                self.slots
                    .info(&new.status, self.plugged.iter().map(|one| &one.status))
            })
            .collect();
        for info in &infos {
            tell_steps(&self.events, &info.id, &steps);
            (self.events)(VmEvent::Attached(info.clone()));
        }
        reply(Ok(Answer::Attached(infos)));
    }

    /// Finds slots for devices and plugs them in: all, or none.
    fn plug(
        &mut self,
        attach: &Attach,
        devices: Vec<AttachedDevice>,
        asked: &[Request],
        machine: &Machine,
    ) -> Result<(), CommandError> {
        let begun = self.plugged.len();
        let mut devices: Vec<Option<AttachedDevice>> = devices.into_iter().map(Some).collect();
        let plugged = self.plug_each(attach, &mut devices, asked, machine);
        if plugged.is_err() {
            for port in self.ports_from(begun) {
                self.close(port, None);
            }
            for mut device in devices.into_iter().flatten() {
                device.unplug();
                self.leave(None, vec![(String::new(), device)], None);
            }
        }
        plugged
    }

    fn plug_each(
        &mut self,
        attach: &Attach,
        devices: &mut [Option<AttachedDevice>],
        asked: &[Request],
        machine: &Machine,
    ) -> Result<(), CommandError> {
        let parts: Vec<Part> = devices.iter().flatten().map(AttachedDevice::part).collect();
        let asked: Vec<NamedRequest> = asked.iter().cloned().map(NamedRequest::from).collect();
        let requests: Vec<usize> = devices
            .iter()
            .flatten()
            .map(|device| device.terms().request)
            .collect();
        let labels = labels(&asked, &requests);
        for set in arrange(&parts) {
            let port = self.slot_for(&set, devices, machine)?;
            for (index, function) in set {
                let Some(part) = parts.get(index) else {
                    continue;
                };
                let id = match &attach.id {
                    None => part.name.to_string(),
                    Some(id) => nth_name(id, index),
                };
                if self.has(&id) {
                    return Err(CommandError::DuplicateId(id));
                }
                let Some(device) = devices.get_mut(index).and_then(Option::take) else {
                    continue;
                };
                let asked = labels.get(index).and_then(|label| label.group.clone());
                let group = asked.or_else(|| device.pool().map(str::to_owned));
                self.seat(device, (port, function), (id, group), machine)
                    .map_err(Error::from)?;
            }
        }
        Ok(())
    }

    /// The first empty slot whose windows hold the BARs of all functions.
    fn slot_for(
        &self,
        set: &[(usize, u8)],
        devices: &[Option<AttachedDevice>],
        machine: &Machine,
    ) -> Result<PortIndex, CommandError> {
        let mut bars = Vec::new();
        let mut first = None;
        for (index, function) in set {
            if let Some(Some(device)) = devices.get(*index) {
                first = first.or(Some(device.name()));
                bars.extend(device.bars(*function));
            }
        }
        let mut small: Option<Misfit> = None;
        for port in self.free() {
            match firmware::fit(&bars, &machine.windows(port)) {
                Ok(()) => return Ok(port),
                Err(misfit) => small = small.or(Some(misfit)),
            }
        }
        Err(match (small, first) {
            (Some(misfit), Some(device)) => CommandError::SlotsTooSmall { device, misfit },
            _ => CommandError::NoFreeSlot {
                slots: machine.slots.len(),
            },
        })
    }
}

/// The name that two devices would have, where there is one: a card may have more functions than its entry says
/// devices. A device without a name is called by its address.
pub fn called_twice(
    asked: &[NamedRequest],
    requests: &[usize],
    devices: &[DeviceName],
) -> Option<String> {
    let labels = labels(asked, requests).into_iter();
    let mut seen = BTreeSet::new();
    let mut ids = labels
        .zip(devices)
        .map(|(label, device)| label.id.unwrap_or_else(|| device.to_string()));
    ids.find(|id| !seen.insert(id.clone()))
}

/// What each device is called, and the group or alias that it was asked for by. `requests` says of each which of
/// those `asked` it is for: a card has several functions.
pub fn labels(asked: &[NamedRequest], requests: &[usize]) -> Vec<Label> {
    let label = |(index, request): (usize, &usize)| {
        let Some(asked) = asked.get(*request) else {
            return Label::default();
        };
        let before = requests.iter().take(index);
        let nth = before.filter(|other| *other == request).count();
        Label {
            id: asked.id.as_ref().map(|id| nth_name(id, nth)),
            group: asked.source().map(str::to_owned),
        }
    };
    requests.iter().enumerate().map(label).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_of_a_card_and_a_named_device_cannot_have_one_name() {
        let asked = |id: Option<&str>| NamedRequest {
            id: id.map(str::to_owned),
            request: Request::group("gpus", 1),
        };
        let devices: Vec<DeviceName> = ["01:00.0", "01:00.1", "02:00.0"]
            .map(|bdf| {
                bdf.parse::<gantry_resources::base::HostBdf>()
                    .unwrap()
                    .into()
            })
            .into();
        let twice = |ids: [Option<&str>; 2]| {
            let asked = ids.map(asked);
            called_twice(&asked, &[0, 0, 1], &devices)
        };
        assert_eq!(
            twice([Some("gpu"), Some("gpu-1")]).as_deref(),
            Some("gpu-1")
        );
        assert_eq!(
            twice([None, Some("0000:01:00.1")]).as_deref(),
            Some("0000:01:00.1")
        );
        assert_eq!(twice([Some("gpu"), Some("gpu-2")]), None);
        assert_eq!(twice([None, None]), None);
    }
}
