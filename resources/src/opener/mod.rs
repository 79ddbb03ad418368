//! The opener: a helper process that leases and opens devices for a VM that can open nothing itself.
//!
//! A confined VMM sends requests over a socket and receives descriptors: of VFIO nodes, and of the leases' lock
//! files, so that a lease lives as long as either process. The opener keeps everything else of a lease. It ends a
//! lease when the VMM returns it over a second socket, where it never waits for a lease that is being made, and
//! ends all of them when the socket closes, as it does when the VMM is killed. Before the VM runs, the opener gets
//! a limit, and grants nothing beyond it.

mod files;
mod server;
mod wire;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::iter;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::base::helpers;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::numbers::Numbers;
use crate::base::uuid::Uuid;
use crate::facts::reserved::{ReservedRegion, reserved_regions};
use crate::facts::vfio::VfioBackEnd;
use crate::holding::record::Holder;
use crate::inventory::card::Terms;
use crate::inventory::scan::{Detail, scan_with};
use crate::pools::group::Groups;
use crate::pools::request::{DeviceRequest, DeviceSource, Placement};
pub use server::{BUSY_PATIENCE, opener_helper, pool_of, source_of, ungrouped};
use wire::{DeadlineStream, Leased, Refusal, Reply, Request, Return};
pub use wire::{Limit, Nodes};

/// The first argument of the helper.
const SUBCOMMAND: &str = "__open";
/// How long a lease may take, with drivers that release devices slowly and virtual functions that are created for
/// it.
const LEASE_PATIENCE: Duration = Duration::from_secs(120);
/// How long ending a lease may take, or reading or opening a file.
const RELEASE_PATIENCE: Duration = Duration::from_secs(60);
/// How long the helper may take to read a request, or to send a file that a reply announced.
const SEND_PATIENCE: Duration = Duration::from_secs(10);
const FILE_PATIENCE: Duration = Duration::from_secs(10);
/// How long the helper may take to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// The opener cannot be used, or refused.
#[derive(Debug, Error)]
pub enum OpenerError {
    /// It could not be started.
    #[error("cannot start the helper that opens devices for this VM")]
    Start(#[source] io::Error),
    /// It is gone, or its replies cannot be read.
    #[error("the helper that opens devices for this VM does not answer: start the VM again")]
    Gone(#[source] io::Error),
    /// The files that it opened did not arrive.
    #[error(
        "cannot take over the files that the helper opened for this VM: if too many are open, raise `ulimit -n`"
    )]
    Files(#[source] io::Error),
    /// The request is denied.
    #[error("{0}")]
    Refused(String),
    /// The request has an unknown name, or a definition is wrong.
    #[error("{0}")]
    Mistaken(String),
    /// Others hold what is requested.
    #[error("{0}")]
    Busy(String),
    /// The host failed.
    #[error("{0}")]
    Failed(String),
}

impl From<Refusal> for OpenerError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Denied(why) => Self::Refused(why),
            Refusal::Mistaken(why) => Self::Mistaken(why),
            Refusal::Busy(why) => Self::Busy(why),
            Refusal::Failed(why) => Self::Failed(why),
        }
    }
}

/// A device that the opener leased.
pub struct OpenedDevice {
    /// Its name for VFIO.
    pub name: DeviceName,
    /// Its IOMMU group.
    pub group: u32,
    /// Whether it is a virtual function of a card.
    pub virtual_function: bool,
    /// The token that opens it.
    pub token: Option<Uuid>,
    /// The resource group that it is in.
    pub pool: Option<String>,
    /// The terms on which it is given.
    pub terms: Terms,
    /// Its open cdev, with iommufd.
    pub cdev: Option<File>,
    /// Dropping it gives the lease back.
    pub lease: HeldLease,
}

/// An IOMMU group that the VM did not have before.
pub struct OpenedGroup {
    /// Its number.
    pub number: u32,
    /// Its open VFIO node, with a container.
    pub node: Option<File>,
    /// The addresses that it cannot map.
    pub reserved: Vec<ReservedRegion>,
}

/// The result of a request.
pub struct Opened {
    /// The devices, in the order of the request.
    pub devices: Vec<OpenedDevice>,
    /// Their IOMMU groups, without those that the VM had already.
    pub groups: Vec<OpenedGroup>,
    /// The node of a new DMA address space, if one was asked for.
    pub address_space: Option<File>,
}

/// A lease that the opener keeps. Dropping it gives the device back, and waits for that, but not for a lease that
/// the opener is making meanwhile.
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
        let id = self.id;
        let mut connection = Sockets::lock(&self.opener.0.returns);
        let released = connection
            .send(&Return { id, aside })
            .and_then(|()| connection.receive::<()>(RELEASE_PATIENCE, &|| false));
        // If a reply is still owed from before, the helper ends the lease on its own.
        if let Err(error) = released
            && error.kind() != io::ErrorKind::Interrupted
        {
            tracing::warn!("the helper that keeps this VM's leases does not answer: {error}");
        }
    }
}

/// The VM's side of the sockets. Its clones share it; the helper ends with the last.
#[derive(Clone)]
pub struct Opener(Arc<Sockets>);

struct Sockets {
    /// Requests and replies.
    asks: Mutex<Connection>,
    /// Leases that end.
    returns: Mutex<Connection>,
}

/// A socket for one request and reply at a time.
struct Connection {
    socket: UnixStream,
    /// A reply was missed: the next one would belong to an unknown request, so that no more requests are sent.
    /// Returned leases are still sent, and the helper ends all leases when the socket closes.
    lost: bool,
}

impl Connection {
    /// # Errors
    /// The socket cannot be made non-blocking.
    fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            lost: false,
        })
    }

    fn send(&mut self, what: &impl Serialize) -> io::Result<()> {
        if self.lost {
            self.discard();
        }
        let never = &|| false;
        wire::send(
            &mut DeadlineStream::new(&self.socket, SEND_PATIENCE, never),
            what,
        )
    }

    /// Sends a request and waits for the reply, unless one was missed before.
    fn request(
        &mut self,
        ask: &Request,
        patience: Duration,
        unwanted: &dyn Fn() -> bool,
    ) -> io::Result<Reply> {
        if self.lost {
            self.discard();
            return Err(reply_lost());
        }
        self.send(ask)?;
        let reply = self.receive(patience, unwanted);
        // A lease whose reply was missed is ended, even if it is made later.
        if reply.is_err() && matches!(ask, Request::Lease { .. }) {
            let _ = self.send(&Request::ReplyLost);
        }
        reply
    }

    /// A file that the last reply announced.
    fn file(&mut self) -> io::Result<File> {
        if self.lost {
            return Err(reply_lost());
        }
        let mut socket = DeadlineStream::new(&self.socket, FILE_PATIENCE, &|| false);
        wire::receive_file(&mut socket).inspect_err(|error| {
            // A file for which this process has no descriptor left has arrived: only this file is missing.
            self.lost = error.kind() != io::ErrorKind::InvalidData;
        })
    }

    /// Discards replies that came too late, with their descriptors.
    fn discard(&mut self) {
        let mut late = [0; 1024];
        while self.socket.read(&mut late).is_ok_and(|len| len > 0) {}
    }

    /// The reply to the last request.
    fn receive<T: DeserializeOwned>(
        &mut self,
        patience: Duration,
        unwanted: &dyn Fn() -> bool,
    ) -> io::Result<T> {
        if self.lost {
            return Err(reply_lost());
        }
        let reply = wire::receive(&mut DeadlineStream::new(&self.socket, patience, unwanted));
        self.lost = reply.is_err();
        reply
    }
}

/// The error after a missed reply.
fn reply_lost() -> io::Error {
    let why = "an earlier answer did not come in time";
    io::Error::new(io::ErrorKind::Interrupted, why)
}

impl Opener {
    /// Starts the helper for a VM. The program that runs must call [`opener_helper`] for `__open`.
    pub fn start(paths: &HostPaths, holder: &Holder) -> Result<Self, OpenerError> {
        let (asks, asked) = UnixStream::pair().map_err(OpenerError::Start)?;
        let (returns, returned) = UnixStream::pair().map_err(OpenerError::Start)?;
        let mut command = Command::new(Path::new("/proc/self/exe"));
        command.arg(SUBCOMMAND).args(paths.to_args());
        // In a process group of its own, so that it does not get the terminal's ctrl-c and does not end
        // with it.
        command.env_clear().process_group(0);
        command
            .stdin(Stdio::from(OwnedFd::from(asked)))
            .stdout(Stdio::from(OwnedFd::from(returned)));
        helpers::keep(command.spawn().map_err(OpenerError::Start)?);
        let end = Sockets::new(asks, returns).map_err(OpenerError::Start)?;
        let opener = Self(Arc::new(end));
        let hello = Request::Hello {
            vm: holder.vm.clone(),
            pid: holder.pid,
        };
        opener.lock().send(&hello).map_err(OpenerError::Start)?;
        Ok(opener)
    }

    /// Sets the placement of the VM, near which devices are chosen. Not after [`Self::limit`].
    pub fn place(&self, placement: Placement) -> Result<(), OpenerError> {
        let asked = self.lock().send(&Request::Place(placement));
        asked.map_err(OpenerError::Gone)
    }

    /// Sets the limit of what the VM is given. It cannot be changed afterwards.
    pub fn limit(&self, limit: Limit) -> Result<(), OpenerError> {
        let asked = self.lock().send(&Request::Limit(limit));
        asked.map_err(OpenerError::Gone)
    }

    /// Sets how many slots are free for the next request: a request that needs more is refused before a device
    /// is leased.
    pub fn slots(&self, free: usize) -> Result<(), OpenerError> {
        let asked = self.lock().send(&Request::Slots(free));
        asked.map_err(OpenerError::Gone)
    }

    /// Leases devices and opens their `nodes`: all of it, or nothing. Once the request is `unwanted`, or takes
    /// too long, the wait ends, a lease that is made late is ended, and nothing will be opened again.
    pub fn open(
        &self,
        requests: &[DeviceRequest],
        nodes: &Nodes,
        unwanted: &dyn Fn() -> bool,
    ) -> Result<Opened, OpenerError> {
        let iommufd = nodes.back_end == VfioBackEnd::Iommufd;
        let cdevs = iommufd && !nodes.sent;
        let ask = Request::Lease {
            requests: requests.to_vec(),
            ungrouped: requests.iter().any(|request| request.allow_ungrouped),
            nodes: nodes.clone(),
        };
        // Leases return themselves over the socket: none may be dropped while it is locked.
        let (leased, groups, mut files) = {
            let mut connection = self.lock();
            match connection
                .request(&ask, LEASE_PATIENCE, unwanted)
                .map_err(OpenerError::Gone)?
            {
                Reply::Leased { devices, groups } => {
                    let locks: usize = devices.iter().map(|device| device.locks).sum();
                    let each = match (cdevs, iommufd) {
                        (true, _) => devices.len(),
                        (false, true) => 0,
                        (false, false) => groups.len(),
                    };
                    let count = usize::from(nodes.address_space) + each + locks;
                    let files = (0..count).map(|_| connection.file());
                    // All of them, even if one fails, so that none is read as part of the next reply.
                    let files: Vec<_> = files.collect();
                    (devices, groups, files.into_iter())
                }
                Reply::Refused(refusal) => return Err(refusal.into()),
                _ => {
                    return Err(OpenerError::Gone(io::ErrorKind::InvalidData.into()));
                }
            }
        };
        let mut file = || match files.next() {
            Some(file) => file,
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        };
        let address_space = nodes.address_space.then(&mut file).transpose();
        let groups = groups.into_iter().map(|group| {
            Ok(OpenedGroup {
                number: group.number,
                reserved: group.reserved,
                node: (!iommufd).then(&mut file).transpose()?,
            })
        });
        // Without `?`: each lease is built, so that it is returned if anything is missing.
        let groups: Vec<io::Result<OpenedGroup>> = groups.collect();
        let cdevs = leased.iter().map(|_| cdevs.then(&mut file).transpose());
        let cdevs: Vec<_> = cdevs.collect();
        let devices = leased.into_iter().zip(cdevs);
        let devices = devices.map(|(device, cdev)| self.held(device, cdev, &mut file));
        let devices: Vec<_> = devices.collect();
        let whole = || {
            Ok(Opened {
                address_space: address_space?,
                groups: groups.into_iter().collect::<io::Result<_>>()?,
                devices: devices.into_iter().collect::<io::Result<_>>()?,
            })
        };
        whole().map_err(OpenerError::Files)
    }

    /// A device that the helper leased, with its cdev if there is one; its locks come from `file`.
    fn held(
        &self,
        device: Leased,
        cdev: io::Result<Option<File>>,
        file: impl FnMut() -> io::Result<File>,
    ) -> io::Result<OpenedDevice> {
        let mut lease = HeldLease {
            opener: self.clone(),
            id: device.id,
            aside: Mutex::default(),
            locks: None,
        };
        let locks: Vec<_> = iter::repeat_with(file).take(device.locks).collect();
        lease.locks = Some(locks.into_iter().collect::<io::Result<_>>()?);
        Ok(OpenedDevice {
            name: device.name,
            group: device.group,
            virtual_function: device.virtual_function,
            token: device.token,
            pool: device.pool,
            terms: device.terms,
            cdev: cdev?,
            lease,
        })
    }

    /// The requests of a plan.
    pub fn plan(&self, name: &str) -> Result<Vec<DeviceRequest>, OpenerError> {
        let mut connection = self.lock();
        let ask = Request::Plan(name.to_owned());
        let reply = connection.request(&ask, RELEASE_PATIENCE, &|| false);
        match reply.map_err(OpenerError::Gone)? {
            Reply::Planned(requests) => Ok(requests),
            Reply::Refused(refusal) => Err(refusal.into()),
            _ => Err(OpenerError::Gone(io::ErrorKind::InvalidData.into())),
        }
    }

    /// The device whose cdev has this number.
    pub fn device_of_cdev(&self, major: u32, minor: u32) -> Result<DeviceName, OpenerError> {
        let mut connection = self.lock();
        let ask = Request::Cdev { major, minor };
        let reply = connection.request(&ask, RELEASE_PATIENCE, &|| false);
        match reply.map_err(OpenerError::Gone)? {
            Reply::Device(name) => Ok(name),
            Reply::Refused(refusal) => Err(refusal.into()),
            _ => Err(OpenerError::Gone(io::ErrorKind::InvalidData.into())),
        }
    }

    /// A file or block device, opened with these flags. The inner result is the kernel's answer. Once the request is
    /// `unwanted`, the wait ends, and nothing will be opened again.
    pub fn file(
        &self,
        path: &Path,
        flags: i32,
        unwanted: &dyn Fn() -> bool,
    ) -> Result<io::Result<File>, OpenerError> {
        let mut connection = self.lock();
        let ask = Request::File {
            path: path.to_owned(),
            flags,
        };
        let reply = connection.request(&ask, RELEASE_PATIENCE, unwanted);
        match reply.map_err(OpenerError::Gone)? {
            Reply::Opened => connection.file().map(Ok).map_err(OpenerError::Files),
            Reply::NotOpened { errno } => Ok(Err(io::Error::from_raw_os_error(errno))),
            Reply::Refused(refusal) => Err(refusal.into()),
            _ => Err(OpenerError::Gone(io::ErrorKind::InvalidData.into())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        Sockets::lock(&self.0.asks)
    }
}

impl Sockets {
    /// # Errors
    /// As [`Connection::new`].
    fn new(asks: UnixStream, returns: UnixStream) -> io::Result<Self> {
        Ok(Self {
            asks: Mutex::new(Connection::new(asks)?),
            returns: Mutex::new(Connection::new(returns)?),
        })
    }

    fn lock(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
        connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Sockets {
    /// Lets the helper end, and waits for that.
    fn drop(&mut self) {
        let connection = self.asks.get_mut().unwrap_or_else(PoisonError::into_inner);
        let socket = &mut connection.socket;
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let mut socket = DeadlineStream::new(socket, END_PATIENCE, &|| false);
        while socket.read(&mut [0; 64]).is_ok_and(|len| len > 0) {}
    }
}

/// The facts about devices that a VM may be given later.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ToCome {
    /// The addresses that they cannot map.
    pub reserved: Vec<ReservedRegion>,
    /// The NUMA nodes that they are on.
    pub nodes: Numbers,
}

/// The facts about devices `from` these sources, without aliases and what cannot be read: those are read when a
/// device comes.
pub fn to_come(paths: &HostPaths, from: &[DeviceSource]) -> ToCome {
    let look = || {
        let groups = Groups::load(paths).ok()?;
        let devices = scan_with(paths, Detail::ForChoice).ok()?;
        let meant = devices.iter().filter(|device| {
            let owner = groups.group_of(device);
            owner.is_some_and(|owner| from.contains(&DeviceSource::Group(owner.name.clone())))
        });
        let meant: Vec<_> = meant.collect();
        let numbers: BTreeSet<u32> = meant.iter().filter_map(|one| one.iommu_group).collect();
        let regions = numbers.iter();
        let regions = regions.filter_map(|number| reserved_regions(paths, *number).ok());
        Some(ToCome {
            reserved: regions.flatten().collect(),
            nodes: meant.iter().filter_map(|one| one.numa_node).collect(),
        })
    };
    let nothing = from.is_empty().then(ToCome::default);
    nothing.or_else(look).unwrap_or_default()
}

#[cfg(test)]
mod tests;
