//! Samples of a test, and the loops that take them.

use std::time::{Duration, Instant};

use crate::Result;

/// The most samples of a test: more say nothing more, and take memory.
const MOST: usize = 200_000;
/// The fewest, however long they take.
const FEWEST: usize = 10;
/// A rate is measured in so many parts of the time, so that its spread is seen.
const PARTS: u32 = 20;

/// The samples of a test, in ascending order; never none.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// `None` without samples.
    pub fn new(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        (!samples.is_empty()).then_some(Self(samples))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The sample below which this share of them lies: 0.5 for the median.
    pub fn quantile(&self, share: f64) -> f64 {
        let last = self.0.len() - 1;
        // The nearest rank: of a few samples, the 99th percentile is the largest.
        let rank = (share.clamp(0.0, 1.0) * last as f64).ceil() as usize;
        self.0.get(rank).copied().unwrap_or_default()
    }

    /// Their mean.
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }
}

/// Times one operation after the other until the time is over, in nanoseconds.
///
/// # Errors
/// The first of the operation.
pub fn latency(time: Duration, operation: impl FnMut() -> Result<()>) -> Result<Samples> {
    latency_after(time, FEWEST, || Ok(()), operation)
}

/// [`latency`], where `prepare` runs before each operation and is not timed. There are `fewest` samples at least.
///
/// # Errors
/// The first of either.
pub fn latency_after(
    time: Duration,
    fewest: usize,
    mut prepare: impl FnMut() -> Result<()>,
    mut operation: impl FnMut() -> Result<()>,
) -> Result<Samples> {
    // The first one pays for caches and translations that the others find.
    prepare()?;
    operation()?;
    let mut samples = Vec::new();
    let begun = Instant::now();
    loop {
        prepare()?;
        let before = Instant::now();
        operation()?;
        let after = Instant::now();
        samples.push((after - before).as_nanos() as f64);
        let over = after - begun >= time || samples.len() >= MOST;
        if over && samples.len() >= fewest {
            break;
        }
    }
    Ok(Samples::new(samples).unwrap_or_else(|| Samples(vec![0.0])))
}

/// Counts in parts of the time what `batch` does each time that it is called; units in a second.
///
/// # Errors
/// The first of the batch.
pub fn rate(time: Duration, mut batch: impl FnMut() -> Result<u64>) -> Result<Samples> {
    batch()?;
    let part = time / PARTS;
    let mut samples = Vec::new();
    for _ in 0..PARTS {
        let begun = Instant::now();
        let mut done = 0;
        let taken = loop {
            done += batch()?;
            let taken = begun.elapsed();
            if taken >= part {
                break taken;
            }
        };
        samples.push(done as f64 / taken.as_secs_f64().max(1e-9));
    }
    Ok(Samples::new(samples).unwrap_or_else(|| Samples(vec![0.0])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples_and_a_few_samples_hide_no_outlier() {
        let samples = Samples::new(vec![3.0, 1.0, 2.0]).unwrap();
        assert_eq!(samples.quantile(0.0), 1.0);
        assert_eq!(samples.quantile(0.5), 2.0);
        assert_eq!(samples.quantile(0.99), 3.0);
        assert_eq!((samples.count(), samples.mean()), (3, 2.0));
        assert_eq!(Samples::new(Vec::new()), None);
        let many = Samples::new((0..1001).map(f64::from).collect()).unwrap();
        assert_eq!(many.quantile(0.5), 500.0);
        assert_eq!(many.quantile(0.999), 999.0);
    }

    #[test]
    fn every_loop_ends_and_has_samples() {
        let mut calls = 0;
        let samples = latency(Duration::ZERO, || {
            calls += 1;
            Ok(())
        });
        assert_eq!((samples.unwrap().count(), calls), (FEWEST, FEWEST + 1));
        let rates = rate(Duration::ZERO, || Ok(8)).unwrap();
        assert_eq!(rates.count(), PARTS as usize);
        assert!(rates.quantile(0.0) > 0.0);
    }
}
