//! The first interrupt of a measured device, as an eventfd.
#![allow(unsafe_code)] // poll(2).

use std::io;
use std::os::fd::AsRawFd;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Subject;
use crate::host::{DeviceIo, Irq};
use crate::{Error, Result};

/// How long an interrupt may take, in milliseconds.
const PATIENCE: libc::c_int = 2000;

/// A connected interrupt. Dropping it disconnects it.
pub struct Interrupt<'a> {
    io: &'a dyn DeviceIo,
    irq: Irq,
    event: EventFd,
}

impl<'a> Interrupt<'a> {
    /// Connects vector 0 of MSI-X, or of MSI; `None` if the device has neither.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn connect(subject: &Subject<'a>) -> Result<Option<Self>> {
        let io = subject.io;
        let mut kinds = [Irq::Msix, Irq::Msi].into_iter();
        let Some(irq) = kinds.find(|irq| io.irq(*irq).count > 0) else {
            return Ok(None);
        };
        let event = EventFd::new(EFD_NONBLOCK).map_err(|source| failed(io, "eventfd", source))?;
        io.set_irqs(irq, 0, &[Some(&event)])?;
        Ok(Some(Self { io, irq, event }))
    }

    /// What kind it is.
    pub fn kind(&self) -> Irq {
        self.irq
    }

    /// Waits for the interrupt.
    ///
    /// # Errors
    /// It does not come.
    pub fn wait(&self) -> Result<()> {
        let mut poll = libc::pollfd {
            fd: self.event.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one structure of which the kernel writes `revents`, and a descriptor that `self` keeps open.
        let ready = unsafe { libc::poll(&raw mut poll, 1, PATIENCE) };
        match ready {
            1 => self.event.read().map(drop),
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Err(io::Error::last_os_error()),
        }
        .map_err(|source| failed(self.io, "waiting for an interrupt", source))
    }

    /// Forgets interrupts that nobody waited for.
    pub fn clear(&self) {
        // Nothing to forget is no failure.
        let _ = self.event.read();
    }
}

impl Drop for Interrupt<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.io.disable_irqs(self.irq) {
            tracing::debug!(%error, "an interrupt stays connected");
        }
    }
}

fn failed(io: &dyn DeviceIo, place: &str, source: io::Error) -> Error {
    Error::Device {
        device: io.name().to_owned(),
        place: place.to_owned(),
        source,
    }
}
