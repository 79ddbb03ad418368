//! gantry's own files and directories. They are replaced as a whole, so that a reader always sees the old or the
//! new content, and readable to tenants and other users whatever root's umask is.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;

/// Creates a directory that everybody may enter and list, and its parents. An existing one is left unchanged.
///
/// # Errors
///
/// It cannot be created, or something else is at its path.
pub fn make_dir(dir: &Path) -> io::Result<()> {
    let make = || DirBuilder::new().mode(0o755).create(dir);
    let made = match (make(), dir.parent()) {
        (Err(error), Some(above)) if error.kind() == io::ErrorKind::NotFound => {
            make_dir(above)?;
            make()
        }
        (made, _) => made,
    };
    match made {
        Err(_) if dir.is_dir() => Ok(()),
        Err(error) => Err(error),
        Ok(()) => show(dir, 0o755),
    }
}

/// Sets the mode of a file or directory if it differs: that of a new one depends on the umask. A confined process
/// can do this only for what it may open.
pub(crate) fn show(path: &Path, mode: u32) -> io::Result<()> {
    if fs::metadata(path)?.mode() & 0o777 == mode {
        return Ok(());
    }
    File::open(path)?.set_permissions(Permissions::from_mode(mode))
}

/// Writes a new file and moves it to the path of the old one, whose mode and owner it takes; without an old one,
/// all users can read it. The content is on disk when this returns. After a failure the old file is unchanged.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    // A link stays, and its target is replaced.
    let target = fs::canonicalize(path).or_else(|_| std::path::absolute(path))?;
    replace_at(&target, content)
}

/// [`replace`] in a directory that a confined process may write: a link is replaced and not followed, and a
/// directory at the path is removed.
pub(crate) fn replace_record(path: &Path, content: &[u8]) -> io::Result<()> {
    clear(path)?;
    replace_at(path, content)
}

/// Removes a file, or whatever is at its path, from a directory that a confined process may write.
pub(crate) fn remove_record(path: &Path) -> io::Result<()> {
    clear(path)?;
    fs::remove_file(path)
}

/// Removes what is at the path of a record and is no regular file.
fn clear(path: &Path) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => found,
        // The next open returns the reason of a failure.
        _ => return Ok(()),
    };
    tracing::warn!(
        "{} is no regular file, so it is no record: it is removed",
        path.display()
    );
    match found.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    }
}

fn replace_at(target: &Path, content: &[u8]) -> io::Result<()> {
    let (Some(dir), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    make_dir(dir)?;
    let draft = dir.join(format!(
        ".{}.{}",
        name.to_string_lossy(),
        std::process::id()
    ));
    let old = fs::symlink_metadata(target).ok();
    let old = old.filter(fs::Metadata::is_file);
    let written = write(&draft, content, old.as_ref()).and_then(|()| fs::rename(&draft, target));
    if written.is_err() {
        let _ = fs::remove_file(&draft);
        return written;
    }
    File::open(dir)?.sync_all()
}

fn write(draft: &Path, content: &[u8], old: Option<&fs::Metadata>) -> io::Result<()> {
    // A file that a killed process left has this number only by chance.
    let _ = fs::remove_file(draft);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(draft)?;
    if let Some(old) = old {
        let new = file.metadata()?;
        if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
            fchown(&file, Some(old.uid()), Some(old.gid()))?;
        }
    }
    let mode = old.map_or(0o644, fs::Metadata::mode);
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_file_of_the_working_directory_needs_no_folder_in_its_name() {
        let name = format!("atomic-{}", std::process::id());
        let path = Path::new(&name);
        let replaced = replace(path, b"one");
        let text = fs::read_to_string(path);
        fs::remove_file(path).unwrap();
        assert_eq!(text.unwrap(), "one");
        replaced.unwrap();
    }

    #[test]
    fn a_file_is_replaced_with_its_mode_and_nothing_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/groups.json");
        replace(&path, b"one").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let link = dir.path().join("link.json");
        symlink(&path, &link).unwrap();
        replace(&link, b"two").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_record_takes_the_place_of_whatever_is_there_and_no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other");
        fs::write(&other, "text").unwrap();
        let path = dir.path().join("restore/record");
        make_dir(path.parent().unwrap()).unwrap();
        let ways: [&dyn Fn(); 4] = [
            &|| symlink(&other, &path).unwrap(),
            &|| symlink("nowhere", &path).unwrap(),
            &|| nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
            &|| fs::create_dir_all(path.join("full")).unwrap(),
        ];
        for put in ways {
            put();
            replace_record(&path, b"one").unwrap();
            assert!(fs::symlink_metadata(&path).unwrap().is_file());
            assert_eq!(fs::read(&path).unwrap(), b"one");
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
            remove_record(&path).unwrap();
            put();
            let removed = remove_record(&path).unwrap_err();
            assert_eq!(removed.kind(), io::ErrorKind::NotFound);
            assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
        }
        assert_eq!(fs::read(&other).unwrap(), b"text");
    }

    #[test]
    fn a_directory_in_the_way_is_an_error_and_leaves_no_draft() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("groups.json");
        fs::create_dir_all(path.join("full")).unwrap();
        assert!(replace(&path, b"x").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
