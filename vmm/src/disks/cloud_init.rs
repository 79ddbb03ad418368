//! The disk from which cloud-init in the guest takes its configuration: its `NoCloud` data source looks for a FAT
//! file system with this label and these files.

use std::io::{self, Cursor, Write};
use std::path::{Path, PathBuf};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions, format_volume};
use gantry_devices::virtio::block::{Disk, Queues};

use crate::config::{CloudInit, DiskConfig};
use crate::host::files::{FileError, read};

const LABEL: [u8; 11] = *b"cidata     ";
/// The most bytes of one file.
const MOST: u64 = 16 << 20;
/// Room beside the files: for the file system's own tables, and so that each file ends in a cluster of its own.
const ROOM: usize = 1 << 20;
/// File systems are made in multiples of this.
const UNIT: usize = 64 << 10;

/// The disk cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CloudInitError {
    /// One of the files cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// One of the files is too large.
    #[error("{key}: {} is larger than {} MiB", path.display(), MOST >> 20)]
    TooLarge {
        /// The key of the VM's file that names it.
        key: String,
        /// The file.
        path: PathBuf,
    },
    /// The file system cannot be made of them.
    #[error("cloud_init: its disk cannot be made")]
    FileSystem(#[from] io::Error),
}

/// What the disk is in the VM.
pub fn config() -> DiskConfig {
    DiskConfig {
        id: CloudInit::DISK.to_owned(),
        path: CloudInit::DISK.into(),
        read_only: true,
        direct: false,
        io_uring: false,
        serial: String::new(),
        queues: Queues {
            count: 1,
            size: 128,
        },
    }
}

/// Makes the disk of the files, which must lie in `below` if that is given.
///
/// # Errors
/// One of them is missing, not permitted or too large.
pub fn disk(config: &CloudInit, below: Option<&Path>) -> Result<Disk, CloudInitError> {
    let mut files = Vec::new();
    for (name, path) in config.files() {
        let key = format!("cloud_init.{}", name.replace('-', "_"));
        let bytes = read(&key, path, below, MOST)?;
        if bytes.len() as u64 > MOST {
            let path = path.clone();
            return Err(CloudInitError::TooLarge { key, path });
        }
        files.push((name, bytes));
    }
    Ok(Disk::of_bytes(image(&files)?))
}

fn image(files: &[(&str, Vec<u8>)]) -> io::Result<Vec<u8>> {
    let size: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    let mut image = vec![0; (size + ROOM).next_multiple_of(UNIT)];
    format_volume(
        Cursor::new(&mut *image),
        FormatVolumeOptions::new().volume_label(LABEL),
    )?;
    let system = FileSystem::new(Cursor::new(&mut *image), FsOptions::new())?;
    for (name, bytes) in files {
        system.root_dir().create_file(name)?.write_all(bytes)?;
    }
    system.unmount()?;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;

    use super::*;

    fn read_back(image: &mut [u8], name: &str) -> Vec<u8> {
        let system = FileSystem::new(Cursor::new(image), FsOptions::new()).unwrap();
        assert_eq!(system.volume_label(), "cidata");
        let mut bytes = Vec::new();
        let root = system.root_dir();
        root.open_file(name)
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        bytes
    }

    #[test]
    fn the_image_holds_the_files_under_the_names_that_cloud_init_looks_for() {
        for size in [0, 1, 5000, 16 << 20] {
            let user: Vec<u8> = (0..size).map(|at| at as u8).collect();
            let files = [("user-data", user.clone()), ("meta-data", b"m".to_vec())];
            let mut image = image(&files).unwrap();
            assert_eq!(read_back(&mut image, "user-data"), user);
            assert_eq!(read_back(&mut image, "meta-data"), b"m");
        }
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named_with_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("user"), "#cloud-config\n").unwrap();
        fs::write(path("meta"), "").unwrap();
        let mut config = CloudInit {
            user_data: path("user"),
            meta_data: path("meta"),
            network_config: None,
        };
        let made = disk(&config, None).unwrap();
        assert!(made.is_read_only() && made.sectors() > 2000);
        config.network_config = Some(path("none"));
        let refused = disk(&config, None).unwrap_err().to_string();
        assert!(
            refused.starts_with("cloud_init.network_config: cannot open "),
            "{refused}"
        );
        let large = fs::File::create(path("none")).unwrap();
        large.set_len(MOST + 1).unwrap();
        let refused = disk(&config, None).unwrap_err().to_string();
        assert!(refused.contains("16 MiB"), "{refused}");
        let outside = tempfile::tempdir().unwrap();
        disk(&config, Some(outside.path())).unwrap_err();
    }
}
