//! Rounds: who runs when, and the figures that come in.

use std::collections::BTreeMap;

use super::rows::{Peer, Ratio, Row, Summary};

/// The contenders of one round, by number: each once, and each round another one first, so that
/// whoever gains by going first does so in turn.
pub fn order(contenders: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..contenders).map(move |place| (place + round) % contenders)
}

/// What a figure is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// What is measured.
    pub row: &'static str,
    /// Under which circumstances.
    pub case: String,
    /// Of the figure.
    pub unit: &'static str,
}

/// All figures of a bench: for each subject, for each contender, one a round.
#[derive(Debug)]
pub struct Samples {
    contenders: usize,
    subjects: Vec<(Subject, Vec<Vec<f64>>)>,
}

impl Samples {
    /// None yet; contender 0 is gantry.
    pub fn new(contenders: usize) -> Self {
        Self {
            contenders,
            subjects: Vec::new(),
        }
    }

    /// Adds a contender's figure of the current round.
    pub fn add(&mut self, subject: Subject, contender: usize, figure: f64) {
        let known = self
            .subjects
            .iter()
            .position(|(known, _)| *known == subject);
        let at = known.unwrap_or_else(|| {
            let none = vec![Vec::new(); self.contenders];
            self.subjects.push((subject, none));
            self.subjects.len() - 1
        });
        if let Some(figures) = self
            .subjects
            .get_mut(at)
            .and_then(|(_, all)| all.get_mut(contender))
        {
            figures.push(figure);
        }
    }

    /// The rows, one below another what belongs to one row, in the order of their first figures.
    pub fn rows(&self, peers: &[String]) -> Vec<Row> {
        let mut names: Vec<&str> = Vec::new();
        for (subject, _) in &self.subjects {
            if !names.contains(&subject.row) {
                names.push(subject.row);
            }
        }
        names
            .into_iter()
            .flat_map(|name| self.subjects.iter().filter(move |(s, _)| s.row == name))
            .filter_map(|(subject, figures)| row(subject, figures, peers))
            .collect()
    }
}

fn row(subject: &Subject, figures: &[Vec<f64>], peers: &[String]) -> Option<Row> {
    let (gantry, others) = figures.split_first()?;
    // A peer that cannot do it has no figures.
    let peers: BTreeMap<String, Peer> = peers
        .iter()
        .zip(others)
        .filter_map(|(name, figures)| {
            let peer = Peer {
                summary: Summary::of(figures)?,
                ratio: Ratio::of(gantry, figures)?,
            };
            Some((name.clone(), peer))
        })
        .collect();
    Some(Row {
        row: subject.row.to_owned(),
        case: subject.case.clone(),
        unit: subject.unit.to_owned(),
        gantry: Summary::of(gantry)?,
        peers,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everyone_goes_first_in_turn() {
        let rounds: Vec<Vec<usize>> = (0..3).map(|round| order(2, round).collect()).collect();
        assert_eq!(rounds, [[0, 1], [1, 0], [0, 1]]);
        assert_eq!(order(3, 4).collect::<Vec<_>>(), [1, 2, 0]);
    }

    #[test]
    fn figures_become_rows() {
        let subject = |row, case: &str| Subject {
            row,
            case: case.to_owned(),
            unit: "ms",
        };
        let mut samples = Samples::new(2);
        for round in 0..2 {
            for contender in order(2, round) {
                let figure = (round + 1) as f64 * (contender + 1) as f64;
                for case in ["a", "b"] {
                    samples.add(subject("first", case), contender, figure);
                    samples.add(subject("second", case), contender, figure);
                }
            }
        }
        let rows = samples.rows(&["peer".to_owned()]);
        let names: Vec<(&str, &str)> = rows
            .iter()
            .map(|row| (row.row.as_str(), row.case.as_str()))
            .collect();
        let wanted = [
            ("first", "a"),
            ("first", "b"),
            ("second", "a"),
            ("second", "b"),
        ];
        assert_eq!(names, wanted);
        assert_eq!((rows[0].gantry.min, rows[0].gantry.max), (1.0, 2.0));
        let peer = rows[0].peers["peer"];
        assert_eq!((peer.summary.median, peer.ratio.median), (3.0, 0.5));
    }
}
