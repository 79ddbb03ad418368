//! The helper's side: files that it opens for a VM that runs.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf, absolute};

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

/// Opens a file that the VM's limit names, or one below a folder that it names. The inner result is the kernel's
/// answer.
///
/// # Errors
/// The limit does not allow it, or there is none yet.
pub(super) fn open(
    limit: Option<&Limit>,
    path: &Path,
    flags: i32,
) -> Result<io::Result<File>, Refusal> {
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
    use std::fs;
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
}
