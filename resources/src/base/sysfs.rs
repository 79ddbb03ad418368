//! Small reads of sysfs attributes, where "not there" is an answer and not an error.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::libc;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Whether an error means that the thing asked about is not there, or went away while being read.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.kind() == io::ErrorKind::NotADirectory
        || matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO))
}

/// Advice to put behind an error's words, where permission was refused: it is of no use for a full disk.
pub(crate) fn if_denied(error: &io::Error, advice: &str) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => format!(": {advice}"),
        _ => String::new(),
    }
}

/// The most that sysfs gives for one attribute: a page.
const PAGE: usize = 4096;

/// An attribute's text without surrounding blanks; none if there is no such attribute.
///
/// sysfs hands out an attribute in one read(2), so one is enough.
pub(crate) fn text(path: &Path) -> io::Result<Option<String>> {
    let mut page = [0; PAGE];
    let length = match File::open(path).and_then(|mut file| file.read(&mut page)) {
        Ok(length) => length,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some(
        String::from_utf8_lossy(&page[..length]).trim().to_owned(),
    ))
}

/// Opens a regular file to be read, and nothing else: neither a link, nor a pipe that opening would wait
/// at, nor a device that it would wake.
pub(crate) fn regular(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options.open(path).and_then(must_be_regular)
}

/// Refuses what is no regular file.
pub(crate) fn must_be_regular(file: File) -> io::Result<File> {
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no regular file")),
    }
}

/// A directory that another user may change, held open. It is reached by its descriptor alone; neither a link
/// nor a mount leads out of it, to a file system that answers when that user likes.
pub(crate) struct HeldDir(File);

impl HeldDir {
    /// Opens `inner`, below a directory that no other user may change; none where there is none, or something
    /// else.
    pub(crate) fn below(outer: &Path, inner: &Path) -> io::Result<Option<Self>> {
        let outer = match File::open(outer) {
            Ok(outer) => outer,
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        match open_beneath(&outer, inner, OFlag::O_DIRECTORY) {
            Ok(dir) => Ok(Some(Self(dir))),
            Err(error) if is_gone(&error) || leads_out(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens a regular file in it to be read, as [`regular`] does.
    pub(crate) fn regular(&self, name: &str) -> io::Result<File> {
        open_beneath(&self.0, Path::new(name), OFlag::O_NONBLOCK).and_then(must_be_regular)
    }

    /// Removes a file from it.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir)?)
    }

    /// Names of no more than so many entries, sorted, and whether there are more.
    pub(crate) fn names(&self, most: usize) -> io::Result<(Vec<String>, bool)> {
        // What leads to it (proc_pid_fd(5)).
        let mut listing = fs::read_dir(format!("/proc/self/fd/{}", self.0.as_raw_fd()))?;
        let mut names = Vec::new();
        for entry in listing.by_ref().take(most) {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok((names, listing.next().is_some()))
    }
}

/// Opens a path below a directory to be read.
fn open_beneath(dir: &File, path: &Path, flags: OFlag) -> io::Result<File> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_RDONLY | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS
                | ResolveFlag::RESOLVE_NO_XDEV,
        );
    let opened: OwnedFd = openat2(dir, path, how)?;
    Ok(opened.into())
}

/// Whether an error means that a link or a mount is in the way.
fn leads_out(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ELOOP | libc::EXDEV))
}

/// All of a file of procfs, however long; nothing if there is no such file.
pub(crate) fn table(path: &Path) -> io::Result<String> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if is_gone(&error) => Ok(String::new()),
        Err(error) => Err(error),
    }
}

/// A decimal attribute; none also where the text is no unsigned number, as in `-1` for "no NUMA node".
pub(crate) fn decimal<T: std::str::FromStr>(path: &Path) -> io::Result<Option<T>> {
    Ok(text(path)?.and_then(|text| text.parse().ok()))
}

/// The last component of a symbolic link's target, such as the driver's name of `driver`.
pub(crate) fn link_name(path: &Path) -> io::Result<Option<String>> {
    match fs::read_link(path) {
        Ok(target) => Ok(target
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Names of a directory's entries, sorted; none at all if there is no such directory.
pub(crate) fn entries(path: &Path) -> io::Result<Vec<String>> {
    let listing = match fs::read_dir(path) {
        Ok(listing) => listing,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in listing {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
