//! The queues of a virtio socket device in the host's kernel.

use std::io;
use std::sync::Arc;

use gantry_devices::ram::RamView;
use gantry_devices::virtio::{ActiveQueue, KernelQueues};
use vhost::VhostBackend;
use vhost::vhost_kern::vsock::Vsock;
use vhost::vsock::VhostVsock;
use vm_memory::GuestMemoryMmap;

use super::open::OpenError;
use super::vhost::{self as queues, Memory, VhostError, io_error};

/// Why a guest cannot have a context id.
#[derive(Debug, thiserror::Error)]
pub enum CidError {
    /// Another VM has it.
    #[error("another VM of this host has CID {0}: choose another one")]
    InUse(u32),
    /// The kernel refused.
    #[error("{} does not take CID {cid}: {source}", queues::VSOCK)]
    Refused {
        /// The id.
        cid: u32,
        /// Why.
        source: io::Error,
    },
}

/// Whether a guest can have this context id.
///
/// # Errors
/// It is in use, or the host has no sockets for guests.
pub fn check(cid: u32) -> Result<(), OpenError> {
    let opened = Vsock::new(Arc::new(GuestMemoryMmap::<()>::new()));
    let vsock = queues::node(queues::VSOCK, opened).map_err(failed)?;
    claim(&vsock, cid)
}

fn failed(problem: VhostError) -> OpenError {
    OpenError::Vhost {
        key: "vsock".to_owned(),
        problem,
    }
}

fn claim(vsock: &impl VhostVsock, cid: u32) -> Result<(), OpenError> {
    let claimed = vsock.set_guest_cid(cid.into()).map_err(io_error);
    let claimed = claimed.map_err(|source| match source.raw_os_error() {
        Some(libc::EADDRINUSE) => CidError::InUse(cid),
        _ => CidError::Refused { cid, source },
    });
    claimed.map_err(OpenError::Cid)
}

/// The queues. The guest has its context id as long as the value lives.
pub struct VsockQueues {
    vhost: Arc<Vsock<Memory>>,
    features: u64,
    // The kernel reads and writes it.
    ram: RamView,
}

impl VsockQueues {
    /// Opens the host's node and takes the context id.
    ///
    /// # Errors
    /// The id is in use, or the host has no sockets for guests.
    pub fn new(cid: u32, ram: &RamView) -> Result<Self, OpenError> {
        let vhost = queues::open(queues::VSOCK, ram, 0, Vsock::new).map_err(failed)?;
        let features = vhost.get_features().unwrap_or_default();
        claim(&vhost, cid)?;
        Ok(Self {
            vhost: Arc::new(vhost),
            features,
            ram: ram.clone(),
        })
    }

    /// The features that the kernel has.
    pub fn features(&self) -> u64 {
        self.features
    }
}

impl KernelQueues for VsockQueues {
    fn start(&self, features: u64, queues: &[ActiveQueue]) -> io::Result<()> {
        let vhost = &self.vhost;
        vhost.set_features(features).map_err(io_error)?;
        for queue in queues {
            queues::give(vhost, queue.index.into(), &self.ram, queue)?;
        }
        vhost.start().map_err(io_error)
    }

    fn stop(&self) {
        if let Err(error) = self.vhost.stop() {
            tracing::error!(%error, "vhost does not stop a socket device");
        }
    }
}
