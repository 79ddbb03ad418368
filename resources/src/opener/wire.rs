//! What goes over the opener's sockets: lengths with JSON behind them, and descriptors.

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

/// The longest message: far beyond any list of devices.
const MAX: u32 = 1 << 20;
/// How often it is looked whether something is still wanted, in milliseconds.
const STEP: u16 = 50;

/// What the VM asks for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    /// First of all: who it is.
    Hello { vm: String, pid: u32 },
    /// Where it is from now on.
    Place(Placement),
    /// What it may be given from now on.
    Limit(Limit),
    /// The slots that are free for the devices that are asked for next.
    Slots(usize),
    /// Devices, and the nodes to be opened for them.
    Lease {
        requests: Vec<DeviceRequest>,
        /// A device that is named by its path may be in no group; a [`Limit`] decides once there is one.
        ungrouped: bool,
        nodes: Nodes,
    },
    /// Nobody has heard the answer to the last `Lease`, and nobody will.
    Unheard,
    /// What the plan of that name asks for.
    Plan(String),
    /// Which device the cdev with this number is of.
    Cdev { major: u32, minor: u32 },
    /// A file or block device, opened with these flags.
    File { path: PathBuf, flags: i32 },
}

/// The nodes to be opened for devices: their groups' or their cdevs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nodes {
    /// Whose.
    pub back_end: VfioBackEnd,
    /// Whether the VM wants a new DMA address space.
    pub address_space: bool,
    /// Whether it has the cdev of the one device that it asks for.
    pub sent: bool,
    /// The IOMMU groups that it has already.
    pub held: Vec<u32>,
}

/// What the VM says over the other socket: a lease ends, and why its device is to be put aside. The answer is
/// `()`, once it has ended.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Return {
    pub(super) id: u64,
    pub(super) aside: Option<String>,
}

/// What a VM may be given once it runs, however it asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Where its devices come from. If nothing is named, from the groups of the devices that it has by now.
    pub from: Vec<DeviceSource>,
    /// Whether it may be given devices that are in no group.
    pub ungrouped: bool,
    /// How many devices it may have at a time.
    pub most: usize,
    /// The files, and the folders with files, that are opened for it to be read.
    pub read: Vec<PathBuf>,
    /// Those that are opened for it to be read and written.
    pub write: Vec<PathBuf>,
}

/// What the opener answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Said {
    /// Behind it come the descriptors: the address space's if wanted, the groups' or the cdevs', the locks'.
    Leased {
        devices: Vec<Leased>,
        groups: Vec<LeasedGroup>,
    },
    /// What a plan asks for.
    Planned(Vec<DeviceRequest>),
    /// Whose cdev it is.
    Device(DeviceName),
    /// Behind it comes the file's descriptor.
    Opened,
    /// The kernel's answer to the open.
    NotOpened {
        errno: i32,
    },
    Not(Refusal),
}

/// Why something is not given, in words for whoever asked.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Refusal {
    /// It is not to be had.
    Denied(String),
    /// It is asked for by a name that nothing on this host has, or a definition is wrong.
    Mistaken(String),
    /// Others hold it.
    Busy(String),
    /// The host failed.
    Failed(String),
}

/// A leased device, and how many locks keep it from others.
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

/// A socket, non-blocking, whose other side may hang: one deadline holds for all that is read and written
/// through this value, to the last byte.
pub(super) struct Bounded<'a> {
    socket: &'a UnixStream,
    deadline: Instant,
    unwanted: &'a dyn Fn() -> bool,
}

impl<'a> Bounded<'a> {
    /// Waits for `patience` in all, or until it is `unwanted`.
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

    /// Tries until the socket has data or room.
    ///
    /// # Errors
    /// `TimedOut` at the deadline, `ConnectionAborted` once it is unwanted; what `attempt` has to say else.
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
            // Not `Interrupted`, at which whoever reads tries again.
            if (self.unwanted)() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if Instant::now() >= self.deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match poll(&mut [PollFd::new(self.socket.as_fd(), ready)], STEP) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Read for Bounded<'_> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.try_until(PollFlags::POLLIN, |mut socket| socket.read(data))
    }
}

impl Write for Bounded<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.try_until(PollFlags::POLLOUT, |mut socket| socket.write(data))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether there is something to receive, or the other side has ended.
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
    if len > MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = vec![0; len as usize];
    socket.read_exact(&mut text)?;
    // Not as serde_json has it, for which a text that breaks off is the end of a file.
    serde_json::from_slice(&text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// A descriptor goes with one byte, as it cannot go alone.
pub(super) fn send_file(socket: &UnixStream, file: RawFd) -> io::Result<()> {
    socket.send_with_fd(&[0_u8][..], file)?;
    Ok(())
}

pub(super) fn receive_file(socket: &mut Bounded<'_>) -> io::Result<File> {
    let mut byte = [0];
    let received = socket.try_until(PollFlags::POLLIN, |socket| {
        Ok(socket.recv_with_fd(&mut byte)?)
    });
    match received? {
        (1, Some(file)) => {
            // The way through the socket has lost this mark.
            fcntl(&file, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
            Ok(file)
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
