//! Paths through a graph whose nodes have names.

use std::collections::{BTreeSet, VecDeque};

/// All nodes that can be reached from `start`, nearest first. Each is the last element of its path, which does not
/// contain `start`.
pub(super) fn paths_from(
    start: &str,
    neighbours: impl Fn(&str) -> BTreeSet<String>,
) -> Vec<Vec<String>> {
    let mut seen = BTreeSet::from([start.to_owned()]);
    let mut waiting = VecDeque::from([Vec::new()]);
    let mut found = Vec::new();
    while let Some(path) = waiting.pop_front() {
        let at = path.last().map_or(start, String::as_str);
        for next in neighbours(at) {
            if seen.insert(next.clone()) {
                let path: Vec<String> = path.iter().cloned().chain([next]).collect();
                found.push(path.clone());
                waiting.push_back(path);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_path_to_every_node_is_found_in_a_graph_with_circles() {
        let neighbours = |node: &str| -> BTreeSet<String> {
            let next: &[&str] = match node {
                "a" => &["b", "c", "a"],
                "b" => &["a", "d"],
                "c" => &["d", "b"],
                "d" => &["e", "a"],
                _ => &[],
            };
            next.iter().map(|name| (*name).to_owned()).collect()
        };
        let found = paths_from("a", neighbours);
        let found: Vec<String> = found.iter().map(|path| path.join(">")).collect();
        assert_eq!(found, ["b", "c", "b>d", "b>d>e"]);
        assert!(paths_from("e", neighbours).is_empty());
    }
}
