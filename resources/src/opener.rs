//! The opener: a helper process that leases and opens devices for a VM that can open nothing itself.
//!
//! A VMM that is confined sends requests over a socket, and gets descriptors back: of the VFIO nodes,
//! and of the leases' lock files. So each lease lives as long as either process does. The opener keeps
//! all else that belongs to a lease, and gives it up when it is told to, or when the socket ends,
//! which the kernel sees to when the VMM is killed. It serves only the groups that it was started for.

mod wire;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::allocate::allocate_beside;
use crate::group::Groups;
use crate::host::{HostBdf, HostPaths};
use crate::inventory::{Detail, HostDevice, scan_with};
use crate::lease::{Holder, Lease};
use crate::request::{Placement, Request, Source};
use crate::reserved::{ReservedRegion, reserved_regions};
use crate::uuid::Uuid;
use wire::{Ask, Leased, LeasedGroup, Said};

/// The first argument of the helper.
const SUBCOMMAND: &str = "__open";
/// How long an IOMMU group may stay busy after its device was leased: a holder that was killed keeps it
/// until the kernel has reset the device.
const BUSY_PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait between two attempts at a group that is in use.
const BUSY_STEP: Duration = Duration::from_millis(20);
/// How long the helper may take to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// The opener cannot be used, or refused.
#[derive(Debug, Error)]
pub enum OpenerError {
    /// It could not be started.
    #[error("cannot start the helper that opens devices for this VM")]
    Start(#[source] io::Error),
    /// It is gone, or says what nobody understands.
    #[error("the helper that opens devices for this VM does not answer: start the VM again")]
    Gone(#[source] io::Error),
    /// It did not do what it was asked for.
    #[error("{0}")]
    Refused(String),
}

/// A device that the opener leased.
pub struct OpenedDevice {
    /// Its address.
    pub bdf: HostBdf,
    /// Its IOMMU group.
    pub group: u32,
    /// The token that it must be opened with.
    pub token: Option<Uuid>,
    /// Dropping it gives the lease back.
    pub lease: HeldLease,
}

/// An IOMMU group that the VM did not have before.
pub struct OpenedGroup {
    /// Its number.
    pub number: u32,
    /// Its VFIO node, open.
    pub node: File,
    /// What it cannot map.
    pub reserved: Vec<ReservedRegion>,
}

/// What a request got.
pub struct Opened {
    /// The devices, in their order.
    pub devices: Vec<OpenedDevice>,
    /// Their IOMMU groups, as far as the VM did not have them.
    pub groups: Vec<OpenedGroup>,
    /// A new VFIO container, if one was asked for.
    pub container: Option<File>,
}

/// A lease that the opener keeps. Dropping it gives the device back, and waits until that is done.
pub struct HeldLease {
    opener: Opener,
    id: u64,
    aside: Mutex<Option<String>>,
    // The locks themselves: they hold even if the opener is killed.
    locks: Option<Arc<[File]>>,
}

impl HeldLease {
    /// Puts the device into quarantine when the lease ends.
    pub fn set_aside(&self, reason: &str) {
        let mut aside = self.aside.lock().unwrap_or_else(PoisonError::into_inner);
        *aside = Some(reason.to_owned());
    }
}

impl Drop for HeldLease {
    fn drop(&mut self) {
        self.locks = None;
        let aside = self
            .aside
            .get_mut()
            .map_or_else(|poisoned| poisoned.into_inner().take(), Option::take);
        let (id, mut socket) = (self.id, self.opener.lock());
        let released = wire::send(&mut socket, &Ask::Release { id, aside })
            .and_then(|()| wire::receive::<Said>(&mut socket));
        if let Err(error) = released {
            tracing::warn!("the helper that keeps this VM's leases does not answer: {error}");
        }
    }
}

/// The VM's end of the socket. Its clones share it; the helper ends with the last.
#[derive(Clone)]
pub struct Opener(Arc<End>);

struct End(Mutex<UnixStream>);

impl Opener {
    /// Starts the helper for a VM, which may then be given devices `from` these sources: from any if
    /// there are none. The program that runs must call [`opener_helper`] for `__open`.
    pub fn start(paths: &HostPaths, holder: &Holder) -> Result<Self, OpenerError> {
        let (ours, theirs) = UnixStream::pair().map_err(OpenerError::Start)?;
        let mut command = Command::new(Path::new("/proc/self/exe"));
        command.arg(SUBCOMMAND).args(paths.to_args());
        // Neither the terminal's ctrl-c nor its end is meant for the helper.
        command.env_clear().process_group(0);
        command
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null());
        command.spawn().map_err(OpenerError::Start)?;
        let opener = Self(Arc::new(End(Mutex::new(ours))));
        let hello = Ask::Hello {
            vm: holder.vm.clone(),
            pid: holder.pid,
        };
        wire::send(&mut opener.lock(), &hello).map_err(OpenerError::Start)?;
        Ok(opener)
    }

    /// From now on the VM is given devices `from` these sources only; nothing takes that back. An
    /// empty list says nothing.
    pub fn limit(&self, from: &[Source]) -> Result<(), OpenerError> {
        let limit = Ask::Limit {
            from: from.to_vec(),
        };
        wire::send(&mut self.lock(), &limit).map_err(OpenerError::Gone)
    }

    /// Leases and opens what is asked for: all of it, or nothing. The VM has the IOMMU groups `held`
    /// already, and wants a `container` or has one.
    pub fn open(
        &self,
        requests: &[Request],
        held: &[u32],
        container: bool,
    ) -> Result<Opened, OpenerError> {
        let mut socket = self.lock();
        let ask = Ask::Lease {
            requests: requests.to_vec(),
            held: held.to_vec(),
            container,
        };
        wire::send(&mut socket, &ask).map_err(OpenerError::Gone)?;
        match wire::receive(&mut socket).map_err(OpenerError::Gone)? {
            Said::Leased { devices, groups } => self
                .take(&mut socket, devices, groups, container)
                .map_err(OpenerError::Gone),
            Said::Refused(why) => Err(OpenerError::Refused(why)),
            Said::Released => Err(OpenerError::Gone(io::ErrorKind::InvalidData.into())),
        }
    }

    /// Receives the descriptors that follow an answer.
    fn take(
        &self,
        socket: &mut UnixStream,
        devices: Vec<Leased>,
        groups: Vec<LeasedGroup>,
        container: bool,
    ) -> io::Result<Opened> {
        let container = match container {
            true => Some(wire::receive_file(socket)?),
            false => None,
        };
        let mut opened = Vec::new();
        for LeasedGroup { number, reserved } in groups {
            opened.push(OpenedGroup {
                number,
                reserved,
                node: wire::receive_file(socket)?,
            });
        }
        let mut held = Vec::new();
        for device in devices {
            let locks = (0..device.locks)
                .map(|_| wire::receive_file(socket))
                .collect::<io::Result<_>>()?;
            held.push(OpenedDevice {
                bdf: device.bdf,
                group: device.group,
                token: device.token,
                lease: HeldLease {
                    opener: self.clone(),
                    id: device.id,
                    aside: Mutex::default(),
                    locks: Some(locks),
                },
            });
        }
        Ok(Opened {
            devices: held,
            groups: opened,
            container,
        })
    }

    fn lock(&self) -> MutexGuard<'_, UnixStream> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for End {
    /// Lets the helper end, and waits until it has.
    fn drop(&mut self) {
        let socket = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let _ = socket.set_read_timeout(Some(END_PATIENCE));
        while socket.read(&mut [0; 64]).is_ok_and(|len| len > 0) {}
    }
}

/// What devices `from` these sources could not map, for a VM that may be given them later. Aliases and
/// what cannot be read are left out: it is looked at again when a device comes.
pub fn reserved_for(paths: &HostPaths, from: &[Source]) -> Vec<ReservedRegion> {
    let look = || {
        let groups = Groups::load(paths).ok()?;
        let devices = scan_with(paths, Detail::ForChoice).ok()?;
        let meant = devices.iter().filter(|device| {
            let owner = groups.group_of(device);
            owner.is_some_and(|owner| from.contains(&Source::Group(owner.name.clone())))
        });
        let numbers: BTreeSet<u32> = meant.filter_map(|device| device.iommu_group).collect();
        let regions = numbers.iter();
        let regions = regions.filter_map(|number| reserved_regions(paths, *number).ok());
        Some(regions.flatten().collect())
    };
    let nothing = from.is_empty();
    nothing.then(Vec::new).or_else(look).unwrap_or_default()
}

/// What the helper does with the arguments after `__open`: the host's directories.
pub fn opener_helper(args: &[String]) -> ExitCode {
    let Some((paths, _)) = HostPaths::from_args(args) else {
        return ExitCode::FAILURE;
    };
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    match stdin
        .map(UnixStream::from)
        .and_then(|socket| serve(&paths, socket))
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Answers until the socket ends.
fn serve(paths: &HostPaths, mut socket: UnixStream) -> io::Result<()> {
    let Ask::Hello { vm, pid } = wire::receive(&mut socket)? else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let mut desk = Desk {
        paths,
        holder: Holder { vm, pid },
        from: Vec::new(),
        leases: Vec::new(),
        next: 0,
    };
    loop {
        match wire::receive(&mut socket) {
            Ok(Ask::Lease {
                requests,
                held,
                container,
            }) => desk.lease(&mut socket, &requests, &held, container)?,
            Ok(Ask::Release { id, aside }) => {
                desk.release(id, aside.as_deref());
                wire::send(&mut socket, &Said::Released)?;
            }
            Ok(Ask::Limit { from }) if desk.from.is_empty() => desk.from = from,
            Ok(Ask::Limit { .. } | Ask::Hello { .. }) => {
                return Err(io::ErrorKind::InvalidData.into());
            }
            // The end of the VM, and of the leases it still had.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// The helper's side: for whom it opens what, and the leases that it keeps.
struct Desk<'a> {
    paths: &'a HostPaths,
    holder: Holder,
    from: Vec<Source>,
    leases: Vec<(u64, Lease)>,
    next: u64,
}

/// What goes over the socket for a request.
struct Bundle {
    leases: Vec<Lease>,
    groups: Vec<(LeasedGroup, File)>,
    container: Option<File>,
}

impl Desk<'_> {
    fn lease(
        &mut self,
        socket: &mut UnixStream,
        requests: &[Request],
        held: &[u32],
        container: bool,
    ) -> io::Result<()> {
        let Bundle {
            leases,
            groups,
            container,
        } = match self.bundle(requests, held, container) {
            Ok(bundle) => bundle,
            Err(why) => return wire::send(socket, &Said::Refused(why)),
        };
        let first = self.next;
        let devices = (first..).zip(&leases).map(|(id, lease)| Leased {
            id,
            bdf: lease.device().bdf,
            group: lease.device().iommu_group.unwrap_or_default(),
            token: lease.token(),
            locks: lease.descriptors().count(),
        });
        let devices = devices.collect();
        let (groups, nodes): (Vec<_>, Vec<_>) = groups.into_iter().unzip();
        wire::send(socket, &Said::Leased { devices, groups })?;
        for file in container.iter().chain(&nodes) {
            wire::send_file(socket, file.as_raw_fd())?;
        }
        for lease in &leases {
            for lock in lease.descriptors() {
                wire::send_file(socket, lock.as_raw_fd())?;
            }
        }
        self.next += leases.len() as u64;
        self.leases.extend((first..).zip(leases));
        Ok(())
    }

    /// Leases and opens, or says why not, in words for whoever asked.
    fn bundle(
        &self,
        requests: &[Request],
        held: &[u32],
        container: bool,
    ) -> Result<Bundle, String> {
        requests.iter().try_for_each(|request| self.may(request))?;
        let own: Vec<&Lease> = self.leases.iter().map(|(_, lease)| lease).collect();
        let nowhere = Placement::default();
        let leases = allocate_beside(self.paths, requests, &nowhere, &self.holder, &own)
            .map_err(|error| chain(&error))?;
        let mut groups: Vec<(LeasedGroup, File)> = Vec::new();
        for lease in &leases {
            let device = lease.device();
            let Some(number) = device.iommu_group else {
                return Err(format!("{} is in no IOMMU group", device.bdf));
            };
            let known =
                held.contains(&number) || groups.iter().any(|(group, _)| group.number == number);
            if !known {
                groups.push(self.group(number, lease)?);
            }
        }
        let path = self.paths.dev.join("vfio/vfio");
        let container = container.then(|| open_node(&path).map_err(cannot_open(&path)));
        let container = container.transpose()?;
        Ok(Bundle {
            leases,
            groups,
            container,
        })
    }

    fn group(&self, number: u32, lease: &Lease) -> Result<(LeasedGroup, File), String> {
        let reserved = reserved_regions(self.paths, number).map_err(|error| chain(&error))?;
        let path = self.paths.vfio_group(number);
        let node = open_node(&path).map_err(|error| {
            // Whoever keeps it busy keeps to no lease, or cannot be ended.
            if error.raw_os_error() == Some(nix::libc::EBUSY) {
                lease.set_aside(&format!("IOMMU group {number} stays busy"));
            }
            cannot_open(&path)(error)
        })?;
        Ok((LeasedGroup { number, reserved }, node))
    }

    /// Whether the VM may be given what it asks for.
    fn may(&self, request: &Request) -> Result<(), String> {
        if self.from.is_empty() {
            return Ok(());
        }
        let allowed = match request {
            Request::Any(wish) => self.from.contains(&wish.from),
            Request::Device { bdf, .. } => {
                let groups = Groups::load(self.paths).map_err(|error| chain(&error))?;
                let device = HostDevice::read(self.paths, *bdf).map_err(|error| chain(&error))?;
                let owner = groups.group_of(&device).map(|group| group.name.clone());
                owner.is_some_and(|owner| self.from.contains(&Source::Group(owner)))
            }
        };
        let from: Vec<String> = self.from.iter().map(ToString::to_string).collect();
        allowed.then_some(()).ok_or_else(|| {
            format!(
                "this VM was started to be given devices from {} only: name other groups in `hotplug.groups` of its file",
                from.join(", ")
            )
        })
    }

    fn release(&mut self, id: u64, aside: Option<&str>) {
        let Some(place) = self.leases.iter().position(|(other, _)| *other == id) else {
            return;
        };
        let (_, lease) = self.leases.remove(place);
        if let Some(reason) = aside {
            lease.set_aside(reason);
        }
    }
}

/// Opens a VFIO node; a group that is in use is asked for again for a while.
fn open_node(path: &Path) -> io::Result<File> {
    let deadline = Instant::now() + BUSY_PATIENCE;
    loop {
        match OpenOptions::new().read(true).write(true).open(path) {
            Err(error)
                if error.raw_os_error() == Some(nix::libc::EBUSY) && Instant::now() < deadline =>
            {
                std::thread::sleep(BUSY_STEP);
            }
            opened => return opened,
        }
    }
}

fn cannot_open(path: &Path) -> impl Fn(io::Error) -> String {
    move |error| format!("cannot open {}: {error}", path.display())
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
