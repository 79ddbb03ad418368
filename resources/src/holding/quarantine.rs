//! Devices in quarantine, which no VM gets: they hung, or were used once.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Once;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::base::atomic::{self, make_dir, show};
use crate::base::bdf::HostBdf;
use crate::base::host::{HostPaths, TENANTS};
use crate::base::regular::{self, HeldDir};
use crate::base::sysfs;
use crate::base::text::short;
use crate::facts::attributes::id_at;
use crate::facts::ids::PciId;
use crate::holding::lock_file;

/// The directory of records, below the state directory.
const DIR: &str = "quarantine";
/// The size limit of a record.
const LONGEST: u64 = 16 << 10;
/// So many files of a tenant are listed at most. With more of them, each device's records are opened by their
/// names.
const MOST_FILES: usize = 4096;

/// How long a device stays in quarantine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Until {
    /// Until the host boots, which resets a device that hangs; or until it is released.
    Boot,
    /// Until it is released.
    Released,
}

/// All of them, the more urgent one first.
const UNTIL: [Until; 2] = [Until::Boot, Until::Released];

/// A record in the state directory. It counts only for the hardware that it names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// Vendor and device id, as they are shown.
    id: String,
    reason: String,
    until: Until,
    /// The boot in which it was written.
    boot: Option<String>,
}

/// A device could not be put into quarantine, or taken out.
#[derive(Debug, Error)]
pub enum QuarantineError {
    /// The state directory cannot be used.
    #[error("cannot use {path}{}", sysfs::if_denied(.source, "run as root"))]
    File {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Puts a device into quarantine.
pub(crate) fn quarantine(
    paths: &HostPaths,
    bdf: HostBdf,
    id: PciId,
    reason: &str,
    until: Until,
) -> Result<(), QuarantineError> {
    let record = Record {
        id: id.to_string(),
        reason: reason.to_owned(),
        until,
        boot: boot(paths),
    };
    let path = path(paths, bdf, until);
    store(&path, &record).map_err(|source| QuarantineError::File { path, source })
}

/// Tenants read the host's records too, so the mode does not depend on the umask.
fn store(path: &Path, record: &Record) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    make_dir(dir)?;
    show(dir, 0o755)?;
    atomic::replace_record(path, &serde_json::to_vec(record)?)?;
    show(path, 0o644)
}

/// A record for a process that can neither read the boot's id nor open a file: it is left in the device's lock
/// file. A boot of the host empties the directory of lock files.
pub(crate) fn note(id: PciId, reason: &str) -> Vec<u8> {
    let record = Record {
        id: id.to_string(),
        reason: reason.to_owned(),
        until: Until::Boot,
        boot: None,
    };
    serde_json::to_vec(&record).unwrap_or_default()
}

/// Reads a record that a tenant may have written: nothing in it is trusted.
fn untrusted(text: &[u8]) -> Option<Record> {
    let record: Record = serde_json::from_slice(text).ok()?;
    Some(Record {
        reason: short(&record.reason),
        ..record
    })
}

/// Reads a [`note`], or what a tenant put in its place. Both last until the host boots.
fn from_note(text: &[u8]) -> Option<Record> {
    Some(Record {
        until: Until::Boot,
        boot: None,
        ..untrusted(text)?
    })
}

/// Stores a [`note`] as a record. Ignores anything else.
pub(crate) fn store_note(paths: &HostPaths, bdf: HostBdf, text: &[u8]) -> io::Result<()> {
    let Some(record) = from_note(text) else {
        return Ok(());
    };
    let boot = boot(paths);
    add(paths, bdf, &Record { boot, ..record })
}

/// Stores a record of another user beside the existing ones. Ignores one of other hardware.
fn add(paths: &HostPaths, bdf: HostBdf, record: &Record) -> io::Result<()> {
    let there = id_at(paths, bdf)?;
    if there.is_some_and(|id| id.to_string() != record.id) {
        return Ok(());
    }
    let own = RecordDir::own(paths);
    let now = boot(paths);
    let known = own.record(paths, bdf, record.until);
    match known.is_some_and(|known| known.counts(&now, &record.id)) {
        true => Ok(()),
        false => store(&path(paths, bdf, record.until), record),
    }
}

/// Removes all records of a device.
pub(crate) fn forget(paths: &HostPaths, bdf: HostBdf) -> Result<(), QuarantineError> {
    for dir in record_dirs(paths) {
        for until in UNTIL {
            dir.forget(paths, bdf, until)?;
        }
    }
    Ok(())
}

fn remove(path: PathBuf) -> Result<(), QuarantineError> {
    match atomic::remove_record(&path) {
        Err(source) if !sysfs::is_gone(&source) => Err(QuarantineError::File { path, source }),
        _ => Ok(()),
    }
}

fn read_own(path: &Path) -> Option<Record> {
    let file = regular::open_no_link(path).ok()?;
    serde_json::from_reader(file.take(LONGEST)).ok()
}

/// Removes the record that [`quarantine`] made with this reason, unless another one replaced it.
pub(crate) fn forget_reason(
    paths: &HostPaths,
    bdf: HostBdf,
    reason: &str,
) -> Result<(), QuarantineError> {
    for path in UNTIL.map(|until| path(paths, bdf, until)) {
        match read_own(&path) {
            Some(record) if record.reason == reason => remove(path)?,
            _ => {}
        }
    }
    Ok(())
}

/// Why a device must not be moved: it hung or failed, and another attempt would hang too.
pub(crate) fn hung(paths: &HostPaths, bdf: HostBdf, id: PciId) -> Option<String> {
    let found = find(paths, bdf, id)?;
    (found.until == Until::Boot).then(|| found.reason())
}

/// Why a device is in quarantine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    reasons: Vec<String>,
    /// Until the host boots if one reason says so: then the device must not be moved.
    pub(crate) until: Until,
}

impl Found {
    /// The reasons in one line.
    pub(crate) fn reason(&self) -> String {
        self.reasons.join("; ")
    }
}

/// All reasons why a device with these ids is in quarantine; none if it is not there.
///
/// A record that cannot be read counts as a reason.
pub(crate) fn find(paths: &HostPaths, bdf: HostBdf, id: PciId) -> Option<Found> {
    let id = &id.to_string();
    let now = boot(paths);
    let record_dirs = record_dirs(paths);
    let contents = record_dirs.iter().flat_map(|dir| {
        let records = UNTIL.map(|until| dir.record(paths, bdf, until));
        records.into_iter().flatten()
    });
    let note = || from_note(&lock_file::note(paths, bdf)?).map(Content::Record);
    let mut found: Option<Found> = None;
    for (reason, until) in contents
        .chain(note())
        .filter(|content| content.counts(&now, id))
        .map(Content::into_reason)
    {
        let found = found.get_or_insert_with(|| Found {
            reasons: Vec::new(),
            until,
        });
        if until == Until::Boot {
            found.until = until;
        }
        if !found.reasons.contains(&reason) {
            found.reasons.push(reason);
        }
    }
    found
}

/// The content of a record's file.
enum Content {
    Record(Record),
    /// Why it cannot be read.
    Unreadable(String),
}

impl Content {
    /// Whether it is about a device with these ids, and was written in this boot if that matters.
    fn counts(&self, now: &Option<String>, id: &str) -> bool {
        match self {
            Self::Unreadable(_) => true,
            Self::Record(record) => {
                let booted = record.boot.is_some() && record.boot != *now;
                !(record.until == Until::Boot && booted) && record.id == id
            }
        }
    }

    fn into_reason(self) -> (String, Until) {
        match self {
            Self::Record(Record { reason, until, .. }) => (reason, until),
            Self::Unreadable(reason) => (reason, Until::Released),
        }
    }
}

/// A directory of records. Those of the host and of its tenants count for both, as the hardware is the same.
pub(crate) struct RecordDir {
    dir: PathBuf,
    /// A tenant's directory is held open, since the tenant may put something else in its place.
    held: Option<HeldDir>,
    owner: Owner,
}

/// The name of a device's record.
fn name(bdf: HostBdf, until: Until) -> String {
    match until {
        Until::Boot => format!("{bdf}.boot.json"),
        Until::Released => format!("{bdf}.json"),
    }
}

/// The names of a device's records: it may have one of each kind.
pub(crate) fn names(bdf: HostBdf) -> [String; 2] {
    UNTIL.map(|until| name(bdf, until))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// This user's.
    Own,
    /// The host's, read by a tenant.
    Host,
    /// A tenant's, read by the host.
    Tenant,
}

/// The directories whose records count: this user's, and the host's for a tenant, or those of all tenants for the
/// host.
pub(crate) fn record_dirs(paths: &HostPaths) -> Vec<RecordDir> {
    let mut record_dirs = vec![RecordDir::own(paths)];
    if let Some(dir) = shared_quarantine(paths) {
        record_dirs.push(RecordDir {
            dir,
            held: None,
            owner: Owner::Host,
        });
        return record_dirs;
    }
    let tenants = paths.state.join(TENANTS);
    for name in sysfs::entries(&tenants).unwrap_or_default() {
        let inner = Path::new(&name).join(DIR);
        // A user who may not look there moves no devices.
        if let Ok(Some(held)) = HeldDir::below(&tenants, &inner) {
            record_dirs.push(RecordDir {
                dir: tenants.join(inner),
                held: Some(held),
                owner: Owner::Tenant,
            });
        }
    }
    record_dirs
}

/// The host's directory of records, where these paths are a tenant's: its records count for the tenant too.
pub fn shared_quarantine(paths: &HostPaths) -> Option<PathBuf> {
    let host = paths.state_of_host();
    (host != paths.state).then(|| host.join(DIR))
}

impl RecordDir {
    fn own(paths: &HostPaths) -> Self {
        Self {
            dir: paths.state.join(DIR),
            held: None,
            owner: Owner::Own,
        }
    }

    /// The names of the files in it; none if they cannot be listed, or are too many.
    pub(crate) fn names(&self) -> Option<Vec<String>> {
        match &self.held {
            None => sysfs::entries(&self.dir).ok(),
            Some(held) => {
                let (names, more) = held.names(MOST_FILES).ok()?;
                (!more).then_some(names)
            }
        }
    }

    fn record(&self, paths: &HostPaths, bdf: HostBdf, until: Until) -> Option<Content> {
        let name = name(bdf, until);
        let path = self.dir.join(&name);
        let read = || -> io::Result<Option<Vec<u8>>> {
            let file = match &self.held {
                Some(held) => held.regular(&name)?,
                None => regular::open_no_link(&path)?,
            };
            if self.owner == Owner::Tenant && !is_owners(paths, bdf, &file)? {
                return Ok(None);
            }
            let mut text = Vec::new();
            file.take(LONGEST).read_to_end(&mut text)?;
            Ok(Some(text))
        };
        match read() {
            Ok(Some(text)) => {
                let record = match self.owner {
                    Owner::Tenant => untrusted(&text),
                    Owner::Own | Owner::Host => serde_json::from_slice(&text).ok(),
                };
                let damaged = || Content::Unreadable(format!("{} is damaged", path.display()));
                Some(record.map_or_else(damaged, Content::Record))
            }
            Ok(None) => None,
            Err(error) => self.unread(&path, &error),
        }
    }

    /// Removes a record. Other files of a tenant may stay.
    fn forget(&self, paths: &HostPaths, bdf: HostBdf, until: Until) -> Result<(), QuarantineError> {
        let name = name(bdf, until);
        let path = self.dir.join(&name);
        let Some(held) = &self.held else {
            return remove(path);
        };
        match held.remove(&name) {
            Err(source) if self.record(paths, bdf, until).is_some() => {
                Err(QuarantineError::File { path, source })
            }
            _ => Ok(()),
        }
    }

    /// The result for a file that cannot be read.
    fn unread(&self, path: &Path, error: &io::Error) -> Option<Content> {
        static WARNED: Once = Once::new();
        match self.owner {
            _ if sysfs::is_gone(error) => None,
            // Other files of a tenant are ignored.
            Owner::Tenant => None,
            // If the directory is closed, missing files give the same error.
            Owner::Host if error.kind() == io::ErrorKind::PermissionDenied => {
                WARNED.call_once(|| {
                    tracing::warn!(
                        "{}: cannot read which of the host's devices are in quarantine: {error}",
                        self.dir.display()
                    );
                });
                None
            }
            Owner::Own | Owner::Host => {
                let what = format!("{} cannot be read: {error}", path.display());
                Some(Content::Unreadable(what))
            }
        }
    }
}

/// Whether a tenant's record is about a device of that tenant: then the device's lock file has the same owner.
fn is_owners(paths: &HostPaths, bdf: HostBdf, record: &fs::File) -> io::Result<bool> {
    let lease = fs::symlink_metadata(lock_file::lock_path(paths, bdf))?;
    Ok(lease.uid() == record.metadata()?.uid())
}

/// Copies tenants' records of a device that goes back to the host.
pub(crate) fn copy_tenant_records(paths: &HostPaths, bdf: HostBdf) -> io::Result<()> {
    let record_dirs = record_dirs(paths);
    let tenants = record_dirs.iter().filter(|dir| dir.owner == Owner::Tenant);
    for dir in tenants {
        for until in UNTIL {
            if let Some(Content::Record(record)) = dir.record(paths, bdf, until) {
                add(paths, bdf, &record)?;
            }
        }
    }
    Ok(())
}

fn boot(paths: &HostPaths) -> Option<String> {
    let path = paths.proc.join("sys/kernel/random/boot_id");
    sysfs::text(&path).ok().flatten()
}

fn path(paths: &HostPaths, bdf: HostBdf, until: Until) -> PathBuf {
    paths.state.join(DIR).join(name(bdf, until))
}

#[cfg(test)]
mod tests;
