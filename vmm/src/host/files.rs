//! The files that a VM's file names. Each is opened once, before the guest runs.

use std::fs::{File, TryLockError};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use gantry_resources::base::{open_below, open_regular};
use gantry_vfio::pci::{RomError, RomImage};
use nix::fcntl::OFlag;

use crate::config::{CloudInit, DiskConfig, SerialMode, VmConfig};
use crate::process::sandbox::{Output, VmFiles};

/// A file named in the VM's file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be opened.
    #[error("{key}: cannot open {}", path.display())]
    Open {
        /// The key of the VM's file that names it.
        key: String,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no expansion ROM.
    #[error("{key}: {}", path.display())]
    Rom {
        /// The key of the VM's file that names it.
        key: String,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: RomError,
    },
    /// Another VM writes to it.
    #[error(
        "{key}: another VM writes to {} already: name another file, or end that VM",
        path.display()
    )]
    InUse {
        /// The key of the VM's file that names it.
        key: String,
        /// The file.
        path: PathBuf,
    },
}

/// The files that a VM may reach of those that its file names.
pub fn of_vm(config: &VmConfig) -> VmFiles {
    let payload = &config.payload;
    let folders = config.folders.as_ref();
    let (read_only, written): (Vec<_>, Vec<_>) =
        config.disks.iter().partition(|disk| disk.read_only);
    let path = |disk: &DiskConfig| disk.path.clone();
    let mut read: Vec<PathBuf> = match folders {
        Some(folders) => vec![folders.payload.clone()],
        None => {
            let roms = config.devices.iter().filter_map(|device| device.rom.file());
            let roms = roms.chain(&config.hotplug.roms);
            let seed = config.cloud_init.iter().flat_map(CloudInit::files);
            let named = roms.chain(seed.map(|(_, file)| file));
            let boot = [Some(&payload.kernel), payload.initramfs.as_ref()];
            boot.into_iter().flatten().chain(named).cloned().collect()
        }
    };
    let mut write = Vec::new();
    // Disks of clients that are kept to folders lie in those: a path elsewhere is not opened, and needs no rule.
    match folders.map(|folders| &folders.output) {
        None => {
            read.extend(read_only.into_iter().map(path));
            write.extend(written.into_iter().map(path));
        }
        Some(output) => write.extend(output.iter().filter(|_| !written.is_empty()).cloned()),
    }
    let later = config.later_disks();
    read.extend(later.read);
    write.extend(later.write);
    read.extend(config.rng.iter().map(|rng| rng.source.clone()));
    let net = config.nets.first().map(|_| ["net/tun", "vhost-net"]);
    let vsock = config.vsock.as_ref().map(|_| "vhost-vsock");
    VmFiles {
        read,
        write,
        nodes: net.into_iter().flatten().chain(vsock).collect(),
        output: match (&config.serial, folders) {
            (SerialMode::Off | SerialMode::Null, _) => None,
            (SerialMode::Tty, _) => Some(Output::Stdout),
            (SerialMode::File(path), folders) => {
                let below = folders.and_then(|folders| folders.output.clone());
                Some(below.map_or_else(|| Output::File(path.clone()), Output::Below))
            }
        },
    }
}

/// Opens a file to read.
///
/// # Errors
/// It is missing, not permitted, or no regular file.
pub fn open(key: &str, path: &Path, below: Option<&Path>) -> Result<File, FileError> {
    let failed = |source| FileError::Open {
        key: key.to_owned(),
        path: path.to_owned(),
        source,
    };
    let file = match below {
        Some(folder) => open_below(folder, path, OFlag::O_RDONLY),
        None => open_regular(path, File::options().read(true)),
    };
    file.map_err(failed)
}

/// Reads a file; of one that is larger than `most` bytes, one byte more than that.
///
/// # Errors
/// As [`open`].
pub fn read(key: &str, path: &Path, below: Option<&Path>, most: u64) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    let file = open(key, path, below)?;
    let read = file.take(most + 1).read_to_end(&mut bytes);
    read.map_err(|source| FileError::Open {
        key: key.to_owned(),
        path: path.to_owned(),
        source,
    })?;
    Ok(bytes)
}

/// Reads an expansion ROM.
///
/// # Errors
/// As [`read`], or the file holds none.
pub fn read_rom(key: &str, path: &Path, below: Option<&Path>) -> Result<RomImage, FileError> {
    let bytes = read(key, path, below, RomImage::MAX)?;
    RomImage::new(bytes).map_err(|source| FileError::Rom {
        key: key.to_owned(),
        path: path.to_owned(),
        source,
    })
}

/// Creates a file to write to, or empties an existing one. It stays locked while it is open, so that no other
/// VM writes to it.
///
/// # Errors
/// It is no regular file, or another VM writes to it, or it cannot be created.
pub fn create(key: &str, path: &Path, below: Option<&Path>) -> Result<File, FileError> {
    let (key, path) = (key.to_owned(), path.to_owned());
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

    use super::{FileError, create, open, read_rom};

    #[test]
    fn a_rom_is_a_regular_file_that_begins_as_one_and_the_error_names_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("rom");
        let read = |bytes: &[u8]| {
            fs::write(&file, bytes).unwrap();
            read_rom("devices[1].rom", &file, None)
        };
        assert!(read(&[0x55, 0xaa, 1]).is_ok());
        let mut long = vec![0; (16 << 20) + 1];
        long[..2].copy_from_slice(&[0x55, 0xaa]);
        for (bytes, why) in [
            (&b"\x7fELF"[..], "55 AA"),
            (&[], "55 AA"),
            (&long, "16 MiB"),
        ] {
            let refused = read(bytes).unwrap_err();
            let named = format!("devices[1].rom: {}", file.display());
            assert_eq!(refused.to_string(), named);
            let source = refused.source().unwrap().to_string();
            assert!(source.contains(why), "{source}");
        }
        let refused = read_rom("devices[0].rom", folder.path(), None).unwrap_err();
        assert!(matches!(refused, FileError::Open { .. }));
        assert!(read_rom("rom", &file, Some(&folder.path().join("x"))).is_err());
    }

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
