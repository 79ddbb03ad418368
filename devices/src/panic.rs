//! The register with which a guest's kernel reports that it has panicked: QEMU's `pvpanic` for the ISA bus
//! (QEMU, `docs/specs/pvpanic.rst`), which Linux drives.

use std::sync::atomic::{AtomicU8, Ordering};

pub use crate::device::Panic;
use crate::device::{BusDevice, Effect};

/// Its I/O port, the same as QEMU's.
pub const PORT: u16 = 0x505;
/// Number of registers, a byte each.
pub const LEN: u64 = 1;

/// The kernel panicked and stops.
const PANICKED: u8 = 1 << 0;
/// The kernel panicked, and its crash kernel starts.
const CRASH_LOADED: u8 = 1 << 1;

/// The register. It reports each kind of panic once, until it is reset.
#[derive(Debug, Default)]
pub struct PanicRegister {
    told: AtomicU8,
}

impl PanicRegister {
    /// Reports panics again: another kernel boots.
    pub fn reset(&self) {
        self.told.store(0, Ordering::Relaxed);
    }
}

impl BusDevice for PanicRegister {
    /// Reads return the kinds of panic that it takes.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Effect {
        let bits = data.first().copied().unwrap_or(0) & (PANICKED | CRASH_LOADED);
        let new = bits & !self.told.fetch_or(bits, Ordering::Relaxed);
        match new {
            0 => Effect::None,
            new if new & PANICKED != 0 => Effect::Panic(Panic::End),
            _ => Effect::Panic(Panic::CrashKernel),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_of_once_a_boot() {
        let register = PanicRegister::default();
        let mut data = [0xff; 2];
        register.read(0, &mut data);
        assert_eq!(data, [3, 0]);
        let tells = |value: u8| match register.write(0, &[value]) {
            Effect::Panic(panic) => Some(panic),
            _ => None,
        };
        for _ in 0..2 {
            assert_eq!(tells(0), None);
            assert_eq!(tells(0xfc), None);
            assert_eq!(tells(CRASH_LOADED), Some(Panic::CrashKernel));
            assert_eq!(tells(PANICKED | CRASH_LOADED), Some(Panic::End));
            assert_eq!(tells(PANICKED), None);
            register.reset();
        }
        assert!(matches!(register.write(0, &[]), Effect::None));
    }
}
