//! The opener: a helper process that leases and opens devices for a VM that can open nothing itself.
//!
//! A VMM that is confined sends requests over a socket, and gets descriptors back: of the VFIO nodes,
//! and of the leases' lock files. So each lease lives as long as either process does. The opener keeps
//! all else that belongs to a lease, and gives it up when it is told to, or when the socket ends,
//! which the kernel sees to when the VMM is killed. A lease is given back over a second socket, and never
//! waits for one that is being made. Before the VM runs it is told what that may be
//! given, and it keeps to that whoever asks.

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
use wire::{Ask, Bounded, Leased, Refusal, Return, Said};
pub use wire::{Limit, Nodes};

/// The first argument of the helper.
const SUBCOMMAND: &str = "__open";
/// How long a lease may take, with drivers that let go slowly and virtual functions that are made for it.
const LEASE_PATIENCE: Duration = Duration::from_secs(120);
/// How long giving one back may take, or reading or opening a file.
const RELEASE_PATIENCE: Duration = Duration::from_secs(60);
/// How long the helper may take to read what it is told, or to send a file that it has announced.
const SAY_PATIENCE: Duration = Duration::from_secs(10);
const FILE_PATIENCE: Duration = Duration::from_secs(10);
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
    /// What it opened did not arrive.
    #[error(
        "cannot take over the files that the helper opened for this VM: if too many are open, raise `ulimit -n`"
    )]
    Files(#[source] io::Error),
    /// What it was asked for is not to be had.
    #[error("{0}")]
    Refused(String),
    /// Nothing on this host has the name that it was asked for by, or a definition is wrong.
    #[error("{0}")]
    Mistaken(String),
    /// What it was asked for is held by others.
    #[error("{0}")]
    Busy(String),
    /// The host failed it.
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
    /// What VFIO opens it by.
    pub name: DeviceName,
    /// Its IOMMU group.
    pub group: u32,
    /// Whether it is a virtual function of a card.
    pub virtual_function: bool,
    /// The token that it must be opened with.
    pub token: Option<Uuid>,
    /// The resource group that it is in.
    pub pool: Option<String>,
    /// On which terms it is given.
    pub terms: Terms,
    /// Its cdev, open, with iommufd.
    pub cdev: Option<File>,
    /// Dropping it gives the lease back.
    pub lease: HeldLease,
}

/// An IOMMU group that the VM did not have before.
pub struct OpenedGroup {
    /// Its number.
    pub number: u32,
    /// Its VFIO node, open, with a container.
    pub node: Option<File>,
    /// What it cannot map.
    pub reserved: Vec<ReservedRegion>,
}

/// What a request got.
pub struct Opened {
    /// The devices, in their order.
    pub devices: Vec<OpenedDevice>,
    /// Their IOMMU groups, as far as the VM did not have them.
    pub groups: Vec<OpenedGroup>,
    /// The node of a new DMA address space, if one was asked for.
    pub address_space: Option<File>,
}

/// A lease that the opener keeps. Dropping it gives the device back, and waits until that is done, but for no
/// lease that the opener is making meanwhile.
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
        let mut line = End::lock(&self.opener.0.returns);
        let released = line
            .say(&Return { id, aside })
            .and_then(|()| line.hear::<()>(RELEASE_PATIENCE, &|| false));
        // Where an answer is owed to something before this, the helper gives back on its own.
        if let Err(error) = released
            && error.kind() != io::ErrorKind::Interrupted
        {
            tracing::warn!("the helper that keeps this VM's leases does not answer: {error}");
        }
    }
}

/// The VM's end of the sockets. Its clones share it; the helper ends with the last.
#[derive(Clone)]
pub struct Opener(Arc<End>);

struct End {
    /// What is asked for.
    asks: Mutex<Line>,
    /// Leases that end.
    returns: Mutex<Line>,
}

/// Questions and answers, one after the other.
struct Line {
    socket: UnixStream,
    /// An answer was not waited for: what comes now is of no question that is known, and nothing is asked for
    /// any more. That a lease ends is still said, and at the end of the socket the helper gives all back.
    lost: bool,
}

impl Line {
    /// # Errors
    /// The socket cannot be made non-blocking.
    fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            lost: false,
        })
    }

    fn say(&mut self, what: &impl Serialize) -> io::Result<()> {
        if self.lost {
            self.discard();
        }
        let never = &|| false;
        wire::send(&mut Bounded::new(&self.socket, SAY_PATIENCE, never), what)
    }

    /// Asks for something, unless an answer was missed before.
    fn ask(
        &mut self,
        ask: &Ask,
        patience: Duration,
        unwanted: &dyn Fn() -> bool,
    ) -> io::Result<Said> {
        if self.lost {
            self.discard();
            return Err(missed());
        }
        self.say(ask)?;
        let heard = self.hear(patience, unwanted);
        // What is leased for nobody goes back, even if that takes place later.
        if heard.is_err() && matches!(ask, Ask::Lease { .. }) {
            let _ = self.say(&Ask::Unheard);
        }
        heard
    }

    /// A file that was announced in the answer heard last.
    fn file(&mut self) -> io::Result<File> {
        if self.lost {
            return Err(missed());
        }
        let mut socket = Bounded::new(&self.socket, FILE_PATIENCE, &|| false);
        wire::receive_file(&mut socket).inspect_err(|error| {
            // A file that this process has no room for has come, and only the file is missing.
            self.lost = error.kind() != io::ErrorKind::InvalidData;
        })
    }

    /// Throws away what came too late, with its descriptors.
    fn discard(&mut self) {
        let mut late = [0; 1024];
        while self.socket.read(&mut late).is_ok_and(|len| len > 0) {}
    }

    /// The answer to what was said last.
    fn hear<T: DeserializeOwned>(
        &mut self,
        patience: Duration,
        unwanted: &dyn Fn() -> bool,
    ) -> io::Result<T> {
        if self.lost {
            return Err(missed());
        }
        let heard = wire::receive(&mut Bounded::new(&self.socket, patience, unwanted));
        self.lost = heard.is_err();
        heard
    }
}

/// Why nothing is heard any more.
fn missed() -> io::Error {
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
        // Neither the terminal's ctrl-c nor its end is meant for the helper.
        command.env_clear().process_group(0);
        command
            .stdin(Stdio::from(OwnedFd::from(asked)))
            .stdout(Stdio::from(OwnedFd::from(returned)));
        helpers::keep(command.spawn().map_err(OpenerError::Start)?);
        let end = End::new(asks, returns).map_err(OpenerError::Start)?;
        let opener = Self(Arc::new(end));
        let hello = Ask::Hello {
            vm: holder.vm.clone(),
            pid: holder.pid,
        };
        opener.lock().say(&hello).map_err(OpenerError::Start)?;
        Ok(opener)
    }

    /// From now on devices are chosen for a VM that is where its `placement` says. Not after [`Self::limit`].
    pub fn place(&self, placement: Placement) -> Result<(), OpenerError> {
        let asked = self.lock().say(&Ask::Place(placement));
        asked.map_err(OpenerError::Gone)
    }

    /// From now on the VM is given what the `limit` allows and no more; nothing takes that back.
    pub fn limit(&self, limit: Limit) -> Result<(), OpenerError> {
        let asked = self.lock().say(&Ask::Limit(limit));
        asked.map_err(OpenerError::Gone)
    }

    /// So many slots are free for what is asked for next: what needs more is refused before a device is leased.
    pub fn slots(&self, free: usize) -> Result<(), OpenerError> {
        let asked = self.lock().say(&Ask::Slots(free));
        asked.map_err(OpenerError::Gone)
    }

    /// Leases what is asked for, and opens its `nodes`: all of it, or nothing. Once it is `unwanted`, or has taken
    /// too long, nothing is waited for any more, what is leased late goes back, and nothing will be opened again.
    pub fn open(
        &self,
        requests: &[DeviceRequest],
        nodes: &Nodes,
        unwanted: &dyn Fn() -> bool,
    ) -> Result<Opened, OpenerError> {
        let iommufd = nodes.back_end == VfioBackEnd::Iommufd;
        let cdevs = iommufd && !nodes.sent;
        let ask = Ask::Lease {
            requests: requests.to_vec(),
            ungrouped: requests.iter().any(|request| request.allow_ungrouped),
            nodes: nodes.clone(),
        };
        // Leases give themselves back over the socket: none is made while it is locked.
        let (leased, groups, mut files) = {
            let mut line = self.lock();
            match line
                .ask(&ask, LEASE_PATIENCE, unwanted)
                .map_err(OpenerError::Gone)?
            {
                Said::Leased { devices, groups } => {
                    let locks: usize = devices.iter().map(|device| device.locks).sum();
                    let each = match (cdevs, iommufd) {
                        (true, _) => devices.len(),
                        (false, true) => 0,
                        (false, false) => groups.len(),
                    };
                    let count = usize::from(nodes.address_space) + each + locks;
                    let files = (0..count).map(|_| line.file());
                    // All of them even if one fails, so that the next answer is not taken for one.
                    let files: Vec<_> = files.collect();
                    (devices, groups, files.into_iter())
                }
                Said::Not(refusal) => return Err(refusal.into()),
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
        // Not by `?`: each lease is made, so that it goes back if anything is missing.
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

    /// What the plan of that name asks for.
    pub fn plan(&self, name: &str) -> Result<Vec<DeviceRequest>, OpenerError> {
        let mut line = self.lock();
        let ask = Ask::Plan(name.to_owned());
        let said = line.ask(&ask, RELEASE_PATIENCE, &|| false);
        match said.map_err(OpenerError::Gone)? {
            Said::Planned(requests) => Ok(requests),
            Said::Not(refusal) => Err(refusal.into()),
            _ => Err(OpenerError::Gone(io::ErrorKind::InvalidData.into())),
        }
    }

    /// The device whose cdev has this number.
    pub fn device_of_cdev(&self, major: u32, minor: u32) -> Result<DeviceName, OpenerError> {
        let mut line = self.lock();
        let ask = Ask::Cdev { major, minor };
        let said = line.ask(&ask, RELEASE_PATIENCE, &|| false);
        match said.map_err(OpenerError::Gone)? {
            Said::Device(name) => Ok(name),
            Said::Not(refusal) => Err(refusal.into()),
            _ => Err(OpenerError::Gone(io::ErrorKind::InvalidData.into())),
        }
    }

    /// A file or block device, opened with these flags. The inner result is the kernel's answer.
    pub fn file(&self, path: &Path, flags: i32) -> Result<io::Result<File>, OpenerError> {
        let mut line = self.lock();
        let ask = Ask::File {
            path: path.to_owned(),
            flags,
        };
        let said = line.ask(&ask, RELEASE_PATIENCE, &|| false);
        match said.map_err(OpenerError::Gone)? {
            Said::Opened => line.file().map(Ok).map_err(OpenerError::Files),
            Said::NotOpened { errno } => Ok(Err(io::Error::from_raw_os_error(errno))),
            Said::Not(refusal) => Err(refusal.into()),
            _ => Err(OpenerError::Gone(io::ErrorKind::InvalidData.into())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        End::lock(&self.0.asks)
    }
}

impl End {
    /// # Errors
    /// As [`Line::new`].
    fn new(asks: UnixStream, returns: UnixStream) -> io::Result<Self> {
        Ok(Self {
            asks: Mutex::new(Line::new(asks)?),
            returns: Mutex::new(Line::new(returns)?),
        })
    }

    fn lock(line: &Mutex<Line>) -> MutexGuard<'_, Line> {
        line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for End {
    /// Lets the helper end, and waits until it has.
    fn drop(&mut self) {
        let line = self.asks.get_mut().unwrap_or_else(PoisonError::into_inner);
        let socket = &mut line.socket;
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let mut socket = Bounded::new(socket, END_PATIENCE, &|| false);
        while socket.read(&mut [0; 64]).is_ok_and(|len| len > 0) {}
    }
}

/// What is known of devices that a VM may be given later.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ToCome {
    /// What they could not map.
    pub reserved: Vec<ReservedRegion>,
    /// The NUMA nodes that they are on.
    pub nodes: Numbers,
}

/// What is known of devices `from` these sources. Aliases and what cannot be read are left out: it is looked
/// at again when a device comes.
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
