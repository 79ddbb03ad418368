//! A bench's result: rows of figures, and how a peer compares.
//!
//! The JSON is a list of rows:
//!
//! ```json
//! {"row": "start-to-init", "case": "1 nvme, 512 MiB", "unit": "ms",
//!  "gantry": {"median": 0, "min": 0, "max": 0, "n": 5},
//!  "peers": {"cloud-hypervisor": {"median": 0, "min": 0, "max": 0, "n": 5,
//!                                 "ratio": {"median": 0, "low": 0, "high": 0}}}}
//! ```
//!
//! `ratio` is gantry's figure divided by the peer's of the same round, so less than 1 is gantry's
//! lead; `low` and `high` bound its median (see [`Ratio::of`]). A ratio to a peer's 0 is `null`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::table;

/// A peer is level while the ratio may be this far from 1, either way.
pub const LEVEL: f64 = 1.05;

/// The interval of a ratio holds its median at least this often.
pub const CONFIDENCE: f64 = 0.90;

/// One figure in one case. Less is better in every row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What is measured.
    pub row: String,
    /// Under which circumstances.
    pub case: String,
    /// Of all its figures.
    pub unit: String,
    /// gantry's figure.
    pub gantry: Summary,
    /// The peers', by name.
    pub peers: BTreeMap<String, Peer>,
}

/// Where a bench's rows go: standard output, and a file if there is one.
#[derive(Debug)]
pub struct Report<'a> {
    json: Option<&'a Path>,
}

impl<'a> Report<'a> {
    /// Fails now, rather than after all the work, if the file cannot be written.
    pub fn new(json: Option<&'a Path>) -> Result<Self> {
        if let Some(path) = json {
            File::options()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(Self { json })
    }

    /// Prints the rows as a table with notes below, and writes them.
    pub fn give(&self, rows: &[Row], peers: &[String], notes: &[String]) -> Result<()> {
        println!("\n{}", table::render(rows, peers));
        for note in notes {
            println!("- {note}");
        }
        if let Some(path) = self.json {
            let mut text = serde_json::to_vec_pretty(rows)?;
            text.push(b'\n');
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// Says so if this machine is too busy to measure well.
pub fn warn_if_busy() {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: Option<f64> = text.split(' ').next().and_then(|word| word.parse().ok());
    if let Some(load) = load.filter(|load| *load > 1.0) {
        eprintln!("This machine is busy (load {load}): the times will scatter.");
    }
}

/// One contender's figures of all rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// Their median.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// How many.
    pub n: usize,
}

impl Summary {
    /// Sums up; `None` without figures.
    pub fn of(figures: &[f64]) -> Option<Self> {
        let sorted = sorted(figures);
        Some(Self {
            median: rounded(median(&sorted)?),
            min: rounded(*sorted.first()?),
            max: rounded(*sorted.last()?),
            n: sorted.len(),
        })
    }
}

/// A peer's figures, and gantry's over them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Peer {
    /// Its figures.
    #[serde(flatten)]
    pub summary: Summary,
    /// gantry's divided by them, round by round.
    pub ratio: Ratio,
}

/// The ratios of all rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ratio {
    /// Their median.
    pub median: f64,
    /// Lower end of the median's interval.
    pub low: f64,
    /// Upper end of the median's interval.
    pub high: f64,
}

impl Ratio {
    /// The ratios of gantry's figures to a peer's, round by round.
    ///
    /// The interval is the sign test's: of the sorted ratios the k-th from either end, with the
    /// largest k for which the chance that the true median lies between them is at least
    /// [`CONFIDENCE`], whatever the ratios' distribution. Of 5 rounds that is the least and the
    /// greatest (94 %), of 8 the second from either end (93 %). Fewer than 5 rounds cannot reach
    /// it and give the least and the greatest.
    pub fn of(gantry: &[f64], peer: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = gantry
            .iter()
            .zip(peer)
            .map(|(a, b)| ratio(*a, *b))
            .collect();
        let sorted = sorted(&ratios);
        let trim = trim(sorted.len());
        Some(Self {
            median: rounded(median(&sorted)?),
            low: rounded(*sorted.get(trim)?),
            high: rounded(*sorted.iter().rev().nth(trim)?),
        })
    }

    /// What it says about gantry.
    pub fn verdict(&self) -> Verdict {
        if self.low > LEVEL {
            Verdict::Behind
        } else if self.high < 1.0 / LEVEL {
            Verdict::Ahead
        } else {
            Verdict::Level
        }
    }
}

/// How gantry stands against a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The whole interval is below 1/[`LEVEL`].
    Ahead,
    /// Neither ahead nor behind can be told.
    Level,
    /// The whole interval is above [`LEVEL`].
    Behind,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ahead => "ahead",
            Self::Level => "level",
            Self::Behind => "behind",
        })
    }
}

/// Nothing is level with nothing; something is infinitely more than nothing.
fn ratio(a: f64, b: f64) -> f64 {
    if a == b { 1.0 } else { a / b }
}

/// How many sorted figures of `n` lie outside the interval at either end.
fn trim(n: usize) -> usize {
    // Chance that at most `k` of `n` fall on one side of the median, each with an even chance.
    let mut term = 0.5f64.powi(i32::try_from(n).unwrap_or(i32::MAX));
    let mut tail = term;
    let mut k = 0;
    while 1.0 - 2.0 * tail >= CONFIDENCE {
        term *= (n - k) as f64 / (k + 1) as f64;
        tail += term;
        k += 1;
    }
    k.saturating_sub(1)
}

fn sorted(figures: &[f64]) -> Vec<f64> {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn median(sorted: &[f64]) -> Option<f64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = *sorted.get(sorted.len() / 2 - 1)?;
    Some(f64::midpoint(lower, upper))
}

/// To three decimals: what is beyond is noise.
fn rounded(figure: f64) -> f64 {
    (figure * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_summed_up() {
        let summary = Summary::of(&[5.0, 1.0, 2.5, 4.0]).unwrap();
        let wanted = Summary {
            median: 3.25,
            min: 1.0,
            max: 5.0,
            n: 4,
        };
        assert_eq!(summary, wanted);
        assert_eq!(Summary::of(&[3.0, 1.0, 2.0]).unwrap().median, 2.0);
        assert!(Summary::of(&[]).is_none());
    }

    #[test]
    fn the_interval_is_the_sign_tests() {
        // From tables of the sign test at 90 %.
        let table = [
            (1, 0),
            (4, 0),
            (5, 0),
            (7, 0),
            (8, 1),
            (10, 1),
            (11, 2),
            (20, 5),
        ];
        for (n, k) in table {
            assert_eq!(trim(n), k, "{n}");
        }
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let ratio = Ratio::of(&[10.0, 20.0, 30.0], &[10.0, 40.0, 20.0]).unwrap();
        let wanted = Ratio {
            median: 1.0,
            low: 0.5,
            high: 1.5,
        };
        assert_eq!(ratio, wanted);
    }

    #[test]
    fn verdicts() {
        let verdict = |gantry: [f64; 2], peer: [f64; 2]| {
            Ratio::of(&gantry, &peer).map(|ratio| ratio.verdict())
        };
        assert_eq!(verdict([0.9, 0.95], [1.0; 2]), Some(Verdict::Ahead));
        assert_eq!(verdict([0.9, 1.0], [1.0; 2]), Some(Verdict::Level));
        assert_eq!(verdict([1.05, 2.0], [1.0; 2]), Some(Verdict::Level));
        assert_eq!(verdict([1.06, 2.0], [1.0; 2]), Some(Verdict::Behind));
        assert_eq!(verdict([0.0; 2], [0.0; 2]), Some(Verdict::Level));
        assert_eq!(verdict([0.0; 2], [7.0; 2]), Some(Verdict::Ahead));
        assert_eq!(verdict([7.0; 2], [0.0; 2]), Some(Verdict::Behind));
    }

    #[test]
    fn the_json_is_as_promised() {
        let figures = [2.0, 1.0, 3.0];
        let peer = Peer {
            summary: Summary::of(&figures).unwrap(),
            ratio: Ratio::of(&figures, &[0.0; 3]).unwrap(),
        };
        let row = Row {
            row: "start-to-init".into(),
            case: "1 nvme, 512 MiB".into(),
            unit: "ms".into(),
            gantry: Summary::of(&figures).unwrap(),
            peers: BTreeMap::from([("cloud-hypervisor".to_owned(), peer)]),
        };
        let wanted = serde_json::json!({
            "row": "start-to-init", "case": "1 nvme, 512 MiB", "unit": "ms",
            "gantry": {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3},
            "peers": {"cloud-hypervisor": {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3,
                "ratio": {"median": null, "low": null, "high": null}}}
        });
        assert_eq!(serde_json::to_value(&row).unwrap(), wanted);
    }
}
