//! The log of a VM that runs in the background: what gantry says, and what the guest writes to its serial port.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use gantry_resources::base::make_dir;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::unistd::linkat;

/// Where the log of the VM called `name` is: kept when it ends, and replaced by the next VM of that name.
pub fn path_of(run: &Path, name: &str) -> PathBuf {
    run.join(format!("{name}.log"))
}

/// A log without a name, which goes with the VM unless it is kept.
#[derive(Debug)]
pub struct NewLog(File);

impl NewLog {
    /// A log in the run directory, for its owner alone.
    ///
    /// # Errors
    /// No file can be made there.
    pub fn create(run: &Path) -> io::Result<Self> {
        make_dir(run)?;
        let flags = (OFlag::O_TMPFILE | OFlag::O_APPEND).bits();
        let mut options = File::options();
        let options = options.read(true).write(true).mode(0o600);
        options.custom_flags(flags).open(run).map(Self)
    }

    /// The log as the standard error of a process.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn stdio(&self) -> io::Result<Stdio> {
        self.0.try_clone().map(Stdio::from)
    }

    /// The first `len` bytes of it, or all.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn text(&self, len: Option<u64>) -> io::Result<Vec<u8>> {
        let all = self.0.metadata()?.len();
        let len = len.map_or(all, |len| len.min(all));
        let mut text = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        self.0.read_exact_at(&mut text, 0)?;
        Ok(text)
    }

    /// Gives the log the name `path`, in place of an older one.
    ///
    /// # Errors
    /// The kernel refuses a step.
    pub fn keep(&self, path: &Path) -> io::Result<()> {
        let own = format!("/proc/self/fd/{}", self.0.as_raw_fd());
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
        let path = path_of(&run, "web");
        for text in ["first", "second"] {
            let mut log = NewLog::create(&run).unwrap();
            log.0.write_all(text.as_bytes()).unwrap();
            let names = || std::fs::read_dir(&run).unwrap().count();
            let before = names();
            drop(NewLog::create(&run).unwrap());
            assert_eq!(names(), before, "an unkept log has no name");
            assert_eq!(log.text(Some(3)).unwrap(), &text.as_bytes()[..3]);
            log.keep(&path).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
            assert_eq!(names(), 1);
        }
    }
}
