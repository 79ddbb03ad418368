//! The MSI capability of a function as a pure model: a write returns which vectors changed.

use super::{Changes, MsiMessage};
use crate::pci::Area;

/// The most vectors a function can have (PCI Express Base Specification 6.0, 7.7.1.2).
const MAX_VECTORS: u16 = 32;
/// Length of the longest capability in bytes.
pub const MSI_MAX_LEN: usize = 24;

/// Message control: MSI is on.
const ENABLE: u16 = 1 << 0;
/// Message control: the number of vectors of the function, as a power of two.
const CAPABLE: u16 = 0b111 << 1;
/// Message control: the number of vectors that the guest enables, as a power of two.
const ENABLED_SHIFT: u16 = 4;
const ENABLED: u16 = 0b111 << ENABLED_SHIFT;
/// Message control: the address has 64 bits.
const ADDRESS_64: u16 = 1 << 7;
/// Message control: each vector has a mask bit and a pending bit.
const MASKING: u16 = 1 << 8;

/// Offset of the message control register.
const CONTROL: usize = 2;
/// Offset of the message address.
const ADDRESS: usize = 4;

/// The layout of an MSI capability (PCI Express Base Specification 6.0, 7.7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiLayout {
    /// The read-only bits of the message control register.
    control: u16,
}

impl MsiLayout {
    /// From the message control register of a function.
    pub const fn from_control(control: u16) -> Self {
        Self {
            control: control & (CAPABLE | ADDRESS_64 | MASKING),
        }
    }

    /// The same with at most `vectors` vectors, a power of two.
    pub fn at_most(self, vectors: u16) -> Self {
        let capable = (vectors.clamp(1, MAX_VECTORS).ilog2() as u16) << 1;
        Self {
            control: self.control & !CAPABLE | capable.min(self.control & CAPABLE),
        }
    }

    /// Number of vectors of the function.
    pub fn vectors(self) -> u16 {
        (1 << ((self.control & CAPABLE) >> 1)).min(MAX_VECTORS)
    }

    /// Length of the capability in bytes.
    pub const fn size(self) -> u16 {
        let address = if self.control & ADDRESS_64 != 0 { 4 } else { 0 };
        let masking = if self.control & MASKING != 0 { 10 } else { 0 };
        10 + address + masking
    }

    /// Offset of the message data.
    const fn data(self) -> usize {
        if self.control & ADDRESS_64 != 0 {
            12
        } else {
            8
        }
    }

    /// Offset of the mask bits. The pending bits follow them.
    const fn mask(self) -> Option<usize> {
        if self.control & MASKING != 0 {
            Some(self.data() + 4)
        } else {
            None
        }
    }

    /// Offset of the pending bits.
    pub fn pending(self) -> Option<u16> {
        self.mask().map(|mask| mask as u16 + 4)
    }

    /// The registers of a capability at `offset`, after its header, with MSI off.
    pub fn area(self, offset: u16) -> Area {
        let mut bytes = [0; MSI_MAX_LEN];
        let mut writable = [0; MSI_MAX_LEN];
        let mut put = |at: usize, value: &[u8], mask: &[u8]| {
            bytes[at..at + value.len()].copy_from_slice(value);
            writable[at..at + mask.len()].copy_from_slice(mask);
        };
        let control = (ENABLE | ENABLED).to_le_bytes();
        put(CONTROL, &self.control.to_le_bytes(), &control);
        put(ADDRESS, &[0; 4], &[0xfc, 0xff, 0xff, 0xff]);
        if self.control & ADDRESS_64 != 0 {
            put(ADDRESS + 4, &[0; 4], &[0xff; 4]);
        }
        put(self.data(), &[0; 2], &[0xff; 2]);
        if let Some(mask) = self.mask() {
            let vectors = u32::MAX >> (32 - u32::from(self.vectors()));
            put(mask, &[0; 4], &vectors.to_le_bytes());
        }
        let range = CONTROL..usize::from(self.size());
        Area::emulated(
            offset + CONTROL as u16,
            &bytes[range.clone()],
            &writable[range],
        )
    }
}

/// What the guest has written to the registers of the capability.
#[derive(Debug, Clone)]
pub struct Msi {
    layout: MsiLayout,
    control: u16,
    address: u64,
    data: u16,
    mask: u32,
}

impl Msi {
    /// The registers of a function after a reset.
    pub fn new(layout: MsiLayout) -> Self {
        Self {
            layout,
            control: 0,
            address: 0,
            data: 0,
            mask: 0,
        }
    }

    /// Whether MSI is on.
    pub fn is_enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// Number of vectors that the guest has enabled.
    pub fn vectors(&self) -> u16 {
        (1 << ((self.control & ENABLED) >> ENABLED_SHIFT)).min(self.layout.vectors())
    }

    /// Takes the bytes of the whole capability, as [`MsiLayout::area`] has them after a guest's write.
    pub fn write(&mut self, capability: &[u8; MSI_MAX_LEN]) -> Changes {
        let before = self.effective();
        let word = |at: usize| u16::from_le_bytes([capability[at], capability[at + 1]]);
        let dword = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
        self.control = word(CONTROL);
        self.address = u64::from(dword(ADDRESS));
        if self.layout.control & ADDRESS_64 != 0 {
            self.address |= u64::from(dword(ADDRESS + 4)) << 32;
        }
        self.data = word(self.layout.data());
        self.mask = self.layout.mask().map_or(0, dword);
        let after = self.effective();
        let changed = (0..).zip(before.into_iter().zip(after));
        changed
            .filter(|(_, (before, after))| before != after)
            .map(|(vector, (_, after))| (vector, after))
            .collect()
    }

    /// The message of each vector that the guest has enabled, `None` for one that is masked: the host has all
    /// of them from the beginning.
    pub fn messages(&self) -> Changes {
        (0..self.vectors()).zip(self.effective()).collect()
    }

    /// The message of each vector; `None` for one that is off or masked.
    fn effective(&self) -> [Option<MsiMessage>; MAX_VECTORS as usize] {
        let vectors = self.vectors();
        std::array::from_fn(|vector| {
            let vector = vector as u16;
            let on = self.is_enabled() && vector < vectors && self.mask >> vector & 1 == 0;
            on.then(|| MsiMessage {
                address: self.address,
                data: u32::from(self.data & !(vectors - 1) | vector),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{ConfigSpace, NoBacking};

    const AT: u16 = 0x50;

    /// A function with the capability, and the guest's writes to it.
    struct Rig(ConfigSpace, Msi);

    impl Rig {
        fn new(control: u16) -> Self {
            let layout = MsiLayout::from_control(control);
            Self(ConfigSpace::new().with(layout.area(AT)), Msi::new(layout))
        }

        fn write(&mut self, offset: u16, data: &[u8]) -> Changes {
            self.0.write(AT + offset, data, &NoBacking);
            self.1.write(&self.0.get(AT))
        }

        /// The vectors and their data.
        fn data(changes: &Changes) -> Vec<(u16, Option<u32>)> {
            let data = |message: &MsiMessage| message.data;
            changes
                .iter()
                .map(|(vector, message)| (*vector, message.as_ref().map(data)))
                .collect()
        }
    }

    #[test]
    fn lengths_and_vectors_are_those_of_the_control_register() {
        for (control, len, vectors) in [
            (0x0000, 10, 1),
            (0x0080, 14, 1),
            (0x0104, 20, 4),
            (0x018a, 24, 32),
            // Reserved.
            (0x018e, 24, 32),
        ] {
            let layout = MsiLayout::from_control(control | 0x0071);
            assert_eq!(
                (layout.size(), layout.vectors()),
                (len, vectors),
                "{control:#x}"
            );
        }
    }

    #[test]
    fn a_function_shows_no_more_vectors_than_the_host_has() {
        for (control, host, shown) in [
            (0x018a, 32, 0x018a),
            (0x018a, 8, 0x0186),
            (0x018a, 7, 0x0184),
            (0x018a, 0, 0x0180),
            (0x0082, 32, 0x0082),
        ] {
            let layout = MsiLayout::from_control(control).at_most(host);
            assert_eq!(
                layout,
                MsiLayout::from_control(shown),
                "{control:#x} {host}"
            );
        }
    }

    #[test]
    fn the_guest_writes_what_the_capability_has() {
        for (control, expected) in [
            (0x0000, [0x0071_0000, 0xffff_fffc, 0x0000_ffff, 0, 0, 0]),
            (
                0x0084,
                [0x00f5_0000, 0xffff_fffc, 0xffff_ffff, 0xffff, 0, 0],
            ),
            (
                0x0186,
                [0x01f7_0000, 0xffff_fffc, 0xffff_ffff, 0xffff, 0xff, 0],
            ),
        ] {
            let mut rig = Rig::new(control);
            rig.write(0, &[0xff; MSI_MAX_LEN]);
            let bytes: [u8; MSI_MAX_LEN] = rig.0.get(AT);
            let dwords = bytes.as_chunks().0.iter().copied().map(u32::from_le_bytes);
            assert_eq!(dwords.collect::<Vec<_>>(), expected, "{control:#x}");
        }
    }

    #[test]
    fn vectors_have_consecutive_data_and_masks() {
        let mut rig = Rig::new(0x0184);
        assert_eq!(rig.write(4, &0x1_fee0_0000_u64.to_le_bytes()), []);
        assert_eq!(rig.write(12, &[0x47, 0x40]), []);
        // Two of the four vectors.
        let on = rig.write(2, &[0x11]);
        assert_eq!(Rig::data(&on), [(0, Some(0x4046)), (1, Some(0x4047))]);
        assert_eq!(on[0].1.unwrap().address, 0x1_fee0_0000);
        assert_eq!(rig.1.messages(), on);
        assert_eq!(Rig::data(&rig.write(16, &[2])), [(1, None)]);
        assert_eq!(rig.1.messages(), [on[0], (1, None)]);
        assert_eq!(Rig::data(&rig.write(12, &[0x50])), [(0, Some(0x4050))]);
        assert_eq!(Rig::data(&rig.write(16, &[0])), [(1, Some(0x4051))]);
        // A dword write to the control register counts as much.
        assert_eq!(rig.write(0, &[0; 4]).len(), 2);
        assert!(!rig.1.is_enabled());
    }

    #[test]
    fn a_guest_cannot_enable_more_than_there_are() {
        let mut rig = Rig::new(0x0002);
        let on = rig.write(2, &[0x71]);
        assert_eq!(Rig::data(&on), [(0, Some(0)), (1, Some(1))]);
    }
}
