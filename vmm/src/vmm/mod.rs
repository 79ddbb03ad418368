//! The process: runs one VM, or one after the other, and takes the commands of clients.
//!
//! There is one mailbox, and one thread at a time reads it. With `gantry run vm.json` the first thread builds
//! the VM, confines itself and runs the VM to its end. A process that outlives its VMs needs another thread for
//! each, as a thread can never leave its filter: the first thread keeps what clients defined, and waits while
//! the VM's thread builds the VM, confines itself and runs it.

mod check;
mod stopped;

use std::io;
use std::sync::Arc;

use gantry_devices::virtio::block::Rings;
use gantry_resources::base::{HostPaths, chain, reap_helpers};
use gantry_resources::holding::{Maintenance, maintenance};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::command::{Answer, Command, CommandError, Reply};
use crate::config::VmConfig;
use crate::disks;
use crate::error::Error;
use crate::host::files;
use crate::info::{ConsoleSink, EventSink, VmEvent, VmInfo, VmState};
use crate::process::error::cannot;
use crate::process::event_loop::Mailbox;
use crate::process::sandbox::{self, Role, Sandbox, SeccompMode};
use crate::process::signals::{Interrupted, Signals};
use crate::process::threads::{self, Task};
use crate::status::{SharedStatus, VmStatus};
use crate::vm::{End, Event, Outcome, Vm, VmContext};
pub use check::check;
use stopped::{Action, StoppedVm};

/// Rings for the disks of VMs that clients define, which are not known when the process starts.
const KEPT_RINGS: usize = 8;

/// Options of a run that are not part of the VM.
#[derive(Clone)]
pub struct Options {
    /// What happens to system calls that a filter does not name.
    pub seccomp: SeccompMode,
    /// Keep the process when the VM has ended, until a client or a signal ends it.
    pub keep: bool,
    /// Who hears of what happens to the VM.
    pub events: EventSink,
    /// Who reads what the guest writes to its serial port.
    pub console: ConsoleSink,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seccomp: SeccompMode::default(),
            keep: false,
            events: Arc::new(|_| {}),
            console: Arc::new(|_| {}),
        }
    }
}

/// Sends commands of clients to the VM, from any thread.
#[derive(Clone)]
pub struct Handle {
    mailbox: Arc<Mailbox<Event>>,
    status: Arc<SharedStatus>,
}

impl Handle {
    /// Sends a command. Never waits: `reply` is called once with the result, on a thread of the VMM that it
    /// must not block, or on this thread if the process is ending.
    pub fn ask(
        &self,
        command: Command,
        reply: impl FnOnce(Result<Answer, CommandError>) + Send + 'static,
    ) {
        self.mailbox.post(Event::Command(command, Box::new(reply)));
    }

    /// Types at the guest's serial port. Returns how many bytes it has taken, which may be fewer than there are:
    /// the guest must read them first. Never waits, and wakes no thread.
    ///
    /// # Errors
    /// No VM runs, or it has no serial port.
    pub fn type_in(&self, input: &[u8]) -> Result<usize, CommandError> {
        if self.mailbox.is_closed() {
            return Err(CommandError::Ending);
        }
        self.status.type_in(input)
    }

    /// The VM's published status. Wakes no thread.
    ///
    /// # Errors
    /// There is no VM, or the process is ending.
    pub fn info(&self) -> Result<VmInfo, CommandError> {
        if self.mailbox.is_closed() {
            return Err(CommandError::Ending);
        }
        self.status.info().ok_or(CommandError::NotCreated)
    }
}

/// The VMM of this process.
pub struct Vmm {
    context: VmContext,
    keep: bool,
}

impl Vmm {
    /// Prepares the process: blocks the signals that ask it to end, which [`Self::run`] reads. Must be called
    /// on the first thread, before any other is made.
    ///
    /// # Errors
    /// The kernel refused something.
    pub fn new(host: &HostPaths, options: Options) -> Result<Self, Error> {
        let signals = Arc::new(Signals::block().map_err(cannot("block signals"))?);
        raise_file_limit();
        sandbox::install_traps().map_err(cannot("install signal handlers"))?;
        let sandbox = Sandbox::new(options.seccomp).map_err(cannot("compile filters"))?;
        Ok(Self {
            context: VmContext {
                host: host.clone(),
                sandbox: Arc::new(sandbox),
                mailbox: Mailbox::new().map_err(cannot("make an eventfd"))?,
                signals,
                events: options.events,
                console: options.console,
                status: Arc::default(),
                rings: Rings::default(),
            },
            keep: options.keep,
        })
    }

    /// The way in for clients.
    pub fn handle(&self) -> Handle {
        Handle {
            mailbox: Arc::clone(&self.context.mailbox),
            status: Arc::clone(&self.context.status),
        }
    }

    /// Runs `body`, which serves clients, on a thread with a filter of its own: it may use the sockets that it
    /// has or accepts, and reaches no file.
    ///
    /// # Errors
    /// The kernel makes no thread.
    pub fn spawn_api(&self, body: impl FnOnce() + Send + 'static) -> io::Result<Task<()>> {
        threads::spawn(Role::Api, &self.context.sandbox, body)
    }

    /// Runs one VM, or VMs until the process is to end, and releases everything. Must be called on the
    /// process's first thread, which stays confined. Waits for clients to create a VM if there is no `first`
    /// one, or if [`Options::keep`] is set.
    ///
    /// # Errors
    /// The VM could not be built, or the host failed later. Everything has been released.
    pub fn run(self, first: Option<VmConfig>) -> Result<Outcome, Error> {
        // None can be made later.
        let rings = first.as_ref().map_or(KEPT_RINGS, disks::rings);
        self.context.rings.fill(rings);
        let confined = self.context.sandbox.confine_process();
        confined.map_err(cannot("enter the sandbox"))?;
        let ended = match first {
            Some(config) if !self.keep => self.once(&Arc::new(config)),
            first => self.serve(first),
        };
        self.context.mailbox.close();
        match ended {
            Err(Error::Interrupted(Interrupted(signal))) => Ok(Outcome::Signal(signal)),
            ended => ended,
        }
    }

    /// One VM, on this thread.
    fn once(&self, config: &Arc<VmConfig>) -> Result<Outcome, Error> {
        let idle = VmStatus::stopped(config, VmState::Created);
        self.context.status.publish(Some(idle));
        let ended = run_vm(&self.context, config, &mut None);
        (self.context.events)(VmEvent::Ended {
            reason: reason_of(&ended),
        });
        match ended? {
            End::Over(outcome) => Ok(outcome),
            End::Requested(_, reply) => {
                reply(Ok(Answer::Done));
                Ok(Outcome::Client)
            }
        }
    }

    /// Runs VMs on threads of their own, as clients boot them.
    fn serve(&self, first: Option<VmConfig>) -> Result<Outcome, Error> {
        let context = &self.context;
        let mut control = context.event_loop()?;
        let mut stopped = StoppedVm::new(&context.host);
        if let Some(config) = first {
            stopped.created = Some(Arc::new(config));
            stopped.publish(&context.status);
            if let Some(outcome) = self.boot(&mut stopped, None)? {
                return Ok(outcome);
            }
        }
        loop {
            let event = control.next(None).map_err(cannot("wait for events"))?;
            let (command, reply) = match event {
                Some(Event::Command(command, reply)) => (command, reply),
                Some(Event::Signal(number)) => return Ok(Outcome::Signal(number)),
                Some(Event::Quit) => return Ok(Outcome::Stopped),
                // A late event of a VM that has ended.
                _ => continue,
            };
            match stopped.handle(command) {
                Action::Answer(answer) => {
                    stopped.publish(&context.status);
                    reply(answer);
                }
                Action::Boot => {
                    if let Some(outcome) = self.boot(&mut stopped, Some(reply))? {
                        return Ok(outcome);
                    }
                }
                Action::Quit => {
                    reply(Ok(Answer::Done));
                    return Ok(Outcome::Client);
                }
            }
            stopped.tell(&context.events);
        }
    }

    /// Runs the VM that was created to its end. Returns `Some` if the process ends with it. `started` is
    /// answered when the vCPUs start, or with the reason why they did not.
    fn boot(
        &self,
        stopped: &mut StoppedVm,
        started: Option<Reply>,
    ) -> Result<Option<Outcome>, Error> {
        let Some(config) = stopped.created.clone() else {
            return Ok(None);
        };
        let (context, asked) = (self.context.clone(), started.is_some());
        let life = move || {
            let mut started = started;
            let ended = run_vm(&context, &config, &mut started);
            (ended, started)
        };
        let thread = threads::spawn(Role::Vm, &self.context.sandbox, life);
        let (ended, unheard) = thread.map_err(cannot("spawn a thread"))?.join();
        // The helpers have ended, or end before the next VM does.
        reap_helpers();
        if ended.is_ok() || unheard.is_none() {
            let reason = reason_of(&ended);
            (self.context.events)(VmEvent::Ended {
                reason: reason.clone(),
            });
            stopped.ran(reason);
        }
        if matches!(ended, Ok(End::Requested(Command::Delete, _))) {
            stopped.created = None;
        }
        stopped.publish(&self.context.status);
        let outcome = match (ended, unheard) {
            (Ok(End::Over(outcome @ (Outcome::Signal(_) | Outcome::Stopped))), _) => Some(outcome),
            (Ok(End::Over(Outcome::GuestFault(error))), _) => {
                tracing::warn!("the guest died: {error}");
                (self.context.events)(VmEvent::GuestFault { error });
                None
            }
            (Ok(End::Over(_)), _) => None,
            (Ok(End::Requested(command, reply)), _) => {
                reply(Ok(Answer::Done));
                matches!(command, Command::Quit).then_some(Outcome::Client)
            }
            (Err(Error::Interrupted(Interrupted(signal))), reply) => {
                if let Some(reply) = reply {
                    reply(Err(CommandError::Ending));
                }
                Some(Outcome::Signal(signal))
            }
            (Err(error), Some(reply)) => {
                reply(Err(CommandError::Failed(error)));
                None
            }
            (Err(error), None) if asked => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "an error of the host ended the VM"
                );
                None
            }
            (Err(error), None) => return Err(error),
        };
        stopped.tell(&self.context.events);
        Ok(outcome)
    }
}

/// Why a VM has ended, in words for people.
fn reason_of(ended: &Result<End, Error>) -> String {
    match ended {
        Ok(End::Over(outcome)) => outcome.to_string(),
        Ok(End::Requested(..)) => Outcome::Client.to_string(),
        Err(Error::Interrupted(Interrupted(signal))) => Outcome::Signal(*signal).to_string(),
        Err(error) => format!("the host failed it: {}", chain(error)),
    }
}

/// Builds a VM, runs it, and releases its resources.
fn run_vm(
    context: &VmContext,
    config: &Arc<VmConfig>,
    started: &mut Option<Reply>,
) -> Result<End, Error> {
    // Maintenance may have begun since the VM was created.
    if let Some(Maintenance { reason, .. }) = maintenance(&context.host)? {
        return Err(Error::Maintenance(reason));
    }
    let confined = context
        .sandbox
        .confine_files(&files::of_vm(config), &context.host);
    let ended = confined
        .map_err(cannot("confine files (Landlock)"))
        .map_err(Error::from)
        .and_then(|()| Vm::build(config, context))
        .and_then(|mut vm| vm.run(started));
    context.mailbox.extract(Event::is_of_guest);
    ended
}

/// Each interrupt vector costs a descriptor, and the usual soft limit of 1024 is there for programs
/// that call select(2).
fn raise_file_limit() {
    let limit = getrlimit(Resource::RLIMIT_NOFILE);
    let raised = limit.and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit on open files");
    }
}
