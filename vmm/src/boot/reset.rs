//! The code at the reset vector, which resets the machine. It is the only firmware.
//!
//! Linux on hardware-reduced ACPI reboots by EFI. Without EFI it does not fall back to the ACPI reset register,
//! but jumps to the reset vector in real mode (`efi_reboot_required` and `native_machine_emergency_restart`).

use gantry_devices::power;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::BootError;
use crate::layout::{Layout, POWER_PORT, RESET_VECTOR};

/// Writes the code, where there is RAM to hold it.
pub fn write<M: GuestMemoryBackend>(memory: &M, layout: &Layout) -> Result<(), BootError> {
    let code = code();
    let end = RESET_VECTOR + code.len() as u64;
    if !layout
        .ram
        .iter()
        .any(|range| range.start <= RESET_VECTOR && end <= range.end())
    {
        // A device forbids this page of RAM: the guest's reboot ends in a triple fault then.
        return Ok(());
    }
    let address = GuestAddress(RESET_VECTOR);
    memory
        .write_slice(&code, address)
        .map_err(|source| BootError::Write {
            what: "the code of the reset vector",
            address,
            source,
        })
}

/// In 16-bit code: `mov dx, port`, `mov al, value`, `out dx, al`, then `hlt` for ever.
fn code() -> [u8; 9] {
    let [low, high] = (POWER_PORT + power::RESET as u16).to_le_bytes();
    [
        0xba,
        low,
        high,
        0xb0,
        power::RESET_VALUE,
        0xee,
        0xf4,
        0xeb,
        0xfd,
    ]
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::layout::LayoutInputs;

    fn written(reserved: &[std::ops::RangeInclusive<u64>]) -> [u8; 9] {
        let inputs = LayoutInputs {
            root_ports: 255,
            ram: 4 << 20,
            physical_bits: 40,
            iova: &[],
            reserved,
        };
        let layout = Layout::plan(&inputs).unwrap();
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        write(&memory, &layout).unwrap();
        memory.read_obj(GuestAddress(0xf_fff0)).unwrap()
    }

    #[test]
    fn the_vector_writes_the_reset_register() {
        assert_eq!(
            written(&[]),
            [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd]
        );
        assert_eq!(written(&[0xf_f000..=0xf_ffff]), [0; 9], "no RAM there");
    }
}
