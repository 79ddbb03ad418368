//! What a function asks of the interrupt controller: routes for messages, and lines for its pin.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// The write with which a function raises an interrupt (PCI Local Bus Specification 3.0, 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Address of the write; on x86 in `0xfee0_0000..0xfef0_0000`.
    pub address: u64,
    /// The 32 bits written.
    pub data: u32,
}

/// Gives interrupt routes to functions. The owner of the interrupt controller implements it.
pub trait MsiRouter: Send + Sync {
    /// A new route, with no message yet.
    ///
    /// # Errors
    /// The interrupt controller has no route left, or no file descriptor can be made.
    fn route(&self) -> io::Result<Box<dyn MsiRoute>>;

    /// Gives the interrupt controller the messages of all [prepared](MsiRoute::prepare) routes at once: a
    /// controller that takes only its whole table takes it once for many routes.
    ///
    /// # Errors
    /// The interrupt controller refused. No route is prepared any more then.
    fn publish(&self) -> io::Result<()>;

    /// Connects a level-triggered line of the interrupt controller.
    ///
    /// # Errors
    /// The interrupt controller refused, or no file descriptor can be made.
    fn line(&self, gsi: u32) -> io::Result<Box<dyn IntxLine>>;
}

/// A source of a level-triggered line. Dropping it disconnects the source.
pub trait IntxLine: Send + Sync {
    /// A write to it asserts the line until the guest has handled the interrupt.
    fn trigger(&self) -> &EventFd;

    /// Readable after the guest has handled the interrupt: a source that still wants one writes again.
    fn resample(&self) -> &EventFd;
}

/// One interrupt route. Dropping it stops delivery and gives the route back.
pub trait MsiRoute: Send + Sync {
    /// Notes the message that the next [`MsiRouter::publish`] gives to the interrupt controller.
    /// [`Self::set`] with the same message begins to deliver it.
    fn prepare(&self, message: MsiMessage);

    /// Delivers interrupts with `message`, or holds them back with `None`: an interrupt that arrives then is
    /// pending until the next message is set.
    ///
    /// # Errors
    /// The interrupt controller refused; delivery is then stopped.
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()>;

    /// Whether an interrupt is held back.
    fn pending(&self) -> bool;

    /// A write to it raises the interrupt.
    fn trigger(&self) -> &EventFd;
}
