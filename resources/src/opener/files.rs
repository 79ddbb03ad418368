//! The helper's side: files that it opens for a VM that runs.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf, absolute};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use nix::fcntl::OFlag;

use super::wire::{Limit, Refusal};
use crate::base::{open_below, open_with};

/// All flags that a VM may ask for.
const FLAGS: OFlag = OFlag::O_RDWR
    .union(OFlag::O_WRONLY)
    .union(OFlag::O_EXCL)
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_NOCTTY)
    .union(OFlag::O_DIRECT);

/// How long a file may take to open. Shorter than the VM waits for an answer.
pub(super) const OPEN_PATIENCE: Duration = Duration::from_secs(30);
/// How many opens may hang at a time.
const MOST_HANGING: usize = 8;

/// Opens files, each on a thread of its own: a folder may be on a server that does not answer.
#[derive(Default)]
pub(super) struct FileOpener {
    /// Each thread has a reference.
    underway: Arc<()>,
}

impl FileOpener {
    /// [`open`], within `patience`.
    ///
    /// # Errors
    /// Those of [`open`]; or the file, or others before it, take too long.
    pub(super) fn open(
        &self,
        limit: Option<&Limit>,
        path: &Path,
        flags: i32,
        patience: Duration,
    ) -> Result<io::Result<File>, Refusal> {
        let shown = path.display();
        if Arc::strong_count(&self.underway) > MOST_HANGING {
            return Err(Refusal::Busy(format!(
                "cannot open {shown}: {MOST_HANGING} other files do not open either: wait until their servers answer"
            )));
        }
        let (sender, opened) = channel();
        let (limit, to_open) = (limit.cloned(), path.to_owned());
        let underway = Arc::clone(&self.underway);
        let body = move || {
            // If nobody waits any more, the file is closed here.
            let _ = sender.send(open(limit.as_ref(), &to_open, flags));
            drop(underway);
        };
        let cannot =
            |why: &dyn std::fmt::Display| Refusal::Failed(format!("cannot open {shown}: {why}"));
        let thread = thread::Builder::new().spawn(body);
        thread.map_err(|error| cannot(&error))?;
        let seconds = patience.as_secs();
        opened.recv_timeout(patience).map_err(|_| {
            cannot(&format_args!(
                "it has not opened in {seconds} s: try again once the server of its file system answers"
            ))
        })?
    }
}

/// Opens a file that the VM's limit names, or one below a folder that it names. The inner result is the kernel's
/// answer.
///
/// # Errors
/// The limit does not allow it, or there is none yet.
fn open(limit: Option<&Limit>, path: &Path, flags: i32) -> Result<io::Result<File>, Refusal> {
    let flags = OFlag::from_bits_retain(flags);
    let roots = limit.map_or(&[][..], |limit| match flags & OFlag::O_ACCMODE {
        access if access == OFlag::O_RDONLY => &limit.read,
        _ => &limit.write,
    });
    let Ok(path) = absolute(path) else {
        return Err(not_named(path, roots));
    };
    let root = roots.iter().find(|root| path.starts_with(root));
    match root.filter(|_| FLAGS.contains(flags)) {
        None => Err(not_named(&path, roots)),
        Some(root) if *root == path || root.parent().is_none() => Ok(open_with(&path, flags)),
        Some(root) => match open_below(root, &path, flags) {
            // The path leads out of the folder, or to no regular file: an error in words.
            Err(error) if error.raw_os_error().is_none() => {
                let path = path.display();
                Err(Refusal::Denied(format!("cannot open {path}: {error}")))
            }
            opened => Ok(opened),
        },
    }
}

fn not_named(path: &Path, roots: &[PathBuf]) -> Refusal {
    let path = path.display();
    let may = match roots {
        [] => "this VM names no folders for disks that are attached later".to_owned(),
        roots => {
            let roots: Vec<String> = roots
                .iter()
                .map(|root| root.display().to_string())
                .collect();
            let roots = roots.join(", ");
            format!("disks that are attached to this VM later come from {roots} only")
        }
    };
    Refusal::Denied(format!(
        "{may}: add {path}, or its folder, to `hotplug.disks` of the VM's file, and start the VM again"
    ))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::symlink;

    use super::*;

    fn limit(roots: &[&Path]) -> Limit {
        let roots: Vec<PathBuf> = roots.iter().map(|root| root.to_path_buf()).collect();
        Limit {
            from: Vec::new(),
            ungrouped: false,
            most: 1,
            read: roots.clone(),
            write: roots,
        }
    }

    #[test]
    fn files_are_opened_where_the_vm_has_named_them_and_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("images");
        fs::create_dir(&inside).unwrap();
        let (good, secret) = (inside.join("disk.raw"), folder.path().join("secret"));
        fs::write(&good, "disk").unwrap();
        fs::write(&secret, "secret").unwrap();
        let link = inside.join("link");
        symlink("../secret", &link).unwrap();
        let (read, write) = (OFlag::O_RDONLY.bits(), OFlag::O_RDWR.bits());
        for roots in [&[&*inside][..], &[&good], &[Path::new("/")]] {
            let limit = limit(roots);
            for flags in [read, write] {
                open(Some(&limit), &good, flags).unwrap().unwrap();
            }
        }
        let named = limit(&[&inside]);
        for path in [&link, &inside.join("../secret")] {
            let Err(Refusal::Denied(why)) = open(Some(&named), path, read) else {
                panic!("{} is opened", path.display());
            };
            assert!(why.contains("it is not in"), "{why}");
        }
        let missing = open(Some(&named), &inside.join("none"), read).unwrap();
        assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
        for (limit, path, flags) in [
            (None, &good, read),
            (Some(&named), &secret, read),
            (Some(&limit(&[])), &good, read),
            (Some(&named), &good, write | OFlag::O_CREAT.bits()),
            (Some(&named), &good, write | OFlag::O_TRUNC.bits()),
        ] {
            let Err(Refusal::Denied(why)) = open(limit, path, flags) else {
                panic!("{} is opened", path.display());
            };
            assert!(why.contains("`hotplug.disks`"), "{why}");
        }
    }

    #[test]
    fn a_file_that_does_not_open_fails_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (stuck, good) = (folder.path().join("stuck"), folder.path().join("good"));
        // It opens once it has a writer.
        nix::unistd::mkfifo(&stuck, nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(&good, "disk").unwrap();
        let limit = limit(&[&stuck, &good]);
        let opener = FileOpener::default();
        let read = OFlag::O_RDONLY.bits();
        let open = |path, patience| opener.open(Some(&limit), path, read, patience);
        for _ in 0..MOST_HANGING {
            let Err(Refusal::Failed(why)) = open(&stuck, Duration::from_millis(10)) else {
                panic!("a pipe without a writer is opened");
            };
            assert!(why.contains("it has not opened"), "{why}");
        }
        let busy = open(&good, OPEN_PATIENCE);
        assert!(matches!(busy, Err(Refusal::Busy(_))));
        while Arc::strong_count(&opener.underway) > 1 {
            drop(
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(&stuck)
                    .unwrap(),
            );
            thread::yield_now();
        }
        open(&good, OPEN_PATIENCE).unwrap().unwrap();
    }
}
