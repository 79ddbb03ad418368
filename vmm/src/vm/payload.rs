//! The files a VM boots: opened once, read at every boot of the guest.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::board::Board;
use crate::boot::{self, Entry, Image, acpi};
use crate::config::{Payload, VcpuCount};
use crate::error::Error;
use crate::layout::Layout;

/// A file that the VM's file names cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be opened.
    #[error("{key}: cannot open {}", path.display())]
    Open {
        /// The key of the VM's file that names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is a directory, a device or a pipe.
    #[error("{key}: {} is not a regular file", path.display())]
    NotAFile {
        /// The key of the VM's file that names it.
        key: &'static str,
        /// What is no file.
        path: PathBuf,
    },
    /// Another VM writes to it.
    #[error(
        "{key}: another VM writes to {} already: name another file, or end that VM",
        path.display()
    )]
    InUse {
        /// The key of the VM's file that names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
    },
}

/// The open files of a [`Payload`].
pub struct OpenPayload {
    kernel: (PathBuf, File),
    initramfs: Option<(PathBuf, File)>,
    cmdline: String,
}

impl OpenPayload {
    /// Opens the files.
    ///
    /// # Errors
    /// One is missing, not permitted, or no regular file.
    pub fn open(payload: &Payload) -> Result<Self, FileError> {
        let initramfs = payload.initramfs.as_deref();
        Ok(Self {
            kernel: open("payload.kernel", &payload.kernel)?,
            initramfs: initramfs
                .map(|path| open("payload.initramfs", path))
                .transpose()?,
            cmdline: payload.cmdline.clone(),
        })
    }

    /// Writes all that the guest finds in its RAM when it starts: ACPI tables, kernel, initramfs,
    /// command line.
    ///
    /// # Errors
    /// The kernel is none, or something does not fit.
    pub fn load(
        &mut self,
        board: &Board,
        layout: &Layout,
        vcpus: VcpuCount,
    ) -> Result<Entry, Error> {
        let memory = board.ram.memory();
        let (cpus, serial) = (vcpus.get(), board.serial.is_some());
        let rsdp = acpi::build(
            memory,
            &acpi::AcpiInputs {
                layout,
                cpus,
                serial,
                slots: &board.slots,
            },
        )?;
        let mut kernel = image(&mut self.kernel);
        let mut initramfs = self.initramfs.as_mut().map(image);
        let initramfs = initramfs.as_mut();
        Ok(boot::load(
            memory,
            layout,
            &mut kernel,
            initramfs,
            &self.cmdline,
            rsdp,
        )?)
    }
}

fn image((path, file): &mut (PathBuf, File)) -> Image<'_> {
    Image { path, file }
}

fn open(key: &'static str, path: &Path) -> Result<(PathBuf, File), FileError> {
    let failed = |source| FileError::Open {
        key,
        path: path.to_owned(),
        source,
    };
    // Asked before it is opened: opening a pipe would wait for its writer.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(FileError::NotAFile {
            key,
            path: path.to_owned(),
        });
    }
    let file = File::open(path).map_err(failed)?;
    Ok((path.to_owned(), file))
}

/// Makes a file to write to, or empties the one there is. It is locked for as long as it is open, so that no
/// other VM writes to it.
///
/// # Errors
/// It is there and no regular file, or another VM's, or cannot be made.
pub fn create(key: &'static str, path: &Path) -> Result<File, FileError> {
    let path = path.to_owned();
    // Opening a pipe would wait for its reader, and so would the guest.
    if fs::metadata(&path).is_ok_and(|existing| !existing.is_file()) {
        return Err(FileError::NotAFile { key, path });
    }
    let opened = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path);
    let emptied = opened.and_then(|file| match file.try_lock() {
        Err(TryLockError::WouldBlock) => Ok(None),
        // Some file systems know no locks.
        Ok(()) | Err(TryLockError::Error(_)) => file.set_len(0).map(|()| Some(file)),
    });
    match emptied {
        Ok(Some(file)) => Ok(file),
        Ok(None) => Err(FileError::InUse { key, path }),
        Err(source) => Err(FileError::Open { key, path, source }),
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn output_goes_to_regular_files_only() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        for path in [folder.path(), &pipe] {
            let refused = create("serial.file", path).unwrap_err().to_string();
            assert!(refused.starts_with("serial.file: "), "{refused}");
            assert!(refused.ends_with("is not a regular file"), "{refused}");
        }
        let log = folder.path().join("log");
        fs::write(&log, "old").unwrap();
        let first = create("serial.file", &log).unwrap();
        assert_eq!(fs::read(&log).unwrap(), b"");
        fs::write(&log, "of the first").unwrap();
        let second = create("serial.file", &log).unwrap_err().to_string();
        assert!(second.contains("another VM writes to"), "{second}");
        assert_eq!(fs::read(&log).unwrap(), b"of the first");
        drop(first);
        create("serial.file", &log).unwrap();
        assert_eq!(fs::read(&log).unwrap(), b"");
        let missing = create("serial.file", &folder.path().join("no/log"));
        assert!(matches!(missing, Err(FileError::Open { .. })));
    }
}
