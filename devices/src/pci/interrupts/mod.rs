//! Message-signalled interrupts of a function: its registers, and the routes of the vectors that its guest uses.
//!
//! [`MessageInterrupts`] joins the parts: [`Msi`] and [`MsixTable`] model what the guest writes, [`Vectors`] has
//! a route for each vector in use, and a [`VectorBackend`] is the device that raises them.

mod message;
mod msi;
mod msix;
mod structures;
mod vectors;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use message::{IntxLine, MsiMessage, MsiRoute, MsiRouter};
pub use msi::{MSI_MAX_LEN, Msi, MsiLayout};
pub use msix::{Changes, ENTRY_SIZE, MAX_VECTORS, MsixTable};
use structures::Target;
pub use structures::{InBar, MsixLayout, MsixStructures, OutsideBar};
pub use vectors::{BackendError, ConnectError, MessageKind, Triggers, VectorBackend, Vectors};

/// Offset of the message control register in the MSI-X capability.
const CONTROL: u16 = 2;

/// The message-signalled interrupts of one function, which has MSI, MSI-X, both or none.
///
/// The owner of the function passes on accesses to its BARs and writes to its capabilities.
pub struct MessageInterrupts<B> {
    structures: Option<MsixStructures>,
    state: Mutex<State<B>>,
}

struct State<B> {
    msix: Option<MsixTable>,
    msi: Option<Msi>,
    vectors: Vectors<B>,
    /// The kind that is enabled in the device, and the number of its vectors.
    enabled: Option<(MessageKind, u16)>,
}

impl<B: VectorBackend> MessageInterrupts<B> {
    /// The interrupts of a function with these capabilities, raised by `backend` and delivered by `router`.
    /// They are off.
    pub fn new(
        msix: Option<MsixStructures>,
        msi: Option<MsiLayout>,
        backend: B,
        router: Arc<dyn MsiRouter>,
    ) -> Self {
        let state = State {
            msix: msix.as_ref().map(|msix| MsixTable::new(msix.vectors())),
            msi: msi.map(Msi::new),
            vectors: Vectors::new(backend, router),
            enabled: None,
        };
        Self {
            structures: msix,
            state: Mutex::new(state),
        }
    }

    /// The parts of a BAR that are emulated.
    pub fn ranges(&self, bar: u8) -> Vec<Range<u64>> {
        let structures = self.structures.as_ref();
        structures.map_or_else(Vec::new, |structures| structures.ranges(bar))
    }

    /// Fills `data` from offset `at` of a BAR if something is emulated there. Returns whether it was.
    pub fn read(&self, bar: u8, at: u64, data: &mut [u8]) -> bool {
        let target = self.target(bar, at, data.len());
        if target == Target::Elsewhere {
            return false;
        }
        let state = self.lock();
        match (target, &state.msix) {
            (Target::Table(offset), Some(table)) => table.read_table(offset, data),
            (Target::Pending(offset), Some(table)) => {
                table.read_pba(offset, data, |vector| state.vectors.is_pending(vector));
            }
            _ => data.fill(0xff),
        }
        true
    }

    /// Takes a write at offset `at` of a BAR if something is emulated there. Returns whether it was.
    pub fn write(&self, bar: u8, at: u64, data: &[u8]) -> bool {
        match self.target(bar, at, data.len()) {
            Target::Table(offset) => {
                let mut state = self.lock();
                if let Some(table) = &mut state.msix {
                    let changes = table.write_table(offset, data);
                    state.vectors.apply(changes);
                }
            }
            Target::Pending(_) | Target::Edge => {}
            Target::Elsewhere => return false,
        }
        true
    }

    /// Takes the guest's message control register of MSI-X.
    pub fn write_msix_control(&self, control: u16) {
        let mut state = self.lock();
        if let Some(table) = &mut state.msix {
            let changes = table.write_control(CONTROL, &control.to_le_bytes());
            state.follow(MessageKind::Msix, changes);
        }
    }

    /// Takes the bytes of the MSI capability after a guest's write.
    pub fn write_msi(&self, capability: &[u8; MSI_MAX_LEN]) {
        let mut state = self.lock();
        if let Some(msi) = &mut state.msi {
            let changes = msi.write(capability);
            state.follow(MessageKind::Msi, changes);
        }
    }

    /// The pending bits of MSI.
    pub fn msi_pending(&self) -> u32 {
        let state = self.lock();
        match state.enabled {
            Some((MessageKind::Msi, vectors)) => (0..vectors)
                .filter(|vector| state.vectors.is_pending(*vector))
                .fold(0, |bits, vector| bits | 1 << vector),
            _ => 0,
        }
    }

    /// Disables interrupts, masks all vectors and gives all routes back.
    pub fn reset(&self) {
        let mut state = self.lock();
        if let Some(table) = &mut state.msix {
            table.reset();
        }
        if let Some(msi) = &mut state.msi {
            msi.write(&[0; MSI_MAX_LEN]);
        }
        state.enabled = None;
        state.vectors.disable();
    }

    /// Has the backend do something while no vector changes.
    pub fn with_backend<T>(&self, action: impl FnOnce(&mut B) -> T) -> T {
        action(self.lock().vectors.backend_mut())
    }

    fn target(&self, bar: u8, at: u64, len: usize) -> Target {
        let structures = self.structures.as_ref();
        structures.map_or(Target::Elsewhere, |structures| {
            structures.target(bar, at, len)
        })
    }

    fn lock(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: VectorBackend> State<B> {
    /// Has the device follow what the guest has changed in the capability of a kind. A guest that enables
    /// both kinds gets MSI-X.
    fn follow(&mut self, kind: MessageKind, changes: Changes) {
        let msix = self.msix.as_ref().filter(|table| table.is_enabled());
        let msi = self.msi.as_ref().filter(|msi| msi.is_enabled());
        let (wanted, unmasked) = match (msix, msi) {
            (Some(table), _) => (Some((MessageKind::Msix, table.vectors())), table.unmasked()),
            (None, Some(msi)) => (Some((MessageKind::Msi, msi.vectors())), msi.unmasked()),
            (None, None) => (None, Changes::new()),
        };
        if wanted == self.enabled {
            if wanted.is_some_and(|(enabled, _)| enabled == kind) {
                self.vectors.apply(changes);
            }
            return;
        }
        if self.enabled.is_some() {
            self.vectors.disable();
        }
        self.enabled = wanted;
        if let Some((kind, vectors)) = wanted {
            self.vectors.enable(kind, vectors);
            self.vectors.apply(unmasked);
        }
    }
}

#[cfg(test)]
mod tests;
