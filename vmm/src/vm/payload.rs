//! The files a VM boots: opened once, read at every boot of the guest.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use gantry_resources::base::{open_below, open_regular};
use nix::fcntl::OFlag;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::machine::Machine;
use crate::boot::{self, BootError, Entry, Image, acpi};
use crate::config::{VcpuCount, VmConfig};
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

/// The open files of a [`Payload`](crate::config::Payload).
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
    pub fn open(config: &VmConfig) -> Result<Self, FileError> {
        let payload = &config.payload;
        let below = config.folders.as_ref();
        let below = below.map(|folders| folders.payload.as_path());
        let initramfs = payload.initramfs.as_deref();
        Ok(Self {
            kernel: open("payload.kernel", &payload.kernel, below)?,
            initramfs: initramfs
                .map(|path| open("payload.initramfs", path, below))
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
        machine: &Machine,
        layout: &Layout,
        vcpus: VcpuCount,
    ) -> Result<Entry, Error> {
        let memory = machine.ram.memory();
        let (cpus, serial) = (vcpus.get(), machine.serial.is_some());
        let rsdp = acpi::build(
            memory,
            &acpi::AcpiInputs {
                layout,
                cpus,
                serial,
                pvpanic: machine.has_pvpanic(),
                slots: &machine.slots,
            },
        )?;
        Ok(self.boot(memory, layout, rsdp)?)
    }

    /// Loads kernel, initramfs and command line.
    pub(super) fn boot(
        &mut self,
        memory: &GuestMemoryMmap,
        layout: &Layout,
        rsdp: GuestAddress,
    ) -> Result<Entry, BootError> {
        let mut kernel = image(&mut self.kernel);
        let mut initramfs = self.initramfs.as_mut().map(image);
        let initramfs = initramfs.as_mut();
        boot::load(memory, layout, &mut kernel, initramfs, &self.cmdline, rsdp)
    }
}

fn image((path, file): &mut (PathBuf, File)) -> Image<'_> {
    Image { path, file }
}

fn open(
    key: &'static str,
    path: &Path,
    below: Option<&Path>,
) -> Result<(PathBuf, File), FileError> {
    let failed = |source| FileError::Open {
        key,
        path: path.to_owned(),
        source,
    };
    let file = match below {
        Some(folder) => open_below(folder, path, OFlag::O_RDONLY),
        None => open_regular(path, File::options().read(true)),
    };
    let file = file.map_err(failed)?;
    Ok((path.to_owned(), file))
}

/// Makes a file to write to, or empties the one there is. It is locked for as long as it is open, so that no
/// other VM writes to it.
///
/// # Errors
/// It is there and no regular file, or another VM's, or cannot be made.
pub fn create(key: &'static str, path: &Path, below: Option<&Path>) -> Result<File, FileError> {
    let path = path.to_owned();
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let opened = match below {
        Some(folder) => open_below(folder, &path, OFlag::O_RDWR | OFlag::O_CREAT),
        None => open_regular(&path, &options),
    };
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
    use std::error::Error;
    use std::fs;

    use nix::sys::stat::Mode;

    use super::{FileError, create, open};

    #[test]
    fn output_goes_to_regular_files_only() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        for path in [folder.path(), &pipe] {
            let refused = create("serial.file", path, None).unwrap_err();
            assert!(
                refused.to_string().starts_with("serial.file: "),
                "{refused}"
            );
            let why = refused.source().unwrap().to_string();
            assert!(why.ends_with("not a regular file"), "{why}");
            let refused = open("payload.kernel", path, None).unwrap_err();
            let why = refused.source().unwrap().to_string();
            assert!(why.ends_with("not a regular file"), "{why}");
        }
        let log = folder.path().join("log");
        fs::write(&log, "old").unwrap();
        let first = create("serial.file", &log, None).unwrap();
        assert_eq!(fs::read(&log).unwrap(), b"");
        fs::write(&log, "of the first").unwrap();
        let second = create("serial.file", &log, None).unwrap_err().to_string();
        assert!(second.contains("another VM writes to"), "{second}");
        assert_eq!(fs::read(&log).unwrap(), b"of the first");
        drop(first);
        create("serial.file", &log, None).unwrap();
        assert_eq!(fs::read(&log).unwrap(), b"");
        let missing = create("serial.file", &folder.path().join("no/log"), None);
        assert!(matches!(missing, Err(FileError::Open { .. })));
    }
}
