//! A limit on how often one line of code may log what a guest causes.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines admitted in one period.
const BURST: u32 = 8;
/// Length of the first period.
const PERIOD: Duration = Duration::from_secs(5);
/// Length of the longest period. After a period with suppressed lines, the next is twice as long.
const LONGEST: Duration = Duration::from_secs(3600);

/// Admits a burst of lines in each period, and counts the rest.
///
/// A guest can cause a line at every access, and must not fill the host's disk with them: a guest that does so
/// for days causes a few hundred lines a day.
#[derive(Debug)]
pub struct RateLimit(Mutex<State>);

#[derive(Debug)]
struct State {
    since: Option<Instant>,
    period: Duration,
    passed: u32,
    /// Whether lines were suppressed in the period.
    flooded: bool,
    suppressed: u64,
}

impl RateLimit {
    /// A limit that nothing has used yet.
    pub const fn new() -> Self {
        Self(Mutex::new(State {
            since: None,
            period: PERIOD,
            passed: 0,
            flooded: false,
            suppressed: 0,
        }))
    }

    /// Whether one more line may be logged now: `Some` with the number of lines left out before it.
    pub fn admit(&self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let age = state
            .since
            .map(|since| now.saturating_duration_since(since));
        if age.is_none_or(|age| age >= state.period) {
            // After a quiet period the length is the first one again.
            let again = age.is_some_and(|age| age < state.period * 2) && state.flooded;
            state.period = match again {
                true => (state.period * 2).min(LONGEST),
                false => PERIOD,
            };
            state.since = Some(now);
            state.passed = 0;
            state.flooded = false;
        }
        if state.passed == BURST {
            state.suppressed += 1;
            state.flooded = true;
            return None;
        }
        state.passed += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

impl Default for RateLimit {
    fn default() -> Self {
        Self::new()
    }
}

/// Logs a warning as `tracing::warn!` does, with a [`RateLimit`] of its own for each place in the
/// code. The field `left_out` has the number of lines left out before it.
#[macro_export]
macro_rules! warn_limited {
    ($($line:tt)*) => { $crate::log_limited!(warn, $($line)*) };
}

/// As [`warn_limited`], at the level of information.
#[macro_export]
macro_rules! info_limited {
    ($($line:tt)*) => { $crate::log_limited!(info, $($line)*) };
}

#[doc(hidden)]
#[macro_export]
macro_rules! log_limited {
    ($level:ident, $($line:tt)*) => {{
        static LIMIT: $crate::limit::RateLimit = $crate::limit::RateLimit::new();
        if let Some(left_out) = LIMIT.admit() {
            $crate::limit::tracing::$level!(left_out, $($line)*);
        }
    }};
}

#[doc(hidden)]
pub use tracing;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_is_counted() {
        let limit = RateLimit::new();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limit.admit_at(start), Some(0));
        }
        for _ in 0..3 {
            assert_eq!(limit.admit_at(start + PERIOD / 2), None);
        }
        assert_eq!(limit.admit_at(start + PERIOD), Some(3));
        assert_eq!(limit.admit_at(start + PERIOD), Some(0));
    }

    #[test]
    fn a_flood_of_days_is_a_few_hundred_lines_a_day() {
        let limit = RateLimit::new();
        let start = Instant::now();
        let day = 24 * 3600;
        let lines = |from: u64| {
            let seconds = from..from + day;
            let passed = seconds.filter(|second| {
                let at = start + Duration::from_secs(*second);
                // More in a second than any period lets through.
                (0..=BURST).filter(|_| limit.admit_at(at).is_some()).count() > 0
            });
            passed.count() as u32 * BURST
        };
        assert!((BURST..400).contains(&lines(0)));
        assert!((BURST..400).contains(&lines(day)));
        let quiet = start + Duration::from_secs(4 * day);
        assert!(limit.admit_at(quiet).is_some());
        assert!(limit.admit_at(quiet).is_some(), "a new burst");
    }

    #[test]
    fn a_clock_that_steps_back_does_no_harm() {
        let limit = RateLimit::new();
        let start = Instant::now() + PERIOD;
        assert_eq!(limit.admit_at(start), Some(0));
        assert_eq!(limit.admit_at(start - PERIOD), Some(0));
    }
}
