//! The commands of clients while no VM runs, and the definition of the next VM.

use std::sync::Arc;

use gantry_resources::base::HostPaths;
use gantry_resources::opener::{source_of, ungrouped};
use gantry_resources::pools::{DeviceRequest, Plans};

use crate::command::{Answer, Attach, Command, CommandError, DeferredConfig, Detach};
use crate::config::{DiskConfig, VmConfig};
use crate::info::{EventSink, VmEvent, VmState};
use crate::status::{SharedStatus, VmStatus};

/// What is remembered while no VM runs.
pub struct StoppedVm {
    /// Where service plans are.
    host: HostPaths,
    /// The VM that there will be.
    pub created: Option<Arc<VmConfig>>,
    /// Why the VM has ended, if it has run.
    ended: Option<String>,
    /// The state that was last told of.
    told: Option<VmState>,
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> CommandError {
    CommandError::Invalid(Box::new(error))
}

/// What a command leads to while no VM runs.
pub enum Action {
    /// It is done, or refused.
    Answer(Result<Answer, CommandError>),
    /// The VM that was created is to run.
    Boot,
    /// The process is to end.
    Quit,
}

impl StoppedVm {
    /// Without a VM.
    pub fn new(host: &HostPaths) -> Self {
        Self {
            host: host.clone(),
            created: None,
            ended: None,
            told: None,
        }
    }

    /// Handles a command, as far as that needs no running VM.
    pub fn handle(&mut self, command: Command) -> Action {
        if self.created.is_none() {
            return match command {
                Command::Create(recipe) => Action::Answer(self.create(recipe)),
                // Gone is what was wanted.
                Command::Delete => Action::Answer(Ok(Answer::Done)),
                Command::Quit => Action::Quit,
                _ => Action::Answer(Err(CommandError::NotCreated)),
            };
        }
        Action::Answer(match command {
            Command::Create(_) => Err(CommandError::AlreadyCreated),
            Command::Boot => return Action::Boot,
            Command::Quit => return Action::Quit,
            Command::Delete => {
                self.created = None;
                Ok(Answer::Done)
            }
            Command::Counters => Ok(Answer::Counters(Vec::new())),
            Command::Attach(attach) => self.attach(attach),
            Command::Detach(detach) => self.detach(detach),
            _ => Err(CommandError::NotBooted),
        })
    }

    fn create(&mut self, DeferredConfig(make): DeferredConfig) -> Result<Answer, CommandError> {
        let config = make()?;
        self.created = Some(Arc::new(config));
        self.ended = None;
        Ok(Answer::Done)
    }

    /// A VM that is not booted will have the device when it is.
    fn attach(&mut self, attach: Attach) -> Result<Answer, CommandError> {
        let mut new = match attach {
            Attach::Devices(request) => vec![request],
            Attach::Plan { name, id } => {
                let plans = Plans::load(&self.host).map_err(invalid)?;
                let mut requests = plans.find(&name).map_err(invalid)?.requests();
                if let Some(first) = requests.first_mut() {
                    first.id = id;
                }
                requests
            }
            // Its descriptor would be kept open for a boot that may never come.
            Attach::Sent(_) => return Err(CommandError::NotBooted),
            Attach::Disk { id, disk } => return self.attach_disk(id, disk),
        };
        let created = self.created.as_mut().ok_or(CommandError::NotCreated)?;
        let allowed = created.hotplug.ungrouped;
        // What cannot be looked at now is when the VM boots.
        let grouped = |request: &DeviceRequest| !matches!(source_of(&self.host, request), Ok(None));
        if let Some(request) = new.iter().find(|one| !allowed && !grouped(one)) {
            return Err(CommandError::Invalid(ungrouped(request).into()));
        }
        for request in &mut new {
            request.allow_ungrouped = allowed;
        }
        let known = created.names();
        let twice = new.iter().find_map(|asked| {
            let same = created
                .devices
                .iter()
                .find(|old| old.from.device().is_some() && old.from == asked.from);
            let taken = asked.names().find(|name| known.contains(name));
            taken.or_else(|| same?.names().next())
        });
        if let Some(twice) = twice {
            return Err(CommandError::DuplicateId(twice));
        }
        Arc::make_mut(created).devices.extend(new);
        Ok(Answer::Done)
    }

    fn attach_disk(
        &mut self,
        id: Option<String>,
        disk: DiskConfig,
    ) -> Result<Answer, CommandError> {
        let created = self.created.as_mut().ok_or(CommandError::NotCreated)?;
        let known = created.names();
        let mut names = (0..).map(|number| format!("disk{number}"));
        let id = id.or_else(|| names.find(|name| !known.contains(name)));
        let id = id.unwrap_or_default();
        if known.contains(&id) {
            return Err(CommandError::DuplicateId(id));
        }
        Arc::make_mut(created).disks.push(DiskConfig { id, ..disk });
        Ok(Answer::Done)
    }

    /// Removes a disk, or the request of a device, from the definition, with all devices of that request.
    fn detach(&mut self, Detach { id, .. }: Detach) -> Result<Answer, CommandError> {
        let created = self.created.as_mut().ok_or(CommandError::NotCreated)?;
        let others = created.names();
        if !others.contains(&id) {
            return Err(CommandError::NoSuchDevice { id, others });
        }
        let meant = |asked: &DeviceRequest| asked.names().any(|name| name == id);
        let created = Arc::make_mut(created);
        created.devices.retain(|asked| !meant(asked));
        created.disks.retain(|disk| disk.id != id);
        Ok(Answer::Done)
    }

    /// The VM has run, has sent its events itself, and has ended for the reason `why`.
    pub fn ran(&mut self, why: String) {
        self.ended = Some(why);
        self.told = Some(VmState::Running);
    }

    /// Publishes the status. Called before any answer or event of a change.
    pub fn publish(&self, status: &SharedStatus) {
        let state = self.state();
        let created = self.created.as_ref();
        let view = |config| VmStatus {
            ended: self.ended.clone(),
            ..VmStatus::stopped(config, state)
        };
        status.publish(created.map(view));
    }

    fn state(&self) -> VmState {
        if self.ended.is_some() {
            VmState::Shutdown
        } else {
            VmState::Created
        }
    }

    /// Sends the event of a state that was not sent yet.
    pub fn tell(&mut self, events: &EventSink) {
        let state = self.created.as_ref().map(|_| self.state());
        if let Some(state) = state.filter(|state| self.told != Some(*state)) {
            events(VmEvent::State(state));
        }
        self.told = state;
    }
}

#[cfg(test)]
mod tests;
