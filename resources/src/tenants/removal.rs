//! Removes directories of another user, who may put anything into them at the same time.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::pools::tenant::dirs;

/// Former directories of a tenant, moved aside so that new ones can be made.
pub(super) struct FormerDirs(Vec<(PathBuf, io::Result<Option<PathBuf>>)>);

impl FormerDirs {
    /// The tenant's directories for run-time files and state.
    pub(super) fn of(host: &HostPaths, name: &str) -> Self {
        let HostPaths { run, state, .. } = dirs(host, name);
        let moved = [run, state].map(|dir| {
            let aside = move_aside(&dir);
            (dir, aside)
        });
        Self(moved.into())
    }

    /// Removes them, which may take long. A failure is logged, and does no harm.
    pub(super) fn remove(self) {
        for (dir, aside) in self.0 {
            let removed = aside.and_then(|aside| aside.map_or(Ok(()), |aside| remove(&aside)));
            if let Err(error) = removed {
                let dir = dir.display();
                tracing::warn!(
                    "cannot remove everything that the tenant's user put into {dir}: {error}"
                );
            }
        }
    }
}

/// Moves a directory aside, to an unused name; none if there is no directory.
fn move_aside(dir: &Path) -> io::Result<Option<PathBuf>> {
    let name = dir.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let name = format!(".{}.{}", name.to_string_lossy(), std::process::id());
    let aside = dir.with_file_name(name);
    match fs::rename(dir, &aside) {
        Ok(()) => Ok(Some(aside)),
        Err(error) if sysfs::is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a directory whose parent no other user may change. Its subdirectories are emptied into it one after the
/// other, so that no path grows long and no descriptor stays open at any depth.
fn remove(dir: &Path) -> io::Result<()> {
    close(dir)?;
    let mut moved = 0_u64;
    loop {
        let mut found = false;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            found = true;
            if !fs::symlink_metadata(&path)?.is_dir() {
                fs::remove_file(&path)?;
                continue;
            }
            close(&path)?;
            for inner in fs::read_dir(&path)? {
                fs::rename(inner?.path(), unused(dir, &mut moved))?;
            }
            fs::remove_dir(&path)?;
        }
        if !found {
            return fs::remove_dir(dir);
        }
    }
}

/// Makes a directory accessible to root alone, also for processes that have it open.
fn close(dir: &Path) -> io::Result<()> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    lchown(dir, Some(uid.as_raw()), Some(gid.as_raw()))?;
    fs::set_permissions(dir, Permissions::from_mode(0o700))
}

/// A path in a directory at which there is nothing.
fn unused(dir: &Path, moved: &mut u64) -> PathBuf {
    loop {
        *moved += 1;
        let path = dir.join(format!("moved-{moved}"));
        if fs::symlink_metadata(&path).is_err() {
            return path;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{OFlag, open, openat};
    use nix::sys::stat::{Mode, mkdirat};
    use std::os::unix::fs::symlink;

    #[test]
    fn whatever_is_in_it_goes_and_what_links_lead_to_stays() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("kept")).unwrap();
        fs::write(root.path().join("kept/file"), "text").unwrap();
        let dir = root.path().join("tenant");
        fs::create_dir_all(dir.join("a/b/moved-1")).unwrap();
        fs::write(dir.join("moved-1"), "x").unwrap();
        symlink(root.path().join("kept"), dir.join("a/link")).unwrap();
        nix::unistd::mkfifo(&dir.join("a/b/pipe"), Mode::S_IRWXU).unwrap();
        // Deeper than a path may be long, and than there may be open files.
        let mut here = open(&dir, OFlag::O_RDONLY, Mode::empty()).unwrap();
        for _ in 0..3000 {
            mkdirat(&here, "deep", Mode::S_IRWXU).unwrap();
            here = openat(&here, "deep", OFlag::O_RDONLY, Mode::empty()).unwrap();
        }
        drop(here);
        let aside = move_aside(&dir).unwrap().unwrap();
        assert!(!dir.exists() && move_aside(&dir).unwrap().is_none());
        remove(&aside).unwrap();
        let left: Vec<_> = fs::read_dir(root.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
        let kept = fs::read_to_string(root.path().join("kept/file"));
        assert_eq!(kept.unwrap(), "text");
    }
}
