//! The API: HTTP over a Unix socket, on one thread that neither owns the VM nor opens a file.
//!
//! [`Socket`] is the file, [`Server`] answers on it, [`Vm`] takes its commands, [`Events`] publishes what
//! happens, [`Console`] what the guest writes, and [`wire`] has the bodies.

pub mod client;
mod connections;
mod console;
mod descriptors;
mod events;
mod handlers;
mod metrics;
mod openapi;
mod race;
mod reply;
mod routes;
mod sanitize;
mod server;
mod settings;
mod socket;
mod timed_stream;
pub mod wire;

pub use console::Console;
pub use events::Events;
pub use server::{Server, Stop};
pub use settings::{Identity, Limits};
pub use socket::{
    CleanupArgs, REMOVE_SOCKET, Socket, SocketError, SocketFile, as_process, cleanup_helper,
    path_of, remove_stale,
};

use gantry_vmm::Handle;
use gantry_vmm::command::{Command, CommandError, Reply, VmInfo};

/// The VM behind the server: the one that this process runs, or a fake in tests.
pub trait Vm: Send + Sync + 'static {
    /// Starts `command`; any thread calls `reply` with the outcome. Never waits.
    fn ask(&self, command: Command, reply: Reply);

    /// The VM's configuration, state and devices, as last published.
    ///
    /// # Errors
    /// There is none, or its process is ending.
    fn info(&self) -> Result<VmInfo, CommandError>;

    /// Types at the guest's serial port. Returns how many bytes it has taken. Never waits.
    ///
    /// # Errors
    /// No VM runs, or it has no serial port.
    fn type_in(&self, input: &[u8]) -> Result<usize, CommandError>;
}

impl Vm for Handle {
    fn ask(&self, command: Command, reply: Reply) {
        Handle::ask(self, command, reply);
    }

    fn info(&self) -> Result<VmInfo, CommandError> {
        Handle::info(self)
    }

    fn type_in(&self, input: &[u8]) -> Result<usize, CommandError> {
        Handle::type_in(self, input)
    }
}
