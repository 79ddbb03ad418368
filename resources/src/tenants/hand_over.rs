//! Owners of devices' nodes and lock files.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::unistd::User;

use super::{TenantError, failed, ignore_missing};
use crate::base::acl;
use crate::base::host::HostPaths;
use crate::base::json::Place;
use crate::base::name::DeviceName;
use crate::base::sysfs;
use crate::facts::open_files::{User as Process, is_open, users};
use crate::facts::process::is_ending;
use crate::facts::vfio::VfioBackEnd;
use crate::holding::device_lock::DeviceLock;
use crate::holding::lock_file::holder;
use crate::holding::passing::PASSING_PATIENCE;
use crate::holding::record::{LeaseRecord, LeaseStatus};
use crate::holding::restore;
use crate::inventory::unavailable::UnavailableDevice;
use crate::making::vgpu::VgpuError;
use crate::pools::tenant::{Tenant, definition, dirs};

/// A user who owns files.
pub(super) struct Owner {
    uid: u32,
    gid: u32,
}

impl Owner {
    /// The user who runs this command: root, who alone can change owners.
    pub(super) fn host() -> Self {
        Self {
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        }
    }

    /// The user of a tenant.
    pub(super) fn of(host: &HostPaths, tenant: &Tenant) -> Result<Self, TenantError> {
        Self::named(&tenant.file.user, &definition(host, &tenant.name))
    }

    /// The user that a definition names.
    pub(super) fn named(user: &str, path: &Path) -> Result<Self, TenantError> {
        let known = User::from_name(user).ok().flatten();
        let known = known.ok_or_else(|| TenantError::User {
            user: user.to_owned(),
            place: Place::of(path, "user"),
        })?;
        Ok(Self {
            uid: known.uid.as_raw(),
            gid: known.gid.as_raw(),
        })
    }

    /// Whether a process is this user's.
    pub(super) fn runs(&self, host: &HostPaths, pid: u32) -> bool {
        let process = fs::metadata(host.proc.join(pid.to_string()));
        process.is_ok_and(|process| process.uid() == self.uid)
    }

    /// Only for paths in directories of root's: a tenant could put a link elsewhere.
    fn own(&self, path: &Path) -> io::Result<()> {
        lchown(path, Some(self.uid), Some(self.gid))
    }

    /// Lets this user open iommufd, if the host has it. `/dev/iommu` belongs to no device: who can open it reaches the
    /// devices whose cdevs that user can open, and can pin memory up to the user's limit.
    pub(super) fn open_iommufd(&self, host: &HostPaths) -> Result<(), TenantError> {
        let node = VfioBackEnd::Iommufd.node(host);
        match acl::allow(&node, self.uid) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let node = node.display();
                tracing::warn!(
                    "tenants cannot use iommufd: {node} takes no access control list (CONFIG_TMPFS_POSIX_ACL)"
                );
                Ok(())
            }
            allowed => allowed.or_else(ignore_missing).map_err(failed(&node)),
        }
    }

    /// Takes that back.
    pub(super) fn close_iommufd(&self, host: &HostPaths) -> Result<(), TenantError> {
        let node = VfioBackEnd::Iommufd.node(host);
        match acl::withdraw(&node, self.uid) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            closed => closed.or_else(ignore_missing).map_err(failed(&node)),
        }
    }

    /// Makes the tenant's directories for run-time files and state, with links to the host's leases and restore
    /// records. The tenant may put anything into these directories: nothing in them is opened or changes its owner
    /// here.
    pub(super) fn make_dirs(&self, host: &HostPaths, name: &str) -> Result<(), TenantError> {
        let HostPaths { run, state, .. } = dirs(host, name);
        for (dir, links) in [(&run, &["leases", restore::DIR][..]), (&state, &[])] {
            if let Some(above) = dir.parent() {
                crate::base::atomic::make_dir(above).map_err(failed(above))?;
            }
            let made = DirBuilder::new().mode(0o700).create(dir);
            made.or_else(ignore_existing).map_err(failed(dir))?;
            for link in links {
                let target = Path::new("../..").join(link);
                let made = symlink(target, dir.join(link));
                made.or_else(ignore_existing).map_err(failed(dir))?;
            }
            self.own(dir).map_err(failed(dir))?;
        }
        // A lock of the former user would keep this user from making one.
        let lock = run.join("allocate.lock");
        match fs::symlink_metadata(&lock) {
            Ok(found) if found.uid() != self.uid => fs::remove_file(&lock)
                .or_else(ignore_missing)
                .map_err(failed(&lock)),
            _ => Ok(()),
        }
    }

    /// Whether the files belong to this user already: then the device may be in use.
    fn has(&self, host: &HostPaths, name: DeviceName) -> io::Result<bool> {
        let mut files = nodes(host, name);
        files.push(crate::holding::lock_file::lock_path(host, name));
        for file in files {
            match fs::metadata(&file) {
                Ok(found) if found.uid() == self.uid => {}
                Ok(_) => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Gives the nodes and the lock file of a device to this user. Refused while the device is leased or open:
    /// permissions only affect a later open.
    ///
    /// The lock file is replaced under its lock: a lock on the old file has no effect.
    pub(super) fn take_over(&self, host: &HostPaths, name: DeviceName) -> Result<(), TenantError> {
        if self
            .has(host, name)
            .map_err(failed(&crate::holding::lock_file::lock_path(host, name)))?
        {
            return Ok(());
        }
        let record = LeaseRecord::task("gantry tenant");
        let Some(lock) = DeviceLock::take(host, name, &record)? else {
            return Err(held(name, &holder(host, name)));
        };
        let closed = ClosedNodes::of(host, name)?;
        is_closed(host, name)?;
        closed.give(self)?;
        let path = crate::holding::lock_file::lock_path(host, name);
        let draft = path.with_extension("new");
        let made = fs::remove_file(&draft)
            .or_else(ignore_missing)
            .and_then(|()| crate::holding::lock_file::create(&draft))
            .and_then(|()| self.own(&draft))
            .and_then(|()| fs::rename(&draft, &path));
        drop(lock);
        made.map_err(failed(&path))
    }
}

/// The nodes of a device, which only root can open now. Dropping it gives them back.
struct ClosedNodes(Vec<(PathBuf, fs::Metadata)>);

impl ClosedNodes {
    fn of(host: &HostPaths, name: DeviceName) -> Result<Self, TenantError> {
        let mut closed = Self(Vec::new());
        for node in nodes(host, name) {
            let found = match fs::symlink_metadata(&node) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                found => found.map_err(failed(&node))?,
            };
            Owner::host().own(&node).map_err(failed(&node))?;
            closed.0.push((node, found));
        }
        Ok(closed)
    }

    fn give(mut self, owner: &Owner) -> Result<(), TenantError> {
        for (node, _) in std::mem::take(&mut self.0) {
            let given = owner.own(&node).or_else(ignore_missing);
            given.map_err(failed(&node))?;
        }
        Ok(())
    }
}

impl Drop for ClosedNodes {
    fn drop(&mut self) {
        for (node, former) in &self.0 {
            if let Err(error) = lchown(node, Some(former.uid()), Some(former.gid())) {
                tracing::error!("cannot give {} back: {error}", node.display());
            }
        }
    }
}

/// Refuses a device that a process has open. Waits for a process that is ending, since the kernel frees its locks
/// before it closes its files.
pub(super) fn is_closed(host: &HostPaths, name: DeviceName) -> Result<(), TenantError> {
    let deadline = Instant::now() + PASSING_PATIENCE;
    let group = group_node(host, name);
    let mut before = Vec::new();
    loop {
        let users = users(&host.proc, &directory_of(host, name).join("driver"));
        if users.is_empty() && !group.as_deref().is_some_and(is_open) {
            return Ok(());
        }
        let stays = |user: &&Process| is_ending(&host.proc, user.pid) == Some(false);
        let staying: Vec<u32> = users.iter().filter(stays).map(|user| user.pid).collect();
        // A process that only checks whether a device is free has it open for a moment: only one that is seen twice
        // counts.
        if staying.iter().any(|pid| before.contains(pid)) || Instant::now() >= deadline {
            let who = users.iter().find(stays).or(users.first());
            return Err(TenantError::Open {
                device: name,
                by: who.map_or_else(|| "a process".to_owned(), Process::to_string),
            });
        }
        before = staying;
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Refuses a leased device. A lock file that cannot be read is replaced when the device is taken over.
pub(super) fn is_free(host: &HostPaths, name: DeviceName) -> Result<(), TenantError> {
    match holder(host, name) {
        LeaseStatus::Free | LeaseStatus::Unreadable { .. } => Ok(()),
        lease => Err(held(name, &lease)),
    }
}

fn held(name: DeviceName, lease: &LeaseStatus) -> TenantError {
    match name {
        DeviceName::Pci(bdf) => TenantError::InUse(UnavailableDevice::leased(bdf, lease)),
        DeviceName::Mdev(uuid) => VgpuError::held(uuid, lease).into(),
    }
}

/// Where sysfs has a device.
fn directory_of(host: &HostPaths, name: DeviceName) -> PathBuf {
    match name {
        DeviceName::Pci(bdf) => host.pci_device(bdf),
        DeviceName::Mdev(uuid) => host.mdev(uuid),
    }
}

/// The node of a device's IOMMU group.
fn group_node(host: &HostPaths, name: DeviceName) -> Option<PathBuf> {
    let link = directory_of(host, name).join("iommu_group");
    let group = sysfs::link_name(&link).ok().flatten()?;
    Some(host.dev.join("vfio").join(group))
}

/// The nodes of a device's IOMMU group, and of the device itself where the kernel has such.
fn nodes(host: &HostPaths, name: DeviceName) -> Vec<PathBuf> {
    let own = directory_of(host, name).join("vfio-dev");
    let own = sysfs::entries(&own).unwrap_or_default().into_iter();
    let devices = host.dev.join("vfio/devices");
    let own = own.map(|name| devices.join(name));
    group_node(host, name).into_iter().chain(own).collect()
}

fn ignore_existing(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::AlreadyExists => Ok(()),
        _ => Err(error),
    }
}
