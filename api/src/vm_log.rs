//! The log of a VM that runs in the background: what gantry says, and what the guest writes to its serial port.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use gantry_resources::base::make_dir;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::unistd::{Uid, linkat};

/// The folders where logs lie: the run directory, and one of gantry's own for a user who may not write there. The log
/// NAME.log is kept when its VM ends, and goes when another VM gets the name.
#[derive(Debug)]
pub struct Logs(Vec<PathBuf>);

impl Logs {
    /// Those of this user.
    pub fn new(run: &Path) -> Self {
        let mut folders = vec![run.to_owned()];
        // Root may write in the run directory, and the variable may name another user's folder.
        if !Uid::effective().is_root() {
            let own = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
            let own = own.filter(|own| own.is_absolute());
            folders.extend(own.map(|own| own.join("gantry")));
        }
        Self(folders)
    }

    /// A log without a name, for its owner alone, in the first folder where this user may make one.
    ///
    /// # Errors
    /// There is none: the reason is that of the first.
    pub fn create(&self) -> io::Result<NewLog> {
        first(self.0.iter().map(|folder| NewLog::create(folder)))
    }

    /// Opens the log of the VM called `name`.
    ///
    /// # Errors
    /// There is none, or this user may not read it.
    pub fn open(&self, name: &str) -> io::Result<File> {
        first(self.paths(name).map(File::open))
    }

    /// Removes the log of the VM before, once another has its name. If it cannot be removed, this user cannot read it
    /// either.
    pub fn remove(&self, name: &str) {
        for path in self.paths(name) {
            let _ = std::fs::remove_file(path);
        }
    }

    fn paths(&self, name: &str) -> impl Iterator<Item = PathBuf> {
        let file = format!("{name}.log");
        self.0.iter().map(move |folder| folder.join(&file))
    }
}

/// The first that succeeds, or the first error.
fn first<T>(mut results: impl Iterator<Item = io::Result<T>>) -> io::Result<T> {
    match results.next() {
        Some(Err(error)) => results.find_map(Result::ok).ok_or(error),
        Some(done) => done,
        None => Err(io::ErrorKind::NotFound.into()),
    }
}

/// Whether a VM still writes to a log.
pub fn is_written(log: &File) -> bool {
    matches!(log.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// A log without a name, which goes with the VM unless it is kept. It is locked as long as a process has it as its
/// standard error.
#[derive(Debug)]
pub struct NewLog {
    file: File,
    folder: PathBuf,
}

impl NewLog {
    fn create(folder: &Path) -> io::Result<Self> {
        make_dir(folder)?;
        let flags = (OFlag::O_TMPFILE | OFlag::O_APPEND).bits();
        let mut options = File::options();
        let options = options.read(true).write(true).mode(0o600);
        let file = options.custom_flags(flags).open(folder)?;
        file.lock()?;
        Ok(Self {
            file,
            folder: folder.to_owned(),
        })
    }

    /// The log as the standard error of a process.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn stdio(&self) -> io::Result<Stdio> {
        self.file.try_clone().map(Stdio::from)
    }

    /// The first `len` bytes of it, or all.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn text(&self, len: Option<u64>) -> io::Result<Vec<u8>> {
        let all = self.file.metadata()?.len();
        let len = len.map_or(all, |len| len.min(all));
        let mut text = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut text, 0)?;
        Ok(text)
    }

    /// Makes it the log of the VM called `name`, in place of an older one.
    ///
    /// # Errors
    /// The kernel refuses a step.
    pub fn keep(&self, name: &str) -> io::Result<()> {
        let path = self.folder.join(format!("{name}.log"));
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let mut new = path.as_os_str().to_owned();
        new.push(format!(".{}", std::process::id()));
        // Of a process with this number that was killed.
        let _ = std::fs::remove_file(&new);
        linkat(
            AT_FDCWD,
            &*own,
            AT_FDCWD,
            new.as_os_str(),
            AtFlags::AT_SYMLINK_FOLLOW,
        )?;
        std::fs::rename(&new, path)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_log_replaces_the_one_before_once_it_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let logs = Logs(vec![run.clone()]);
        let path = run.join("web.log");
        for text in ["first", "second"] {
            let mut log = logs.create().unwrap();
            log.file.write_all(text.as_bytes()).unwrap();
            let names = || std::fs::read_dir(&run).unwrap().count();
            let before = names();
            drop(logs.create().unwrap());
            assert_eq!(names(), before, "an unkept log has no name");
            assert_eq!(log.text(Some(3)).unwrap(), &text.as_bytes()[..3]);
            log.keep("web").unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
            assert_eq!(names(), 1);
        }
    }

    #[test]
    fn a_user_without_rights_to_the_run_directory_has_logs_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        // A file is no directory, even for root.
        let run = folder.path().join("run");
        std::fs::write(&run, "").unwrap();
        let logs = Logs(vec![run.clone(), folder.path().join("own/gantry")]);
        let log = logs.create().unwrap();
        log.keep("web").unwrap();
        let reader = logs.open("web").unwrap();
        assert!(is_written(&reader));
        drop(log);
        assert!(!is_written(&reader));
        logs.remove("web");
        assert!(logs.open("web").is_err());
        assert!(Logs(vec![run]).create().is_err());
    }
}
