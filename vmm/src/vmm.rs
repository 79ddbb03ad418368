//! The process: one VM after the other, or one and no more, and the way in for clients.
//!
//! There is one mailbox, and at any time one thread that takes from it. `gantry run vm.json` is the
//! simple case: the first thread builds the VM, confines itself and runs it to its end. A process
//! that outlives its VMs cannot do so, as a thread never gets out of its filter: there the first
//! thread keeps what clients said, and each VM is built and run by a thread of its own that confines
//! itself in the same way, while the first one waits for its end.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gantry_resources::{HostPaths, Maintenance, Plans, Request, maintenance};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::command::{
    Answer, Attach, Command, CommandError, Detach, EventSink, Recipe, Reply, VmEvent, VmInfo,
    VmState, Wanted,
};
use crate::config::VmConfig;
use crate::control::{ControlLoop, Event, Mailbox, SignalWatch, Signals};
use crate::error::Error;
use crate::sandbox::{self, Sandbox, SeccompMode};
use crate::shown::{Shown, View};
use crate::threads::{self, Role, Task};
use crate::vm::{End, Vm};

/// What the user decides about a run beside the VM itself.
#[derive(Clone)]
pub struct Options {
    /// What becomes of system calls that a filter does not name.
    pub seccomp: SeccompMode,
    /// Go on when the VM has ended, until a client or a signal ends the process.
    pub keep: bool,
    /// Who hears of what happens to the VM.
    pub events: EventSink,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seccomp: SeccompMode::default(),
            keep: false,
            events: Arc::new(|_| {}),
        }
    }
}

/// How the process, or its VM, ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered itself off.
    PowerOff,
    /// The user ended it from its console.
    Stopped,
    /// A client ended it.
    Asked,
    /// A signal ended it.
    Signal(i32),
    /// The guest cannot go on, and why.
    GuestFault(String),
}

/// What the VMs of a process stand on.
#[derive(Clone)]
pub struct Ground {
    /// Where the host keeps things.
    pub host: HostPaths,
    /// The filters.
    pub sandbox: Arc<Sandbox>,
    /// Where commands and events come in.
    pub mailbox: Arc<Mailbox>,
    /// The signals that ask the process to end.
    pub signals: Arc<Signals>,
    /// Where events go.
    pub events: EventSink,
    /// Where it is shown what the VM is.
    pub shown: Arc<Shown>,
}

/// The way to the VM for clients, from any thread.
#[derive(Clone)]
pub struct Handle {
    mailbox: Arc<Mailbox>,
    shown: Arc<Shown>,
}

impl Handle {
    /// Asks for something. Never waits: `reply` is called once with what became of it, on a thread of
    /// the VMM that must not be kept, or on this one if the process is ending.
    pub fn ask(
        &self,
        command: Command,
        reply: impl FnOnce(Result<Answer, CommandError>) + Send + 'static,
    ) {
        self.mailbox.post(Event::Command(command, Box::new(reply)));
    }

    /// What the VM is and has. Nobody is asked nor woken for that: it is what its owner shows.
    ///
    /// # Errors
    /// There is no VM, or the process is ending.
    pub fn info(&self) -> Result<VmInfo, CommandError> {
        if self.mailbox.is_closed() {
            return Err(CommandError::Ending);
        }
        self.shown.info().ok_or(CommandError::NotCreated)
    }
}

/// The VMM of this process.
pub struct Vmm {
    ground: Ground,
    keep: bool,
    /// Where the socket of the clients is, if there is one.
    socket_folder: Option<PathBuf>,
}

impl Vmm {
    /// Prepares the process: signals that ask it to end are blocked from here on and heard by
    /// [`Self::run`]. To be called on the first thread, before any other is made.
    ///
    /// # Errors
    /// The kernel refused something.
    pub fn new(host: &HostPaths, options: Options) -> Result<Self, Error> {
        let signals = Arc::new(Signals::block().map_err(Error::host("block signals"))?);
        raise_file_limit();
        sandbox::install_traps().map_err(Error::host("install signal handlers"))?;
        let sandbox = Sandbox::new(options.seccomp).map_err(Error::host("compile filters"))?;
        Ok(Self {
            ground: Ground {
                host: host.clone(),
                sandbox: Arc::new(sandbox),
                mailbox: Mailbox::new().map_err(Error::host("make an eventfd"))?,
                signals,
                events: options.events,
                shown: Arc::default(),
            },
            keep: options.keep,
            socket_folder: None,
        })
    }

    /// The way in for clients.
    pub fn handle(&self) -> Handle {
        Handle {
            mailbox: Arc::clone(&self.ground.mailbox),
            shown: Arc::clone(&self.ground.shown),
        }
    }

    /// Runs `body`, which speaks with the clients, on a thread of its own behind its own filter: it
    /// may use sockets that it has or accepts, and reaches no file. Its socket is in `folder`, from where
    /// the calling thread may remove it at the end.
    ///
    /// # Errors
    /// The kernel makes no thread.
    pub fn spawn_api(
        &mut self,
        folder: &Path,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<Task<()>> {
        let sandbox = Arc::clone(&self.ground.sandbox);
        let confine = move || sandbox.confine_to_nothing();
        self.socket_folder = Some(folder.to_owned());
        threads::spawn_confined(Role::Api, &self.ground.sandbox, confine, body)
    }

    /// Runs a VM until it ends, or VMs until the process is to end, and gives everything back. To be
    /// called on the process's first thread, which is confined for the rest of its life. Without a
    /// `first` VM, and wherever [`Options::keep`] says so, it waits for clients to create one.
    ///
    /// # Errors
    /// The VM could not be built, or the host failed it later. Everything has been given back.
    pub fn run(self, first: Option<VmConfig>) -> Result<Outcome, Error> {
        let ended = match first {
            Some(config) if !self.keep => self.once(&Arc::new(config)),
            first => self.serve(first),
        };
        self.ground.mailbox.close();
        match ended {
            Err(Error::Interrupted(signal)) => Ok(Outcome::Signal(signal)),
            ended => ended,
        }
    }

    /// One VM, on this thread.
    fn once(&self, config: &Arc<VmConfig>) -> Result<Outcome, Error> {
        let idle = View::idle(config, VmState::Created);
        self.ground.shown.show(Some(idle));
        let socket = self.socket_folder.as_deref();
        match live(&self.ground, config, socket, &mut None)? {
            End::Over(outcome) => Ok(outcome),
            End::Asked(_, reply) => {
                reply(Ok(Answer::Done));
                Ok(Outcome::Asked)
            }
        }
    }

    /// VMs on threads of their own, as clients ask for them.
    fn serve(&self, first: Option<VmConfig>) -> Result<Outcome, Error> {
        let ground = &self.ground;
        let mut control = ControlLoop::new(Arc::clone(&ground.mailbox))
            .map_err(Error::host("make the control loop"))?;
        let confined = ground.sandbox.filter(Role::Keeper).enter();
        confined.map_err(Error::host("enter the sandbox"))?;
        ground.signals.check()?;
        control.add(Box::new(SignalWatch {
            signals: Arc::clone(&ground.signals),
            mailbox: Arc::clone(&ground.mailbox),
        }));
        let mut desk = Desk::new(&ground.host);
        if let Some(config) = first {
            desk.created = Some(Arc::new(config));
            desk.show(&ground.shown);
            if let Some(outcome) = self.boot(&mut desk, None)? {
                return Ok(outcome);
            }
        }
        loop {
            let event = control.next(None).map_err(Error::host("wait for events"))?;
            let (command, reply) = match event {
                Some(Event::Command(command, reply)) => (command, reply),
                Some(Event::Signal(number)) => return Ok(Outcome::Signal(number)),
                Some(Event::Quit) => return Ok(Outcome::Stopped),
                // The last words of a VM that is no more.
                _ => continue,
            };
            match desk.take(command) {
                Deed::Answer(answer) => {
                    desk.show(&ground.shown);
                    reply(answer);
                }
                Deed::Boot => {
                    if let Some(outcome) = self.boot(&mut desk, Some(reply))? {
                        return Ok(outcome);
                    }
                }
                Deed::Quit => {
                    reply(Ok(Answer::Done));
                    return Ok(Outcome::Asked);
                }
            }
            desk.tell(&ground.events);
        }
    }

    /// Runs the VM on the desk to its end; `Some` if the process ends with it. `started` hears when
    /// its vCPUs run, or why they never did.
    fn boot(&self, desk: &mut Desk, started: Option<Reply>) -> Result<Option<Outcome>, Error> {
        let Some(config) = desk.created.clone() else {
            return Ok(None);
        };
        let (ground, asked) = (self.ground.clone(), started.is_some());
        let life = move || {
            let mut started = started;
            // The first thread removes the socket, which is free to.
            let ended = live(&ground, &config, None, &mut started);
            match (ended, started) {
                (Err(error), Some(reply)) => Err((error, Some(reply))),
                (ended, _) => ended.map_err(|error| (error, None)),
            }
        };
        let thread = threads::spawn(Role::Vm, &self.ground.sandbox, life);
        let ended = thread.map_err(Error::host("spawn a thread"))?.join();
        reap();
        if !matches!(ended, Err((_, Some(_)))) {
            desk.ran();
        }
        if matches!(ended, Ok(End::Asked(Command::Delete, _))) {
            desk.created = None;
        }
        desk.show(&self.ground.shown);
        let outcome = match ended {
            Ok(End::Over(outcome @ (Outcome::Signal(_) | Outcome::Stopped))) => Some(outcome),
            Ok(End::Over(Outcome::GuestFault(error))) => {
                (self.ground.events)(VmEvent::GuestFault { error });
                None
            }
            Ok(End::Over(_)) => None,
            Ok(End::Asked(command, reply)) => {
                reply(Ok(Answer::Done));
                matches!(command, Command::Quit).then_some(Outcome::Asked)
            }
            Err((Error::Interrupted(signal), reply)) => {
                if let Some(reply) = reply {
                    reply(Err(CommandError::Ending));
                }
                Some(Outcome::Signal(signal))
            }
            Err((error, Some(reply))) => {
                reply(Err(CommandError::Failed(error)));
                None
            }
            Err((error, None)) if asked => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the host failed the VM"
                );
                None
            }
            Err((error, None)) => return Err(error),
        };
        desk.tell(&self.ground.events);
        Ok(outcome)
    }
}

/// Builds a VM, runs it, and gives back what it had. A thread that is to remove the clients' socket says in
/// which folder that is.
fn live(
    ground: &Ground,
    config: &Arc<VmConfig>,
    socket: Option<&Path>,
    started: &mut Option<Reply>,
) -> Result<End, Error> {
    // A VM may have been made, or have ended, long before it is started.
    if let Some(Maintenance { reason, .. }) = maintenance(&ground.host)? {
        return Err(Error::Maintenance(reason));
    }
    let confined = ground.sandbox.confine_files(config, &ground.host, socket);
    let ended = confined
        .map_err(Error::host("confine files (Landlock)"))
        .and_then(|()| Vm::build(config, ground))
        .and_then(|mut vm| vm.run(started));
    ground.mailbox.forget_vm();
    ended
}

/// Forgets the VM's helpers, which have ended, or end before the next VM does: nobody waits for them.
fn reap() {
    let any = || waitpid(None, Some(WaitPidFlag::WNOHANG));
    while any().is_ok_and(|status| status != WaitStatus::StillAlive) {}
}

/// Each interrupt vector costs a descriptor, and the usual soft limit of 1024 is there for programs
/// that call select(2).
fn raise_file_limit() {
    let limit = getrlimit(Resource::RLIMIT_NOFILE);
    let raised = limit.and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit on open files stays as it is");
    }
}

/// What is remembered while no VM runs.
struct Desk {
    /// Where service plans are.
    host: HostPaths,
    created: Option<Arc<VmConfig>>,
    /// Whether the VM has run.
    ended: bool,
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
enum Deed {
    Answer(Result<Answer, CommandError>),
    Boot,
    Quit,
}

impl Desk {
    fn new(host: &HostPaths) -> Self {
        Self {
            host: host.clone(),
            created: None,
            ended: false,
            told: None,
        }
    }

    fn take(&mut self, command: Command) -> Deed {
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
        self.ended = false;
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

    /// The VM ran, and told so itself.
    fn ran(&mut self) {
        self.ended = true;
        self.told = Some(VmState::Running);
    }

    /// Shows the VM as it is: done before anyone is answered or told of a change.
    fn show(&self, shown: &Shown) {
        let state = self.state();
        let created = self.created.as_ref();
        shown.show(created.map(|config| View::idle(config, state)));
    }

    fn state(&self) -> VmState {
        if self.ended {
            VmState::Shutdown
        } else {
            VmState::Created
        }
    }

    /// Tells of a state that has not been told of.
    fn tell(&mut self, events: &EventSink) {
        let state = self.created.as_ref().map(|_| self.state());
        if let Some(state) = state.filter(|state| self.told != Some(*state)) {
            events(VmEvent::State(state));
        }
        self.told = state;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Recipe {
        Recipe(Box::new(|| Ok(VmConfig::small())))
    }

    fn refused(deed: Deed) -> CommandError {
        match deed {
            Deed::Answer(Err(error)) => error,
            _ => panic!("it was done"),
        }
    }

    fn done(deed: Deed) -> Answer {
        match deed {
            Deed::Answer(Ok(answer)) => answer,
            _ => panic!("it was not done"),
        }
    }

    #[test]
    fn nothing_can_be_asked_of_a_vm_that_is_not_there() {
        let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
        for command in [
            Command::Boot,
            Command::Counters,
            Command::Shutdown,
            Command::Nmi,
        ] {
            assert!(matches!(
                refused(desk.take(command)),
                CommandError::NotCreated
            ));
        }
        done(desk.take(Command::Delete));
        assert!(matches!(desk.take(Command::Quit), Deed::Quit));
    }

    #[test]
    fn what_describes_no_vm_creates_none() {
        let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
        let wrong = Recipe(Box::new(|| Err("no kernel".into())));
        let error = refused(desk.take(Command::Create(wrong)));
        assert!(matches!(error, CommandError::Invalid(_)), "{error}");
        assert!(matches!(
            refused(desk.take(Command::Counters)),
            CommandError::NotCreated
        ));
    }

    #[test]
    fn a_vm_is_created_once_booted_and_deleted() {
        let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
        done(desk.take(Command::Create(config())));
        let again = refused(desk.take(Command::Create(config())));
        assert!(matches!(again, CommandError::AlreadyCreated));
        let stopped = refused(desk.take(Command::Pause));
        assert!(matches!(stopped, CommandError::NotBooted));
        let shown = Shown::default();
        let state = |desk: &Desk| {
            desk.show(&shown);
            shown.info().map(|info| info.state)
        };
        assert_eq!(state(&desk), Some(VmState::Created));
        assert!(matches!(desk.take(Command::Boot), Deed::Boot));
        desk.ended = true;
        assert_eq!(state(&desk), Some(VmState::Shutdown));
        assert!(matches!(desk.take(Command::Boot), Deed::Boot));
        done(desk.take(Command::Delete));
        assert_eq!(state(&desk), None);
        done(desk.take(Command::Create(config())));
        assert_eq!(state(&desk), Some(VmState::Created));
    }

    #[test]
    fn a_state_is_told_of_once() {
        let told = Arc::new(std::sync::Mutex::new(Vec::new()));
        let events: EventSink = {
            let told = Arc::clone(&told);
            Arc::new(move |event| told.lock().unwrap().push(event))
        };
        let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
        desk.tell(&events);
        done(desk.take(Command::Create(config())));
        desk.tell(&events);
        desk.tell(&events);
        desk.ended = true;
        desk.tell(&events);
        let expected = [VmState::Created, VmState::Shutdown].map(VmEvent::State);
        assert_eq!(*told.lock().unwrap(), expected);
    }

    #[test]
    fn a_vm_that_ends_twice_is_told_of_twice() {
        let told = Arc::new(std::sync::Mutex::new(Vec::new()));
        let events: EventSink = {
            let told = Arc::clone(&told);
            Arc::new(move |event| told.lock().unwrap().push(event))
        };
        let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
        done(desk.take(Command::Create(config())));
        for _ in 0..2 {
            desk.ran();
            desk.tell(&events);
        }
        let expected = [VmState::Shutdown; 2].map(VmEvent::State);
        assert_eq!(*told.lock().unwrap(), expected);
    }

    #[test]
    fn a_plans_devices_may_come_before_the_vm_is_booted() {
        let folder = tempfile::tempdir().unwrap();
        let host = HostPaths::under(folder.path());
        std::fs::create_dir_all(&host.config).unwrap();
        let plans = r#"{"plans": [{"name": "two", "devices": [{"group": "gpu", "count": 2}]}]}"#;
        std::fs::write(host.config.join("plans.json"), plans).unwrap();
        let mut desk = Desk::new(&host);
        done(desk.take(Command::Create(config())));
        let attach = |plan: &str| {
            Command::Attach(Attach {
                id: None,
                wanted: Wanted::Plan(plan.to_owned()),
            })
        };
        let unknown = refused(desk.take(attach("three")));
        assert!(matches!(unknown, CommandError::Invalid(_)), "{unknown}");
        done(desk.take(attach("two")));
        let devices = &desk.created.as_ref().unwrap().devices;
        assert_eq!(*devices, [Request::group("gpu", 2)]);
    }

    #[test]
    fn a_device_may_come_before_the_vm_is_booted() {
        let attach = |id: Option<&str>| {
            Command::Attach(Attach {
                id: id.map(str::to_owned),
                wanted: Wanted::Request(Request::Device {
                    bdf: "0000:01:00.0".parse().unwrap(),
                    allow_ungrouped: false,
                }),
            })
        };
        let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
        let early = refused(desk.take(attach(None)));
        assert!(matches!(early, CommandError::NotCreated));
        done(desk.take(Command::Create(config())));
        let named = refused(desk.take(attach(Some("disk"))));
        assert!(matches!(named, CommandError::Invalid(_)), "{named}");
        assert!(matches!(done(desk.take(attach(None))), Answer::Done));
        let twice = refused(desk.take(attach(None)));
        assert!(matches!(twice, CommandError::DuplicateId(_)), "{twice}");
        let created = desk.created.as_ref().unwrap();
        assert_eq!(created.devices.len(), 1);
        let detach = |id: &str| {
            Command::Detach(Detach {
                id: id.to_owned(),
                force_after: None,
            })
        };
        let other = refused(desk.take(detach("0000:02:00.0"))).to_string();
        assert!(other.contains("it has 0000:01:00.0"), "{other}");
        done(desk.take(detach("0000:01:00.0")));
        assert!(desk.created.as_ref().unwrap().devices.is_empty());
        let counters = done(desk.take(Command::Counters));
        assert!(matches!(counters, Answer::Counters(devices) if devices.is_empty()));
    }
}
