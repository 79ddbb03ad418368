//! Interrupts of a function: its registers, the mode that its guest has chosen, and what delivers them.
//!
//! [`Interrupts`] joins the parts: [`Msi`] and [`MsixTable`] model what the guest writes, [`Delivery`] has the
//! mode, with a route for each vector in use or the line of the pin, and an [`InterruptBackend`] is the device
//! that raises them.

mod delivery;
mod message;
mod msi;
mod msix;
mod structures;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use delivery::Delivery;
pub use delivery::{
    BackendError, ConnectError, InterruptBackend, InterruptMode, MessageKind, Triggers,
};
pub use message::{IntxLine, MsiMessage, MsiRoute, MsiRouter};
pub use msi::{MSI_MAX_LEN, Msi, MsiLayout};
pub use msix::{Changes, ENTRY_SIZE, MAX_VECTORS, MsixTable};
use structures::Target;
pub use structures::{InBar, MsixLayout, MsixStructures, OutsideBar};

/// Offset of the message control register in the MSI-X capability.
const CONTROL: u16 = 2;

/// The interrupts of one function, which has any of MSI-X, MSI and a pin.
///
/// The owner of the function passes on accesses to its BARs and writes to its capabilities, and then switches
/// to the [mode](Self::wanted) that the guest has chosen.
pub struct Interrupts<B> {
    structures: Option<MsixStructures>,
    state: Mutex<State<B>>,
}

struct State<B> {
    msix: Option<MsixTable>,
    msi: Option<Msi>,
    /// The interrupt controller's line of the pin, if the guest has the pin.
    line: Option<u32>,
    delivery: Delivery<B>,
}

impl<B: InterruptBackend> Interrupts<B> {
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
            line: None,
            delivery: Delivery::new(backend, router),
        };
        Self {
            structures: msix,
            state: Mutex::new(state),
        }
    }

    /// Sets the interrupt controller's line of the pin.
    pub fn set_line(&self, line: Option<u32>) {
        self.lock().line = line;
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
                table.read_pba(offset, data, |vector| state.delivery.is_pending(vector));
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
                    state.apply(MessageKind::Msix, changes);
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
            state.apply(MessageKind::Msix, changes);
        }
    }

    /// Takes the bytes of the MSI capability after a guest's write.
    pub fn write_msi(&self, capability: &[u8; MSI_MAX_LEN]) {
        let mut state = self.lock();
        if let Some(msi) = &mut state.msi {
            let changes = msi.write(capability);
            state.apply(MessageKind::Msi, changes);
        }
    }

    /// The mode that the guest has chosen: MSI-X goes before MSI, and both before the pin, which the function
    /// uses if it is `enabled`.
    pub fn wanted(&self, enabled: bool) -> InterruptMode {
        let state = self.lock();
        match (state.enabled_kind(), state.line) {
            (Some((kind, vectors)), _) => InterruptMode::Messages(kind, vectors),
            (None, Some(gsi)) if enabled => InterruptMode::Intx(gsi),
            (None, _) => InterruptMode::Off,
        }
    }

    /// The mode that the device is in; off if it failed to enter the last one.
    pub fn mode(&self) -> InterruptMode {
        let state = self.lock();
        match state.delivery.has_entered() {
            true => state.delivery.mode(),
            false => InterruptMode::Off,
        }
    }

    /// Has the device leave its mode and enter `mode`, unless it is in that one. Returns whether it raises
    /// interrupts in that mode then. If not, the next call tries again, and so does the next change of a vector.
    pub fn switch(&self, mode: InterruptMode) -> bool {
        self.lock().switch(mode)
    }

    /// The pending bits of MSI.
    pub fn msi_pending(&self) -> u32 {
        let state = self.lock();
        match state.delivery.mode() {
            InterruptMode::Messages(MessageKind::Msi, vectors) => (0..vectors)
                .filter(|vector| state.delivery.is_pending(*vector))
                .fold(0, |bits, vector| bits | 1 << vector),
            _ => 0,
        }
    }

    /// Disables interrupts, masks all vectors and gives all routes and the line back.
    pub fn reset(&self) {
        let mut state = self.lock();
        if let Some(table) = &mut state.msix {
            table.reset();
        }
        if let Some(msi) = &mut state.msi {
            msi.write(&[0; MSI_MAX_LEN]);
        }
        state.switch(InterruptMode::Off);
    }

    /// Has the backend do something while nothing else changes.
    pub fn with_backend<T>(&self, action: impl FnOnce(&mut B) -> T) -> T {
        action(self.lock().delivery.backend_mut())
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

impl<B: InterruptBackend> State<B> {
    /// The kind of messages that the guest has enabled, and the number of its vectors.
    fn enabled_kind(&self) -> Option<(MessageKind, u16)> {
        let msix = self.msix.as_ref().filter(|table| table.is_enabled());
        let msi = self.msi.as_ref().filter(|msi| msi.is_enabled());
        match (msix, msi) {
            (Some(table), _) => Some((MessageKind::Msix, table.vectors())),
            (None, Some(msi)) => Some((MessageKind::Msi, msi.vectors())),
            (None, None) => None,
        }
    }

    fn switch(&mut self, mode: InterruptMode) -> bool {
        let messages = match (mode, &self.msix, &self.msi) {
            (InterruptMode::Messages(MessageKind::Msix, _), Some(table), _) => table.unmasked(),
            (InterruptMode::Messages(MessageKind::Msi, _), _, Some(msi)) => msi.messages(),
            _ => Changes::new(),
        };
        self.delivery.switch(mode, messages)
    }

    /// Carries out what the guest has changed in a kind of messages, if the device is in that mode. A guest that
    /// has disabled the kind has masked its vectors.
    fn apply(&mut self, kind: MessageKind, mut changes: Changes) {
        let mode = self.delivery.mode();
        let InterruptMode::Messages(_, vectors) = mode else {
            return;
        };
        if mode != InterruptMode::Messages(kind, vectors) {
            return;
        }
        if self.delivery.has_entered() {
            changes.retain(|(vector, _)| *vector < vectors);
            self.delivery.apply(changes);
        } else if !changes.is_empty() && self.enabled_kind() == Some((kind, vectors)) {
            self.switch(mode);
        }
    }
}

#[cfg(test)]
mod tests;
