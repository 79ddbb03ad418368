//! Whether a block device is in exclusive use.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::libc;

use super::uses::HostUse;
use crate::base::sysfs;

/// How often a claim is tried: another command that tries it has it for a moment.
const CLAIMS: u32 = 5;

/// Whether the kernel refuses an exclusive claim: it does if the device is mounted, swapped to, or part of a volume
/// or a pool, also in another mount namespace. A device that cannot be tried counts as used.
pub(super) fn claim(node: &Path, name: &str) -> Option<HostUse> {
    let block = || name.to_owned();
    let unsure = |why: io::Error| HostUse::Unsure {
        block: block(),
        why: why.to_string(),
    };
    match fs::metadata(node) {
        Ok(meta) if meta.file_type().is_block_device() => {}
        Ok(_) => return None,
        Err(error) => return (!sysfs::is_gone(&error)).then(|| unsure(error)),
    }
    for _ in 0..CLAIMS {
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
            .open(node);
        match opened {
            Ok(_) => return None,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            // No card is in the reader, or the disk was just removed.
            Err(error)
                if sysfs::is_gone(&error) || error.raw_os_error() == Some(libc::ENOMEDIUM) =>
            {
                return None;
            }
            Err(error) => return Some(unsure(error)),
        }
    }
    Some(HostUse::Claimed { block: block() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_block_devices_are_tried() {
        let folder = tempfile::tempdir().unwrap();
        let node = folder.path().join("nvme0n1");
        fs::write(&node, "a file that happens to be there").unwrap();
        assert_eq!(claim(&node, "nvme0n1"), None);
        assert_eq!(claim(Path::new("/dev/null"), "nvme0n1"), None);
        assert_eq!(claim(Path::new("/nonexistent"), "nvme0n1"), None);
    }

    #[test]
    fn a_claim_that_cannot_be_asked_for_keeps_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let node = folder.path().join("nvme0n1");
        assert_eq!(claim(&node, "nvme0n1"), None, "no node, nobody to claim it");
        std::os::unix::fs::symlink(&node, &node).unwrap();
        let used = claim(&node, "nvme0n1");
        assert!(matches!(used, Some(HostUse::Unsure { .. })), "{used:?}");
    }
}
