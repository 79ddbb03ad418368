//! Opening a disk: the right kind of file, whole, raw, and nobody else's.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use gantry_devices::virtio::block::{Disk, SECTOR};
use gantry_resources::base::{open_below, open_with};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::config::{DiskConfig, Folders};

/// Why a file cannot be a disk, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum DiskProblem {
    /// It cannot be opened.
    #[error("cannot open {}: {source}: {help}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What to do.
        help: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The host uses it.
    #[error(
        "the host uses {} (mounted, or part of a RAID or volume group): unmount it, or name another disk",
        path.display()
    )]
    HostUses {
        /// The block device.
        path: PathBuf,
    },
    /// Another VM has it.
    #[error(
        "another process has locked {}, most likely a VM that runs (`gantry vm list`): end it, or name another \
         image; VMs can share an image for which all of them have `\"readonly\": true`",
        path.display()
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// It is neither a file nor a block device.
    #[error("{} is neither a regular file nor a block device: name a raw image or a disk", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// It is an image of a format that is not raw.
    #[error(
        "{path} is a {format} image, and gantry takes raw images only: convert it with `qemu-img convert -O raw \
         {path} disk.raw`",
        path = path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// The name of the format.
        format: &'static str,
    },
    /// It cannot be accessed past the page cache.
    #[error("{} cannot be a disk with `\"direct\": true`: {source}: remove the key", path.display())]
    Direct {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no whole number of sectors long.
    #[error(
        "{path} is {len} bytes long, which is not a number of whole 512-byte sectors: make it longer with `truncate \
         -s %512 {path}`",
        path = path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
}

/// The first bytes of image formats that hold more than the disk's own bytes. Given as raw, a guest could write
/// such a header and choose which files of the host the next reader opens.
const FORMATS: [(&str, &[u8]); 6] = [
    ("qcow2", b"QFI\xfb"),
    ("QED", b"QED\0"),
    ("VMDK", b"KDMV"),
    ("VHDX", b"vhdxfile"),
    ("VHD", b"conectix"),
    ("VDI", b"<<< "),
];

/// Opens a disk of a VM, and keeps it locked as long as it is open: for this VM alone, or, if it is read-only, for all
/// VMs that only read it.
///
/// # Errors
/// It is missing, not permitted, in use, or no raw disk.
pub fn open(config: &DiskConfig, folders: Option<&Folders>) -> Result<Disk, DiskProblem> {
    accept(config, open_file(config, folders))
}

/// Makes a disk of the file that was `opened` for it with [`flags`], as [`open`] does.
///
/// # Errors
/// It could not be opened, is in use, or no raw disk.
pub fn accept(config: &DiskConfig, opened: io::Result<File>) -> Result<Disk, DiskProblem> {
    let path = || config.path.clone();
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::EBUSY) => DiskProblem::HostUses { path: path() },
        _ => DiskProblem::Open {
            path: path(),
            help: help(&source, config.read_only),
            source,
        },
    };
    let mut file = opened.map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DiskProblem::Kind { path: path() });
    }
    if !lock(&file, config.read_only).map_err(failed)? {
        return Err(DiskProblem::Locked { path: path() });
    }
    if let Some(format) = format_of(&mut file).map_err(failed)? {
        let path = path();
        return Err(DiskProblem::Format { path, format });
    }
    let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
    if len == 0 || !len.is_multiple_of(SECTOR) {
        return Err(DiskProblem::Size { path: path(), len });
    }
    blocking(&file).map_err(failed)?;
    let disk = Disk::new(file, len, SECTOR as u32, config.read_only);
    match config.direct {
        false => Ok(disk),
        true => disk.past_the_cache().map_err(|source| {
            let path = path();
            DiskProblem::Direct { path, source }
        }),
    }
}

/// Opening a file must not wait, but accesses to it do.
fn blocking(file: &File) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(())
}

/// How a disk is opened: without waiting for anybody. A block device that the host uses is refused to be written:
/// `O_EXCL` does that, and means nothing for a file that is there.
pub fn flags(config: &DiskConfig) -> OFlag {
    let access = match config.read_only {
        true => OFlag::O_RDONLY,
        false => OFlag::O_RDWR | OFlag::O_EXCL,
    };
    access | OFlag::O_NONBLOCK | OFlag::O_NOCTTY
}

fn open_file(config: &DiskConfig, folders: Option<&Folders>) -> io::Result<File> {
    let (path, flags) = (&config.path, flags(config));
    match folders {
        None => open_with(path, flags),
        Some(folders) if config.read_only => open_below(&folders.payload, path, flags),
        Some(folders) => {
            let none = || io::Error::from(io::ErrorKind::PermissionDenied);
            let output = folders.output.as_ref().ok_or_else(none)?;
            open_below(output, path, flags)
        }
    }
}

fn help(error: &io::Error, read_only: bool) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT) => {
            "name a file that is there: `truncate -s 10G disk.raw` makes an empty disk"
        }
        Some(libc::EROFS | libc::EACCES | libc::EPERM) if !read_only => {
            "let this user write to it, or have it with `\"readonly\": true`"
        }
        _ => "name a raw image or a block device that this user may open",
    }
}

/// Locks all of a file by its open file description (fcntl_locking(2)). `false` if somebody else has it.
fn lock(file: &File, read_only: bool) -> io::Result<bool> {
    let kind = match read_only {
        true => libc::F_RDLCK,
        false => libc::F_WRLCK,
    };
    let whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// The format of an image that is not raw.
fn format_of(file: &mut File) -> io::Result<Option<&'static str>> {
    let mut start = Vec::new();
    file.take(SECTOR).read_to_end(&mut start)?;
    let mut formats = FORMATS.iter();
    let found = formats.find(|(_, magic)| start.starts_with(magic));
    Ok(found.map(|(name, _)| *name))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn config(path: &Path, read_only: bool) -> DiskConfig {
        DiskConfig {
            path: path.to_owned(),
            read_only,
            ..DiskConfig::small()
        }
    }

    fn try_open(path: &Path, read_only: bool) -> Result<Disk, String> {
        open(&config(path, read_only), None).map_err(|problem| problem.to_string())
    }

    #[test]
    fn an_image_has_one_writer_or_many_readers() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        fs::write(&image, [0; 1024]).unwrap();
        let writer = try_open(&image, false).unwrap();
        assert_eq!(writer.sectors(), 2);
        for read_only in [false, true] {
            let refused = try_open(&image, read_only).unwrap_err();
            assert!(refused.contains("another process has locked"), "{refused}");
        }
        drop(writer);
        let _readers = [true, true].map(|read_only| try_open(&image, read_only).unwrap());
        try_open(&image, false).unwrap_err();
    }

    #[test]
    fn what_is_no_raw_disk_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        for (content, expected) in [
            (&b"QFI\xfb"[..], "is a qcow2 image"),
            (b"vhdxfile", "is a VHDX image"),
            (b"", "is 0 bytes long"),
            (b"text", "is 4 bytes long"),
        ] {
            fs::write(&image, content).unwrap();
            let refused = try_open(&image, true).unwrap_err();
            assert!(refused.contains(expected), "{refused}");
        }
        let missing = try_open(&folder.path().join("none"), true).unwrap_err();
        assert!(missing.contains("truncate -s 10G"), "{missing}");
        let refused = try_open(folder.path(), true).unwrap_err();
        assert!(refused.contains("neither a regular file nor"), "{refused}");
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let refused = try_open(&pipe, true).unwrap_err();
        assert!(refused.contains("neither a regular file nor"), "{refused}");
    }
}
