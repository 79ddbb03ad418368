//! Files that are locked by the kernel and say who has locked them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::num::NonZeroU32;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FcntlArg, RenameFlags, fcntl, renameat2};
use nix::libc;

use crate::base::atomic::make_dir;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::regular;
use crate::base::text::short;
use crate::holding::record::{LeaseRecord, LeaseStatus};

/// More than the length of a line in `/proc/locks`.
const LONGEST_LINE: u64 = 512;

/// A locked file that says who locked it.
#[derive(Debug)]
pub(crate) struct LockFile {
    pub(super) file: File,
    /// What the file says once nobody holds the lock; empty if this is not set.
    pub(super) leave: OnceLock<Vec<u8>>,
}

impl LockFile {
    /// Locks a file, which is created where it is missing. None if another process has the lock.
    pub(crate) fn take(
        paths: &HostPaths,
        path: &Path,
        record: &LeaseRecord,
    ) -> io::Result<Option<Self>> {
        Self::take_after(paths, path, record, |_| Ok(()))
    }

    /// [`LockFile::take`], with a look at what the last holder left before it is overwritten.
    pub(super) fn take_after(
        paths: &HostPaths,
        path: &Path,
        record: &LeaseRecord,
        look: impl Fn(&[u8]) -> io::Result<()>,
    ) -> io::Result<Option<Self>> {
        loop {
            let file = match open(path) {
                Ok(file) => file,
                Err(error) if is_replaceable(path, &error) => match replace(paths, path) {
                    Ok(Some(file)) => file,
                    Ok(None) => return Ok(None),
                    // This user may not create it: the first failure is the one to report.
                    Err(_) => return Err(error),
                },
                Err(error) => return Err(error),
            };
            if !try_lock(&file)? {
                return Ok(None);
            }
            let leave = OnceLock::new();
            let lock = Self { file, leave };
            // The directory was cleared in between: a lock on a removed file keeps nobody out.
            if !lock.is_at(path)? {
                continue;
            }
            let left = content(&lock.file)?;
            if let Err(error) = look(&left) {
                // The note stays in the file, so that another process can store it.
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
        // Unlocked explicitly, and not only by closing: a process that another thread is spawning has a
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

/// Creates a lock file, which must not exist.
pub(crate) fn create(path: &Path) -> io::Result<()> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    made.map(drop)
}

/// Opens a lock file, which is created where it is missing.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).mode(0o600);
    match regular::open_no_link_as(path, &options) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(dir) = path.parent() {
                make_dir(dir)?;
            }
            regular::open_no_link_as(path, &options)
        }
        opened => opened,
    }
}

/// Whether an error of [`open`] is due to the file at this path, so that a new file helps: its owner holds a file
/// lease on it (fcntl(2), "Leases") or has closed it to others, or it is no regular file.
fn is_replaceable(path: &Path, error: &io::Error) -> bool {
    let closed = [io::ErrorKind::WouldBlock, io::ErrorKind::PermissionDenied];
    let other = || fs::symlink_metadata(path).is_ok_and(|found| !found.is_file());
    closed.contains(&error.kind()) || other()
}

/// Replaces a lock file that cannot be opened by a new one of the same owner, and returns the new one, locked. None
/// if another process has locked the old file, which then stays. Every user who may write the directory can do
/// this.
///
/// The two files are exchanged in one step, and the old one is examined afterwards: a process that locks it later
/// sees that it is no longer at its path (see [`LockFile::is_at`]).
fn replace(paths: &HostPaths, path: &Path) -> io::Result<Option<File>> {
    let old = fs::symlink_metadata(path)?;
    let new = path.with_extension(format!("{}.new", std::process::id()));
    let swap = || {
        let both = RenameFlags::RENAME_EXCHANGE;
        renameat2(AT_FDCWD, &new, AT_FDCWD, path, both).map_err(io::Error::from)
    };
    create(&new)?;
    // By descriptor: a confined process may not change owners by path.
    let swapped = open(&new)
        .and_then(|file| fchown(&file, Some(old.uid()), Some(old.gid())).map(|()| file))
        .and_then(|file| try_lock(&file).map(|_| file))
        .and_then(|file| swap().map(|()| file));
    let file = match swapped {
        Ok(file) => file,
        Err(error) => {
            let _ = fs::remove_file(&new);
            return Err(error);
        }
    };
    let swapped_out = fs::symlink_metadata(&new)?;
    // If the list cannot be read, the old file may be locked.
    let locked = !swapped_out.is_dir() && is_listed(paths, &swapped_out).unwrap_or(true);
    if locked {
        swap()?;
    }
    fs::remove_file(&new).or_else(|_| fs::remove_dir(&new))?;
    Ok((!locked).then_some(file))
}

/// The content of a lock file. A tenant writes its own files, so that no more is read than a record needs.
pub(super) fn content(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 16 << 10];
    let length = file.read_at(&mut bytes, 0)?;
    bytes.truncate(length);
    Ok(bytes)
}

/// Who has locked a file. Asks the kernel; takes no lock. A file that cannot be read counts as locked.
pub(crate) fn status(paths: &HostPaths, path: &Path) -> LeaseStatus {
    let unreadable = |error: io::Error| LeaseStatus::Unreadable {
        file: path.to_owned(),
        why: error.to_string(),
    };
    let known = match regular::open_no_link(path) {
        Ok(file) => status_of(paths, &file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(LeaseStatus::Free),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            listed_as_locked(paths, path)
        }
        Err(error) => Err(error),
    };
    known.unwrap_or_else(unreadable)
}

/// Who has locked a file that was opened to be read.
pub(crate) fn status_of(paths: &HostPaths, file: &File) -> io::Result<LeaseStatus> {
    let owner = file.metadata()?.uid();
    // The holder locks first and writes second, so that its record may be a moment late. Another user may omit
    // it in many files, for which nobody waits.
    let attempts = if is_trusted(owner) { 20 } else { 1 };
    for attempt in 1..=attempts {
        if !is_locked(file)? {
            return Ok(LeaseStatus::Free);
        }
        let record = content(file)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<LeaseRecord>(&bytes).ok());
        match record {
            Some(record) => return Ok(LeaseStatus::Held(credible(paths, owner, record))),
            None if attempt < attempts => std::thread::sleep(Duration::from_millis(1)),
            None => {}
        }
    }
    Ok(LeaseStatus::Unrecorded)
}

/// The part of a record that is credible. A tenant writes its own records: they may hold control characters, or
/// name the process of another user.
pub(super) fn credible(paths: &HostPaths, owner: u32, record: LeaseRecord) -> LeaseRecord {
    let process = |pid: u32| fs::metadata(paths.proc.join(pid.to_string()));
    let owners = |pid: &NonZeroU32| process(pid.get()).is_ok_and(|process| process.uid() == owner);
    let name = short(&record.name);
    if is_trusted(owner) {
        return LeaseRecord { name, ..record };
    }
    // Nothing that ends a quotation, or that a shell reads as more than a name.
    let plain = |one: &char| one.is_alphanumeric() || "._- ".contains(*one);
    LeaseRecord {
        name: name.chars().filter(plain).collect(),
        pid: record.pid.filter(owners),
        ..record
    }
}

/// Root and this user are trusted: a tenant writes anything into the lock files of its devices.
pub(super) fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

/// The state of a lock in the kernel's list of all locks, for users who may not open the file.
pub(super) fn listed_as_locked(paths: &HostPaths, path: &Path) -> io::Result<LeaseStatus> {
    let locked = is_listed(paths, &fs::symlink_metadata(path)?)?;
    Ok(if locked {
        LeaseStatus::Unrecorded
    } else {
        LeaseStatus::Free
    })
}

/// Whether the kernel lists a lock of ours on a file (proc_locks(5)).
fn is_listed(paths: &HostPaths, file: &fs::Metadata) -> io::Result<bool> {
    let (major, minor) = (
        nix::sys::stat::major(file.dev()),
        nix::sys::stat::minor(file.dev()),
    );
    let id = format!("{major:02x}:{minor:02x}:{}", file.ino());
    let locks = File::open(paths.proc.join("locks"))?;
    lists(BufReader::new(locks), &id)
}

/// Whether a list of locks names an open-file-description lock on the file of this `id`. Users can make the list
/// long: it is read line by line, and each line only up to a length.
pub(super) fn lists(mut locks: impl BufRead, id: &str) -> io::Result<bool> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if locks
            .by_ref()
            .take(LONGEST_LINE)
            .read_until(b'\n', &mut line)?
            == 0
        {
            return Ok(false);
        }
        let mut words = line.split(u8::is_ascii_whitespace);
        if words.by_ref().any(|word| word == b"OFDLCK") && words.any(|word| word == id.as_bytes()) {
            return Ok(true);
        }
    }
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

/// Whether another process has locked a file that this process has opened on its own.
pub(crate) fn is_locked(file: &File) -> io::Result<bool> {
    let mut lock = whole_file(libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

/// Who holds a device. Asks the kernel; takes no lock, not even for a moment.
pub fn holder(paths: &HostPaths, name: impl Into<DeviceName>) -> LeaseStatus {
    status(paths, &lock_path(paths, name))
}

pub(crate) fn lock_path(paths: &HostPaths, name: impl Into<DeviceName>) -> PathBuf {
    let name = name.into();
    paths.run.join("leases").join(format!("{name}.lock"))
}

/// The note that the last holder of a device left, or the record of its holder.
pub(crate) fn note(paths: &HostPaths, bdf: HostBdf) -> Option<Vec<u8>> {
    let file = regular::open_no_link(&lock_path(paths, bdf)).ok()?;
    content(&file).ok()
}
