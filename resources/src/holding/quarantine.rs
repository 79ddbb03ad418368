//! Devices that no VM gets for now, and why: one that hung, one that was used once.

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

/// Where records lie, below the state directory.
const DIR: &str = "quarantine";
/// No record is longer.
const LONGEST: u64 = 16 << 10;
/// Files of a tenant that are looked through before each device's is asked for by its name.
const MOST_FILES: usize = 4096;

/// How long a device stays out of use by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Until {
    /// Until the host boots, which cures what hangs; or until it is released.
    Boot,
    /// Until it is released.
    Released,
}

/// All of them, what is the more urgent first.
const UNTIL: [Until; 2] = [Until::Boot, Until::Released];

/// A record in the state directory. It counts only for the hardware that it was made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// Vendor and device id, in their shown form.
    id: String,
    reason: String,
    until: Until,
    /// The boot in which it was made.
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

/// Keeps a device from VMs until it is released by hand.
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

/// Tenants read the host's records too, whatever the umask of the one who writes them.
fn store(path: &Path, record: &Record) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    make_dir(dir)?;
    show(dir, 0o755)?;
    atomic::replace_record(path, &serde_json::to_vec(record)?)?;
    show(path, 0o644)
}

/// A record for a process that can neither ask for the boot nor open a file: it is left in the file of
/// the device's lease, whose directory a boot of the host empties.
pub(crate) fn note(id: PciId, reason: &str) -> Vec<u8> {
    let record = Record {
        id: id.to_string(),
        reason: reason.to_owned(),
        until: Until::Boot,
        boot: None,
    };
    serde_json::to_vec(&record).unwrap_or_default()
}

/// A record that may be a tenant's, who writes into it what it likes.
fn of_others(text: &[u8]) -> Option<Record> {
    let record: Record = serde_json::from_slice(text).ok()?;
    Some(Record {
        reason: short(&record.reason),
        ..record
    })
}

/// What a [`note`] says, or what somebody put into its place. It lasts until the host boots, as a note does.
fn of_note(text: &[u8]) -> Option<Record> {
    Some(Record {
        until: Until::Boot,
        boot: None,
        ..of_others(text)?
    })
}

/// Writes down what a [`note`] says. Anything else is none.
pub(crate) fn keep(paths: &HostPaths, bdf: HostBdf, text: &[u8]) -> io::Result<()> {
    let Some(record) = of_note(text) else {
        return Ok(());
    };
    let boot = boot(paths);
    add(paths, bdf, &Record { boot, ..record })
}

/// Writes down what others say of a device, beside what is written down already. A record of another device
/// is none.
fn add(paths: &HostPaths, bdf: HostBdf, record: &Record) -> io::Result<()> {
    let there = id_at(paths, bdf)?;
    if there.is_some_and(|id| id.to_string() != record.id) {
        return Ok(());
    }
    let own = Home::own(paths);
    let now = boot(paths);
    let known = own.record(paths, bdf, record.until);
    match known.is_some_and(|known| known.counts(&now, &record.id)) {
        true => Ok(()),
        false => store(&path(paths, bdf, record.until), record),
    }
}

/// Takes all records of a device away.
pub(crate) fn forget(paths: &HostPaths, bdf: HostBdf) -> Result<(), QuarantineError> {
    for home in homes(paths) {
        for until in UNTIL {
            home.forget(paths, bdf, until)?;
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

fn own_record(path: &Path) -> Option<Record> {
    let file = regular::open_no_link(path).ok()?;
    serde_json::from_reader(file.take(LONGEST)).ok()
}

/// Takes the record away that [`quarantine`] made with this reason, unless another one replaced it.
pub(crate) fn forget_reason(
    paths: &HostPaths,
    bdf: HostBdf,
    reason: &str,
) -> Result<(), QuarantineError> {
    for path in UNTIL.map(|until| path(paths, bdf, until)) {
        match own_record(&path) {
            Some(record) if record.reason == reason => remove(path)?,
            _ => {}
        }
    }
    Ok(())
}

/// Why a device must not be moved: it hung or failed, and another attempt would hang as well.
pub(crate) fn hung(paths: &HostPaths, bdf: HostBdf, id: PciId) -> Option<String> {
    let found = find(paths, bdf, id)?;
    (found.until == Until::Boot).then(|| found.reason())
}

/// Why a device is in quarantine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    reasons: Vec<String>,
    /// Until the host boots if any of them is, as then the device must not be moved.
    pub(crate) until: Until,
}

impl Found {
    /// The reasons in a line.
    pub(crate) fn reason(&self) -> String {
        self.reasons.join("; ")
    }
}

/// Why a device with these ids is in quarantine, if it is: all the reasons that there are.
///
/// A record that cannot be read keeps the device out: better idle than broken.
pub(crate) fn find(paths: &HostPaths, bdf: HostBdf, id: PciId) -> Option<Found> {
    let id = &id.to_string();
    let now = boot(paths);
    let homes = homes(paths);
    let kept = homes.iter().flat_map(|home| {
        let records = UNTIL.map(|until| home.record(paths, bdf, until));
        records.into_iter().flatten()
    });
    let note = || of_note(&lock_file::note(paths, bdf)?).map(Kept::Record);
    let mut found: Option<Found> = None;
    for (reason, until) in kept
        .chain(note())
        .filter(|kept| kept.counts(&now, id))
        .map(Kept::into_reason)
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

/// What a file says.
enum Kept {
    Record(Record),
    /// Why it cannot be understood.
    Broken(String),
}

impl Kept {
    /// Whether it is about a device with these ids, in the boot that is now.
    fn counts(&self, now: &Option<String>, id: &str) -> bool {
        match self {
            Self::Broken(_) => true,
            Self::Record(record) => {
                let booted = record.boot.is_some() && record.boot != *now;
                !(record.until == Until::Boot && booted) && record.id == id
            }
        }
    }

    fn into_reason(self) -> (String, Until) {
        match self {
            Self::Record(Record { reason, until, .. }) => (reason, until),
            Self::Broken(reason) => (reason, Until::Released),
        }
    }
}

/// A directory of records that count for the host and for a tenant alike: the hardware is the same.
pub(crate) struct Home {
    dir: PathBuf,
    /// Of a tenant: held open, as the tenant may put something else into its place.
    held: Option<HeldDir>,
    whose: Whose,
}

/// The name of a device's record.
fn name(bdf: HostBdf, until: Until) -> String {
    match until {
        Until::Boot => format!("{bdf}.boot.json"),
        Until::Released => format!("{bdf}.json"),
    }
}

/// The names of a device's records: it may hang and have been used once.
pub(crate) fn names(bdf: HostBdf) -> [String; 2] {
    UNTIL.map(|until| name(bdf, until))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    /// One's own.
    Own,
    /// The host's, in the eyes of a tenant.
    Host,
    /// A tenant's, in the eyes of the host.
    Tenant,
}

/// Where records are: one's own, and the host's for a tenant, or those of tenants for the host.
pub(crate) fn homes(paths: &HostPaths) -> Vec<Home> {
    let mut homes = vec![Home::own(paths)];
    if let Some(dir) = shared_quarantine(paths) {
        homes.push(Home {
            dir,
            held: None,
            whose: Whose::Host,
        });
        return homes;
    }
    let tenants = paths.state.join(TENANTS);
    for name in sysfs::entries(&tenants).unwrap_or_default() {
        let inner = Path::new(&name).join(DIR);
        // Who may not look there is nobody who moves devices.
        if let Ok(Some(held)) = HeldDir::below(&tenants, &inner) {
            homes.push(Home {
                dir: tenants.join(inner),
                held: Some(held),
                whose: Whose::Tenant,
            });
        }
    }
    homes
}

/// The host's records, where this is a tenant's view: they count for the tenant too.
pub fn shared_quarantine(paths: &HostPaths) -> Option<PathBuf> {
    let host = paths.state_of_host();
    (host != paths.state).then(|| host.join(DIR))
}

impl Home {
    fn own(paths: &HostPaths) -> Self {
        Self {
            dir: paths.state.join(DIR),
            held: None,
            whose: Whose::Own,
        }
    }

    /// Names of what is there; none where that cannot be listed, or is too much.
    pub(crate) fn names(&self) -> Option<Vec<String>> {
        match &self.held {
            None => sysfs::entries(&self.dir).ok(),
            Some(held) => {
                let (names, more) = held.names(MOST_FILES).ok()?;
                (!more).then_some(names)
            }
        }
    }

    fn record(&self, paths: &HostPaths, bdf: HostBdf, until: Until) -> Option<Kept> {
        let name = name(bdf, until);
        let path = self.dir.join(&name);
        let read = || -> io::Result<Option<Vec<u8>>> {
            let file = match &self.held {
                Some(held) => held.regular(&name)?,
                None => regular::open_no_link(&path)?,
            };
            if self.whose == Whose::Tenant && !is_owners(paths, bdf, &file)? {
                return Ok(None);
            }
            let mut text = Vec::new();
            file.take(LONGEST).read_to_end(&mut text)?;
            Ok(Some(text))
        };
        match read() {
            Ok(Some(text)) => {
                let record = match self.whose {
                    Whose::Tenant => of_others(&text),
                    Whose::Own | Whose::Host => serde_json::from_slice(&text).ok(),
                };
                let broken = || Kept::Broken(format!("{} is damaged", path.display()));
                Some(record.map_or_else(broken, Kept::Record))
            }
            Ok(None) => None,
            Err(error) => self.unread(&path, &error),
        }
    }

    /// Removes a record. What a tenant has put there besides may stay.
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

    /// What a file that cannot be read comes to.
    fn unread(&self, path: &Path, error: &io::Error) -> Option<Kept> {
        static TOLD: Once = Once::new();
        match self.whose {
            _ if sysfs::is_gone(error) => None,
            // What a tenant puts there besides is nothing to anybody.
            Whose::Tenant => None,
            // Where the directory is closed this is said of files that are not there too.
            Whose::Host if error.kind() == io::ErrorKind::PermissionDenied => {
                TOLD.call_once(|| {
                    tracing::warn!(
                        "{}: what the host has in quarantine is not known here: {error}",
                        self.dir.display()
                    );
                });
                None
            }
            Whose::Own | Whose::Host => {
                let what = format!("{} cannot be read: {error}", path.display());
                Some(Kept::Broken(what))
            }
        }
    }
}

/// Whether a tenant's record is about a device of that tenant: the file of its lease is the user's too.
fn is_owners(paths: &HostPaths, bdf: HostBdf, record: &fs::File) -> io::Result<bool> {
    let lease = fs::symlink_metadata(lock_file::lock_path(paths, bdf))?;
    Ok(lease.uid() == record.metadata()?.uid())
}

/// Keeps what tenants' records say of devices that are about to be the host's again.
pub(crate) fn adopt(paths: &HostPaths, bdf: HostBdf) -> io::Result<()> {
    let homes = homes(paths);
    let tenants = homes.iter().filter(|home| home.whose == Whose::Tenant);
    for home in tenants {
        for until in UNTIL {
            if let Some(Kept::Record(record)) = home.record(paths, bdf, until) {
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
