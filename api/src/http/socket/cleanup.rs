//! The helper that removes a socket's file: the process that listens may remove nothing once it is confined,
//! and may be killed.

use std::fs;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use super::{DYING_PATIENCE, DYING_STEP, MAX_PROBE_INTERVAL, dir_of, lock_path, remove_stale};
use gantry_vmm::sandbox;
use nix::sys::signal::{SigSet, Signal};

/// The first argument of the helper.
pub const SUBCOMMAND: &str = "__remove-socket";
/// How long the helper may take to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// The connection to the helper. Drop it after the listener: the helper removes the file, and the drop waits for
/// that. The end of the process does the same without waiting.
#[derive(Debug)]
pub struct CleanupHelper(UnixStream);

impl CleanupHelper {
    /// Starts the helper for a socket that is in its place. `program` must call [`cleanup_helper`].
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start(program: &Path, path: &Path, run: &Path) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new(program);
        command.arg(SUBCOMMAND).arg(path).arg(run);
        // The terminal's signals must not end the helper.
        command.env_clear().process_group(0);
        command
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.spawn()?;
        Ok(Self(ours))
    }
}

impl Drop for CleanupHelper {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Write);
        let _ = self.0.set_read_timeout(Some(END_PATIENCE));
        while self.0.read(&mut [0; 64]).is_ok_and(|len| len > 0) {}
    }
}

/// What the helper does with the socket and the run directory: waits for the end of its standard input,
/// then removes the socket unless another one took its place.
pub fn cleanup_helper(path: &Path, run: &Path) -> ExitCode {
    // Its end is the VM's, whatever ends others that run this program.
    let ending = [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
    ];
    let _ = SigSet::from_iter(ending).thread_block();
    let removed = identity(path).and_then(|own| {
        sandbox::confine_removal(dir_of(path), &lock_path(run))?;
        io::copy(&mut io::stdin().lock(), &mut io::sink())?;
        remove(path, run, own)
    });
    match removed {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// A process that was killed listens until the kernel has closed all its files.
fn remove(path: &Path, run: &Path, own: (u64, u64)) -> io::Result<()> {
    let deadline = Instant::now() + DYING_PATIENCE;
    let mut step = DYING_STEP;
    let is_there = || identity(path).is_ok_and(|found| found == own);
    while is_there() && Instant::now() < deadline {
        remove_stale(path, run)?;
        if is_there() {
            std::thread::sleep(step);
        }
        step = (step * 2).min(MAX_PROBE_INTERVAL);
    }
    Ok(())
}

/// Arguments of the helper.
#[derive(Debug, clap::Args)]
pub struct CleanupArgs {
    /// The socket
    pub path: PathBuf,
    /// The run directory
    pub run: PathBuf,
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn bind(path: &Path) -> UnixListener {
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    #[test]
    fn a_socket_goes_as_soon_as_nobody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.sock");
        let listener = bind(&path);
        let own = identity(&path).unwrap();
        let removing = {
            let (path, run) = (path.clone(), dir.path().to_owned());
            thread::spawn(move || remove(&path, &run, own))
        };
        thread::sleep(DYING_STEP * 2);
        assert!(path.exists());
        drop(listener);
        removing.join().unwrap().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn what_took_its_place_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.sock");
        let own = {
            let _listener = bind(&path);
            identity(&path).unwrap()
        };
        // Beside it first, as a file that is gone may give its number to the next.
        drop(bind(&dir.path().join("next")));
        fs::rename(dir.path().join("next"), &path).unwrap();
        remove(&path, dir.path(), own).unwrap();
        assert!(path.exists());
    }
}
