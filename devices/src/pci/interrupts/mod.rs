//! Message-signalled interrupts of a function: its registers, and the routes of the vectors that its guest uses.
//!
//! [`MessageInterrupts`] joins the parts: [`MsixTable`] models what the guest writes, [`Vectors`] has a
//! route for each vector in use, and a [`VectorBackend`] is the device that raises them.

mod message;
mod msix;
mod structures;
mod vectors;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use message::{MsiMessage, MsiRoute, MsiRouter};
pub use msix::{Changes, ENTRY_SIZE, MAX_VECTORS, MsixTable};
use structures::Target;
pub use structures::{InBar, MsixLayout, MsixStructures, OutsideBar};
pub use vectors::{BackendError, ConnectError, MessageKind, Triggers, VectorBackend, Vectors};

/// Where the message control register lies in the capability.
const CONTROL: u16 = 2;

/// The message-signalled interrupts of one function.
///
/// The owner of the function passes on accesses to its BARs and writes to the control register of its
/// capability.
pub struct MessageInterrupts<B> {
    structures: MsixStructures,
    state: Mutex<State<B>>,
}

struct State<B> {
    msix: MsixTable,
    vectors: Vectors<B>,
    /// The kind that is enabled in the device, if one is.
    enabled: Option<MessageKind>,
}

impl<B: VectorBackend> MessageInterrupts<B> {
    /// The interrupts of a function with MSI-X `structures`, raised by `backend` and delivered by `router`.
    /// They are off.
    pub fn new(structures: MsixStructures, backend: B, router: Arc<dyn MsiRouter>) -> Self {
        let state = State {
            msix: MsixTable::new(structures.vectors()),
            vectors: Vectors::new(backend, router),
            enabled: None,
        };
        Self {
            structures,
            state: Mutex::new(state),
        }
    }

    /// The parts of a BAR that are emulated.
    pub fn ranges(&self, bar: u8) -> Vec<Range<u64>> {
        self.structures.ranges(bar)
    }

    /// Fills `data` from offset `at` of a BAR if something is emulated there. Returns whether it was.
    pub fn read(&self, bar: u8, at: u64, data: &mut [u8]) -> bool {
        match self.structures.target(bar, at, data.len()) {
            Target::Table(offset) => self.lock().msix.read_table(offset, data),
            Target::Pending(offset) => {
                let state = self.lock();
                let pending = |vector| state.vectors.is_pending(vector);
                state.msix.read_pba(offset, data, pending);
            }
            Target::Edge => data.fill(0xff),
            Target::Elsewhere => return false,
        }
        true
    }

    /// Takes a write at offset `at` of a BAR if something is emulated there. Returns whether it was.
    pub fn write(&self, bar: u8, at: u64, data: &[u8]) -> bool {
        match self.structures.target(bar, at, data.len()) {
            Target::Table(offset) => {
                let mut state = self.lock();
                let changes = state.msix.write_table(offset, data);
                state.vectors.apply(changes);
            }
            Target::Pending(_) | Target::Edge => {}
            Target::Elsewhere => return false,
        }
        true
    }

    /// Takes the guest's message control register of MSI-X.
    pub fn write_msix_control(&self, control: u16) {
        let mut state = self.lock();
        let changes = state.msix.write_control(CONTROL, &control.to_le_bytes());
        state.follow();
        if state.enabled.is_some() {
            state.vectors.apply(changes);
        }
    }

    /// Disables interrupts, masks all vectors and gives all routes back.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.msix.reset();
        state.enabled = None;
        state.vectors.disable();
    }

    fn lock(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: VectorBackend> State<B> {
    /// Brings the device in line with what the guest has enabled.
    fn follow(&mut self) {
        let wanted = self.msix.is_enabled().then_some(MessageKind::Msix);
        if wanted == self.enabled {
            return;
        }
        if self.enabled.is_some() {
            self.vectors.disable();
        }
        self.enabled = wanted;
        if let Some(kind) = wanted {
            self.vectors.enable(kind, self.msix.vectors());
        }
    }
}
