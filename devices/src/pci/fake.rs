//! Stand-ins for tests: an endpoint with BARs, and an address space that takes notes.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::registers::{COMMAND, DEVICE_ID, VENDOR_ID};
use super::{
    Area, Bar, BarGuard, BarKind, BarPlacement, BarSet, BarSpace, BarSpaceError, ConfigSpace,
    Decode, NoBacking, PciDevice,
};
use crate::device::BusError;

/// What happened to an address space, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Map(u64),
    Unmap(u64),
    Refused(u64),
    Hardware,
}

/// An address space in which some bases are taken.
#[derive(Default)]
pub struct FakeSpace {
    pub log: Arc<Mutex<Vec<Event>>>,
    pub taken: Mutex<Vec<u64>>,
}

impl FakeSpace {
    pub fn note(&self, event: Event) {
        self.log.lock().unwrap().push(event);
    }

    /// What happened since the last call.
    pub fn events(&self) -> Vec<Event> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

struct Guard(Arc<Mutex<Vec<Event>>>, u64);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.lock().unwrap().push(Event::Unmap(self.1));
    }
}

impl BarSpace for FakeSpace {
    fn map(&self, placement: &BarPlacement) -> Result<BarGuard, BarSpaceError> {
        let base = placement.base;
        if self.taken.lock().unwrap().contains(&base) {
            self.note(Event::Refused(base));
            let len = placement.size;
            return Err(BusError::BadRange { base, len }.into());
        }
        self.note(Event::Map(base));
        Ok(Box::new(Guard(Arc::clone(&self.log), base)))
    }
}

pub fn bar(index: u8, kind: BarKind, size: u64) -> Bar {
    Bar {
        index,
        kind,
        size,
        segments: Arc::new([]),
    }
}

struct State {
    config: ConfigSpace,
    bars: BarSet,
}

/// A function with a command register and BARs, as any other is built.
pub struct Endpoint(Mutex<State>);

impl Endpoint {
    pub fn new(id: u16, bars: impl IntoIterator<Item = Bar>) -> Arc<Self> {
        let config = ConfigSpace::new()
            .with(Area::read_only(VENDOR_ID, &0x1234_u16.to_le_bytes()))
            .with(Area::read_only(DEVICE_ID, &id.to_le_bytes()))
            .with(Area::emulated(COMMAND, &[0; 2], &[7, 4]));
        let bars = BarSet::new("endpoint", bars, 48).unwrap();
        Arc::new(Self(Mutex::new(State { config, bars })))
    }

    pub fn address(&self, index: u8) -> u64 {
        self.state().bars.address(index).unwrap()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl State {
    fn decode(&self) -> Decode {
        Decode::from_command(u16::from_le_bytes(self.config.get(COMMAND)))
    }
}

impl PciDevice for Endpoint {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let state = self.state();
        if BarSet::handles(offset) {
            state.bars.read(offset, data);
        } else {
            state.config.read(offset, data, &NoBacking);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> bool {
        let mut state = self.state();
        if BarSet::handles(offset) {
            state.bars.write(offset, data);
        } else {
            state.config.write(offset, data, &NoBacking);
        }
        state.bars.is_stale(state.decode())
    }

    fn remap(&self, space: &dyn BarSpace) {
        let mut state = self.state();
        let decode = state.decode();
        state.bars.remap(decode, space, || {});
    }

    fn reset(&self, _space: &dyn BarSpace) -> io::Result<()> {
        let mut state = self.state();
        state.bars.unmap();
        state.bars.unassign();
        state.config.set(COMMAND, &[0; 2]);
        Ok(())
    }
}
