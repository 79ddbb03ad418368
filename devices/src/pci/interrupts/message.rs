//! Message-signalled interrupts as seen by a device: it asks for a route and gives it a message.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// What a function writes to raise an interrupt (PCI Local Bus Specification 3.0, 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Address of the write; on x86 in `0xfee0_0000..0xfef0_0000`.
    pub address: u64,
    /// The 32 bits written.
    pub data: u32,
}

/// Gives out interrupt routes: implemented by the owner of the interrupt controller.
pub trait MsiRouter: Send + Sync {
    /// A new route, with no message yet.
    ///
    /// # Errors
    /// The interrupt controller has no route left, or no file descriptor can be made.
    fn route(&self) -> io::Result<Box<dyn MsiRoute>>;

    /// Gives the interrupt controller the messages of all routes that were [prepared](MsiRoute::prepare), at
    /// once: a controller that takes its table as a whole takes it one time for many routes.
    ///
    /// # Errors
    /// The interrupt controller refused. Nothing is prepared any more then.
    fn publish(&self) -> io::Result<()>;
}

/// One interrupt route. Dropping it stops delivery and gives the route back.
pub trait MsiRoute: Send + Sync {
    /// Notes the message that the next [`MsiRouter::publish`] gives to the interrupt controller.
    /// [`Self::set`] with the same message begins to deliver it.
    fn prepare(&self, message: MsiMessage);

    /// Delivers with `message` from now on, or with `None` holds interrupts back: one that arrives
    /// meanwhile stays pending and is delivered with the next message.
    ///
    /// # Errors
    /// The interrupt controller refused; delivery is then stopped.
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()>;

    /// Whether an interrupt has arrived that is being held back.
    fn pending(&self) -> bool;

    /// Who writes to it raises the interrupt.
    fn trigger(&self) -> &EventFd;
}
