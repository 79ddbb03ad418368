//! Small reads of sysfs attributes, for which a missing file is no error.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use nix::libc;

/// Whether an error means that the file does not exist, or disappeared while it was read.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.kind() == io::ErrorKind::NotADirectory
        || matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO))
}

/// Advice for an error message, if permission was denied.
pub(crate) fn if_denied(error: &io::Error, advice: &str) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => format!(": {advice}"),
        _ => String::new(),
    }
}

/// The longest attribute of sysfs: a page.
const PAGE: usize = 4096;

/// An attribute's text without surrounding blanks; none if there is no such attribute.
///
/// sysfs returns an attribute in one read(2), so one is enough.
pub(crate) fn text(path: &Path) -> io::Result<Option<String>> {
    let mut page = [0; PAGE];
    let length = match File::open(path).and_then(|mut file| file.read(&mut page)) {
        Ok(length) => length,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some(
        String::from_utf8_lossy(&page[..length]).trim().to_owned(),
    ))
}

/// A whole file of procfs; empty if there is no such file.
pub(crate) fn table(path: &Path) -> io::Result<String> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if is_gone(&error) => Ok(String::new()),
        Err(error) => Err(error),
    }
}

/// A decimal attribute; none also for other texts, such as `-1` for "no NUMA node".
pub(crate) fn decimal<T: std::str::FromStr>(path: &Path) -> io::Result<Option<T>> {
    Ok(text(path)?.and_then(|text| text.parse().ok()))
}

/// The last component of a symbolic link's target, such as the driver's name of `driver`.
pub(crate) fn link_name(path: &Path) -> io::Result<Option<String>> {
    match fs::read_link(path) {
        Ok(target) => Ok(target
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Names of a directory's entries, sorted; empty if there is no directory.
pub(crate) fn entries(path: &Path) -> io::Result<Vec<String>> {
    let listing = match fs::read_dir(path) {
        Ok(listing) => listing,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in listing {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
