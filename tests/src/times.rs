//! How long the lab tests took, suite by suite, as a table.

use std::fmt;
use std::time::Duration;

/// How many of the slowest cases are named.
const SLOWEST: usize = 5;

/// The times of a run, as they come in.
#[derive(Debug, Default)]
pub struct Times {
    suites: Vec<Suite>,
    cases: Vec<(String, Duration)>,
}

#[derive(Debug)]
struct Suite {
    name: &'static str,
    cases: usize,
    labs: usize,
    boots: Duration,
    time: Duration,
}

impl Times {
    /// Notes the boot of a lab for a suite.
    pub fn boot(&mut self, suite: &'static str, time: Duration) {
        let suite = self.suite(suite);
        suite.labs += 1;
        suite.boots += time;
    }

    /// Notes the end of a case, whose time includes no boot.
    pub fn case(&mut self, suite: &'static str, name: String, time: Duration) {
        let suite = self.suite(suite);
        suite.cases += 1;
        suite.time += time;
        self.cases.push((name, time));
    }

    fn suite(&mut self, name: &'static str) -> &mut Suite {
        let at = self.suites.iter().position(|suite| suite.name == name);
        let at = at.unwrap_or_else(|| {
            self.suites.push(Suite {
                name,
                cases: 0,
                labs: 0,
                boots: Duration::ZERO,
                time: Duration::ZERO,
            });
            self.suites.len() - 1
        });
        &mut self.suites[at]
    }
}

impl fmt::Display for Times {
    /// The table; nothing if nothing ran.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.cases.is_empty() {
            return Ok(());
        }
        writeln!(f, "suite          cases  labs   boots     cases")?;
        for suite in &self.suites {
            let Suite {
                name, cases, labs, ..
            } = suite;
            let (boots, time) = (suite.boots.as_secs_f64(), suite.time.as_secs_f64());
            writeln!(f, "{name:14} {cases:5} {labs:5} {boots:7.1} s {time:7.1} s")?;
        }
        let mut slowest: Vec<_> = self.cases.iter().collect();
        slowest.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
        writeln!(f, "the slowest cases")?;
        for (name, time) in slowest.into_iter().take(SLOWEST) {
            writeln!(f, "{:7.1} s  {name}", time.as_secs_f64())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_are_added_up_and_the_slowest_cases_named() {
        let mut times = Times::default();
        assert_eq!(times.to_string(), "");
        for (suite, case, seconds) in [("a", "a::x", 2), ("b", "b::y", 9), ("a", "a::z", 3)] {
            times.boot(suite, Duration::from_millis(1500));
            times.case(suite, case.to_owned(), Duration::from_secs(seconds));
        }
        let table = times.to_string();
        let lines: Vec<Vec<&str>> = table
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines[1], ["a", "2", "2", "3.0", "s", "5.0", "s"]);
        assert_eq!(lines[2], ["b", "1", "1", "1.5", "s", "9.0", "s"]);
        assert_eq!(lines[4], ["9.0", "s", "b::y"]);
        assert_eq!(lines.len(), 7);
    }
}
