//! MSI-X: the guest's table and control register on one side, VFIO and interrupt routes on the
//! other.
//!
//! The hardware's own table and control register are never written by the guest: VFIO owns them. A
//! vector costs the host something only once the guest unmasks it: a route is asked for, given its
//! message, and then VFIO is told to trigger it. A vector masked later keeps its place in VFIO,
//! while its route holds interrupts back and remembers them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::error::Error;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gantry_devices::pci::{Changes, MsiMessage, MsiRoute, MsiRouter, MsixTable};
use gantry_devices::warn_limited;
use vmm_sys_util::eventfd::EventFd;

use super::config::{InBar, MsixCapability};
use crate::host::{DeviceIo, Irq, Region};

/// Where the message control register lies in the capability.
const CONTROL: u16 = 2;

/// The MSI-X interrupts of a device.
pub(super) struct Interrupts {
    io: Arc<dyn DeviceIo>,
    router: Arc<dyn MsiRouter>,
    table: Place,
    pba: Option<Place>,
    state: Mutex<State>,
}

/// A structure in a BAR.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    region: Region,
    range: Range<u64>,
}

struct State {
    table: MsixTable,
    /// The vectors that have been unmasked since MSI-X was switched on.
    routes: BTreeMap<u16, Box<dyn MsiRoute>>,
    /// Routes for vectors that are about to be unmasked, many at once.
    prepared: BTreeMap<u16, Box<dyn MsiRoute>>,
    /// Vectors that VFIO has set aside from vector 0 on; 0 while it has MSI-X switched off.
    armed: u16,
}

/// What an access to a region meets.
enum Target {
    /// The table, at an offset.
    Table(u64),
    /// The pending bits, at an offset.
    Pending(u64),
    /// The edge of one of them: naturally aligned accesses never do.
    Edge,
    /// Neither.
    Elsewhere,
}

impl Place {
    /// Where `len` bytes at `place` are, if there is such a BAR and it is large enough.
    fn find(io: &dyn DeviceIo, place: InBar, len: u64) -> Option<Self> {
        let region = Region::bar(place.bar)?;
        let end = place.offset.checked_add(len)?;
        let range = place.offset..end;
        (end <= io.region(region).size).then_some(Self { region, range })
    }

    fn meets(&self, region: Region, access: &Range<u64>) -> bool {
        region == self.region && access.start < self.range.end && self.range.start < access.end
    }

    fn offset_of(&self, access: &Range<u64>) -> Option<u64> {
        let inside = access.end <= self.range.end;
        access
            .start
            .checked_sub(self.range.start)
            .filter(|_| inside)
    }
}

impl Interrupts {
    /// The interrupts of `capability`, delivered through `router`; switched off.
    ///
    /// # Errors
    /// The table lies outside of the device's BARs.
    pub fn new(
        io: &Arc<dyn DeviceIo>,
        router: Arc<dyn MsiRouter>,
        capability: &MsixCapability,
    ) -> Result<Arc<Self>, &'static str> {
        let table = MsixTable::new(capability.vectors);
        let place = Place::find(io.as_ref(), capability.table, table.table_len())
            .ok_or("its MSI-X table lies outside of its BARs")?;
        // Some devices point outside with their pending bits, which their drivers do not look at.
        let pba = Place::find(io.as_ref(), capability.pba, table.pba_len());
        Ok(Arc::new(Self {
            io: Arc::clone(io),
            router,
            table: place,
            pba,
            state: Mutex::new(State {
                table,
                routes: BTreeMap::new(),
                prepared: BTreeMap::new(),
                armed: 0,
            }),
        }))
    }

    /// The parts of a region that are emulated.
    pub fn ranges(&self, region: Region) -> Vec<Range<u64>> {
        std::iter::once(&self.table)
            .chain(&self.pba)
            .filter(|place| place.region == region)
            .map(|place| place.range.clone())
            .collect()
    }

    /// Fills `data` from offset `at` of a region if something is emulated there.
    pub fn read(&self, region: Region, at: u64, data: &mut [u8]) -> bool {
        let target = self.target(region, at, data.len());
        let state = self.lock();
        match target {
            Target::Table(offset) => state.table.read_table(offset, data),
            Target::Pending(offset) => {
                let pending = |vector| state.routes.get(&vector).is_some_and(|r| r.pending());
                state.table.read_pba(offset, data, pending);
            }
            Target::Edge => data.fill(0xff),
            Target::Elsewhere => return false,
        }
        true
    }

    /// Takes a write at offset `at` of a region if something is emulated there.
    pub fn write(&self, region: Region, at: u64, data: &[u8]) -> bool {
        match self.target(region, at, data.len()) {
            Target::Table(offset) => {
                let mut state = self.lock();
                let changes = state.table.write_table(offset, data);
                self.apply(&mut state, changes);
            }
            Target::Pending(_) | Target::Edge => {}
            Target::Elsewhere => return false,
        }
        true
    }

    /// Takes the guest's message control register.
    pub fn write_control(&self, control: u16) {
        let mut state = self.lock();
        let was_enabled = state.table.is_enabled();
        let changes = state.table.write_control(CONTROL, &control.to_le_bytes());
        match (was_enabled, state.table.is_enabled()) {
            (true, false) => state.switch_off(self.io.as_ref()),
            (false, true) => {
                // The mode of the hardware follows at once: some firmware and physical functions
                // look at it before any vector is unmasked.
                if let Err(error) = state.switch_on(self.io.as_ref()) {
                    warn_limited!(error = &error as &dyn Error, "MSI-X cannot be switched on");
                }
                self.apply(&mut state, changes);
            }
            _ => self.apply(&mut state, changes),
        }
    }

    /// Back to how it began: switched off, all vectors masked, no route held.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.table.reset();
        state.switch_off(self.io.as_ref());
    }

    fn target(&self, region: Region, at: u64, len: usize) -> Target {
        let access = at..at.saturating_add(len as u64);
        if self.table.meets(region, &access) {
            let offset = self.table.offset_of(&access);
            return offset.map_or(Target::Edge, Target::Table);
        }
        match &self.pba {
            Some(pba) if pba.meets(region, &access) => {
                pba.offset_of(&access).map_or(Target::Edge, Target::Pending)
            }
            _ => Target::Elsewhere,
        }
    }

    /// Carries out what a write to the table or the control register has changed. A vector that
    /// the host cannot deliver stays masked until the guest unmasks it again.
    fn apply(&self, state: &mut State, changes: Changes) {
        self.prepare(state, &changes);
        for (vector, message) in changes {
            let applied = match message {
                Some(message) => self.unmask(state, vector, message),
                None => state.mask(vector).map_err(Into::into),
            };
            if let Err(error) = applied {
                warn_limited!(
                    device = self.io.name(),
                    vector,
                    error = error.as_ref(),
                    "interrupt vector cannot be delivered"
                );
            }
        }
    }

    /// Has the interrupt controller hear of many messages at once. What fails here is tried, and told, vector
    /// by vector.
    fn prepare(&self, state: &mut State, changes: &Changes) {
        let unmasked = || {
            changes
                .iter()
                .filter_map(|(vector, message)| Some((*vector, (*message)?)))
        };
        if unmasked().nth(1).is_none() {
            return;
        }
        for (vector, message) in unmasked() {
            let route = match state.routes.entry(vector) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(_) => match state.prepared.entry(vector) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(place) => match self.router.route() {
                        Ok(route) => place.insert(route),
                        Err(_) => break,
                    },
                },
            };
            route.prepare(message);
        }
        let _ = self.router.publish();
    }

    fn unmask(
        &self,
        state: &mut State,
        vector: u16,
        message: MsiMessage,
    ) -> Result<(), Box<dyn Error>> {
        if let Some(route) = state.routes.get(&vector) {
            return Ok(route.set(Some(message))?);
        }
        let route = match state.prepared.remove(&vector) {
            Some(route) => route,
            None => self.router.route()?,
        };
        route.set(Some(message))?;
        state.arm(self.io.as_ref(), vector, route.trigger())?;
        state.routes.insert(vector, route);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn mask(&self, vector: u16) -> io::Result<()> {
        match self.routes.get(&vector) {
            Some(route) => route.set(None),
            None => Ok(()),
        }
    }

    /// Switches MSI-X on in the device, with no vector that goes anywhere.
    fn switch_on(&mut self, io: &dyn DeviceIo) -> crate::Result<()> {
        if self.armed == 0 {
            io.set_irqs(Irq::Msix, 0, &[None])?;
            self.armed = 1;
        }
        Ok(())
    }

    fn switch_off(&mut self, io: &dyn DeviceIo) {
        self.routes.clear();
        if self.armed > 0
            && let Err(error) = io.disable_irqs(Irq::Msix)
        {
            warn_limited!(error = &error as &dyn Error, "MSI-X stays on in the device");
        }
        self.armed = 0;
    }

    /// Lets VFIO trigger one more vector.
    fn arm(&mut self, io: &dyn DeviceIo, vector: u16, trigger: &EventFd) -> crate::Result<()> {
        self.switch_on(io)?;
        if vector < self.armed || !io.irq(Irq::Msix).fixed {
            return io.set_irqs(Irq::Msix, vector.into(), &[Some(trigger)]);
        }
        let before = self.armed;
        io.disable_irqs(Irq::Msix)?;
        self.armed = 0;
        // Drivers unmask one vector after the other: with room for twice as many, the number of
        // times that all are taken away grows with the logarithm only.
        let roomy = vector.saturating_add(1).next_power_of_two();
        let roomy = roomy.min(self.table.vectors());
        let new = Some((vector, trigger));
        let grown = self
            .arm_all(io, roomy, new)
            .or_else(|_| self.arm_all(io, vector + 1, new));
        if grown.is_err()
            && let Err(lost) = self.arm_all(io, before, None)
        {
            // Each is asked for anew when the guest next unmasks it.
            self.routes.clear();
            return Err(lost);
        }
        // What arrived while all were away is lost; drivers put up with an interrupt too many.
        for route in self.routes.values() {
            route.trigger().write(1).ok();
        }
        grown
    }

    fn arm_all(
        &mut self,
        io: &dyn DeviceIo,
        count: u16,
        new: Option<(u16, &EventFd)>,
    ) -> crate::Result<()> {
        let trigger = |vector| match new {
            Some((number, trigger)) if number == vector => Some(trigger),
            _ => self.routes.get(&vector).map(|route| route.trigger()),
        };
        let triggers: Vec<_> = (0..count).map(trigger).collect();
        io.set_irqs(Irq::Msix, 0, &triggers)?;
        self.armed = count;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
