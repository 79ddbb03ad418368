//! The vectors that a function uses: an interrupt route for each, and the device that raises it.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::{Changes, MsiMessage, MsiRoute, MsiRouter};
use crate::warn_limited;

/// Why a call of a [`VectorBackend`] failed.
pub type BackendError = Box<dyn Error + Send + Sync>;

/// The kinds of message-signalled interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageKind {
    /// MSI: up to 32 vectors with one message, in configuration space.
    Msi,
    /// MSI-X: a table in a BAR has a message for each vector.
    Msix,
}

/// The device that raises interrupts: a host device behind VFIO, or an emulated one.
///
/// A vector is connected when the guest unmasks it for the first time, and stays connected until its
/// kind is disabled: the interrupt route holds back what a masked vector raises.
pub trait VectorBackend: Send {
    /// The device's name, for messages.
    fn name(&self) -> &str;

    /// Enables a kind of interrupts in the device, of which the guest uses up to `vectors`. None of them
    /// is connected yet.
    ///
    /// # Errors
    /// The device refused. [`Self::connect`] tries again.
    fn enable(&mut self, kind: MessageKind, vectors: u16) -> Result<(), BackendError>;

    /// Has the device write to `trigger` to raise `vector`. `connected` has the vectors connected before.
    ///
    /// # Errors
    /// The device refused, and the vector is not connected.
    fn connect(
        &mut self,
        vector: u16,
        trigger: &EventFd,
        connected: &Triggers,
    ) -> Result<(), ConnectError>;

    /// Disconnects all vectors and disables their kind in the device.
    fn disable(&mut self);
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

/// The vectors that a function uses. A vector costs a route and a vector of the host from its first
/// unmasking on.
pub struct Vectors<B> {
    router: Arc<dyn MsiRouter>,
    backend: B,
    connected: Triggers,
}

impl<B: VectorBackend> Vectors<B> {
    /// No vectors. `backend` raises them and `router` delivers them.
    pub fn new(backend: B, router: Arc<dyn MsiRouter>) -> Self {
        Self {
            router,
            backend,
            connected: Triggers::default(),
        }
    }

    /// Enables a kind of interrupts in the device at once: some firmware and physical functions look at
    /// their mode before any vector is unmasked.
    pub fn enable(&mut self, kind: MessageKind, vectors: u16) {
        if let Err(error) = self.backend.enable(kind, vectors) {
            warn_limited!(
                device = self.backend.name(),
                ?kind,
                error = error.as_ref() as &dyn Error,
                "interrupts cannot be enabled"
            );
        }
    }

    pub(super) fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Gives all routes back and disables interrupts in the device.
    pub fn disable(&mut self) {
        self.connected.0.clear();
        self.backend.disable();
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
                warn_limited!(
                    device = self.backend.name(),
                    vector,
                    error = error.as_ref() as &dyn Error,
                    "interrupt vector cannot be delivered"
                );
            }
        }
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
        let route = match prepared {
            Some(route) => route,
            None => self.router.route()?,
        };
        route.set(Some(message))?;
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
