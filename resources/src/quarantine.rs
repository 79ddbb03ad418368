//! Devices that no VM gets for now, and why: one that hung, one that was used once.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Once;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::atomic::{self, make_dir, show};
use crate::host::{HostBdf, HostPaths};
use crate::inventory::{HostDevice, InventoryError};
use crate::lease::{self, DeviceLock, LeaseRecord};
use crate::sysfs::{self, HeldDir};

/// Where records lie, below the state directory.
const DIR: &str = "quarantine";
/// Where tenants' state directories lie, below the host's.
const TENANTS: &str = "tenants";
/// No record is longer.
const LONGEST: u64 = 16 << 10;
/// Characters of what others say of a device.
const MOST_WORDS: usize = 200;

/// How long a device stays out of the pools by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Until {
    /// Until the host boots, which cures what hangs; or until it is released.
    Boot,
    /// Until it is released.
    Released,
}

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
    #[error("cannot use {path}: run as root, or set GANTRY_STATE_DIR to a directory that you own")]
    File {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The device is not there, or cannot be looked at.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The device is in no quarantine.
    #[error("{bdf} is not in quarantine: `gantry device list` shows the states")]
    NotThere {
        /// The device.
        bdf: HostBdf,
    },
    /// Somebody has the device.
    #[error(
        "{bdf} is held by somebody: `gantry device list` shows by whom; release it when that is over"
    )]
    Held {
        /// The device.
        bdf: HostBdf,
    },
    /// The device still is not well.
    #[error(
        "{bdf} does not answer (it reads all-ones): reset or power-cycle it, or boot the host, then release it"
    )]
    Dead {
        /// The device.
        bdf: HostBdf,
    },
}

/// Keeps a device out of the pools until somebody releases it.
pub fn quarantine(
    paths: &HostPaths,
    device: &HostDevice,
    reason: &str,
    until: Until,
) -> Result<(), QuarantineError> {
    let record = Record {
        id: device.id.to_string(),
        reason: reason.to_owned(),
        until,
        boot: boot(paths),
    };
    let path = path(paths, device.bdf);
    store(&path, &record).map_err(|source| QuarantineError::File { path, source })
}

/// Tenants read the host's records too, whatever the umask of the one who writes them.
fn store(path: &Path, record: &Record) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    make_dir(dir)?;
    show(dir, 0o755)?;
    atomic::replace(path, &serde_json::to_vec(record)?)?;
    show(path, 0o644)
}

/// A record for a process that can neither ask for the boot nor open a file: it is left in the file of
/// the device's lease, whose directory a boot of the host empties.
pub(crate) fn note(device: &HostDevice, reason: &str) -> Vec<u8> {
    let record = Record {
        id: device.id.to_string(),
        reason: reason.to_owned(),
        until: Until::Boot,
        boot: None,
    };
    serde_json::to_vec(&record).unwrap_or_default()
}

/// As much of what others say as a line has room for: it is kept for people to read, at a terminal.
pub(crate) fn short(reason: &str) -> String {
    let printed = reason.chars().filter(|one| !one.is_control());
    printed.take(MOST_WORDS).collect()
}

/// A record that may be a tenant's, who writes into it what it likes.
fn of_others(text: &[u8]) -> Option<Record> {
    let record: Record = serde_json::from_slice(text).ok()?;
    Some(Record {
        reason: short(&record.reason),
        ..record
    })
}

/// Writes down what a [`note`] says. Anything else is none.
pub(crate) fn keep(paths: &HostPaths, bdf: HostBdf, text: &[u8]) -> io::Result<()> {
    let Some(record) = of_others(text) else {
        return Ok(());
    };
    let record = Record {
        boot: boot(paths),
        ..record
    };
    store(&path(paths, bdf), &record)
}

/// Gives a device back to its pools, if it answers.
pub fn release_quarantine(paths: &HostPaths, bdf: HostBdf) -> Result<(), QuarantineError> {
    let device = HostDevice::read(paths, bdf)?;
    if device.quarantine.is_none() {
        return Err(QuarantineError::NotThere { bdf });
    }
    if is_dead(&paths.pci_device(bdf).join("config")) {
        return Err(QuarantineError::Dead { bdf });
    }
    // Taking the lock takes away what its last holder left.
    let record = LeaseRecord::task("gantry device release-quarantine");
    let lock = DeviceLock::take(paths, bdf, &record).map_err(InventoryError::from)?;
    if lock.is_none() {
        return Err(QuarantineError::Held { bdf });
    }
    homes(paths)
        .iter()
        .try_for_each(|home| remove(home.file(bdf)))
}

fn remove(path: PathBuf) -> Result<(), QuarantineError> {
    match fs::remove_file(&path) {
        Err(source) if !sysfs::is_gone(&source) => Err(QuarantineError::File { path, source }),
        _ => Ok(()),
    }
}

/// Takes the record away that [`quarantine`] made with this reason, unless another one replaced it.
pub(crate) fn forget_reason(
    paths: &HostPaths,
    bdf: HostBdf,
    reason: &str,
) -> Result<(), QuarantineError> {
    let text = fs::read(path(paths, bdf)).unwrap_or_default();
    match serde_json::from_slice::<Record>(&text) {
        Ok(record) if record.reason == reason => remove(path(paths, bdf)),
        _ => Ok(()),
    }
}

/// Why a device must not be moved: it hung or failed, and another attempt would hang as well.
pub(crate) fn hung(paths: &HostPaths, device: &HostDevice) -> Option<String> {
    let found = find(paths, device.bdf, &device.id.to_string())?;
    (found.until == Until::Boot).then_some(found.reason)
}

/// Why a device is in quarantine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) reason: String,
    pub(crate) until: Until,
}

/// Why a device with these ids is in quarantine, if it is.
///
/// A record that cannot be read keeps the device out: better idle than broken.
pub(crate) fn find(paths: &HostPaths, bdf: HostBdf, id: &str) -> Option<Found> {
    let now = boot(paths);
    let counts = |found: &Kept| match found {
        Kept::Broken(_) => true,
        Kept::Record(record) => {
            let booted = record.boot.is_some() && record.boot != now;
            !(record.until == Until::Boot && booted) && record.id == id
        }
    };
    let kept = homes(paths)
        .iter()
        .filter_map(|home| home.record(paths, bdf))
        .find(counts);
    // A record of another boot or device says nothing of what the last VM left.
    let note = || of_others(&lease::note(paths, bdf)?);
    let note = || note().map(Kept::Record).filter(counts);
    Some(match kept.or_else(note)? {
        Kept::Record(Record { reason, until, .. }) => Found { reason, until },
        Kept::Broken(reason) => {
            let until = Until::Released;
            Found { reason, until }
        }
    })
}

/// What a file says.
enum Kept {
    Record(Record),
    /// Why it cannot be understood.
    Broken(String),
}

/// A directory of records that count for the host and for a tenant alike: the hardware is the same.
pub(crate) struct Home {
    dir: PathBuf,
    /// Of a tenant: held open, as the tenant may put something else into its place.
    _held: Option<HeldDir>,
    whose: Whose,
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
    let plain = |dir, whose| Home {
        dir,
        _held: None,
        whose,
    };
    let mut homes = vec![plain(paths.state.join(DIR), Whose::Own)];
    if let Some(above) = shared_quarantine(paths) {
        homes.push(plain(above, Whose::Host));
        return homes;
    }
    let tenants = paths.state.join(TENANTS);
    for name in sysfs::entries(&tenants).unwrap_or_default() {
        // Who may not look there is nobody who moves devices.
        if let Ok(Some(held)) = HeldDir::open(&tenants.join(name).join(DIR)) {
            homes.push(Home {
                dir: held.path(),
                _held: Some(held),
                whose: Whose::Tenant,
            });
        }
    }
    homes
}

/// The host's records, where this is a tenant's view: they count for the tenant too.
pub fn shared_quarantine(paths: &HostPaths) -> Option<PathBuf> {
    let tenants = paths.state.parent()?;
    let of_tenant = paths.only.is_some() && tenants.file_name()? == TENANTS;
    Some(tenants.parent()?.join(DIR)).filter(|_| of_tenant)
}

impl Home {
    /// Its place, for a list of what is there.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    fn file(&self, bdf: HostBdf) -> PathBuf {
        self.dir.join(format!("{bdf}.json"))
    }

    fn record(&self, paths: &HostPaths, bdf: HostBdf) -> Option<Kept> {
        let path = self.file(bdf);
        let read = || -> io::Result<Option<Vec<u8>>> {
            let file = sysfs::regular(&path)?;
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
    let lease = fs::symlink_metadata(lease::lock_path(paths, bdf))?;
    Ok(lease.uid() == record.metadata()?.uid())
}

/// Keeps what tenants' records say of devices that are about to be the host's again.
pub(crate) fn adopt(paths: &HostPaths, bdf: HostBdf) -> io::Result<()> {
    let own = path(paths, bdf);
    for home in homes(paths)
        .iter()
        .filter(|home| home.whose == Whose::Tenant)
    {
        if let (Some(Kept::Record(record)), false) = (home.record(paths, bdf), own.exists()) {
            store(&own, &record)?;
        }
    }
    Ok(())
}

/// A device that is off the bus reads all-ones (PCIe 2.3.2, completion with an error).
fn is_dead(config: &Path) -> bool {
    let mut id = [0; 2];
    let read = fs::File::open(config).and_then(|mut file| io::Read::read_exact(&mut file, &mut id));
    read.is_ok() && id == [0xff; 2]
}

fn boot(paths: &HostPaths) -> Option<String> {
    let path = paths.proc.join("sys/kernel/random/boot_id");
    sysfs::text(&path).ok().flatten()
}

fn path(paths: &HostPaths, bdf: HostBdf) -> PathBuf {
    paths.state.join(DIR).join(format!("{bdf}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost, bdf};
    use crate::inventory::DeviceState;
    use std::os::unix::fs::PermissionsExt;

    fn host() -> FakeHost {
        let host = FakeHost::new(&[Fake::nvme("01:00.0", 1)]);
        host.file("proc/sys/kernel/random/boot_id", "one\n");
        host
    }

    #[test]
    fn a_device_is_kept_out_until_it_is_released() {
        let host = host();
        let disk = host.read("01:00.0");
        quarantine(&host.paths, &disk, "it was used", Until::Released).unwrap();
        host.file("proc/sys/kernel/random/boot_id", "two\n");
        let reason = "it was used".to_owned();
        assert_eq!(
            host.read("01:00.0").state(),
            DeviceState::Quarantined { reason }
        );
        release_quarantine(&host.paths, disk.bdf).unwrap();
        assert_eq!(host.read("01:00.0").state(), DeviceState::Detached);
        let error = release_quarantine(&host.paths, disk.bdf)
            .unwrap_err()
            .to_string();
        assert!(error.contains("not in quarantine"), "{error}");
    }

    #[test]
    fn what_a_confined_vm_sets_aside_stays_out_until_it_is_released() {
        let host = host();
        let holder = crate::Holder {
            vm: "a".to_owned(),
            pid: 1,
        };
        host.file(
            "etc/groups.json",
            r#"{"groups": [{"name": "g", "rules": [{"class": "0108"}]}]}"#,
        );
        let wish = [crate::Request::group("g", 1)];
        let lease = crate::allocate(&host.paths, &wish, &holder).unwrap();
        lease[0].set_aside("its reset failed");
        assert!(matches!(
            host.read("01:00.0").state(),
            DeviceState::Assigned { .. }
        ));
        drop(lease);
        let reason = "its reset failed".to_owned();
        let quarantined = DeviceState::Quarantined { reason };
        assert_eq!(host.read("01:00.0").state(), quarantined);
        let refused = crate::allocate(&host.paths, &wish, &holder).unwrap_err();
        assert!(refused.to_string().contains("release-quarantine"));
        // A command that takes the lock writes it down before it takes its place.
        let record = LeaseRecord::task("a");
        drop(DeviceLock::take(&host.paths, bdf("01:00.0"), &record).unwrap());
        assert_eq!(host.read("01:00.0").state(), quarantined);
        host.file("proc/sys/kernel/random/boot_id", "two\n");
        assert_eq!(host.read("01:00.0").quarantine, None, "a boot ends it");
        host.file("proc/sys/kernel/random/boot_id", "one\n");
        release_quarantine(&host.paths, bdf("01:00.0")).unwrap();
        assert_eq!(host.read("01:00.0").state(), DeviceState::Detached);
    }

    #[test]
    fn a_note_that_cannot_be_kept_stays_in_its_place() {
        let host = host();
        let device = host.read("01:00.0");
        host.file(
            "run/leases/0000:01:00.0.lock",
            std::str::from_utf8(&note(&device, "it hangs")).unwrap(),
        );
        host.file("var", "no directory");
        let record = LeaseRecord::task("a");
        assert!(DeviceLock::take(&host.paths, device.bdf, &record).is_err());
        assert_eq!(host.read("01:00.0").quarantine.as_deref(), Some("it hangs"));
    }

    #[test]
    fn a_tenant_reads_the_hosts_records_whatever_the_umask_was() {
        let host = host();
        let disk = host.read("01:00.0");
        let file = path(&host.paths, disk.bdf);
        let dir = file.parent().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        host.file("var/quarantine/0000:01:00.0.json", "{}");
        for (path, closed) in [(&*file, 0o600), (dir, 0o700)] {
            fs::set_permissions(path, fs::Permissions::from_mode(closed)).unwrap();
        }
        quarantine(&host.paths, &disk, "it hangs", Until::Boot).unwrap();
        assert_eq!((mode(dir), mode(&file)), (0o755, 0o644));
    }

    #[test]
    fn a_tenant_that_may_not_look_at_the_hosts_records_keeps_its_devices() {
        let kept = |whose, error: io::ErrorKind| {
            let home = Home {
                dir: PathBuf::from("/x"),
                _held: None,
                whose,
            };
            home.unread(Path::new("/x/y"), &error.into()).is_some()
        };
        let denied = io::ErrorKind::PermissionDenied;
        let cases = [
            (Whose::Own, true),
            (Whose::Host, false),
            (Whose::Tenant, false),
        ];
        for (whose, keeps_out) in cases {
            assert_eq!(kept(whose, denied), keeps_out, "{whose:?}");
            assert!(!kept(whose, io::ErrorKind::NotFound), "{whose:?}");
        }
        assert!(kept(Whose::Host, io::ErrorKind::InvalidData));
    }

    #[test]
    fn what_a_note_says_is_fit_for_a_terminal() {
        let host = host();
        let disk = host.read("01:00.0");
        let wild = format!("\u{1b}[2Jgone\n\u{7}{}", "x".repeat(999));
        let note = String::from_utf8(note(&disk, &wild)).unwrap();
        host.file("run/leases/0000:01:00.0.lock", &note);
        let tame = format!("[2Jgone{}", "x".repeat(193));
        assert_eq!(host.read("01:00.0").quarantine.as_ref(), Some(&tame));
        let record = LeaseRecord::task("a");
        drop(DeviceLock::take(&host.paths, disk.bdf, &record).unwrap());
        let kept = fs::read_to_string(path(&host.paths, disk.bdf)).unwrap();
        assert!(kept.contains(&format!("\"{tame}\"")), "{kept}");
    }

    #[test]
    fn a_boot_or_other_hardware_ends_it() {
        let host = host();
        let disk = host.read("01:00.0");
        quarantine(&host.paths, &disk, "it hangs", Until::Boot).unwrap();
        let reason = |id| find(&host.paths, disk.bdf, id).map(|found| found.reason);
        assert_eq!(reason("1b36:0010").as_deref(), Some("it hangs"));
        assert_eq!(reason("1b36:0011"), None);
        host.file("proc/sys/kernel/random/boot_id", "two\n");
        assert_eq!(host.read("01:00.0").quarantine, None);
    }

    #[test]
    fn a_damaged_record_keeps_the_device_out_and_a_dead_device_stays() {
        let host = host();
        let disk = host.read("01:00.0");
        host.file("var/quarantine/0000:01:00.0.json", "{");
        assert!(
            host.read("01:00.0")
                .quarantine
                .unwrap()
                .contains("is damaged")
        );
        fs::write(host.paths.pci_device(disk.bdf).join("config"), [0xff; 64]).unwrap();
        let error = release_quarantine(&host.paths, bdf("01:00.0"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("does not answer"), "{error}");
    }

    #[test]
    fn a_record_of_another_boot_hides_no_note() {
        let host = host();
        let disk = host.read("01:00.0");
        quarantine(&host.paths, &disk, "it hung", Until::Boot).unwrap();
        host.file("proc/sys/kernel/random/boot_id", "two\n");
        let id = disk.id.to_string();
        assert_eq!(find(&host.paths, disk.bdf, &id), None);
        let note = String::from_utf8(note(&disk, "its reset failed")).unwrap();
        host.file("run/leases/0000:01:00.0.lock", &note);
        let found = find(&host.paths, disk.bdf, &id).unwrap();
        assert_eq!(found.reason, "its reset failed");
    }

    #[test]
    fn only_the_record_that_was_made_is_taken_back() {
        let host = host();
        let disk = host.read("01:00.0");
        quarantine(&host.paths, &disk, "it was used", Until::Released).unwrap();
        quarantine(&host.paths, &disk, "it hung", Until::Boot).unwrap();
        forget_reason(&host.paths, disk.bdf, "it was used").unwrap();
        assert_eq!(hung(&host.paths, &disk).as_deref(), Some("it hung"));
        forget_reason(&host.paths, disk.bdf, "it hung").unwrap();
        assert_eq!(hung(&host.paths, &disk), None);
    }
}
