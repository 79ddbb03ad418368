//! The kinds of interrupt that a PCI function has, read from its configuration space.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;

const STATUS: usize = 0x06;
/// Bit 4 of the status register: there is a list of capabilities (PCI 3.0, 6.2.3).
const HAS_CAPABILITIES: u8 = 1 << 4;
const FIRST_CAPABILITY: usize = 0x34;
const INTERRUPT_PIN: usize = 0x3d;
const HEADER: usize = 64;
const MSI: u8 = 0x05;
const MSIX: u8 = 0x11;
/// The number of capabilities that fit behind the header, so that a list in a circle ends.
const MOST_CAPABILITIES: usize = (256 - HEADER) / 4;

/// Which interrupts a PCI function can raise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Interrupts {
    /// MSI-X.
    pub msix: bool,
    /// MSI.
    pub msi: bool,
    /// A pin for INTx.
    pub intx: bool,
}

impl Interrupts {
    /// Reads the `config` attribute of a function. None if the interrupts are unknown: only root can read the
    /// list of capabilities, and a function that does not answer reads all-ones.
    pub(crate) fn read(config: &Path) -> Option<Self> {
        let file = File::open(config).ok()?;
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).ok()?;
        Self::parse(&header, |offset| {
            let mut bytes = [0; 2];
            file.read_exact_at(&mut bytes, offset).ok()?;
            Some(bytes)
        })
    }

    /// The same for a header and the first two bytes of each capability.
    fn parse(
        header: &[u8; HEADER],
        mut capability: impl FnMut(u64) -> Option<[u8; 2]>,
    ) -> Option<Self> {
        if header.starts_with(&[0xff, 0xff]) {
            return None;
        }
        let mut found = Self {
            msix: false,
            msi: false,
            intx: header[INTERRUPT_PIN] != 0,
        };
        let mut next = match header[STATUS] & HAS_CAPABILITIES {
            0 => 0,
            _ => header[FIRST_CAPABILITY] & !3,
        };
        for _ in 0..MOST_CAPABILITIES {
            if usize::from(next) < HEADER {
                break;
            }
            let [id, following] = capability(next.into())?;
            found.msix |= id == MSIX;
            found.msi |= id == MSI;
            next = following & !3;
        }
        Some(found)
    }
}

impl Interrupts {
    /// Whether there are any.
    pub fn are_any(self) -> bool {
        self.msix || self.msi || self.intx
    }
}

/// "MSI and INTx", "MSI", or "no interrupts".
impl fmt::Display for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [(self.msix, "MSI-X"), (self.msi, "MSI"), (self.intx, "INTx")];
        let kinds: Vec<&str> = kinds
            .iter()
            .filter_map(|(has, name)| has.then_some(*name))
            .collect();
        match kinds.as_slice() {
            [] => f.write_str("no interrupts"),
            kinds => f.write_str(&kinds.join(" and ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A configuration space with these capabilities, one behind the other.
    fn space(pin: u8, capabilities: &[u8]) -> Vec<u8> {
        let mut space = vec![0; 256];
        space[0] = 0x36;
        space[INTERRUPT_PIN] = pin;
        let mut link = FIRST_CAPABILITY;
        for (index, id) in capabilities.iter().enumerate() {
            let at = HEADER + index * 16;
            space[STATUS] = HAS_CAPABILITIES;
            space[link] = at as u8;
            space[at] = *id;
            link = at + 1;
        }
        space
    }

    fn read(space: &[u8]) -> Option<Interrupts> {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config");
        std::fs::write(&config, space).unwrap();
        Interrupts::read(&config)
    }

    #[test]
    fn each_kind_is_found_in_the_list_of_capabilities() {
        for (pin, capabilities, words) in [
            (0, &[][..], "no interrupts"),
            (1, &[], "INTx"),
            (0, &[MSI], "MSI"),
            (1, &[0x01, MSI, 0x10], "MSI and INTx"),
            (1, &[0x10, MSI, MSIX], "MSI-X and MSI and INTx"),
        ] {
            let found = read(&space(pin, capabilities)).unwrap();
            assert_eq!(found.to_string(), words);
            assert_eq!(found.msix, capabilities.contains(&MSIX));
        }
    }

    #[test]
    fn what_a_user_without_rights_cannot_read_is_not_guessed() {
        let with_list = space(1, &[MSIX]);
        assert_eq!(read(&with_list[..HEADER]), None);
        let without = space(1, &[]);
        assert_eq!(read(&without[..HEADER]).unwrap().to_string(), "INTx");
        assert_eq!(read(&[0xff; 256]), None);
        assert_eq!(read(&[]), None);
    }

    proptest! {
        #[test]
        fn any_list_of_capabilities_ends(space in proptest::collection::vec(any::<u8>(), 256)) {
            let header = space.first_chunk().unwrap();
            let at = |offset: u64| space.get(offset as usize..)?.first_chunk().copied();
            let _ = Interrupts::parse(header, at);
        }
    }
}
