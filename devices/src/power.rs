//! Power: the ACPI sleep and reset registers of hardware-reduced ACPI.

use crate::device::{BusDevice, Effect};
use crate::warn_limited;

/// Offset of the sleep control register, 8 bits (ACPI Specification 6.5, 4.8.3.7; FADT field
/// `SLEEP_CONTROL_REG`).
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register, 8 bits (4.8.3.7; FADT field `SLEEP_STATUS_REG`).
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register, 8 bits (4.8.3.6; FADT field `RESET_REG`).
pub const RESET: u64 = 2;
/// Number of registers.
pub const LEN: u64 = 3;
/// What is written to the reset register (FADT field `RESET_VALUE`).
pub const RESET_VALUE: u8 = 1;
/// The sleep type of soft off, for the `\_S5` package (7.4.2).
pub const S5: u8 = 5;

/// Sleep control: the sleep type, in bits 4 to 2.
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111;
/// Sleep control: enter the sleep state. Write-only.
const SLP_EN: u8 = 1 << 5;

/// The registers, at ports or in memory. They hold no state: a guest that can read them is running, and has
/// not been woken up.
#[derive(Debug, Clone, Copy, Default)]
pub struct PowerRegisters;

impl BusDevice for PowerRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        // Registers are bytes; a wider access writes each of them in turn.
        for (register, &value) in (offset..LEN).zip(data) {
            match register {
                SLEEP_CONTROL if value & SLP_EN != 0 => {
                    let kind = value >> SLP_TYP_SHIFT & SLP_TYP_MASK;
                    if kind == S5 {
                        return Effect::PowerOff;
                    }
                    warn_limited!(kind, "guest asked for a sleep type that it was not offered");
                }
                RESET if value == RESET_VALUE => return Effect::Reset,
                _ => {}
            }
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_off_and_reset_are_recognised() {
        let power = PowerRegisters;
        let off = power.write(SLEEP_CONTROL, &[S5 << 2 | 1 << 5]);
        assert!(matches!(off, Effect::PowerOff));
        assert!(matches!(power.write(RESET, &[RESET_VALUE]), Effect::Reset));
    }

    #[test]
    fn anything_else_is_ignored() {
        let power = PowerRegisters;
        let ignored: [(u64, &[u8]); 7] = [
            (SLEEP_CONTROL, &[S5 << 2]),
            (SLEEP_CONTROL, &[1 << 2 | 1 << 5]),
            (SLEEP_STATUS, &[0x80]),
            (RESET, &[2]),
            (RESET, &[]),
            (LEN, &[1; 8]),
            (u64::MAX, &[1; 8]),
        ];
        for (offset, data) in ignored {
            let effect = power.write(offset, data);
            assert!(matches!(effect, Effect::None), "{offset:#x} {data:?}");
        }
    }

    #[test]
    fn registers_read_as_awake() {
        let mut data = [0xff; 4];
        PowerRegisters.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
