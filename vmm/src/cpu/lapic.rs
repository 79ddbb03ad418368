//! The local APIC's two pins, as firmware would leave them.

use kvm_bindings::kvm_lapic_state;

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const MASKED: u32 = 1 << 16;
const DELIVER_NMI: u32 = 0b100 << 8;
const DELIVER_EXTINT: u32 = 0b111 << 8;

/// LINT1 delivers NMIs, as the MADT says. LINT0 would be for a PIC, which the ACPI tables leave out: KVM's
/// irqchip has one, uninitialised and unmasked by default, and no guest masks it.
pub fn set_pins(state: &mut kvm_lapic_state) {
    set(state, LVT_LINT0, DELIVER_EXTINT | MASKED);
    set(state, LVT_LINT1, DELIVER_NMI);
}

fn set(state: &mut kvm_lapic_state, register: usize, value: u32) {
    let bytes = value.to_le_bytes();
    for (place, byte) in state.regs[register..].iter_mut().zip(bytes) {
        *place = byte.cast_signed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pins_change() {
        let mut state = kvm_lapic_state::default();
        state.regs.fill(0x55);
        set_pins(&mut state);
        let word = |at: usize| [0, 1, 2, 3].map(|byte| state.regs[at + byte].cast_unsigned());
        assert_eq!(word(0x350), [0, 7, 1, 0]);
        assert_eq!(word(0x360), [0, 4, 0, 0]);
        assert_eq!(
            state.regs.iter().filter(|byte| **byte == 0x55).count(),
            1024 - 8
        );
    }
}
