//! The socket's file: created for its owner alone, named after the VM, never taken from a VM that
//! lives.

mod cleanup;

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cleanup::CleanupHelper;
pub use cleanup::{CleanupArgs, SUBCOMMAND as REMOVE_SOCKET, cleanup_helper};
use gantry_resources::base::make_dir;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt};
use nix::unistd::{Gid, Group, Pid, chown};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A process listens there.
    #[error(
        "a VM listens on {path} already{}\ngive this one another socket with --api-socket, or another \
         name with --name",
        as_process(*pid)
    )]
    Live {
        /// The socket.
        path: PathBuf,
        /// The process, if that is known.
        pid: Option<u32>,
    },
    /// The file at the path is no socket.
    #[error("{path} is not a socket: it is left as it is\nname another path with --api-socket")]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// There is no such group of users.
    #[error("there is no group of users \"{name}\"\n`getent group` lists them")]
    NoGroup {
        /// Its name.
        name: String,
    },
    /// The kernel refused a step.
    #[error("cannot {step} {path}")]
    Io {
        /// The step.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A process named in an error.
pub fn as_process(pid: Option<u32>) -> String {
    pid.map(|pid| format!(", as process {pid}"))
        .unwrap_or_default()
}

impl SocketError {
    fn io(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { step, path, source }
    }
}

/// How long a killed process may take to end: its devices are reset meanwhile.
const DYING_PATIENCE: Duration = Duration::from_secs(10);
const DYING_STEP: Duration = Duration::from_millis(10);
/// The longest time between two attempts to connect: each attempt stays in the listener's queue.
const MAX_PROBE_INTERVAL: Duration = Duration::from_millis(640);

/// A listening socket with its file.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

/// The file of the socket of the VM called `name`.
pub fn path_of(run: &Path, name: &str) -> PathBuf {
    run.join(format!("{name}.sock"))
}

impl Socket {
    /// Listens at `path`, for its owner alone (0600), or with a group of users for these too (0660).
    /// A rename puts the socket in its place once it listens and has its final rights. `run` is the host's run
    /// directory.
    ///
    /// # Errors
    /// A live socket or another file is there, or the kernel refuses a step.
    pub fn bind(path: &Path, group: Option<&str>, run: &Path) -> Result<Self, SocketError> {
        let group = group.map(gid).transpose()?;
        let dir = dir_of(path);
        // Gantry's own are there for all users, whatever root's umask is; another folder is its maker's.
        let made = match dir.starts_with(run) {
            true => make_dir(dir),
            false => fs::create_dir_all(dir),
        };
        made.map_err(SocketError::io("make", dir))?;
        let _lock = wait_until_free(path, run, is_dying)?;
        let private = PrivateDir::new(dir).map_err(SocketError::io("make", path))?;
        let hidden = private.0.join("s");
        let listener = UnixListener::bind(&hidden).map_err(SocketError::io("listen on", path))?;
        listener
            .set_nonblocking(true)
            .and_then(|()| grant(&hidden, group))
            .and_then(|()| fs::rename(&hidden, path))
            .map_err(SocketError::io("give rights to", path))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Waits until no process that was killed listens at `path`. `run` is the host's run directory.
    ///
    /// # Errors
    /// A live socket or another file is there.
    pub fn check_free(path: &Path, run: &Path) -> Result<(), SocketError> {
        wait_until_free(path, run, is_dying).map(drop)
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The listener, non-blocking, and its file, which goes with the process or before, by a helper:
    /// `program` must call [`cleanup_helper`]. `run` is the host's run directory.
    ///
    /// # Errors
    /// The helper cannot be started.
    pub fn into_parts(self, program: &Path, run: &Path) -> io::Result<(UnixListener, SocketFile)> {
        let cleanup = CleanupHelper::start(program, &self.path, run)?;
        Ok((self.listener, SocketFile(cleanup)))
    }
}

/// The file of a socket. Drop it after the listener: the file is removed.
#[derive(Debug)]
pub struct SocketFile(#[expect(dead_code, reason = "it is dropped")] CleanupHelper);

/// The directory that a path is in.
pub fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    }
}

/// Removes the file of a socket if no process listens on it.
///
/// # Errors
/// The kernel refuses a step.
pub fn remove_stale(path: &Path, run: &Path) -> io::Result<()> {
    let _lock = lock(run);
    match state(path)? {
        State::Stale => fs::remove_file(path),
        State::Absent | State::Live(_) | State::Other => Ok(()),
    }
}

/// Whether there is a socket without a listener.
#[cfg(test)]
fn is_stale(path: &Path) -> bool {
    matches!(state(path), Ok(State::Stale))
}

/// A directory that only its owner enters, for as long as a socket in it is not ready.
struct PrivateDir(PathBuf);

impl PrivateDir {
    fn new(dir: &Path) -> io::Result<Self> {
        let private = Self(dir.join(format!(".{}", std::process::id())));
        // Of a process with this number that was killed.
        private.clear();
        fs::DirBuilder::new().mode(0o700).create(&private.0)?;
        Ok(private)
    }

    fn clear(&self) {
        let _ = fs::remove_file(self.0.join("s"));
        let _ = fs::remove_dir(&self.0);
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        self.clear();
    }
}

enum State {
    Absent,
    Stale,
    /// With its process, if that is known.
    Live(Option<u32>),
    Other,
}

fn state(path: &Path) -> io::Result<State> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => return Ok(State::Other),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(State::Absent),
        Err(error) => return Err(error),
    }
    match probe(path) {
        Err(Errno::ECONNREFUSED) => Ok(State::Stale),
        Err(Errno::ENOENT) => Ok(State::Absent),
        // A full queue or a denied connection also shows a listener.
        answer => Ok(State::Live(answer.ok().flatten())),
    }
}

/// Connects without waiting for a listener whose queue is full. Returns the process that listens, if this one
/// can see it.
fn probe(path: &Path) -> nix::Result<Option<u32>> {
    let (family, kind) = (AddressFamily::Unix, SockType::Stream);
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(family, kind, flags, None)?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let listener = socket::getsockopt(&socket, sockopt::PeerCredentials);
    Ok(listener.ok().and_then(|one| process(one.pid())))
}

/// A process that the kernel names, as whose socket it is for one; 0 is one of another PID namespace, and
/// would be oneself to kill(2).
pub fn process(pid: i32) -> Option<u32> {
    u32::try_from(pid).ok().filter(|pid| *pid != 0)
}

/// Waits until no process listens at a path, and returns the lock that keeps it so. The lock is free meanwhile.
fn wait_until_free(
    path: &Path,
    run: &Path,
    is_dying: impl Fn(u32) -> bool,
) -> Result<Option<File>, SocketError> {
    let owned = || path.to_owned();
    let deadline = Instant::now() + DYING_PATIENCE;
    let (mut step, mut known) = (DYING_STEP, None);
    loop {
        let lock = lock(run);
        match state(path).map_err(SocketError::io("look at", path))? {
            // What is stale is replaced by the rename.
            State::Absent | State::Stale => return Ok(lock),
            // A full queue hides the listener's process.
            State::Live(pid) => known = pid.or(known),
            State::Other => return Err(SocketError::NoSocket { path: owned() }),
        }
        drop(lock);
        // One that was killed listens until the kernel has closed its files.
        match known {
            Some(pid) if is_dying(pid) && Instant::now() < deadline => await_end(pid, step),
            pid => return Err(SocketError::Live { path: owned(), pid }),
        }
        step = (step * 2).min(MAX_PROBE_INTERVAL);
    }
}

/// Waits until a process is gone, but not for long: it may listen no more before.
fn await_end(pid: u32, patience: Duration) {
    let deadline = Instant::now() + patience;
    std::thread::sleep(DYING_STEP);
    while !is_gone(pid) && Instant::now() < deadline {
        std::thread::sleep(DYING_STEP);
    }
}

/// Whether a process has been killed, and is not gone yet; or just is.
fn is_dying(pid: u32) -> bool {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
    match (read("stat"), read("status")) {
        (Ok(stat), Ok(status)) => is_exiting(&stat) || has_kill_pending(&status),
        // Processes of other users may not be readable.
        _ => is_gone(pid),
    }
}

fn is_gone(pid: u32) -> bool {
    let pid = i32::try_from(pid).map(Pid::from_raw);
    pid.is_ok_and(|pid| kill(pid, None) == Err(Errno::ESRCH))
}

/// By its flags in `/proc/PID/stat`, of which the ninth word has them (proc_pid_stat(5)): `PF_EXITING`.
fn is_exiting(stat: &str) -> bool {
    const AFTER_NAME: usize = 6;
    const PF_EXITING: u64 = 4;
    let after = stat.rsplit_once(") ").map_or("", |(_, after)| after);
    let flags = after.split_whitespace().nth(AFTER_NAME);
    let flags = flags.and_then(|flags| flags.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & PF_EXITING != 0)
}

/// By its pending signals in `/proc/PID/status` (proc_pid_status(5)).
fn has_kill_pending(status: &str) -> bool {
    const SIGKILL: u64 = 1 << 8;
    let masks = status.lines().filter_map(|line| {
        let mask = line
            .strip_prefix("SigPnd:")
            .or(line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    });
    masks.into_iter().any(|mask| mask & SIGKILL != 0)
}

/// The lock file of the processes that replace or remove sockets.
fn lock_path(run: &Path) -> PathBuf {
    run.join("sockets.lock")
}

/// Takes the lock, which is held as long as the file is open: two processes that find the same stale socket must
/// not both replace it. Only the file's owner may open it, as any user who may could block all others.
fn lock(run: &Path) -> Option<File> {
    let mut options = File::options();
    let file = options.write(true).create(true).truncate(false).mode(0o600);
    let file = file.open(lock_path(run)).ok()?;
    file.lock().ok()?;
    Some(file)
}

fn grant(path: &Path, group: Option<Gid>) -> io::Result<()> {
    let mode = match group {
        None => 0o600,
        Some(group) => {
            // An owner may give a file to a group of its own, root to any.
            if fs::metadata(path)?.gid() != group.as_raw() {
                chown(path, None, Some(group))?;
            }
            0o660
        }
    };
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn gid(name: &str) -> Result<Gid, SocketError> {
    let unknown = || SocketError::NoGroup {
        name: name.to_owned(),
    };
    if let Ok(number) = name.parse() {
        return Ok(Gid::from_raw(number));
    }
    let group = Group::from_name(name).map_err(|_| unknown())?;
    group.map(|group| group.gid).ok_or_else(unknown)
}

#[cfg(test)]
mod tests;
