//! The place of a key in a JSON file, for mistakes that show only when all files have been read.

use std::fmt;
use std::path::Path;

use super::tree::{self, Node, Position, Value};

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: Box<Path>,
    /// Line and column; none if the file has no such key yet.
    pub position: Option<Position>,
}

/// An entry of a list, by its name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ListItem<'a> {
    /// The key of the list.
    pub(crate) list: &'a str,
    /// The `name` of the entry.
    pub(crate) name: &'a str,
}

impl Place {
    /// A byte offset of a text.
    pub(super) fn at(file: &Path, text: &str, at: usize) -> Self {
        Self {
            file: file.into(),
            position: Some(tree::position(text, at)),
        }
    }

    /// A key of a file, such as `groups[0].rules[1].slot`.
    pub(crate) fn of(file: &Path, key: &str) -> Self {
        Self::found(file, |root| Some(root.nearest(key)))
    }

    /// A key of the first entry of that name, or the entry if it has no such key.
    pub(crate) fn first(file: &Path, item: ListItem<'_>, key: &str) -> Self {
        Self::found(file, |root| Some(item.entries(root).next()?.nearest(key)))
    }

    /// The same in the last entry of that name: the duplicate.
    pub(crate) fn last(file: &Path, item: ListItem<'_>, key: &str) -> Self {
        Self::found(file, |root| Some(item.entries(root).last()?.nearest(key)))
    }

    fn found(file: &Path, find: impl FnOnce(&Node) -> Option<&Node>) -> Self {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let root = tree::parse(&text).ok();
        let at = root.as_ref().and_then(find).map(|node| node.at);
        Self {
            file: file.into(),
            position: at.map(|at| tree::position(&text, at)),
        }
    }
}

impl ListItem<'_> {
    fn entries<'n>(&self, root: &'n Node) -> impl Iterator<Item = &'n Node> {
        let items = match root.child(self.list).map(|node| &node.value) {
            Some(Value::List(items)) => items.as_slice(),
            _ => &[],
        };
        let is_named = |node: &&Node| match node.child("name").map(|node| &node.value) {
            Some(Value::Text(name)) => name == self.name,
            _ => false,
        };
        items.iter().filter(is_named)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        match self.position {
            Some(Position { line, column }) => write!(f, ":{line}:{column}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "{\n  \"groups\": [\n    {\"name\": \"a\",\n     \"rules\": [{\"class\": \"01\"},\n       \
        {\"slot\": \"x\"}]},\n    {\"name\": \"a\"}\n  ]\n}\n";

    #[test]
    fn a_key_or_its_entry_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("groups.json");
        std::fs::write(&file, TEXT).unwrap();
        let line = |place: Place| place.position.map(|position| position.line);
        assert_eq!(line(Place::of(&file, "groups[0].rules[1].slot")), Some(5));
        let item = |name| ListItem {
            list: "groups",
            name,
        };
        assert_eq!(line(Place::first(&file, item("a"), "name")), Some(3));
        assert_eq!(
            line(Place::first(&file, item("a"), "rules[1].slot")),
            Some(5)
        );
        assert_eq!(line(Place::last(&file, item("a"), "name")), Some(6));
        assert_eq!(line(Place::last(&file, item("a"), "rules")), Some(6));
        let new = Place::last(&file, item("b"), "name");
        assert_eq!(new.to_string(), file.display().to_string());
        let shown = Place::first(&file, item("a"), "name").to_string();
        assert!(shown.ends_with("groups.json:3:14"), "{shown}");
        let none = Place::of(&dir.path().join("none.json"), "user");
        assert_eq!(none.position, None);
    }
}
