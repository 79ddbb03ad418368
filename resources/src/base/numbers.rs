//! Numbers of processors or NUMA nodes, in the kernel's list format.

use std::collections::BTreeSet;
use std::fmt;
use std::num::ParseIntError;
use std::ops::{BitAnd, RangeInclusive};
use std::str::FromStr;

/// The highest number that is read: no kernel has as many processors.
const MAX: u32 = 1 << 16;

/// A set of numbers, written `0-15,64-79` (cpuset(7), "List format").
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers(BTreeSet<u32>);

/// A text that is no list of numbers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a list of numbers like 0-15,64")]
pub struct NumbersError(String);

impl Numbers {
    /// The lowest number.
    pub fn first(&self) -> Option<u32> {
        self.0.first().copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it has this number.
    pub fn contains(&self, number: u32) -> bool {
        self.0.contains(&number)
    }

    /// The numbers, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.iter().copied()
    }

    /// The ranges without a gap.
    fn runs(&self) -> Vec<RangeInclusive<u32>> {
        let mut runs: Vec<RangeInclusive<u32>> = Vec::new();
        for number in self.iter() {
            match runs.last_mut() {
                Some(run) if *run.end() + 1 == number => *run = *run.start()..=number,
                _ => runs.push(number..=number),
            }
        }
        runs
    }
}

impl FromIterator<u32> for Numbers {
    fn from_iter<I: IntoIterator<Item = u32>>(numbers: I) -> Self {
        Self(numbers.into_iter().collect())
    }
}

/// The numbers in both.
impl BitAnd for &Numbers {
    type Output = Numbers;

    fn bitand(self, other: Self) -> Numbers {
        Numbers(&self.0 & &other.0)
    }
}

impl FromStr for Numbers {
    type Err = NumbersError;

    fn from_str(text: &str) -> Result<Self, NumbersError> {
        let run = |part: &str| -> Result<RangeInclusive<u32>, ParseIntError> {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Ok(first.parse()?..=last.parse()?)
        };
        let wrong = || NumbersError(text.to_owned());
        let mut numbers = BTreeSet::new();
        for part in text.trim().split(',').filter(|_| !text.trim().is_empty()) {
            let run = run(part).map_err(|_| wrong())?;
            if run.is_empty() || *run.end() > MAX {
                return Err(wrong());
            }
            numbers.extend(run);
        }
        Ok(Self(numbers))
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, run) in self.runs().iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            match run.start() == run.end() {
                true => write!(f, "{comma}{}", run.start())?,
                false => write!(f, "{comma}{}-{}", run.start(), run.end())?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_are_read() {
        let numbers = |text: &str| text.parse::<Numbers>();
        assert_eq!(
            numbers("0-2,5\n").unwrap(),
            [0, 1, 2, 5].into_iter().collect()
        );
        assert!(numbers("\n").unwrap().is_empty());
        for wrong in ["-", "1-", "a", "3-1", "1,,2", "0-99999999", "1 2"] {
            assert!(numbers(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(numbers in prop::collection::btree_set(0u32..40, 0..20)) {
            let numbers = Numbers(numbers);
            prop_assert_eq!(numbers.to_string().parse::<Numbers>().unwrap(), numbers);
        }
    }
}
