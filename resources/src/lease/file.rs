//! Files that are locked by the kernel and say who has locked them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::{LeaseError, LeaseRecord, LeaseStatus};
use crate::atomic::make_dir;
use crate::host::HostPaths;
use crate::quarantine::short;
use crate::sysfs;

/// A locked file that says who locked it.
#[derive(Debug)]
pub(crate) struct LockFile {
    pub(super) file: File,
    /// What the file is to say when nobody has it; nothing if this is not set.
    pub(super) leave: OnceLock<Vec<u8>>,
}

impl LockFile {
    /// Locks a file, making it first where needed; none if somebody else has the lock.
    pub(crate) fn take(path: &Path, record: &LeaseRecord) -> io::Result<Option<Self>> {
        Self::take_after(path, record, |_| Ok(()))
    }

    /// [`LockFile::take`], with a look at what the last holder left before it is overwritten.
    pub(super) fn take_after(
        path: &Path,
        record: &LeaseRecord,
        look: impl Fn(&[u8]) -> io::Result<()>,
    ) -> io::Result<Option<Self>> {
        loop {
            let file = open(path)?;
            if !try_lock(&file)? {
                return Ok(None);
            }
            let leave = OnceLock::new();
            let lock = Self { file, leave };
            // Somebody cleared the directory in between: a lock on a file that is gone binds nobody.
            if !lock.is_at(path)? {
                continue;
            }
            let left = content(&lock.file)?;
            if let Err(error) = look(&left) {
                // It stays as it is, for somebody who may write it down.
                let _ = lock.leave.set(left);
                return Err(error);
            }
            if let Err(error) = lock.write(record) {
                tracing::warn!(
                    "{} is locked, but its record cannot be written: {error}",
                    path.display()
                );
            }
            return Ok(Some(lock));
        }
    }

    pub(super) fn is_at(&self, path: &Path) -> io::Result<bool> {
        let held = self.file.metadata()?;
        match fs::symlink_metadata(path) {
            Ok(there) => Ok((there.dev(), there.ino()) == (held.dev(), held.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn write(&self, record: &LeaseRecord) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.write_all_at(&serde_json::to_vec(record)?, 0)
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Unlocked by name and not only by closing: a process being spawned by another thread has a
        // copy of the descriptor until it executes its program.
        let emptied = self.file.set_len(0);
        let left = self
            .leave
            .get()
            .map_or(Ok(()), |note| self.file.write_all_at(note, 0));
        let unlocked = emptied.and(left).and_then(|()| unlock(&self.file));
        if let Err(error) = unlocked {
            tracing::debug!("a lock is left to be freed by closing: {error}");
        }
    }
}

/// Makes a file to be locked, which must not be there.
pub(crate) fn create(path: &Path) -> io::Result<()> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    made.map(drop)
}

pub(super) fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let opened = match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(dir) = path.parent() {
                make_dir(dir)?;
            }
            options.open(path)
        }
        opened => opened,
    };
    opened.and_then(sysfs::must_be_regular)
}

/// What a lock file says. A tenant writes its own: there is no more to be read than records have.
pub(super) fn content(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 16 << 10];
    let length = file.read_at(&mut bytes, 0)?;
    bytes.truncate(length);
    Ok(bytes)
}

/// Who has locked a file. Asks the kernel; takes no lock.
pub(crate) fn status(paths: &HostPaths, path: &Path) -> Result<LeaseStatus, LeaseError> {
    let file = match sysfs::regular(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(LeaseStatus::Free),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return listed_as_locked(paths, path).map_err(LeaseError::file(path));
        }
        Err(error) => return Err(LeaseError::file(path)(error)),
    };
    // The holder locks first and writes second: its record may be a moment late.
    for _ in 0..20 {
        if !is_locked(&file).map_err(LeaseError::file(path))? {
            return Ok(LeaseStatus::Free);
        }
        let record = content(&file)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<LeaseRecord>(&bytes).ok());
        match record {
            // It may be a tenant's, who writes into it what it likes.
            Some(record) => {
                return Ok(LeaseStatus::Held(LeaseRecord {
                    name: short(&record.name),
                    ..record
                }));
            }
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    Ok(LeaseStatus::Unrecorded)
}

/// What the kernel's list of all locks says (proc_locks(5)), for those who may not open the file.
pub(super) fn listed_as_locked(paths: &HostPaths, path: &Path) -> io::Result<LeaseStatus> {
    let file = fs::metadata(path)?;
    let (major, minor) = (
        nix::sys::stat::major(file.dev()),
        nix::sys::stat::minor(file.dev()),
    );
    let id = format!("{major:02x}:{minor:02x}:{}", file.ino());
    let locks = fs::read_to_string(paths.proc.join("locks"))?;
    let locked = locks
        .lines()
        .any(|line| line.contains("OFDLCK") && line.split_whitespace().any(|word| word == id));
    Ok(if locked {
        LeaseStatus::Unrecorded
    } else {
        LeaseStatus::Free
    })
}

/// A write lock on all of a file.
fn whole_file(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        // Open-file-description locks want a zero here.
        l_pid: 0,
    }
}

/// Takes a lock that holds for as long as any process has this file open, or until it is [`unlock`]ed.
pub(crate) fn try_lock(file: &File) -> io::Result<bool> {
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))) {
            Ok(_) => return Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

pub(crate) fn unlock(file: &File) -> io::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_UNLCK)))?;
    Ok(())
}

/// Whether somebody has locked a file that was opened on its own.
pub(crate) fn is_locked(file: &File) -> io::Result<bool> {
    let mut lock = whole_file(libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}
