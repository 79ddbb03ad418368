//! The API: HTTP over a Unix socket, on one thread that neither owns the VM nor opens a file.
//!
//! [`Socket`] is the file, [`Server`] answers on it, [`Vm`] is whom it asks, [`Events`] is where the VM
//! tells what happens, and [`wire`] has the bodies.

pub mod client;
mod connections;
mod events;
mod handlers;
mod metrics;
mod openapi;
mod reply;
mod routes;
mod sanitize;
mod server;
mod socket;
mod timed_stream;
pub mod wire;

pub use events::Events;
pub use server::{Identity, Limits, Server, Stop};
pub use socket::{
    CleanupArgs, REMOVE_SOCKET, Socket, SocketError, SocketFile, as_process, cleanup_helper,
    path_of, remove_stale,
};

use gantry_vmm::Handle;
use gantry_vmm::command::{Command, CommandError, Reply, VmInfo};

/// Whom the server asks: the VM that this process runs, or one that a test plays.
pub trait Vm: Send + Sync + 'static {
    /// Has `command` done and `reply` called with the outcome, from whatever thread. Never waits.
    fn ask(&self, command: Command, reply: Reply);

    /// What the VM is and has, as far as its owner has shown.
    ///
    /// # Errors
    /// There is none, or its process is ending.
    fn info(&self) -> Result<VmInfo, CommandError>;
}

impl Vm for Handle {
    fn ask(&self, command: Command, reply: Reply) {
        Handle::ask(self, command, reply);
    }

    fn info(&self) -> Result<VmInfo, CommandError> {
        Handle::info(self)
    }
}
