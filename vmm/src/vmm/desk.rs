//! What a client may ask for while no VM runs, and what is remembered of it.

use std::sync::Arc;

use gantry_resources::{HostPaths, Plans, Request, source_of, ungrouped};

use crate::command::{
    Answer, Attach, Command, CommandError, Detach, EventSink, Recipe, VmEvent, VmState, Wanted,
};
use crate::config::VmConfig;
use crate::shown::{Shown, View};

/// What is remembered while no VM runs.
pub struct Desk {
    /// Where service plans are.
    host: HostPaths,
    /// The VM that there will be.
    pub created: Option<Arc<VmConfig>>,
    /// Why the VM has ended, if it has run.
    ended: Option<String>,
    /// The state that was last told of.
    told: Option<VmState>,
}

/// What the device is called that a request is for, if it is for that one only.
fn address(request: &Request) -> Option<String> {
    match request {
        Request::Any(_) => None,
        Request::Device { bdf, .. } => Some(bdf.to_string()),
        Request::Mdev { uuid, .. } => Some(uuid.to_string()),
    }
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> CommandError {
    CommandError::Invalid(Box::new(error))
}

/// What follows from a command while no VM runs.
pub enum Deed {
    /// It is done, or refused.
    Answer(Result<Answer, CommandError>),
    /// The VM that was created is to run.
    Boot,
    /// The process is to end.
    Quit,
}

impl Desk {
    /// Without a VM.
    pub fn new(host: &HostPaths) -> Self {
        Self {
            host: host.clone(),
            created: None,
            ended: None,
            told: None,
        }
    }

    /// Does what a client asks for, as far as it can be done here.
    pub fn take(&mut self, command: Command) -> Deed {
        if self.created.is_none() {
            return match command {
                Command::Create(recipe) => Deed::Answer(self.create(recipe)),
                // Gone is what was wanted.
                Command::Delete => Deed::Answer(Ok(Answer::Done)),
                Command::Quit => Deed::Quit,
                _ => Deed::Answer(Err(CommandError::NotCreated)),
            };
        }
        Deed::Answer(match command {
            Command::Create(_) => Err(CommandError::AlreadyCreated),
            Command::Boot => return Deed::Boot,
            Command::Quit => return Deed::Quit,
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

    fn create(&mut self, Recipe(make): Recipe) -> Result<Answer, CommandError> {
        let config = make().map_err(CommandError::Invalid)?;
        self.created = Some(Arc::new(config));
        self.ended = None;
        Ok(Answer::Done)
    }

    /// A VM that is not booted will have the device when it is.
    fn attach(&mut self, Attach { id, wanted }: Attach) -> Result<Answer, CommandError> {
        if id.is_some() {
            let what = "a VM that is not booted calls its devices by their addresses: leave `id` out, or boot it first";
            return Err(CommandError::Invalid(what.into()));
        }
        let requests = match wanted {
            Wanted::Request(request) => vec![request],
            Wanted::Plan(name) => {
                let plans = Plans::load(&self.host).map_err(invalid)?;
                let plan = plans.find(&name).map_err(invalid)?;
                plan.requests().map_err(invalid)?
            }
        };
        if let Some(created) = &mut self.created {
            let allowed = created.hotplug.ungrouped;
            // What cannot be looked at now is when the VM boots.
            let grouped = |request: &Request| !matches!(source_of(&self.host, request), Ok(None));
            if let Some(request) = requests.iter().find(|one| !allowed && !grouped(one)) {
                return Err(CommandError::Invalid(ungrouped(request).into()));
            }
            let requests: Vec<Request> = requests
                .into_iter()
                .map(|request| request.with_ungrouped(allowed))
                .collect();
            let known = |request| address(request).filter(|_| created.devices.contains(request));
            if let Some(twice) = requests.iter().find_map(known) {
                return Err(CommandError::DuplicateId(twice));
            }
            Arc::make_mut(created).devices.extend(requests);
        }
        Ok(Answer::Done)
    }

    /// A VM that is not booted will not have the device when it is.
    fn detach(&mut self, Detach { id, .. }: Detach) -> Result<Answer, CommandError> {
        let created = self.created.as_mut().ok_or(CommandError::NotCreated)?;
        let meant = |request: &Request| address(request).is_some_and(|name| name == id);
        if !created.devices.iter().any(meant) {
            let others = created.devices.iter().filter_map(address).collect();
            return Err(CommandError::NoSuchDevice { id, others });
        }
        Arc::make_mut(created)
            .devices
            .retain(|request| !meant(request));
        Ok(Answer::Done)
    }

    /// The VM ran, told so itself, and has ended for the reason `why`.
    pub fn ran(&mut self, why: String) {
        self.ended = Some(why);
        self.told = Some(VmState::Running);
    }

    /// Shows the VM as it is: done before anyone is answered or told of a change.
    pub fn show(&self, shown: &Shown) {
        let state = self.state();
        let created = self.created.as_ref();
        let view = |config| View {
            ended: self.ended.clone(),
            ..View::idle(config, state)
        };
        shown.show(created.map(view));
    }

    fn state(&self) -> VmState {
        if self.ended.is_some() {
            VmState::Shutdown
        } else {
            VmState::Created
        }
    }

    /// Tells of a state that has not been told of.
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
