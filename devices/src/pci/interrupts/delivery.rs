//! How interrupts of a function reach its guest: the mode that the device is in, a route for each vector that is
//! used or the line of the pin, and the device that raises them.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::{Changes, IntxLine, MsiMessage, MsiRoute, MsiRouter};
use crate::warn_limited;

/// Why a call of an [`InterruptBackend`] failed.
pub type BackendError = Box<dyn Error + Send + Sync>;

/// The kinds of message-signalled interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageKind {
    /// MSI: up to 32 vectors with one message, in configuration space.
    Msi,
    /// MSI-X: a table in a BAR has a message for each vector.
    Msix,
}

/// How a function raises interrupts. It is in one mode at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InterruptMode {
    /// Not at all.
    Off,
    /// By its pin, on this line of the interrupt controller.
    Intx(u32),
    /// By messages, of which the guest uses up to so many vectors.
    Messages(MessageKind, u16),
}

/// The device that raises interrupts: a host device behind VFIO, or an emulated one. It is in one mode at a
/// time: [`Self::disable`] comes before another one.
///
/// A vector of MSI-X is connected when the guest unmasks it for the first time, all vectors of MSI when the guest
/// enables MSI. A vector stays connected until its kind is disabled: the interrupt route holds back what a
/// masked vector raises.
pub trait InterruptBackend: Send {
    /// The device's name, for messages.
    fn name(&self) -> &str;

    /// Enables a kind of messages in the device, of which the guest uses up to `vectors`, and connects those
    /// that `triggers` has. Returns how many vectors the device can raise, from 0 on: a host may have fewer.
    ///
    /// # Errors
    /// The device refused.
    fn enable(
        &mut self,
        kind: MessageKind,
        vectors: u16,
        triggers: &Triggers,
    ) -> Result<u16, BackendError>;

    /// Has the device write to `trigger` to raise `vector` of the kind that is enabled. `connected` has the
    /// vectors connected before.
    ///
    /// # Errors
    /// The device refused, and the vector is not connected.
    fn connect(
        &mut self,
        vector: u16,
        trigger: &EventFd,
        connected: &Triggers,
    ) -> Result<(), ConnectError>;

    /// Connects the pin to `line`.
    ///
    /// # Errors
    /// The device refused, and the pin is not connected.
    fn connect_pin(&mut self, line: &dyn IntxLine) -> Result<(), BackendError>;

    /// Disconnects all vectors and the pin, and disables their mode in the device.
    ///
    /// # Errors
    /// The device refused. That is tried again before another mode is enabled.
    fn disable(&mut self) -> Result<(), BackendError>;
}

/// Why a vector could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Vectors that were connected before still are.
    #[error(transparent)]
    One(BackendError),
    /// No vector is connected any more.
    #[error(transparent)]
    All(BackendError),
}

/// The vectors that are connected, with their routes.
#[derive(Default)]
pub struct Triggers(BTreeMap<u16, Box<dyn MsiRoute>>);

impl Triggers {
    /// The trigger of a vector, if the vector is connected.
    pub fn get(&self, vector: u16) -> Option<&EventFd> {
        self.0.get(&vector).map(|route| route.trigger())
    }

    /// The triggers of all connected vectors.
    pub fn all(&self) -> impl Iterator<Item = &EventFd> {
        self.0.values().map(|route| route.trigger())
    }
}

/// Delivers the interrupts of a function. A vector of MSI-X costs a route and a vector of the host from its first
/// unmasking on.
pub struct Delivery<B> {
    router: Arc<dyn MsiRouter>,
    backend: B,
    mode: InterruptMode,
    /// The device raises interrupts in that mode.
    entered: bool,
    connected: Triggers,
    /// The line of the pin.
    line: Option<Box<dyn IntxLine>>,
}

impl<B: InterruptBackend> Delivery<B> {
    /// No interrupts. `backend` raises them and `router` delivers them.
    pub fn new(backend: B, router: Arc<dyn MsiRouter>) -> Self {
        Self {
            router,
            backend,
            mode: InterruptMode::Off,
            entered: true,
            connected: Triggers::default(),
            line: None,
        }
    }

    /// The mode that the device is in, or has failed to enter.
    pub fn mode(&self) -> InterruptMode {
        self.mode
    }

    /// Whether the device raises interrupts in its mode.
    pub fn has_entered(&self) -> bool {
        self.entered
    }

    pub(super) fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Leaves the mode and enters `mode`, for messages with these vectors, unless the device is in that mode.
    /// Returns whether it is then; if not, nothing is connected.
    pub fn switch(&mut self, mode: InterruptMode, messages: Changes) -> bool {
        if self.mode == mode && self.entered {
            return true;
        }
        let left = self.leave();
        self.mode = mode;
        let entered = match mode {
            InterruptMode::Off => left,
            InterruptMode::Intx(gsi) => self.connect_pin(gsi),
            InterruptMode::Messages(kind, vectors) => self.enable(kind, vectors, messages),
        };
        self.entered = entered.is_ok();
        if let Err(error) = entered {
            // Where this fails too, the next attempt begins with it.
            let _ = self.leave();
            warn_limited!(
                device = self.backend.name(),
                ?mode,
                error = error.as_ref() as &dyn Error,
                "interrupts cannot be switched to another mode"
            );
        }
        self.entered
    }

    /// Gives all routes and the line back and disables interrupts in the device.
    fn leave(&mut self) -> Result<(), BackendError> {
        self.connected.0.clear();
        let left = self.backend.disable();
        self.line = None;
        left
    }

    fn connect_pin(&mut self, gsi: u32) -> Result<(), BackendError> {
        let line = self.router.line(gsi)?;
        self.backend.connect_pin(line.as_ref())?;
        self.line = Some(line);
        Ok(())
    }

    /// Enables messages in the device at once: some firmware and physical functions look at the mode before
    /// any vector is unmasked. The host gives all vectors of MSI together, so these are connected in the same
    /// step, and no event of one is lost.
    fn enable(
        &mut self,
        kind: MessageKind,
        vectors: u16,
        messages: Changes,
    ) -> Result<(), BackendError> {
        if kind == MessageKind::Msix {
            self.backend.enable(kind, vectors, &self.connected)?;
            self.apply(messages);
            return Ok(());
        }
        let mut prepared = self.prepare(&messages);
        for (vector, message) in messages {
            match self.route(message, prepared.remove(&vector)) {
                Ok(route) => drop(self.connected.0.insert(vector, route)),
                Err(error) => self.report(vector, error.as_ref()),
            }
        }
        let has = self.backend.enable(kind, vectors, &self.connected)?;
        for vector in self.connected.0.split_off(&has).into_keys() {
            let why = format!("the host has only {has} MSI vectors for the device");
            self.report(vector, BackendError::from(why).as_ref());
        }
        Ok(())
    }

    /// Whether an interrupt of a masked vector waits.
    pub fn is_pending(&self, vector: u16) -> bool {
        self.connected
            .0
            .get(&vector)
            .is_some_and(|route| route.pending())
    }

    /// Carries out what the guest has changed. A vector that cannot be delivered stays masked until the
    /// guest unmasks it again.
    pub fn apply(&mut self, changes: Changes) {
        let mut prepared = self.prepare(&changes);
        for (vector, message) in changes {
            let applied = match message {
                Some(message) => self.unmask(vector, message, prepared.remove(&vector)),
                None => self.mask(vector),
            };
            if let Err(error) = applied {
                self.report(vector, error.as_ref());
            }
        }
    }

    fn report(&self, vector: u16, error: &(dyn Error + 'static)) {
        warn_limited!(
            device = self.backend.name(),
            vector,
            error,
            "interrupt vector cannot be delivered"
        );
    }

    /// A route that delivers `message`, or holds interrupts back.
    fn route(
        &self,
        message: Option<MsiMessage>,
        prepared: Option<Box<dyn MsiRoute>>,
    ) -> Result<Box<dyn MsiRoute>, BackendError> {
        let route = match prepared {
            Some(route) => route,
            None => self.router.route()?,
        };
        if message.is_some() {
            route.set(message)?;
        }
        Ok(route)
    }

    /// Gives the interrupt controller many messages at once. Returns the routes of new vectors. What
    /// fails here is tried again, and reported, for each vector.
    fn prepare(&self, changes: &Changes) -> BTreeMap<u16, Box<dyn MsiRoute>> {
        let mut prepared = BTreeMap::new();
        let unmasked = || {
            changes
                .iter()
                .filter_map(|(vector, message)| Some((*vector, (*message)?)))
        };
        if unmasked().nth(1).is_none() {
            return prepared;
        }
        for (vector, message) in unmasked() {
            if let Some(route) = self.connected.0.get(&vector) {
                route.prepare(message);
                continue;
            }
            let Ok(route) = self.router.route() else {
                break;
            };
            route.prepare(message);
            prepared.insert(vector, route);
        }
        let _ = self.router.publish();
        prepared
    }

    fn unmask(
        &mut self,
        vector: u16,
        message: MsiMessage,
        prepared: Option<Box<dyn MsiRoute>>,
    ) -> Result<(), BackendError> {
        if let Some(route) = self.connected.0.get(&vector) {
            return Ok(route.set(Some(message))?);
        }
        let route = self.route(Some(message), prepared)?;
        let connected = self
            .backend
            .connect(vector, route.trigger(), &self.connected);
        match connected {
            Ok(()) => {
                self.connected.0.insert(vector, route);
                Ok(())
            }
            Err(ConnectError::One(error)) => Err(error),
            Err(ConnectError::All(error)) => {
                self.connected.0.clear();
                self.entered = false;
                Err(error)
            }
        }
    }

    fn mask(&self, vector: u16) -> Result<(), BackendError> {
        match self.connected.0.get(&vector) {
            Some(route) => Ok(route.set(None)?),
            None => Ok(()),
        }
    }
}
