//! The tree as a picture: a row a function, a colour a state, a band an IOMMU group.

use std::fmt::Write;

use gantry_resources::DeviceState;

use super::Node;

const ROW: usize = 24;
const STEP: usize = 28;
const LEFT: usize = 24;
const TOP: usize = 40;
/// Wide enough for an address and a name of pci.ids.
const LABEL: usize = 620;
/// Width of one letter at the font's size, about.
const LETTER: usize = 7;

const STYLE: &str = "text{font:12px system-ui,sans-serif;fill:#222}.id{fill:#777}\
    .line{stroke:#b8b8b8;fill:none}.band{fill:#7f7f7f;opacity:.08}\
    @media(prefers-color-scheme:dark){.back{fill:#1c1c1e}text{fill:#eee}.id{fill:#999}.line{stroke:#666}}";

/// The states with their colours, as in the legend.
const STATES: [(&str, &str); 5] = [
    ("attached", "#4e79a7"),
    ("detached", "#59a14f"),
    ("assigned", "#f28e2b"),
    ("unbound", "#9c9c9c"),
    ("quarantined", "#e15759"),
];

/// The picture as the text of an SVG file.
pub fn draw(roots: &[Node]) -> String {
    let mut rows = Vec::new();
    roots
        .iter()
        .for_each(|node| collect(node, 0, None, &mut rows));
    let depth = rows.iter().map(|row| row.depth).max().unwrap_or(0);
    let facts = rows
        .iter()
        .map(|row| row.node.facts().chars().count())
        .max();
    let column = LEFT + depth * STEP + LABEL;
    let width = column + facts.unwrap_or(0) * LETTER + LEFT;
    let height = TOP + rows.len() * ROW + LEFT;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\"><title>PCI functions of this host</title>\
         <style>{STYLE}</style><rect class=\"back\" width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    bands(&mut svg, &rows, width);
    for (index, row) in rows.iter().enumerate() {
        draw_row(&mut svg, index, row, column);
    }
    legend(&mut svg);
    svg.push_str("</svg>\n");
    svg
}

/// A function in its row.
struct Row<'a> {
    node: &'a Node,
    depth: usize,
    /// The row of the bridge that leads to it.
    parent: Option<usize>,
}

fn collect<'a>(node: &'a Node, depth: usize, parent: Option<usize>, rows: &mut Vec<Row<'a>>) {
    let own = rows.len();
    rows.push(Row {
        node,
        depth,
        parent,
    });
    for child in &node.children {
        collect(child, depth + 1, Some(own), rows);
    }
}

/// A band behind neighbours that share an IOMMU group.
fn bands(svg: &mut String, rows: &[Row], width: usize) {
    let mut start = 0;
    for index in 1..=rows.len() {
        let group = |index: usize| rows.get(index).and_then(|row| row.node.iommu_group);
        if index < rows.len() && group(index) == group(start) {
            continue;
        }
        if index - start > 1 && group(start).is_some() {
            let (y, height) = (TOP + start * ROW, (index - start) * ROW);
            let _ = writeln!(
                svg,
                "<rect class=\"band\" x=\"4\" y=\"{y}\" width=\"{}\" height=\"{height}\" rx=\"6\"/>",
                width.saturating_sub(8)
            );
        }
        start = index;
    }
}

fn draw_row(svg: &mut String, index: usize, row: &Row, column: usize) {
    let (x, y) = (LEFT + row.depth * STEP, TOP + index * ROW + ROW / 2);
    if let Some(parent) = row.parent {
        let (from, top) = (x - STEP, TOP + parent * ROW + ROW / 2 + 6);
        let _ = writeln!(
            svg,
            "<path class=\"line\" d=\"M{from} {top}V{y}H{}\"/>",
            x - 6
        );
    }
    let node = row.node;
    let fill = if node.bridge {
        "none"
    } else {
        colour(&node.state)
    };
    let _ = writeln!(
        svg,
        "<circle cx=\"{x}\" cy=\"{y}\" r=\"6\" fill=\"{fill}\" stroke=\"#888\"/>\
         <text x=\"{}\" y=\"{}\">{} <tspan class=\"id\">{}</tspan> {}</text>\
         <text x=\"{column}\" y=\"{}\">{}</text>",
        x + 12,
        y + 4,
        node.bdf,
        node.id,
        escaped(&node.name),
        y + 4,
        escaped(&node.facts())
    );
}

fn legend(svg: &mut String) {
    let mut x = LEFT;
    for (word, colour) in STATES {
        let _ = writeln!(
            svg,
            "<circle cx=\"{x}\" cy=\"20\" r=\"6\" fill=\"{colour}\" stroke=\"#888\"/>\
             <text x=\"{}\" y=\"24\">{word}</text>",
            x + 12
        );
        x += 36 + word.len() * LETTER;
    }
}

fn colour(state: &DeviceState) -> &'static str {
    let word = super::state_word(state);
    let known = STATES.iter().find(|(known, _)| *known == word);
    known.map_or("none", |(_, colour)| colour)
}

/// Text as XML has it.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::tests::host;
    use super::*;

    #[test]
    fn every_function_and_every_line_is_drawn() {
        let svg = draw(&host());
        let count = |what: &str| svg.matches(what).count();
        assert_eq!(count("class=\"id\">"), 6);
        assert_eq!(count("<path "), 5, "all but the root hang on something");
        assert_eq!(count("class=\"band\""), 1);
        assert_eq!(count("<circle "), 6 + STATES.len());
        assert!(svg.contains("a &lt;card&gt;") && !svg.contains("<card>"));
        assert_eq!(count("<text "), count("</text>"));
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn a_host_without_devices_has_a_picture_too() {
        assert!(draw(&[]).contains("attached"));
    }
}
