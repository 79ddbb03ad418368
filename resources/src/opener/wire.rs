//! The messages on the opener's sockets: lengths followed by JSON, and descriptors.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::base::name::DeviceName;
use crate::base::uuid::Uuid;
use crate::facts::reserved::ReservedRegion;
use crate::facts::vfio::VfioBackEnd;
use crate::inventory::card::Terms;
use crate::pools::request::{DeviceRequest, DeviceSource, Placement};

/// The longest message: far longer than any list of devices.
const MAX_MESSAGE: u32 = 1 << 20;
/// How often a wait checks whether the request is still wanted, in milliseconds.
const POLL_STEP_MS: u16 = 50;

/// A request of the VM.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// The first request: the VM's name and process.
    Hello { vm: String, pid: u32 },
    /// The VM's placement from now on.
    Place(Placement),
    /// The limit from now on.
    Limit(Limit),
    /// The slots that are free for the next request.
    Slots(usize),
    /// Devices, and the nodes to be opened for them.
    Lease {
        requests: Vec<DeviceRequest>,
        /// A device that is named by its path may be in no group; a [`Limit`] decides once there is one.
        ungrouped: bool,
        nodes: Nodes,
    },
    /// The reply to the last `Lease` was missed, and its leases must end.
    ReplyLost,
    /// The devices of a plan.
    Plan(String),
    /// The device whose cdev has this number.
    Cdev { major: u32, minor: u32 },
    /// A file or block device, opened with these flags.
    File { path: PathBuf, flags: i32 },
}

/// The nodes to be opened for devices: their groups' or their cdevs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nodes {
    /// Their back end.
    pub back_end: VfioBackEnd,
    /// Whether the VM wants a new DMA address space.
    pub address_space: bool,
    /// Whether the VM has the cdev of the one device that it asks for.
    pub sent: bool,
    /// The IOMMU groups that it has already.
    pub held: Vec<u32>,
}

/// A message of the VM on the other socket: a lease ends, and why its device goes into quarantine. The reply is
/// `()`, once the lease has ended.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Return {
    pub(super) id: u64,
    pub(super) aside: Option<String>,
}

/// The limit of what a VM is given once it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// The sources of its devices. If none is named, the groups of the devices that it has by now.
    pub from: Vec<DeviceSource>,
    /// Whether it may be given devices that are in no group.
    pub ungrouped: bool,
    /// The greatest number of devices at a time.
    pub most: usize,
    /// Files, and folders of files, that it may read.
    pub read: Vec<PathBuf>,
    /// Files, and folders of files, that it may read and write.
    pub write: Vec<PathBuf>,
}

/// A reply of the opener.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// The descriptors follow: the address space's if wanted, those of groups or cdevs, those of locks.
    Leased {
        devices: Vec<Leased>,
        groups: Vec<LeasedGroup>,
    },
    /// The devices of a plan.
    Planned(Vec<DeviceRequest>),
    /// The device of a cdev.
    Device(DeviceName),
    /// The file's descriptor follows.
    Opened,
    /// The kernel refused the open.
    NotOpened {
        errno: i32,
    },
    Refused(Refusal),
}

/// The reason of a refusal, in words for the user.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Refusal {
    /// It is denied.
    Denied(String),
    /// It has an unknown name, or a definition is wrong.
    Mistaken(String),
    /// Others hold it.
    Busy(String),
    /// The host failed.
    Failed(String),
}

/// A leased device, and the number of its locks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Leased {
    pub(super) id: u64,
    pub(super) name: DeviceName,
    pub(super) group: u32,
    pub(super) virtual_function: bool,
    pub(super) token: Option<Uuid>,
    /// The resource group that it is in.
    pub(super) pool: Option<String>,
    pub(super) terms: Terms,
    pub(super) locks: usize,
}

/// A group that the VM did not have.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LeasedGroup {
    pub(super) number: u32,
    pub(super) reserved: Vec<ReservedRegion>,
}

/// A non-blocking socket whose other side may hang: one deadline holds for everything that is read and written
/// through this value.
pub(super) struct DeadlineStream<'a> {
    socket: &'a UnixStream,
    deadline: Instant,
    unwanted: &'a dyn Fn() -> bool,
}

impl<'a> DeadlineStream<'a> {
    /// Waits until the deadline, or until the request is `unwanted`.
    pub(super) fn new(
        socket: &'a UnixStream,
        patience: Duration,
        unwanted: &'a dyn Fn() -> bool,
    ) -> Self {
        Self {
            socket,
            deadline: Instant::now() + patience,
            unwanted,
        }
    }

    /// Repeats `attempt` until the socket has data or room.
    ///
    /// # Errors
    ///
    /// `TimedOut` at the deadline, `ConnectionAborted` once the request is unwanted, and those of `attempt`.
    fn try_until<T>(
        &self,
        ready: PollFlags,
        mut attempt: impl FnMut(&UnixStream) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match attempt(self.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            // Not `Interrupted`, after which readers try again.
            if (self.unwanted)() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if Instant::now() >= self.deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match poll(&mut [PollFd::new(self.socket.as_fd(), ready)], POLL_STEP_MS) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Read for DeadlineStream<'_> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.try_until(PollFlags::POLLIN, |mut socket| socket.read(data))
    }
}

impl Write for DeadlineStream<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.try_until(PollFlags::POLLOUT, |mut socket| socket.write(data))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether there is input, or the other side has closed.
pub(super) fn has_more(socket: &UnixStream) -> bool {
    let mut files = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut files, PollTimeout::ZERO), Ok(1..))
}

pub(super) fn send(socket: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let len = u32::try_from(text.len()).map_err(io::Error::other)?;
    socket.write_all(&len.to_le_bytes())?;
    socket.write_all(&text)
}

/// # Errors
/// `UnexpectedEof` at the end of the socket.
pub(super) fn receive<T: DeserializeOwned>(socket: &mut impl Read) -> io::Result<T> {
    let mut len = [0; 4];
    socket.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len);
    if len > MAX_MESSAGE {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = vec![0; len as usize];
    socket.read_exact(&mut text)?;
    // serde_json reports text that breaks off as the end of a file, which here means a closed socket.
    serde_json::from_slice(&text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// A descriptor is sent with one byte, as it cannot be sent alone.
pub(super) fn send_file(socket: &UnixStream, file: RawFd) -> io::Result<()> {
    socket.send_with_fd(&[0_u8][..], file)?;
    Ok(())
}

pub(super) fn receive_file(socket: &mut DeadlineStream<'_>) -> io::Result<File> {
    let mut byte = [0];
    let received = socket.try_until(PollFlags::POLLIN, |socket| {
        Ok(socket.recv_with_fd(&mut byte)?)
    });
    match received? {
        (1, Some(file)) => {
            // Passing it over the socket has cleared this flag.
            fcntl(&file, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
            Ok(file)
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
