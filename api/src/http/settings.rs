//! The settings of a server: its limits, and the VM that it answers for.

use std::time::Duration;

/// The limits for clients.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at a time. One more takes the slot of an idle one, or gets 503.
    pub connections: usize,
    /// Time for the head of a request, which is also how long a connection may idle.
    pub head: Duration,
    /// Time for the body of a request.
    pub body: Duration,
    /// Bytes of the body of a request.
    pub body_bytes: usize,
    /// Time that a client may take to read anything at all.
    pub read: Duration,
    /// Time that the VM may take to answer.
    pub answer: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            head: Duration::from_secs(10),
            body: Duration::from_secs(10),
            body_bytes: 256 << 10,
            read: Duration::from_secs(10),
            answer: Duration::from_secs(120),
        }
    }
}

/// The VM and the user that the server answers for.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Name of the VM.
    pub name: String,
    /// Devices named by path may be in no group.
    pub allow_ungrouped: bool,
    /// The host's directories.
    pub host: gantry_resources::base::HostPaths,
    /// Where the files that clients name must lie; anywhere if absent.
    pub folders: Option<gantry_vmm::Folders>,
}
