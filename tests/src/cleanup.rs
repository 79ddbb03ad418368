//! What must be undone however this process ends: children, temporary folders, the terminal.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, io, thread};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

type Action = Box<dyn FnOnce() + Send>;

static ACTIONS: Mutex<BTreeMap<u64, Action>> = Mutex::new(BTreeMap::new());
static ENDING: AtomicBool = AtomicBool::new(false);
static NEXT: AtomicU64 = AtomicU64::new(0);

fn actions() -> MutexGuard<'static, BTreeMap<u64, Action>> {
    ACTIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs its action when dropped, or when a signal ends the process, whichever comes first.
#[must_use = "dropping the guard runs its action at once"]
#[derive(Debug)]
pub struct Guard(u64);

impl Guard {
    /// Registers `action`.
    pub fn new(action: impl FnOnce() + Send + 'static) -> Self {
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        actions().insert(id, Box::new(action));
        Self(id)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let action = actions().remove(&self.0);
        if let Some(action) = action {
            action();
        }
    }
}

/// Runs every registered action, latest first, when SIGINT, SIGTERM or SIGHUP arrives, and exits
/// with 128 plus the signal's number. Call once, early.
pub fn on_signals() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            ENDING.store(true, Ordering::Relaxed);
            run_all();
            // Ends the line that a spinner may have left.
            eprintln!("\nEnded by signal {signal}: nothing is left running");
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// Waits for the end if a signal is ending the process: what fails meanwhile fails because of it.
pub fn wait_if_ending() {
    while ENDING.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_secs(1));
    }
}

/// Runs every registered action, latest first.
pub fn run_all() {
    loop {
        let last = actions().pop_last();
        let Some((_, action)) = last else { return };
        action();
    }
}

/// A folder with a name of its own, removed with all it holds when this is dropped.
#[derive(Debug)]
pub struct TempFolder {
    path: PathBuf,
    _guard: Guard,
}

impl TempFolder {
    /// Creates it in the folder `parent`; its name begins with `prefix`.
    pub fn new(parent: &Path, prefix: &str) -> io::Result<Self> {
        let path = tempfile::Builder::new()
            .prefix(prefix)
            .tempdir_in(parent)?
            .keep();
        let doomed = path.clone();
        let guard = Guard::new(move || {
            // What cannot be removed is left behind: there is nobody to tell.
            let _ = fs::remove_dir_all(doomed);
        });
        Ok(Self {
            path,
            _guard: guard,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A child process that is killed and waited for when this is dropped.
#[derive(Debug)]
pub struct OwnedChild {
    child: Arc<Mutex<Child>>,
    _guard: Guard,
}

impl OwnedChild {
    /// Spawns `command`.
    pub fn spawn(command: &mut Command) -> io::Result<Self> {
        let child = Arc::new(Mutex::new(command.spawn()?));
        let killed = Arc::clone(&child);
        let guard = Guard::new(move || {
            let mut child = killed.lock().unwrap_or_else(PoisonError::into_inner);
            // Both fail only when the child is gone and waited for.
            let _ = child.kill();
            let _ = child.wait();
        });
        Ok(Self {
            child,
            _guard: guard,
        })
    }

    /// Its exit status, if it is over.
    pub fn try_wait(&self) -> io::Result<Option<ExitStatus>> {
        self.lock().try_wait()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.lock().id()
    }

    /// Its piped standard output, once.
    pub fn stdout(&self) -> Option<std::process::ChildStdout> {
        self.lock().stdout.take()
    }

    fn lock(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Stdio;

    #[test]
    fn dropping_the_owner_kills_the_child() {
        let child =
            OwnedChild::spawn(Command::new("sleep").arg("60").stdin(Stdio::null())).unwrap();
        let process = std::path::PathBuf::from(format!("/proc/{}", child.id()));
        assert!(process.exists());
        assert!(child.try_wait().unwrap().is_none());
        drop(child);
        assert!(!process.exists());
    }
}
