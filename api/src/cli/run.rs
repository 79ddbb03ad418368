//! `gantry run`: one VM, in the foreground or in the background.

mod background;
mod readiness;
mod systemd;

use std::collections::BTreeSet;
use std::io::{ErrorKind, IsTerminal, Write};
use std::iter;
use std::path::{self, Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use gantry_resources::base::HostPaths;
use gantry_resources::holding::{Holder, Maintenance, announce, maintenance};

use crate::cli::group::fit;
use crate::config::{self, LoadOptions, Source};
use crate::http::{
    Console, Events, Identity, Limits, Server, Socket, SocketError, SocketFile, Stop, as_process,
    path_of,
};
use crate::output::print;
use crate::report::{
    self, BY_SIGNAL, EXIT_STATUSES, Failure, GUEST_DIED, STOPPED, SUCCESS, TRY_AGAIN, USAGE,
};
use crate::stderr::Stderr;
use crate::vm_log::Logs;
use background::Background;
pub use background::FLAG as IN_BACKGROUND;
use gantry_vmm::command::{ConsoleSink, VmEvent};
use gantry_vmm::threads::Task;
use gantry_vmm::{Folders, NumaPolicy, Options, Outcome, SeccompMode, SerialMode, VmConfig, Vmm};
use readiness::Readiness;
use tracing::Level;

const HELP: &str = "\
Examples:
  gantry run vm.json
  gantry run -d vm.json
  gantry run --check vm.json
  gantry run --name web-1 - < vm.json
  gantry run --api-socket /run/gantry/web-1.sock
  gantry run --api-socket /run/gantry/web-1.sock --api-group web \\
      --payload-dir /srv/kernels --output-dir /srv/logs

Without a file, a client creates and boots the VM over the socket: vm.create, vm.boot.

While it runs, `gantry vm` controls the VM over its socket: NAME.sock in the run directory, for its owner \
alone; with --api-group, for a group of users too. A user who may connect controls the VM, and may \
attach devices of the groups that its file names. A user who may create a VM may boot any file that gantry can \
read, and write to any file that it can write: --payload-dir and --output-dir limit that to two folders.

A VM with one device of the group \"nvme\":
  {
    \"payload\": {\"kernel\": \"vmlinuz\", \"initramfs\": \"initrd.img\",
      \"cmdline\": \"console=ttyS0\"},
    \"cpus\": {\"boot_vcpus\": 2},
    \"memory\": {\"size\": \"1G\"},
    \"devices\": [{\"group\": \"nvme\", \"count\": 1}]
  }

With the serial port on the terminal, ctrl-a x stops the VM. Started in the background (`&`), the VM \
gets no input until `fg` brings it to the foreground; press Enter if it still gets none. `gantry vm console` \
attaches to the serial port from elsewhere.

With -d the VM has no terminal. What gantry and the guest say is kept, up to 1 MiB, in NAME.log in the run \
directory, until a VM of that name is started again: `gantry vm logs NAME` shows it. A user who may not write there names a \
socket with --api-socket, and has the log in $XDG_RUNTIME_DIR/gantry.";

#[derive(Debug, Args)]
#[command(after_help = format!("{HELP}\n\n{EXIT_STATUSES}"))]
pub struct RunArgs {
    /// JSON file that describes the VM, or - for standard input; `gantry schema` lists its keys
    #[arg(value_name = "VM.JSON")]
    file: Option<PathBuf>,
    /// Only check the file, and show which devices the VM would get; nothing is taken and nothing starts
    #[arg(long, requires = "file", conflicts_with_all = ["api_socket", "api_group", "no_api"])]
    check: bool,
    /// Run in the background: return when the guest runs, or say why it does not
    #[arg(short = 'd', long, aliases = ["background", "daemon", "daemonize"])]
    #[arg(conflicts_with_all = ["check", "no_api"])]
    detach: bool,
    /// Name of the VM, unique among the VMs that run [default: the file's name without its extension]
    #[arg(long)]
    name: Option<String>,
    /// Give the VM devices named by path that are in no group
    #[arg(long)]
    allow_ungrouped: bool,
    /// What to do on a system call that gantry should never make
    #[arg(long, value_enum, default_value_t = Seccomp::On)]
    seccomp: Seccomp,
    /// Path of the socket that the VM is controlled by [default: NAME.sock in the run directory].
    /// Without a file, a client creates the VM over it, and gantry stays when the VM ends
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    /// Group of users who may use the socket too, by name or number
    #[arg(long, value_name = "GROUP")]
    api_group: Option<String>,
    /// Folder of the kernels, initramfs files and read-only disks that clients may name, and of no others.
    /// Needed with --api-group
    #[arg(long, value_name = "DIR", conflicts_with = "file")]
    payload_dir: Option<PathBuf>,
    /// Folder of the files that clients may have as writable disks, or a serial port write to; none without it
    #[arg(long, value_name = "DIR", requires = "payload_dir")]
    output_dir: Option<PathBuf>,
    /// Do not listen on a socket
    #[arg(long, conflicts_with_all = ["api_socket", "api_group"])]
    no_api: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Seccomp {
    /// End the process and name the call
    On,
    /// Let the kernel log it, and go on
    Log,
    /// Go on
    Off,
}

impl From<Seccomp> for SeccompMode {
    fn from(mode: Seccomp) -> Self {
        match mode {
            Seccomp::On => Self::On,
            Seccomp::Log => Self::Log,
            Seccomp::Off => Self::Off,
        }
    }
}

/// Runs the VM, as the second gantry of `gantry run -d` if `in_background`. `stderr` was opened before the VM confines
/// the process.
pub fn run(
    args: RunArgs,
    in_background: bool,
    stderr: &Stderr,
    paths: &HostPaths,
) -> Result<ExitCode, Failure> {
    if args.api_socket.as_deref() == Some("-".as_ref()) {
        let what = "--api-socket: a socket has a path, and standard output is none";
        return Err(Failure::new(USAGE, what));
    }
    if args.file.is_none() && args.api_socket.is_none() {
        let what = "no VM's file is named";
        return Err(Failure::new(USAGE, what).help(
            "`gantry run vm.json` runs the VM of a file, which `gantry init` writes; \
             `gantry run --api-socket PATH` waits for a client that creates one",
        ));
    }
    if args.detach && !in_background {
        return background::start(&args, paths);
    }
    let streams = |error| Failure::host(format!("cannot set up standard streams: {error}"));
    let background = in_background.then(|| Background::enter(stderr));
    let background = background.transpose().map_err(streams)?;
    let folders = args.folders()?;
    let name = args.vm_name();
    if !args.check {
        args.check_name(&name, paths)?;
    }
    let config = args.load(paths)?;
    if let Some(config) = config.as_ref().filter(|_| args.check) {
        return check(config, stderr, paths);
    }
    if let Some(config) = &config {
        config::warn_of_groups(config, paths);
    }
    let starter = background.map(Background::leave_stdin);
    let readiness = Readiness::new(&name, starter.transpose().map_err(streams)?);
    let identity = Identity {
        name,
        allow_ungrouped: args.allow_ungrouped,
        host: paths.clone(),
        folders,
    };
    args.live(config, identity, readiness, stderr)
}

/// Writes a line to standard error.
fn say(stderr: &Stderr, line: &str) {
    stderr.say(Level::INFO, format!("{line}\n").as_bytes());
}

/// Where what the guest writes goes beside its file: to clients, and to the log of a VM in the background.
fn console_sink(console: &Console, log: Option<Stderr>) -> ConsoleSink {
    let clients = console.sink();
    match log {
        None => clients,
        Some(log) => Arc::new(move |data| {
            // A write to the log never fails.
            let _ = log.clone().write_all(data);
            clients(data);
        }),
    }
}

/// Runs `--check`: shows the devices that the VM would get, and all that is wrong with them, with the groups of later
/// ones, with the host's memory, with the disks and with the kernel. The file itself has been checked.
fn check(config: &VmConfig, stderr: &Stderr, paths: &HostPaths) -> Result<ExitCode, Failure> {
    let nodes = match &config.nodes {
        NumaPolicy::Only(nodes) => nodes.iter().collect(),
        NumaPolicy::NearDevices | NumaPolicy::Any => BTreeSet::new(),
    };
    let groups = config::unknown_groups(config, paths).into_iter();
    let groups = groups.map(|error| Failure::new(USAGE, format!("hotplug.groups: {error}")));
    let mut wrong: Vec<Failure> = groups.collect();
    wrong.extend(fit::print_fit(paths, &config.devices, nodes, false).err());
    let host = gantry_vmm::check(config, paths).into_iter();
    wrong.extend(host.map(Failure::host));
    // The status is that of a mistake, if there is one, or else of something that does not pass by itself.
    wrong.sort_by_key(|failure| match failure.exit {
        USAGE => 2,
        TRY_AGAIN => 0,
        _ => 1,
    });
    let Some(last) = wrong.pop() else {
        print(|out| writeln!(out, "VM {}: nothing is wrong with its file", config.name))?;
        return Ok(ExitCode::SUCCESS);
    };
    let colour = report::colour();
    for failure in &wrong {
        failure.show(stderr, colour);
    }
    Err(last)
}

/// Why a VM ended, if no error says it.
fn ended(outcome: &Outcome) -> Option<String> {
    Some(match outcome {
        Outcome::PowerOff => "the guest powered off".to_owned(),
        Outcome::Client => "a client shut it down".to_owned(),
        Outcome::Stopped => "ctrl-a x".to_owned(),
        Outcome::Signal(signal) => format!("signal {signal}"),
        Outcome::GuestFault(_) | Outcome::DeviceFault(_) => return None,
    })
}

/// The thread of the API server. Dropping it sends the last answers, ends the thread and removes the socket.
struct Api {
    stop: Stop,
    _task: Task<()>,
    _file: SocketFile,
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

impl RunArgs {
    /// Whether the VM's file is standard input.
    fn reads_stdin(&self) -> bool {
        self.file.as_deref() == Some(Path::new("-"))
    }

    /// What `gantry vm` calls the VM called `name`: by the path of its socket, if that is not the usual one.
    fn name_for_clients(&self, name: &str) -> String {
        match &self.api_socket {
            None => name.to_owned(),
            Some(path) if path.parent() == Some(Path::new("")) => format!("./{}", path.display()),
            Some(path) => path.display().to_string(),
        }
    }

    /// The name of the VM.
    fn vm_name(&self) -> String {
        let given = self.name.as_deref();
        match &self.file {
            Some(file) => Source::from(file.clone()).name(given),
            None => given.map_or_else(|| self.socket_stem(), str::to_owned),
        }
    }

    /// Refuses a name that a running VM has, before the disks of the same file are found to be in use.
    fn check_name(&self, name: &str, paths: &HostPaths) -> Result<(), Failure> {
        if self.no_api || self.api_socket.is_some() {
            return Ok(());
        }
        match Socket::check_free(&path_of(&paths.run, name), &paths.run) {
            Err(SocketError::Live { pid, .. }) => Err(name_in_use(name, pid)),
            // It is told when the socket is made.
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Reads the VM's file, if there is one.
    fn load(&self, paths: &HostPaths) -> Result<Option<VmConfig>, Failure> {
        let Some(file) = &self.file else {
            return Ok(None);
        };
        let options = LoadOptions {
            name: self.name.clone(),
            allow_ungrouped: self.allow_ungrouped,
            host: paths.clone(),
            // A socket that is named is meant for attaching devices.
            slots: self.api_socket.as_ref().map_or(0, |_| config::SLOTS),
            folders: None,
            later_disks: Vec::new(),
        };
        let config = config::load(&Source::from(file.clone()), &options);
        config.map(Some).map_err(|error| {
            let is_missing = matches!(&error, config::Error::Read { source, .. }
                if source.kind() == ErrorKind::NotFound);
            match is_missing {
                true => Failure::host(error)
                    .help("`gantry init` writes a VM's file, `gantry run --help` shows one"),
                false => Failure::host(error),
            }
        })
    }

    /// Runs the VM, or those that clients create, to the end.
    fn live(
        self,
        config: Option<VmConfig>,
        identity: Identity,
        readiness: Readiness,
        stderr: &Stderr,
    ) -> Result<ExitCode, Failure> {
        let paths = identity.host.clone();
        let name = identity.name.clone();
        let (events, console) = (Events::default(), Console::default());
        let log = self.detach.then(|| stderr.clone());
        let options = Options {
            seccomp: self.seccomp.into(),
            keep: config.is_none(),
            events: readiness.sink(events.sink()),
            console: console_sink(&console, log),
        };
        // Before anything is locked: it blocks the signals, which from here on end the VM in order.
        let vmm = Vmm::new(&paths, options)?;
        readiness.watch(vmm.handle());
        // Announced before the check for maintenance: a command that switches it on in between sees the VM.
        let _running = announce(
            &paths,
            &Holder {
                vm: name.clone(),
                pid: std::process::id(),
            },
        );
        may_start(&paths)?;
        let api = self.serve(&vmm, events.clone(), console, identity)?;
        match &config {
            None => readiness.tell(),
            Some(config) if config.serial == SerialMode::Tty && std::io::stdin().is_terminal() => {
                say(stderr, &format!("VM {name}: ctrl-a x ends it"));
            }
            Some(_) => {}
        }
        let outcome = vmm.run(config).map_err(Failure::host);
        if let Some(why) = outcome.as_ref().ok().and_then(ended) {
            say(stderr, &format!("VM {name} ended: {why}"));
        }
        let ended = outcome.and_then(exit_code);
        let status = match &ended {
            Ok(status) => *status,
            Err(failure) => failure.exit,
        };
        events.publish(VmEvent::Exit { status });
        drop(api);
        ended.map(ExitCode::from)
    }

    /// Serves the VM on its socket, if it has one.
    fn serve(
        self,
        vmm: &Vmm,
        events: Events,
        console: Console,
        identity: Identity,
    ) -> Result<Option<Api>, Failure> {
        let paths = &identity.host;
        let socket = self.socket(&identity.name, paths)?;
        let usual = path_of(&paths.run, &identity.name);
        let has_name = socket.as_ref().is_some_and(|socket| socket.path() == usual);
        // Without the usual socket, a VM that runs may have the name.
        if has_name || Socket::check_free(&usual, &paths.run).is_ok() {
            Logs::new(&paths.run).remove(&identity.name);
        }
        let Some(socket) = socket else {
            return Ok(None);
        };
        let failed = |error| Failure::host(format!("cannot serve the VM's socket: {error}"));
        let program = Path::new("/proc/self/exe");
        let parts = socket.into_parts(program, &paths.run);
        let (listener, file) = parts.map_err(failed)?;
        let server = Server::new(listener, Limits::default()).map_err(failed)?;
        let stop = server.stopper();
        let vm = Arc::new(vmm.handle());
        let serve = move || server.serve(vm, events, console, identity);
        let task = vmm.spawn_api(serve).map_err(failed)?;
        Ok(Some(Api {
            stop,
            _task: task,
            _file: file,
        }))
    }

    /// The requested socket, or the default one if this user can create it.
    fn socket(&self, name: &str, paths: &HostPaths) -> Result<Option<Socket>, Failure> {
        let group = self.api_group.as_deref();
        if self.no_api {
            return Ok(None);
        }
        if let Some(path) = &self.api_socket {
            return Socket::bind(path, group, &paths.run)
                .map(Some)
                .map_err(Failure::host);
        }
        let usual = path_of(&paths.run, name);
        match Socket::bind(&usual, group, &paths.run) {
            Err(SocketError::Live { pid, .. }) => Err(name_in_use(name, pid)),
            Err(error) if group.is_some() || self.detach => Err(Failure::host(error)),
            Err(error) => {
                tracing::debug!("the VM has no socket: {error}");
                Ok(None)
            }
            Ok(socket) => Ok(Some(socket)),
        }
    }

    /// The folders to which clients that create a VM are limited. With `--api-group` there must be one, or these
    /// users could have gantry read and write any file of the host.
    fn folders(&self) -> Result<Option<Folders>, Failure> {
        let wrong = |what: String, help: &str| Err(Failure::new(USAGE, what).help(help));
        let Some(payload) = &self.payload_dir else {
            return match (&self.file, &self.api_group) {
                (None, Some(_)) => wrong(
                    "--api-group without a VM's file needs --payload-dir".to_owned(),
                    "name the folder of the kernels that the group may boot: `--payload-dir /boot`",
                ),
                _ => Ok(None),
            };
        };
        for dir in iter::once(payload).chain(&self.output_dir) {
            if !dir.is_dir() {
                return wrong(
                    format!("{} is not a directory", dir.display()),
                    "name one that is there",
                );
            }
        }
        let absolute = |dir| path::absolute(dir).map_err(Failure::host);
        Ok(Some(Folders {
            payload: absolute(payload)?,
            output: self.output_dir.as_ref().map(absolute).transpose()?,
        }))
    }

    /// The name of a VM that is created over its socket.
    fn socket_stem(&self) -> String {
        let stem = self.api_socket.as_ref().and_then(|path| path.file_stem());
        stem.map_or("vm".into(), |stem| stem.to_string_lossy().into_owned())
    }
}

/// The error for a name that a running VM has.
fn name_in_use(name: &str, pid: Option<u32>) -> Failure {
    let what = format!("a VM \"{name}\" runs already{}", as_process(pid));
    Failure::host(what).help(format!(
        "`--name` gives this one another name; `gantry vm shutdown {name}` ends the other"
    ))
}

/// Refuses to start during maintenance. Gives the devices of killed VMs back to the host.
pub fn may_start(paths: &HostPaths) -> Result<(), Failure> {
    if let Some(Maintenance { reason, .. }) = maintenance(paths)? {
        let what = format!("this host is in maintenance and starts no VM: {reason}");
        return Err(Failure::new(TRY_AGAIN, what)
            .help("try again later; `gantry maintenance off` ends the maintenance"));
    }
    super::reap_or_warn(paths);
    Ok(())
}

fn exit_code(outcome: Outcome) -> Result<u8, Failure> {
    match outcome {
        Outcome::PowerOff | Outcome::Client => Ok(SUCCESS),
        Outcome::Stopped => Ok(STOPPED),
        Outcome::Signal(signal) => Ok(BY_SIGNAL.saturating_add(u8::try_from(signal).unwrap_or(0))),
        Outcome::GuestFault(what) => {
            Err(Failure::new(GUEST_DIED, format!("the guest died: {what}")))
        }
        Outcome::DeviceFault(_) => Err(Failure::host(outcome.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_exit_code() {
        assert_eq!(exit_code(Outcome::PowerOff).unwrap(), 0);
        assert_eq!(exit_code(Outcome::Stopped).unwrap(), 4);
        assert_eq!(exit_code(Outcome::Signal(15)).unwrap(), 143);
        let died = exit_code(Outcome::GuestFault("triple fault".to_owned())).unwrap_err();
        assert_eq!(died.exit, 3);
        let failed = exit_code(Outcome::DeviceFault("gpu0".to_owned())).unwrap_err();
        assert_eq!(failed.exit, 1);
    }

    #[test]
    fn every_end_is_told() {
        assert_eq!(ended(&Outcome::Stopped).unwrap(), "ctrl-a x");
        assert_eq!(ended(&Outcome::Signal(15)).unwrap(), "signal 15");
        // The error tells.
        assert_eq!(ended(&Outcome::GuestFault("triple fault".to_owned())), None);
    }
}
