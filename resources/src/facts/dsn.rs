//! The PCIe device serial number, found by a bounded walk of the extended capabilities.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const FIRST_CAPABILITY: u16 = 0x100;
const DEVICE_SERIAL_NUMBER: u16 = 0x0003;
/// The greatest number of capabilities in extended configuration space.
const MOST_CAPABILITIES: usize = (0x1000 - 0x100) / 8;

/// The serial number of the device with this `config` attribute, as sixteen hex digits in pairs.
///
/// Only root can read beyond the first 64 bytes; other users get none.
pub(crate) fn read(config: &Path) -> Option<String> {
    let file = File::open(config).ok()?;
    let number = find(|offset| {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, u64::from(offset)).ok()?;
        Some(u32::from_le_bytes(bytes))
    })?;
    let pairs: Vec<String> = number
        .to_be_bytes()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Some(pairs.join("-"))
}

/// Walks the list (PCIe 7.6.3) to the serial number (PCIe 7.9.3). A dead device reads all-ones, and a broken one
/// may have a list in a circle: neither gives a number.
fn find(read: impl Fn(u16) -> Option<u32>) -> Option<u64> {
    let mut offset = FIRST_CAPABILITY;
    for _ in 0..MOST_CAPABILITIES {
        let header = read(offset)?;
        if header == 0 || header == u32::MAX {
            return None;
        }
        if header as u16 == DEVICE_SERIAL_NUMBER {
            let number = u64::from(read(offset.checked_add(4)?)?)
                | u64::from(read(offset.checked_add(8)?)?) << 32;
            return (number != 0 && number != u64::MAX).then_some(number);
        }
        offset = (header >> 20) as u16 & !3;
        if offset < FIRST_CAPABILITY {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space(words: &[(u16, u32)]) -> impl Fn(u16) -> Option<u32> {
        move |offset| {
            Some(
                words
                    .iter()
                    .find(|(at, _)| *at == offset)
                    .map_or(0, |(_, word)| *word),
            )
        }
    }

    #[test]
    fn the_number_is_found_behind_other_capabilities() {
        let words = [
            (0x100, 0x1402_0001),
            (0x140, 0x0001_0003),
            (0x144, 0xffaa_bbcc),
            (0x148, 0x001b_21ff),
        ];
        assert_eq!(find(space(&words)), Some(0x001b_21ff_ffaa_bbcc));
    }

    #[test]
    fn nothing_dead_or_circular_gives_a_number() {
        assert_eq!(find(|_| Some(u32::MAX)), None);
        assert_eq!(find(|_| None), None);
        assert_eq!(find(space(&[])), None);
        assert_eq!(
            find(space(&[(0x100, 0x1002_0001)])),
            None,
            "points at itself"
        );
        assert_eq!(
            find(space(&[(0x100, 0x0402_0001)])),
            None,
            "points into the ordinary space"
        );
        assert_eq!(
            find(space(&[(0x100, 0x0001_0003)])),
            None,
            "a serial number of zeroes"
        );
    }

    #[test]
    fn a_file_is_read_and_shown_in_pairs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        let mut bytes = vec![0; 0x1000];
        bytes[0x100..0x10c]
            .copy_from_slice(&[3, 0, 1, 0, 0xcc, 0xbb, 0xaa, 0xff, 0xff, 0x21, 0x1b, 0]);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path).as_deref(), Some("00-1b-21-ff-ff-aa-bb-cc"));
        std::fs::write(&path, &bytes[..64]).unwrap();
        assert_eq!(read(&path), None, "what an unprivileged reader sees");
    }

    proptest! {
        #[test]
        fn any_content_ends_the_walk(words in prop::collection::vec(any::<u32>(), 1024)) {
            let _ = find(|offset| words.get(usize::from(offset) / 4).copied());
        }
    }
}
