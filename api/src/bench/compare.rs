//! Two results beside each other: which tests are slower in the later one.

use super::model::{Device, Results, Test, Unit, medians};
use super::stats::{Ratio, independent_ratio};
use super::table::{interval, middle, show};
use crate::report::Failure;
use crate::table::{Column, Shrink, cell, print_table};

/// What a comparison says of one side of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The later one is better, by more than the threshold.
    Better,
    /// The later one is worse, by more than the threshold.
    Worse,
    /// They differ by less than the threshold.
    Same,
    /// The rounds are too few or too unlike each other to say.
    Undecided,
}

/// One side of a test in both results.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Comparison {
    /// Address of the device in the later results.
    pub device: String,
    /// The test.
    pub test: String,
    /// `host` or `guest`.
    pub side: &'static str,
    /// Unit of the figures.
    pub unit: Unit,
    /// Median of the earlier one.
    pub before: f64,
    /// Median of the later one.
    pub after: f64,
    /// The later one divided by the earlier one.
    pub ratio: Option<Ratio>,
    /// What follows from it.
    pub verdict: Verdict,
}

/// Compares all tests that both results have, of devices with the same ids. `threshold` is the difference that counts:
/// 0.05 for 5%.
pub fn compare(before: &Results, after: &Results, threshold: f64) -> Vec<Comparison> {
    let mut left: Vec<&Device> = before.devices.iter().collect();
    let mut compared = Vec::new();
    for device in &after.devices {
        let Some(at) = left.iter().position(|other| other.ids == device.ids) else {
            continue;
        };
        let earlier = left.remove(at);
        for test in &device.tests {
            let known = earlier.tests.iter().find(|known| known.test == test.test);
            // The clock is no property of the device.
            if let Some(known) = known.filter(|known| known.test != "clock") {
                let sides = sides(&device.address, known, test, threshold);
                compared.extend(sides.into_iter().flatten());
            }
        }
    }
    compared
}

fn sides(device: &str, before: &Test, after: &Test, threshold: f64) -> [Option<Comparison>; 2] {
    [
        ("host", &before.host, &after.host),
        ("guest", &before.guest, &after.guest),
    ]
    .map(|(side, before, rounds)| {
        let ratio = independent_ratio(&medians(rounds), &medians(before));
        Some(Comparison {
            device: device.to_owned(),
            test: after.test.clone(),
            side,
            unit: after.unit,
            before: middle(before)?,
            after: middle(rounds)?,
            ratio,
            verdict: judge(after.unit, ratio, threshold),
        })
    })
}

fn judge(unit: Unit, ratio: Option<Ratio>, threshold: f64) -> Verdict {
    let Some((low, high)) = ratio.and_then(|ratio| Some((ratio.low?, ratio.high?))) else {
        return Verdict::Undecided;
    };
    let more = 1.0 + threshold;
    match (low, high, unit) {
        (low, _, Unit::Nanoseconds) if low > more => Verdict::Worse,
        (_, high, Unit::Nanoseconds) if high < 1.0 / more => Verdict::Better,
        (low, _, Unit::PerSecond | Unit::BytesPerSecond) if low > more => Verdict::Better,
        (_, high, Unit::PerSecond | Unit::BytesPerSecond) if high < 1.0 / more => Verdict::Worse,
        (low, high, _) if low >= 1.0 / more && high <= more => Verdict::Same,
        _ => Verdict::Undecided,
    }
}

/// Prints a comparison as a table.
///
/// # Errors
/// Standard output takes nothing.
pub fn print_comparison(compared: &[Comparison]) -> Result<(), Failure> {
    let columns = [
        Column::new("device", Shrink::Drop(1)),
        Column::new("test", Shrink::Cut(16)),
        Column::full("side"),
        Column::full("before"),
        Column::full("after"),
        Column::full("ratio"),
        Column::new("95%", Shrink::Drop(2)),
        Column::full("verdict"),
    ];
    let rows = compared.iter().map(|one| {
        vec![
            one.device.clone(),
            one.test.clone(),
            one.side.to_owned(),
            show(one.unit, one.before),
            show(one.unit, one.after),
            cell(one.ratio.map(|ratio| format!("{:.2}", ratio.value))),
            cell(one.ratio.and_then(interval)),
            format!("{:?}", one.verdict).to_lowercase(),
        ]
    });
    print_table(&columns, rows.collect(), None)
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::example;
    use super::*;

    #[test]
    fn a_verdict_needs_the_whole_interval() {
        let ratio = |low, high| {
            Some(Ratio {
                value: (low + high) / 2.0,
                low: Some(low),
                high: Some(high),
            })
        };
        for (low, high, time, rate) in [
            (1.1, 1.2, Verdict::Worse, Verdict::Better),
            (0.8, 0.9, Verdict::Better, Verdict::Worse),
            (0.97, 1.03, Verdict::Same, Verdict::Same),
            (0.9, 1.3, Verdict::Undecided, Verdict::Undecided),
            (1.01, 1.3, Verdict::Undecided, Verdict::Undecided),
        ] {
            assert_eq!(
                judge(Unit::Nanoseconds, ratio(low, high), 0.05),
                time,
                "{low}-{high}"
            );
            assert_eq!(
                judge(Unit::PerSecond, ratio(low, high), 0.05),
                rate,
                "{low}-{high}"
            );
        }
        assert_eq!(judge(Unit::PerSecond, None, 0.05), Verdict::Undecided);
    }

    #[test]
    fn only_the_side_that_changed_is_worse() {
        let compared = compare(&example([2000.0, 2001.0]), &example([3000.0, 3001.0]), 0.05);
        let worse: Vec<_> = compared
            .iter()
            .filter(|one| one.verdict == Verdict::Worse)
            .collect();
        let [worse] = &worse[..] else {
            panic!("{compared:?}");
        };
        assert_eq!((&*worse.test, worse.side), ("MMIO read 4 B", "guest"));
        assert_eq!(compared.len(), 6);
        let mut other = example([1.0, 1.0]);
        other.devices[0].ids = "8086:10c9".to_owned();
        assert!(compare(&example([1.0, 1.0]), &other, 0.05).is_empty());
    }
}
