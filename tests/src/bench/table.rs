//! Rows on a terminal: aligned columns, the medians first.

use super::rows::{Ratio, Row, Summary};

/// The rows as lines of text, with `peers` in this order; a line of its own names what is measured,
/// its cases follow.
pub fn render(rows: &[Row], peers: &[String]) -> String {
    let mut head = vec![String::new(), "gantry".into()];
    for peer in peers {
        head.extend([peer.clone(), "ratio".into(), "gantry is".into()]);
    }
    let mut lines = vec![head];
    let mut last = "";
    for row in rows {
        if row.row != last {
            lines.push(vec![format!("{}, {}", row.row, row.unit)]);
        }
        last = &row.row;
        let mut line = vec![format!("  {}", row.case), summary(&row.gantry)];
        for peer in peers.iter().filter_map(|name| row.peers.get(name)) {
            let Ratio { median, low, high } = peer.ratio;
            line.push(summary(&peer.summary));
            line.push(format!("{median:.2} ({low:.2}-{high:.2})"));
            line.push(peer.ratio.verdict().to_string());
        }
        lines.push(line);
    }
    align(&lines)
}

/// `median (min-max)`, or the one figure that they all are.
fn summary(summary: &Summary) -> String {
    let Summary {
        median, min, max, ..
    } = *summary;
    if min == max {
        return figure(median);
    }
    format!("{} ({}-{})", figure(median), figure(min), figure(max))
}

/// Three digits, and no decimals of whole numbers.
fn figure(value: f64) -> String {
    if value.fract() == 0.0 || value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// Columns as wide as their widest cell, two spaces apart. A line of one cell takes part in none.
pub fn align(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        let lines = lines.iter().filter(|line| line.len() > 1);
        let cells = lines.filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let mut whole = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            whole.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(whole.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::rows::Peer;
    use super::*;
    use std::collections::BTreeMap;

    fn example(row: &str, case: &str, gantry: &[f64], peer: &[f64]) -> Row {
        let theirs = Peer {
            summary: Summary::of(peer).unwrap(),
            ratio: Ratio::of(gantry, peer).unwrap(),
        };
        Row {
            row: row.into(),
            case: case.into(),
            unit: "ms".into(),
            gantry: Summary::of(gantry).unwrap(),
            peers: BTreeMap::from([("cloud-hypervisor".to_owned(), theirs)]),
        }
    }

    #[test]
    fn rows_are_aligned() {
        let rows = [
            example(
                "start-to-init",
                "0 nvme",
                &[1000.4, 900.0],
                &[2000.0, 1800.0],
            ),
            example("start-to-init", "1 nvme", &[12.34], &[1.234]),
            example("exits", "1 nvme", &[0.0], &[0.0]),
        ];
        let text = render(&rows, &["cloud-hypervisor".to_owned()]);
        let wanted = [
            "          gantry          cloud-hypervisor  ratio                gantry is",
            "start-to-init, ms",
            "  0 nvme  950 (900-1000)  1900 (1800-2000)  0.50 (0.50-0.50)     ahead",
            "  1 nvme  12.3            1.23              10.00 (10.00-10.00)  behind",
            "exits, ms",
            "  1 nvme  0               0                 1.00 (1.00-1.00)     level",
            "",
        ]
        .join("\n");
        assert_eq!(text, wanted);
    }

    #[test]
    fn gantry_alone_has_one_column() {
        let mut row = example("a", "b", &[1.0], &[1.0]);
        row.peers.clear();
        assert_eq!(render(&[row], &[]), "     gantry\na, ms\n  b  1\n");
    }
}
