//! Leases: who holds a device, as a kernel lock that dies with its holder.
//!
//! Each device has a file in `<run>/leases`, made when it is first leased and never removed, but for that of
//! a mediated device, which is removed under its lock when the device is gone. A lease is
//! an open-file-description write lock on it (fcntl(2), "Open file description locks"): the kernel lets
//! go of it when the last descriptor closes, so with the holder's death by any cause. The descriptors
//! are close-on-exec; only the opener hands them on, to the VM that it leased for, so that either
//! process keeps the lock. The content says who holds the lock, for people; only the
//! lock counts. The files can be read by their owner alone: whoever could open one could block it.

mod file;
mod passing;

use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use file::content;
pub(crate) use file::{LockFile, create, is_locked, open, status, status_of, try_lock, unlock};
pub(crate) use passing::{InTheWay, PASSING_PATIENCE, is_ending, is_passing, under_lock};

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::sysfs;
use crate::base::uuid::Uuid;
use crate::holding::quarantine;
use crate::inventory::card::Terms;
use crate::inventory::device::HostDevice;
use crate::inventory::mdev::MdevDevice;
use crate::moving::demand::Watch;

/// How long to wait for others who are choosing devices. Choosing takes milliseconds.
pub(crate) const ALLOCATION_DEADLINE: Duration = Duration::from_secs(10);

/// The VM that a device is leased for, and the process that keeps the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Name of the VM.
    pub vm: String,
    /// Its process.
    pub pid: u32,
}

/// What a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseKind {
    /// A VM has the device.
    Vm,
    /// A command is moving the device between drivers.
    Task,
}

/// What a holder says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// What the lease is for.
    pub kind: LeaseKind,
    /// Name of the VM or of the command.
    pub name: String,
    /// Process; none where another user names one that is not its own.
    pub pid: Option<NonZeroU32>,
    /// When it was taken, in seconds since 1970.
    pub since: u64,
}

impl LeaseRecord {
    fn now(kind: LeaseKind, name: &str, pid: u32) -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |passed| passed.as_secs());
        Self {
            kind,
            name: name.to_owned(),
            pid: NonZeroU32::new(pid),
            since,
        }
    }

    pub(crate) fn vm(holder: &Holder) -> Self {
        Self::now(LeaseKind::Vm, &holder.vm, holder.pid)
    }

    pub(crate) fn task(name: &str) -> Self {
        Self::now(LeaseKind::Task, name, std::process::id())
    }
}

impl fmt::Display for LeaseRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            LeaseKind::Vm => write!(f, "VM '{}'", self.name)?,
            LeaseKind::Task => write!(f, "`{}`", self.name)?,
        }
        match self.pid {
            Some(pid) => write!(f, " (pid {pid})"),
            None => Ok(()),
        }
    }
}

/// Whether a device is leased, and by whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseStatus {
    /// By nobody.
    Free,
    /// By this holder.
    Held(LeaseRecord),
    /// By somebody whose record is not to be had: a full disk, or another user's lease.
    Unrecorded,
    /// By somebody unknown, for all that can be told: the lock file cannot be read.
    Unreadable {
        /// The lock file.
        file: PathBuf,
        /// Why not.
        why: String,
    },
}

impl LeaseStatus {
    /// Whether somebody holds the device.
    pub fn is_held(&self) -> bool {
        *self != Self::Free
    }

    /// The holder's record.
    pub fn record(&self) -> Option<&LeaseRecord> {
        match self {
            Self::Held(record) => Some(record),
            Self::Free | Self::Unrecorded | Self::Unreadable { .. } => None,
        }
    }
}

/// Leasing failed.
#[derive(Debug, Error)]
pub enum LeaseError {
    /// A file or directory of the run directory cannot be used.
    #[error(
        "cannot use {path} to keep leases{}",
        sysfs::if_denied(
            .source,
            "run as root, or as a tenant's user (`gantry tenant create`)"
        )
    )]
    File {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else is choosing devices and does not finish.
    #[error(
        "waited {waited:?} for {holder} to finish choosing devices, which takes milliseconds: is that process stopped?"
    )]
    AllocationBusy {
        /// Who, or words for somebody unknown.
        holder: String,
        /// How long.
        waited: Duration,
    },
    /// Somebody else is changing what is whose and does not finish.
    #[error(
        "waited a minute for {holder} to finish: is that process stopped, or does a device hang? see dmesg"
    )]
    OwnersBusy {
        /// Who, or words for somebody unknown.
        holder: String,
    },
}

impl LeaseError {
    fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        |source| Self::File { path, source }
    }
}

/// A device held for a VM; dropping it gives the device back.
///
/// An IOMMU group is never split between VMs, so all endpoints of the device's group are locked with
/// it. The leases of one VM on devices of one group share those locks; the last one dropped frees them.
#[derive(Debug)]
pub struct Lease {
    device: Leased,
    group: Arc<[DeviceLock]>,
    /// Of a device that goes back to the host.
    watch: Option<Arc<Watch>>,
    /// What it is opened with.
    token: Option<Uuid>,
    terms: Terms,
}

/// What is leased.
#[derive(Debug)]
enum Leased {
    Pci(Box<HostDevice>),
    Mdev(MdevDevice),
}

impl Lease {
    pub(crate) fn new(device: HostDevice, group: Arc<[DeviceLock]>) -> Self {
        Self::of(Leased::Pci(Box::new(device)), group)
    }

    /// The lease on a mediated device, which is alone in its IOMMU group.
    pub(crate) fn mdev(device: MdevDevice, lock: DeviceLock, watch: Option<Arc<Watch>>) -> Self {
        let mut lease = Self::of(Leased::Mdev(device), [lock].into());
        lease.watch = watch;
        lease
    }

    fn of(device: Leased, group: Arc<[DeviceLock]>) -> Self {
        Self {
            device,
            group,
            watch: None,
            token: None,
            terms: Terms::default(),
        }
    }

    /// The lease on a device that is given on these terms.
    pub(crate) fn on_terms(mut self, terms: Terms) -> Self {
        self.terms = terms;
        self
    }

    /// On which terms the device is given.
    pub fn terms(&self) -> Terms {
        self.terms
    }

    /// The lease on a function of a card that others have functions of.
    pub(crate) fn with_token(mut self, token: Option<Uuid>) -> Self {
        self.token = token;
        self
    }

    /// The token that the device must be opened with.
    pub fn token(&self) -> Option<Uuid> {
        self.token
    }

    /// The lease on a device that goes back to the host with it.
    pub(crate) fn on_demand(mut self, device: HostDevice, watch: &Arc<Watch>) -> Self {
        self.device = Leased::Pci(Box::new(device));
        self.watch = Some(Arc::clone(watch));
        self
    }

    /// The PCI function as it was when it was leased; none for a mediated device.
    pub fn device(&self) -> Option<&HostDevice> {
        match &self.device {
            Leased::Pci(device) => Some(device),
            Leased::Mdev(_) => None,
        }
    }

    /// What VFIO opens the device by.
    pub fn name(&self) -> DeviceName {
        match &self.device {
            Leased::Pci(device) => device.bdf.into(),
            Leased::Mdev(device) => device.uuid.into(),
        }
    }

    /// Whether it is a virtual function of a card: a device of its own, whatever its address.
    pub fn is_virtual_function(&self) -> bool {
        self.device().is_some_and(|device| device.physfn.is_some())
    }

    /// The IOMMU group; none if the device has none.
    pub fn iommu_group(&self) -> Option<u32> {
        match &self.device {
            Leased::Pci(device) => device.iommu_group,
            Leased::Mdev(device) => device.iommu_group,
        }
    }

    /// Puts the device into quarantine when the lease ends: no VM gets it until it is released, or the
    /// host boots.
    ///
    /// This needs nothing that a confined process lacks: the reason is left in the lock's file, and the
    /// next command that moves the device writes it down where quarantine is kept.
    pub fn set_aside(&self, reason: &str) {
        // A mediated device goes with its lease, whatever became of it.
        let Some(device) = self.device() else {
            return;
        };
        if let Some(lock) = self.group.iter().find(|lock| lock.name == device.bdf) {
            let _ = lock.lock.leave.set(quarantine::note(device, reason));
        }
    }

    /// Its locks, for another lease of this VM on a device of the same IOMMU group.
    pub(crate) fn locks(&self) -> Arc<[DeviceLock]> {
        Arc::clone(&self.group)
    }

    /// The files of its locks. A lock holds as long as any process has its file open.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = &File> {
        self.group.iter().map(|lock| &lock.lock.file)
    }

    /// Every function that this lease keeps from others: the endpoints of the IOMMU group.
    pub fn locked(&self) -> impl Iterator<Item = DeviceName> {
        self.group.iter().map(|lock| lock.name)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Whoever is told waits for the locks, which are freed next.
        if let Some(watch) = &self.watch {
            watch.released(self.name());
        }
    }
}

/// The lock of one device.
#[derive(Debug)]
pub(crate) struct DeviceLock {
    name: DeviceName,
    lock: LockFile,
}

impl DeviceLock {
    /// Takes the lock of a device; none if somebody has it. A note of quarantine that the last holder
    /// left is written down first.
    pub(crate) fn take(
        paths: &HostPaths,
        name: impl Into<DeviceName>,
        record: &LeaseRecord,
    ) -> Result<Option<Self>, LeaseError> {
        let name = name.into();
        let path = lock_path(paths, name);
        let keep = |note: &[u8]| match name {
            DeviceName::Pci(bdf) => quarantine::keep(paths, bdf, note),
            DeviceName::Mdev(_) => Ok(()),
        };
        let lock =
            LockFile::take_after(paths, &path, record, keep).map_err(LeaseError::file(&path))?;
        Ok(lock.map(|lock| Self { name, lock }))
    }
}

/// The host-wide lock under which devices are chosen, so that contenders for several devices cannot
/// all give up. Always taken before any device's lock.
#[derive(Debug)]
pub(crate) struct AllocationLock {
    _lock: LockFile,
}

/// The host-wide lock under which it is changed what is whose. It is held while devices move, which may
/// take long, and so is taken before all other locks.
#[derive(Debug)]
pub(crate) struct OwnersLock {
    _lock: LockFile,
}

impl OwnersLock {
    /// How long one command may take: a write to sysfs that hangs is given up after half a minute.
    const DEADLINE: Duration = Duration::from_secs(60);

    pub(crate) fn acquire(paths: &HostPaths, record: &LeaseRecord) -> Result<Self, LeaseError> {
        let path = paths.run.join("owners.lock");
        let waited = wait(paths, &path, record, Self::DEADLINE)?;
        waited
            .map(|_lock| Self { _lock })
            .map_err(|holder| LeaseError::OwnersBusy { holder })
    }
}

impl AllocationLock {
    /// Waits for one holder no longer than the deadline.
    pub(crate) fn acquire(
        paths: &HostPaths,
        record: &LeaseRecord,
        deadline: Duration,
    ) -> Result<Self, LeaseError> {
        let path = paths.run.join("allocate.lock");
        let waited = wait(paths, &path, record, deadline)?;
        waited
            .map(|_lock| Self { _lock })
            .map_err(|holder| LeaseError::AllocationBusy {
                holder,
                waited: deadline,
            })
    }
}

/// Waits for a lock as long as its holders change, and for one of them until the deadline: then it is
/// named, and told of before if that is long.
fn wait(
    paths: &HostPaths,
    path: &Path,
    record: &LeaseRecord,
    deadline: Duration,
) -> Result<Result<LockFile, String>, LeaseError> {
    let mut started = Instant::now();
    let mut pause = Duration::from_micros(200);
    let mut seen = None;
    let mut told = false;
    loop {
        if let Some(lock) = LockFile::take(paths, path, record).map_err(LeaseError::file(path))? {
            return Ok(Ok(lock));
        }
        // It is one holder that must not take too long: of many contenders the last one waits for all.
        let patience = match told {
            true => deadline,
            false => deadline.min(ALLOCATION_DEADLINE),
        };
        if seen.is_none() || started.elapsed() >= patience {
            let holder = status(paths, path);
            if seen.as_ref() == Some(&holder) && holder.is_held() {
                let record = holder.record().map(ToString::to_string);
                let name = record.unwrap_or_else(|| "an unknown process".to_owned());
                if patience == deadline {
                    return Ok(Err(name));
                }
                tracing::warn!("waiting for {name} to finish");
                told = true;
            } else {
                seen = Some(holder);
                started = Instant::now();
                told = false;
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Who holds a device. Asks the kernel; takes no lock, not even for a moment.
pub fn holder(paths: &HostPaths, name: impl Into<DeviceName>) -> LeaseStatus {
    status(paths, &lock_path(paths, name))
}

pub(crate) fn lock_path(paths: &HostPaths, name: impl Into<DeviceName>) -> PathBuf {
    let name = name.into();
    paths.run.join("leases").join(format!("{name}.lock"))
}

/// What the last holder of a device left to be read, or the record of the one who has it.
pub(crate) fn note(paths: &HostPaths, bdf: HostBdf) -> Option<Vec<u8>> {
    let file = sysfs::regular(&lock_path(paths, bdf)).ok()?;
    content(&file).ok()
}

#[cfg(test)]
mod tests;
