//! Ratios of figures with their intervals.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Student's t for 95% confidence on two sides, by degrees of freedom from 1 on.
const T: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
];

/// A ratio with its interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Ratio {
    /// The geometric mean over the rounds.
    pub value: f64,
    /// The least that it is, with 95% confidence; unknown from a single round.
    pub low: Option<f64>,
    /// The most that it is, with 95% confidence; unknown from a single round.
    pub high: Option<f64>,
}

/// The ratio of figures to others that were taken in the same rounds, in pairs; `None` before the first pair.
pub fn ratio(figures: &[f64], others: &[f64]) -> Option<Ratio> {
    let pairs = figures.iter().zip(others);
    let logs: Vec<f64> = pairs
        .filter_map(|(one, other)| log_ratio(*one, *other))
        .collect();
    let (mean, deviation) = moments(&logs)?;
    let error = deviation / (logs.len() as f64).sqrt();
    Some(around(
        mean,
        (logs.len() > 1).then(|| error * t(logs.len() as f64 - 1.0)),
    ))
}

/// The ratio of figures to others that have nothing to do with each other, by Welch's interval; `None` without figures.
pub fn independent_ratio(figures: &[f64], others: &[f64]) -> Option<Ratio> {
    let logs = |figures: &[f64]| -> Vec<f64> {
        figures
            .iter()
            .filter_map(|one| log_ratio(*one, 1.0))
            .collect()
    };
    let (one, other) = (logs(figures), logs(others));
    let ((mean, deviation), (other_mean, other_deviation)) = (moments(&one)?, moments(&other)?);
    let of = |deviation: f64, count: usize| deviation * deviation / count as f64;
    let (error, other_error) = (of(deviation, one.len()), of(other_deviation, other.len()));
    let both = error + other_error;
    let known = one.len() > 1 && other.len() > 1;
    let freedom = both * both
        / (error * error / (one.len() as f64 - 1.0)
            + other_error * other_error / (other.len() as f64 - 1.0));
    // Without any spread the interval is a point, whatever the degrees of freedom.
    let margin = match both == 0.0 {
        true => 0.0,
        false => both.sqrt() * t(freedom),
    };
    Some(around(mean - other_mean, known.then_some(margin)))
}

fn around(log: f64, margin: Option<f64>) -> Ratio {
    Ratio {
        value: log.exp(),
        low: margin.map(|margin| (log - margin).exp()),
        high: margin.map(|margin| (log + margin).exp()),
    }
}

fn log_ratio(one: f64, other: f64) -> Option<f64> {
    let log = (one / other).ln();
    log.is_finite().then_some(log)
}

/// Mean and standard deviation; `None` without numbers.
fn moments(numbers: &[f64]) -> Option<(f64, f64)> {
    let count = numbers.len() as f64;
    let mean = numbers.iter().sum::<f64>() / count;
    let squares: f64 = numbers.iter().map(|one| (one - mean).powi(2)).sum();
    let deviation = (squares / (count - 1.0).max(1.0)).sqrt();
    (!numbers.is_empty()).then_some((mean, deviation))
}

/// Student's t for so many degrees of freedom, rounded down.
fn t(freedom: f64) -> f64 {
    let index = (freedom as usize).max(1) - 1;
    T.get(index).copied().unwrap_or(1.96)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(one: f64, other: f64) -> bool {
        (one / other - 1.0).abs() < 1e-3
    }

    #[test]
    fn a_ratio_is_of_pairs_and_has_no_interval_from_one() {
        let one = ratio(&[20.0], &[10.0]).unwrap();
        assert_eq!((one.low, one.high), (None, None));
        assert!(near(one.value, 2.0));
        // Each round is twice as slow, however much the rounds differ from each other.
        let steady = ratio(&[20.0, 200.0, 2.0], &[10.0, 100.0, 1.0]).unwrap();
        assert!(near(steady.value, 2.0) && near(steady.low.unwrap(), 2.0));
        assert_eq!(ratio(&[], &[]), None);
        assert_eq!(ratio(&[1.0], &[0.0]), None);
    }

    #[test]
    fn an_interval_is_students() {
        // Logs of the ratios are 1, 2, 3: mean 2, deviation 1, t(2) = 4.303.
        let e = std::f64::consts::E;
        let found = ratio(&[e, e.powi(2), e.powi(3)], &[1.0; 3]).unwrap();
        let margin = 4.303 / 3f64.sqrt();
        assert!(near(found.low.unwrap().ln(), 2.0 - margin));
        assert!(near(found.high.unwrap().ln(), 2.0 + margin));
    }

    #[test]
    fn what_is_independent_is_not_paired() {
        let same = independent_ratio(&[1.0, 2.0, 3.0], &[3.0, 1.0, 2.0]).unwrap();
        assert!(near(same.value, 1.0));
        assert!(same.low.unwrap() < 1.0 && same.high.unwrap() > 1.0);
        let exact = independent_ratio(&[2.0, 2.0], &[1.0, 1.0]).unwrap();
        assert!(near(exact.low.unwrap(), 2.0) && near(exact.high.unwrap(), 2.0));
        assert_eq!(independent_ratio(&[1.0], &[1.0, 2.0]).unwrap().low, None);
    }
}
