//! The tree as a picture: one row per function, one colour per state, one band per IOMMU group.

use std::fmt::Write;

use gantry_resources::inventory::DeviceState;

use super::Node;
use super::icon::Icon;

const ROW: usize = 24;
const STEP: usize = 28;
const LEFT: usize = 24;
const TOP: usize = 112;
/// Between a circle and its text.
const INDENT: usize = 14;
/// Width of a VM's mark, with the gap to its name.
const MARK: usize = 20;
/// Between two columns.
const GAP: usize = 24;
/// Width of one letter at the font's size, with room to spare.
const LETTER: usize = 7;

const STYLE: &str = "text{font:12px system-ui,sans-serif;fill:#222}.dim,.id{fill:#777}\
    .head{font-weight:600}.vm{font-weight:600}.line{stroke:#b8b8b8;fill:none}\
    .icon{fill:none;stroke:#fff;stroke-width:1.2}.plain{fill:none;stroke:#888;stroke-width:1.2}\
    .mark{fill:#fff;font-weight:600;text-anchor:middle}.band{fill:#7f7f7f;opacity:.1}.node{stroke:#b8b8b8}\
    @media(prefers-color-scheme:dark){.back{fill:#1c1c1e}text{fill:#eee}.dim,.id{fill:#999}.line,.node{stroke:#666}}";

/// The states with their colours, as in the legend.
const STATES: [(&str, &str); 5] = [
    ("attached", "#4e79a7"),
    ("detached", "#59a14f"),
    ("assigned", "#f28e2b"),
    ("unbound", "#9c9c9c"),
    ("quarantined", "#e15759"),
];

/// What stands beside a function, in columns of their own.
const COLUMNS: [&str; 3] = ["IOMMU group", "Group", "State, VM"];

/// Colours of VMs' marks; the number tells those of one colour apart.
const MARKS: [&str; 6] = [
    "#b6992d", "#d37295", "#499894", "#7b5ea7", "#8c564b", "#3b5b92",
];

/// The host that a picture shows, and the time.
pub struct Title {
    pub host: String,
    pub date: String,
}

/// The picture as the text of an SVG file.
pub fn draw(roots: &[Node], title: &Title) -> String {
    let rows = rows(roots);
    let vms = vms(&rows);
    let columns = columns(&rows);
    let width = columns[COLUMNS.len()];
    let height = TOP + rows.len() * ROW + LEFT;
    let (host, date) = (escaped(&title.host), escaped(&title.date));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\"><title>PCI functions of {host}, {date}</title>\
         <style>{STYLE}</style><rect class=\"back\" width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    text(&mut svg, "head", (LEFT - 8, 24), &title.host);
    text(
        &mut svg,
        "dim",
        (LEFT + title.host.chars().count() * (LETTER + 1), 24),
        &title.date,
    );
    bands(&mut svg, &rows, width);
    for (title, x) in COLUMNS.iter().zip(columns) {
        text(&mut svg, "dim", (x, TOP - ROW / 2), title);
    }
    for (index, row) in rows.iter().enumerate() {
        let y = TOP + index * ROW + ROW / 2;
        match &row.what {
            What::Node(node) => {
                branch(&mut svg, row, y);
                function(&mut svg, (row.x(), y), node);
                let (plain, state) = match (&node.state, node.bridge) {
                    (_, true) => ("dim", "dim"),
                    (DeviceState::Assigned { .. }, _) => ("fact", "vm"),
                    _ => ("fact", "fact"),
                };
                let cells = row.cells(node);
                let number = vm(node).and_then(|vm| vms.iter().position(|one| *one == vm));
                if let Some(number) = number {
                    mark(&mut svg, (columns[2], y), number);
                }
                let [first, second, last] = [columns[0], columns[1], columns[2]];
                let last = last + number.map_or(0, |_| MARK);
                let places = [(first, plain), (second, plain), (last, state)];
                for (cell, (x, class)) in cells.iter().zip(places) {
                    text(&mut svg, class, (x, y + 4), cell);
                }
            }
            What::Heading(words) => {
                let _ = writeln!(
                    svg,
                    "<path class=\"node\" d=\"M8 {}H{}\"/>",
                    y - ROW / 2,
                    width.saturating_sub(8)
                );
                text(&mut svg, "head", (LEFT - 8, y + 4), words);
            }
        }
    }
    legend(&mut svg);
    svg.push_str("</svg>\n");
    svg
}

/// The VM that has a function.
fn vm(node: &Node) -> Option<&str> {
    match &node.state {
        DeviceState::Assigned { vm: Some(vm) } => Some(vm),
        _ => None,
    }
}

/// The VMs in the order of their first functions: the place of each is the number of its mark.
fn vms<'a>(rows: &[Row<'a>]) -> Vec<&'a str> {
    let mut all = Vec::new();
    for row in rows {
        if let What::Node(node) = &row.what
            && let Some(vm) = vm(node)
            && !all.contains(&vm)
        {
            all.push(vm);
        }
    }
    all
}

/// A VM's mark: the same for all its functions.
fn mark(svg: &mut String, (x, y): (usize, usize), number: usize) {
    let colour = MARKS.get(number % MARKS.len()).copied().unwrap_or("none");
    let _ = write!(
        svg,
        "<rect x=\"{x}\" y=\"{}\" width=\"16\" height=\"16\" rx=\"3\" fill=\"{colour}\"/>",
        y - 8
    );
    text(svg, "mark", (x + 8, y + 4), &(number + 1).to_string());
}

/// A function, or a heading, in its row.
struct Row<'a> {
    what: What<'a>,
    depth: usize,
    /// The row of the bridge that leads to it.
    parent: Option<usize>,
    /// The NUMA node of the heading above.
    near: Option<u32>,
}

enum What<'a> {
    Node(&'a Node),
    Heading(String),
}

impl Row<'_> {
    fn x(&self) -> usize {
        LEFT + self.depth * STEP
    }

    fn iommu_group(&self) -> Option<u32> {
        match self.what {
            What::Node(node) => node.iommu_group,
            What::Heading(_) => None,
        }
    }

    /// The texts of the columns.
    fn cells(&self, node: &Node) -> [String; 3] {
        let group = node.iommu_group.map(|group| group.to_string());
        let elsewhere = node.numa_node.filter(|numa| Some(*numa) != self.near);
        let elsewhere = elsewhere.map(|numa| format!("numa {numa}"));
        let place: Vec<String> = group.into_iter().chain(elsewhere).collect();
        let pool = node.group.clone().filter(|_| !node.bridge);
        let mut state = node.made();
        if !node.bridge {
            state.insert(0, node.holder());
        }
        [
            place.join(" · "),
            pool.unwrap_or_default(),
            state.join(" · "),
        ]
    }
}

/// The functions of the host in their order. Where there are several NUMA nodes, each has a heading.
fn rows(roots: &[Node]) -> Vec<Row<'_>> {
    let first = roots.first().map(|root| root.numa_node);
    let several = roots.iter().any(|root| Some(root.numa_node) != first);
    let (mut rows, mut near) = (Vec::new(), None);
    for root in roots {
        if several && near != Some(root.numa_node) {
            let words = match root.numa_node {
                Some(numa) => format!("NUMA node {numa}"),
                None => "No NUMA node".to_owned(),
            };
            rows.push(Row {
                what: What::Heading(words),
                depth: 0,
                parent: None,
                near: None,
            });
            near = Some(root.numa_node);
        }
        collect(root, (0, None), near.flatten(), &mut rows);
    }
    rows
}

fn collect<'a>(
    node: &'a Node,
    (depth, parent): (usize, Option<usize>),
    near: Option<u32>,
    rows: &mut Vec<Row<'a>>,
) {
    let own = rows.len();
    rows.push(Row {
        what: What::Node(node),
        depth,
        parent,
        near,
    });
    for child in &node.children {
        collect(child, (depth + 1, Some(own)), near, rows);
    }
}

/// Where each column begins, and after the last one the width of all.
fn columns(rows: &[Row]) -> [usize; COLUMNS.len() + 1] {
    let letters = |text: &str| text.chars().count() * LETTER;
    let mut widths = COLUMNS.map(letters);
    let mut labels = 0;
    for row in rows {
        let What::Node(node) = &row.what else {
            continue;
        };
        labels = labels.max(row.x() + INDENT + letters(&label(node)));
        let mark = vm(node).map_or(0, |_| MARK);
        for (width, cell) in widths.iter_mut().zip(row.cells(node)) {
            *width = (letters(&cell) + mark).max(*width);
        }
    }
    let legend = LEFT + STATES.len() * (36 + 12 * LETTER) + 40 * LETTER;
    let mut starts = [labels.max(legend / 2) + GAP; COLUMNS.len() + 1];
    for (index, width) in widths.iter().enumerate() {
        starts[index + 1] = starts[index] + width + GAP;
    }
    starts[COLUMNS.len()] = starts[COLUMNS.len()].max(legend);
    starts
}

fn label(node: &Node) -> String {
    format!("{} {} {}", node.bdf, node.id, node.name)
}

/// A band behind neighbours that share an IOMMU group.
fn bands(svg: &mut String, rows: &[Row], width: usize) {
    let mut start = 0;
    for index in 1..=rows.len() {
        let group = |index: usize| rows.get(index).and_then(Row::iommu_group);
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

/// The line from the bridge that leads to a function.
fn branch(svg: &mut String, row: &Row, y: usize) {
    if let Some(parent) = row.parent {
        let (from, top) = (row.x() - STEP, TOP + parent * ROW + ROW / 2 + 8);
        let to = row.x() - 8;
        let _ = writeln!(svg, "<path class=\"line\" d=\"M{from} {top}V{y}H{to}\"/>");
    }
}

fn function(svg: &mut String, (x, y): (usize, usize), node: &Node) {
    let (fill, class) = match node.bridge {
        true => ("none", "dim"),
        false => (colour(&node.state), "name"),
    };
    circle(svg, (x, y), fill);
    icon(
        svg,
        (x, y),
        node.icon,
        if node.bridge { "plain" } else { "icon" },
    );
    let _ = writeln!(
        svg,
        "<text class=\"{class}\" x=\"{}\" y=\"{}\">{} <tspan class=\"id\">{}</tspan> {}</text>",
        x + INDENT,
        y + 4,
        node.bdf,
        node.id,
        escaped(&node.name),
    );
}

fn circle(svg: &mut String, (x, y): (usize, usize), fill: &str) {
    let _ = write!(
        svg,
        "<circle cx=\"{x}\" cy=\"{y}\" r=\"8\" fill=\"{fill}\" stroke=\"#888\"/>"
    );
}

fn icon(svg: &mut String, (x, y): (usize, usize), icon: Icon, class: &str) {
    let path = icon.path();
    let _ = write!(
        svg,
        "<path class=\"{class}\" transform=\"translate({x} {y})\" d=\"{path}\"/>"
    );
}

fn text(svg: &mut String, class: &str, (x, y): (usize, usize), words: &str) {
    if !words.is_empty() {
        let words = escaped(words);
        let _ = writeln!(
            svg,
            "<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{words}</text>"
        );
    }
}

fn legend(svg: &mut String) {
    let mut x = LEFT;
    let known = STATES.iter().chain(&[("bridge", "none")]);
    for (word, colour) in known {
        circle(svg, (x, 48), colour);
        text(svg, "fact", (x + INDENT, 52), word);
        x += 36 + word.len() * LETTER;
    }
    let _ = writeln!(
        svg,
        "<rect class=\"band\" x=\"{x}\" y=\"38\" width=\"28\" height=\"20\" rx=\"6\"/>"
    );
    text(svg, "fact", (x + 36, 52), "one IOMMU group");
    let mut x = LEFT;
    for one in Icon::ALL {
        icon(svg, (x, 74), one, "plain");
        text(svg, "fact", (x + INDENT, 78), one.word());
        x += 36 + one.word().len() * LETTER;
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
    use super::super::tests::{host, node};
    use super::*;

    fn draw(roots: &[Node]) -> String {
        let title = Title {
            host: "rack-7 <b>".to_owned(),
            date: "Sat, 28 Nov 2026 12:00:00 GMT".to_owned(),
        };
        super::draw(roots, &title)
    }

    #[test]
    fn the_picture_says_which_host_it_shows_and_when() {
        let svg = draw(&host());
        assert!(svg.contains(">rack-7 &lt;b&gt;</text>"), "{svg}");
        assert!(
            svg.contains(">Sat, 28 Nov 2026 12:00:00 GMT</text>"),
            "{svg}"
        );
    }

    #[test]
    fn each_vm_has_a_mark_and_each_class_an_icon() {
        let mut host = host();
        for (vm, address) in [("web", "0d:00.0"), ("db", "0e:00.0"), ("web", "0f:00.0")] {
            let mut one = node(address, "a disk", Vec::new());
            one.icon = Icon::Storage;
            one.state = DeviceState::Assigned {
                vm: Some(vm.to_owned()),
            };
            host.push(one);
        }
        let svg = draw(&host);
        let count = |what: &str| svg.matches(what).count();
        assert_eq!(
            count(&format!("fill=\"{}\"/><text class=\"mark\"", MARKS[0])),
            2
        );
        assert_eq!(
            count(&format!("fill=\"{}\"/><text class=\"mark\"", MARKS[1])),
            1
        );
        let icons = |icon: Icon| count(icon.path());
        assert_eq!((icons(Icon::Storage), icons(Icon::Network)), (3 + 1, 6 + 1));
    }

    #[test]
    fn every_function_and_every_line_is_drawn() {
        let svg = draw(&host());
        let count = |what: &str| svg.matches(what).count();
        assert_eq!(count("class=\"id\">"), 6);
        assert_eq!(
            count("class=\"line\""),
            5,
            "all but the root hang on something"
        );
        assert_eq!(count("class=\"band\""), 1 + 1, "and one in the legend");
        assert_eq!(count("<circle "), 6 + STATES.len() + 1);
        assert_eq!(count("NUMA node"), 0, "nothing to tell apart");
        assert!(svg.contains("a &lt;card&gt;") && !svg.contains("<card>"));
        assert_eq!(count("<text "), count("</text>"));
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn numa_nodes_have_headings_and_no_column_meets_the_next() {
        let mut host = host();
        let mut far = node("80:01.0", &"a long name ".repeat(9), Vec::new());
        far.numa_node = Some(1);
        far.group = Some("a-group-of-some-length".to_owned());
        host.push(far);
        let svg = draw(&host);
        assert!(svg.find("No NUMA node") < svg.find("0000:00:01.0"), "{svg}");
        assert!(svg.find("NUMA node 1") < svg.find("0000:80:01.0"), "{svg}");
        assert!(!svg.contains("numa 1"), "the heading says it");
        let rows = rows(&host);
        let starts = columns(&rows);
        for row in &rows {
            let What::Node(node) = &row.what else {
                continue;
            };
            let ends = |x: usize, text: &str| x + text.chars().count() * LETTER;
            assert!(ends(row.x() + INDENT, &label(node)) < starts[0]);
            for (index, cell) in row.cells(node).iter().enumerate() {
                assert!(ends(starts[index], cell) < starts[index + 1], "{cell}");
            }
        }
    }

    #[test]
    fn a_host_without_devices_has_a_picture_too() {
        assert!(draw(&[]).contains("attached"));
    }
}
