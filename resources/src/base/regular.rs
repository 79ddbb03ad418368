//! Opens files that other users name: never waits, and opens only regular files.
//!
//! Opening a pipe waits for its other end, and opening a device may affect it. The kind of a file is therefore
//! checked before it is opened, and again afterwards, when another file may be at the path.

use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::libc;
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::base::sysfs::is_gone;

/// Opens a regular file, or a link to one, without waiting.
///
/// # Errors
///
/// It is no regular file, or cannot be opened.
pub fn open_regular(path: &Path, options: &OpenOptions) -> io::Result<File> {
    match fs::metadata(path) {
        Ok(metadata) => must_be_regular(metadata.file_type())?,
        // The options may create the file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut options = options.clone();
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options.open(path).and_then(opened_regular)
}

/// Opens what there is at a path, with these flags alone.
///
/// # Errors
/// The kernel refused.
pub fn open_with(path: &Path, flags: OFlag) -> io::Result<File> {
    let opened = nix::fcntl::open(path, flags | OFlag::O_CLOEXEC, Mode::empty());
    Ok(File::from(opened?))
}

/// Opens a regular file below a folder without waiting; no link and no `..` in `path` leads out of it. The path
/// begins with the folder, or is relative to it.
///
/// # Errors
///
/// It is no regular file or is elsewhere, or cannot be opened.
pub fn open_below(folder: &Path, path: &Path, flags: OFlag) -> io::Result<File> {
    let inner = path.strip_prefix(folder).unwrap_or(path);
    let outside = || {
        let what = format!("it is not in {}", folder.display());
        io::Error::new(io::ErrorKind::InvalidInput, what)
    };
    if inner.is_absolute() {
        return Err(outside());
    }
    let mut options = OpenOptions::new();
    options.read(true);
    options.custom_flags(libc::O_PATH | libc::O_DIRECTORY);
    let folder = options.open(folder)?;
    let open = |flags: OFlag, mode| {
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).mode(mode);
        let how = how.resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        match openat2(&folder, inner, how) {
            Ok(file) => Ok(File::from(file)),
            Err(Errno::EXDEV) => Err(outside()),
            Err(errno) => Err(errno.into()),
        }
    };
    match open(OFlag::O_PATH, Mode::empty()) {
        Ok(found) => must_be_regular(found.metadata()?.file_type())?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mode = match flags.contains(OFlag::O_CREAT) {
        true => Mode::from_bits_truncate(0o644),
        false => Mode::empty(),
    };
    open(flags | OFlag::O_NONBLOCK | OFlag::O_NOCTTY, mode).and_then(opened_regular)
}

/// Opens a regular file for reading, and nothing else: no link, no pipe whose open would wait, no device that it
/// would wake.
pub(crate) fn open_no_link(path: &Path) -> io::Result<File> {
    open_no_link_as(path, OpenOptions::new().read(true))
}

/// [`open_no_link`] with other options.
pub(crate) fn open_no_link_as(path: &Path, options: &OpenOptions) -> io::Result<File> {
    let mut options = options.clone();
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY);
    options.open(path).and_then(opened_regular)
}

/// An opened file, if it is a regular one.
pub(crate) fn opened_regular(file: File) -> io::Result<File> {
    must_be_regular(file.metadata()?.file_type())?;
    Ok(file)
}

/// A directory that another user may change, held open. It is used by its descriptor alone; neither a link nor a
/// mount leads out of it, for example to a file system whose server does not answer.
pub(crate) struct HeldDir(File);

impl HeldDir {
    /// Opens `inner`, below a directory that no other user may change; none if it does not exist or is no
    /// directory.
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

    /// Opens a regular file in it to be read, as [`open_no_link`] does.
    pub(crate) fn regular(&self, name: &str) -> io::Result<File> {
        open_beneath(&self.0, Path::new(name), OFlag::O_NONBLOCK).and_then(opened_regular)
    }

    /// Removes a file from it.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir)?)
    }

    /// At most so many names of its entries, sorted, and whether there are more.
    pub(crate) fn names(&self, most: usize) -> io::Result<(Vec<String>, bool)> {
        // The path of the open directory (proc_pid_fd(5)).
        let mut listing = fs::read_dir(format!("/proc/self/fd/{}", self.0.as_raw_fd()))?;
        let mut names = Vec::new();
        for entry in listing.by_ref().take(most) {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok((names, listing.next().is_some()))
    }
}

/// Opens a path below a directory for reading.
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

/// Whether an error is due to a link or a mount on the path.
fn leads_out(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ELOOP | libc::EXDEV))
}

/// The text of a regular file of at most `most` bytes.
///
/// # Errors
///
/// Those of [`open_regular`]; or it is longer, or no text.
pub fn read_regular(path: &Path, most: u64) -> io::Result<String> {
    read_text(open_regular(path, OpenOptions::new().read(true))?, most)
}

/// All of a text of at most `most` bytes.
///
/// # Errors
/// It cannot be read, is longer, or is no text.
pub fn read_text(source: impl Read, most: u64) -> io::Result<String> {
    let mut text = String::new();
    let length = source
        .take(most.saturating_add(1))
        .read_to_string(&mut text)?;
    match length as u64 > most {
        true => Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it is longer than {most} bytes"),
        )),
        false => Ok(text),
    }
}

fn must_be_regular(kind: FileType) -> io::Result<()> {
    let what = match kind {
        kind if kind.is_file() => return Ok(()),
        kind if kind.is_dir() => "a directory",
        kind if kind.is_fifo() => "a named pipe",
        kind if kind.is_socket() => "a socket",
        kind if kind.is_block_device() || kind.is_char_device() => "a device",
        _ => "something else",
    };
    let what = format!("it is {what}, not a regular file");
    Err(io::Error::new(io::ErrorKind::InvalidInput, what))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn nothing_outside_a_folder_is_opened_below_it() {
        let host = tempfile::tempdir().unwrap();
        let folder = host.path().join("kernels");
        fs::create_dir_all(folder.join("old")).unwrap();
        fs::write(host.path().join("secret"), "text").unwrap();
        fs::write(folder.join("old/vmlinuz"), "text").unwrap();
        symlink("old/vmlinuz", folder.join("vmlinuz")).unwrap();
        symlink("../secret", folder.join("link")).unwrap();
        symlink(host.path(), folder.join("host")).unwrap();
        symlink("/proc/self/root", folder.join("magic")).unwrap();
        nix::unistd::mkfifo(&folder.join("pipe"), Mode::S_IRWXU).unwrap();
        let open = |path: &Path| open_below(&folder, path, OFlag::O_RDONLY);
        for inside in ["vmlinuz", "old/vmlinuz", "old/../vmlinuz"] {
            open(Path::new(inside)).unwrap();
            open(&folder.join(inside)).unwrap();
        }
        let secret = host.path().join("secret");
        let secret = secret.to_str().unwrap();
        let magic = format!("magic{secret}");
        for outside in [
            "link",
            "host/secret",
            "../secret",
            &magic,
            secret,
            "/etc/passwd",
        ] {
            let refused = open(Path::new(outside)).unwrap_err().to_string();
            let expected = format!("it is not in {}", folder.display());
            assert_eq!(refused, expected, "{outside}");
        }
        let refused = open(Path::new("pipe")).unwrap_err().to_string();
        assert!(refused.contains("a named pipe"), "{refused}");
        let make = |path| open_below(&folder, Path::new(path), OFlag::O_RDWR | OFlag::O_CREAT);
        make("new").unwrap();
        assert!(folder.join("new").is_file());
        make("../new").unwrap_err();
        make("host/new").unwrap_err();
        assert!(!host.path().join("new").exists());
    }

    #[test]
    fn only_regular_files_are_opened_and_none_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        nix::unistd::mkfifo(&path("pipe"), Mode::S_IRWXU).unwrap();
        symlink(path("pipe"), path("link-to-pipe")).unwrap();
        let _listener = UnixListener::bind(path("socket")).unwrap();
        fs::write(path("file"), "text").unwrap();
        symlink(path("file"), path("link")).unwrap();
        let mut write = OpenOptions::new();
        write.write(true).create(true);
        for (name, what) in [
            ("pipe", "a named pipe"),
            ("link-to-pipe", "a named pipe"),
            ("socket", "a socket"),
            ("", "a directory"),
            ("/dev/zero", "a device"),
        ] {
            for options in [OpenOptions::new().read(true), &mut write] {
                let refused = open_regular(&path(name), options).unwrap_err().to_string();
                assert_eq!(refused, format!("it is {what}, not a regular file"));
            }
        }
        for name in ["file", "link"] {
            assert_eq!(read_regular(&path(name), 4).unwrap(), "text");
        }
        let long = read_regular(&path("file"), 3).unwrap_err().to_string();
        assert_eq!(long, "it is longer than 3 bytes");
        let missing = read_regular(&path("none"), 4).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        open_regular(&path("new"), &write).unwrap();
        assert!(path("new").is_file());
    }
}
