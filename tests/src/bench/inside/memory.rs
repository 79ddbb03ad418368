//! What a process has mapped (`/proc/PID/smaps`), and how much of it is a guest's RAM.

/// One mapping of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Its size in KiB.
    pub size: u64,
    /// The process's share of what is in memory of it, in KiB.
    pub pss: u64,
    /// Whether it can be read and written.
    pub writable: bool,
}

/// The mappings in an `smaps` file.
pub fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("Pss:"), Some(kib)) => {
                if let Some(last) = mappings.last_mut() {
                    last.pss = kib.parse().unwrap_or(0);
                }
            }
            (Some(range), Some(rights)) => {
                if let Some(size) = size(range) {
                    mappings.push(Mapping {
                        size,
                        pss: 0,
                        writable: rights.starts_with("rw"),
                    });
                }
            }
            _ => {}
        }
    }
    mappings
}

/// The PSS of all mappings but the guest's RAM, in KiB; `None` when no writable mappings add up to
/// `ram` KiB.
///
/// RAM is the one mapping of that size, or the largest few that make it up: address spaces with a
/// hole, or ranges with advice of their own, are several.
pub fn beyond_ram(mappings: &[Mapping], ram: u64) -> Option<u64> {
    let mut largest: Vec<&Mapping> = mappings.iter().filter(|mapping| mapping.writable).collect();
    largest.sort_by_key(|mapping| std::cmp::Reverse(mapping.size));
    let mut missing = ram;
    let mut rest = total(mappings);
    for mapping in largest {
        if missing == 0 {
            break;
        }
        if mapping.size <= missing {
            missing -= mapping.size;
            rest -= mapping.pss;
        }
    }
    (missing == 0).then_some(rest)
}

/// The PSS of all mappings, in KiB.
pub fn total(mappings: &[Mapping]) -> u64 {
    mappings.iter().map(|mapping| mapping.pss).sum()
}

/// Size in KiB of `start-end`, in hexadecimal.
fn size(range: &str) -> Option<u64> {
    let (start, end) = range.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    Some(end.checked_sub(start)? >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0a0000000-55d0a0100000 r-xp 00000000 00:02 1234   /bin/gantry
Size:               1024 kB
Pss:                 800 kB
Pss_Dirty:             0 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0020000000 rw-p 00000000 00:00 0
Size:             524288 kB
Pss:              100000 kB
7f0020000000-7f0060000000 ---p 00000000 00:00 0
Pss:                   0 kB
7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0      [stack]
Pss:                  20 kB
";

    #[test]
    fn ram_is_told_from_the_rest() {
        let mappings = parse(SMAPS);
        assert_eq!(mappings.len(), 4);
        assert_eq!(total(&mappings), 100_820);
        assert_eq!(beyond_ram(&mappings, 512 << 10), Some(820));
        assert_eq!(beyond_ram(&mappings, 513 << 10), None);
    }

    #[test]
    fn ram_may_be_in_pieces() {
        let mapping = |mib: u64, pss, writable| Mapping {
            size: mib << 10,
            pss,
            writable,
        };
        let mappings = [
            mapping(300, 1, false),
            mapping(512, 20, true),
            mapping(1024, 300, true),
            mapping(1, 4000, true),
        ];
        assert_eq!(beyond_ram(&mappings, 1536 << 10), Some(4001));
    }
}
