//! Attaching devices: the control thread finds slots for the devices that the worker opened, and notifies the
//! guest.

use gantry_devices::pci::PortIndex;
use gantry_devices::pci::firmware::{self, Misfit};

use super::job::{AttachJob, AttachResult};
use super::{AttachWorker, HostDevices, SlotDevice, arrange};
use crate::command::{Answer, Attach, CommandError, Reply};
use crate::error::Error;
use crate::info::{DeviceInfo, VmEvent};
use crate::machine::SlotWindows;

impl HostDevices {
    /// Begins to attach. The reply comes when the guest has been notified, or on failure.
    pub fn attach(&mut self, mut attach: Attach, reply: Reply) {
        self.name(&mut attach);
        let free = self.free().len().saturating_sub(self.coming);
        let refused = match (&self.worker, attach.id()) {
            (None, _) => Some(CommandError::NoSlots),
            _ if free == 0 => Some(CommandError::NoFreeSlot {
                slots: self.slots.count(),
            }),
            (_, Some(id)) if self.has(id) => Some(CommandError::DuplicateId(id.to_owned())),
            _ => None,
        };
        match (refused, &self.worker) {
            (None, Some(worker)) => {
                self.coming += 1;
                worker.give(AttachJob {
                    attach,
                    reply,
                    slots: free,
                });
            }
            (refused, _) => reply(Err(refused.unwrap_or(CommandError::NoSlots))),
        }
    }

    /// Gives a disk without a name one that no other device has, nor one on its way.
    fn name(&mut self, attach: &mut Attach) {
        let Attach::Disk { id: id @ None, .. } = attach else {
            return;
        };
        let mut names = (self.disks_named..).map(|number| (number, format!("disk{number}")));
        if let Some((number, name)) = names.find(|(_, name)| !self.has(name)) {
            self.disks_named = number + 1;
            *id = Some(name);
        }
    }

    /// Plugs in the devices of finished jobs, and notifies the guest.
    pub fn arrive(&mut self, windows: &SlotWindows) {
        while let Some(result) = self.worker.as_ref().and_then(AttachWorker::take_result) {
            self.arrive_one(result, windows);
        }
    }

    fn arrive_one(&mut self, result: AttachResult, windows: &SlotWindows) {
        let AttachResult {
            attach,
            reply,
            devices,
            mut steps,
        } = result;
        self.coming = self.coming.saturating_sub(1);
        let begun = self.plugged.len();
        let devices = devices.map_err(CommandError::from);
        if let Err(error) = devices.and_then(|devices| self.plug_all(devices, windows)) {
            self.tell(VmEvent::AttachFailed {
                id: attach
                    .id()
                    .map_or_else(|| attach.to_string(), str::to_owned),
                error: error.to_string(),
            });
            return reply(Err(error));
        }
        for port in self.ports_from(begun) {
            self.slots.events().announce(port);
        }
        self.remind();
        steps.done("announce");
        for new in self.plugged.iter_mut().skip(begun) {
            new.attach = steps.times().to_vec();
        }
        self.publish();
        let all = || self.plugged.iter().map(|one| &one.status);
        let new = all().skip(begun);
        let infos: Vec<DeviceInfo> = new.map(|new| new.info(&self.slots, all())).collect();
        for info in &infos {
            steps.tell(&self.context.events, &info.id);
            self.tell(VmEvent::Attached(info.clone()));
        }
        reply(Ok(Answer::Attached(infos)));
    }

    /// Finds slots for all devices and plugs them in, or plugs in none.
    fn plug_all(
        &mut self,
        devices: Vec<SlotDevice>,
        windows: &SlotWindows,
    ) -> Result<(), CommandError> {
        let begun = self.plugged.len();
        let mut devices: Vec<Option<SlotDevice>> = devices.into_iter().map(Some).collect();
        let plugged = self.plug_each(&mut devices, windows);
        if plugged.is_err() {
            for port in self.ports_from(begun) {
                self.close(port, None);
            }
            for device in devices.into_iter().flatten() {
                self.take_away(None, vec![device], None);
            }
        }
        plugged
    }

    fn plug_each(
        &mut self,
        devices: &mut [Option<SlotDevice>],
        windows: &SlotWindows,
    ) -> Result<(), CommandError> {
        let functions = devices.iter().flatten().map(SlotDevice::function);
        for set in arrange(&functions.collect::<Vec<_>>()) {
            let port = self.slot_for(&set, devices, windows)?;
            for (index, function) in set {
                let Some(device) = devices.get_mut(index) else {
                    continue;
                };
                if let Some(id) = device.as_ref().map(SlotDevice::id)
                    && self.has(id)
                {
                    return Err(CommandError::DuplicateId(id.to_owned()));
                }
                if let Some(device) = device.take() {
                    self.plug(device, port, function).map_err(Error::from)?;
                }
            }
        }
        Ok(())
    }

    /// The first empty slot whose windows hold the BARs of all functions.
    fn slot_for(
        &self,
        set: &[(usize, u8)],
        devices: &[Option<SlotDevice>],
        windows: &SlotWindows,
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
            match firmware::fit(&bars, &windows.of(port)) {
                Ok(()) => return Ok(port),
                Err(misfit) => small = small.or(Some(misfit)),
            }
        }
        Err(match (small, first) {
            (Some(misfit), Some(device)) => CommandError::SlotsTooSmall { device, misfit },
            _ => CommandError::NoFreeSlot {
                slots: self.slots.count(),
            },
        })
    }
}
