//! A JSON text as a tree in which every key and value has its place in the text.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The deepest nesting that is read; gantry's own files need five levels.
const MAX_DEPTH: usize = 32;

/// A mistake in a text: the byte offset and the message.
pub(super) type Fault = (usize, String);

/// Line and column in a text, both counted from 1, columns in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Character within the line.
    pub column: usize,
}

/// A value and the byte offset it starts at.
#[derive(Debug)]
pub struct Node {
    /// Byte offset of the value's first character.
    pub at: usize,
    /// The value.
    pub value: Value,
}

/// A JSON value.
#[derive(Debug)]
pub enum Value {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number.
    Number(serde_json::Number),
    /// A string, without its escapes.
    Text(String),
    /// An array.
    List(Vec<Node>),
    /// An object, in the order it was written.
    Map(Vec<Entry>),
    /// A value that is not decoded again, since its mistake is known already.
    Skipped,
}

/// One member of an object.
#[derive(Debug)]
pub struct Entry {
    /// Its key, without escapes.
    pub key: String,
    /// Byte offset of the key's opening quote.
    pub at: usize,
    /// Its value.
    pub node: Node,
}

impl Node {
    /// The value at a key path such as `devices[0].count`, or the nearest value around it.
    pub fn nearest(&self, path: &str) -> &Self {
        let Some((step, rest)) = first_step(path) else {
            return self;
        };
        self.child(step).map_or(self, |child| child.nearest(rest))
    }

    /// The value at a key path.
    pub(super) fn find_mut(&mut self, path: &str) -> Option<&mut Self> {
        let Some((step, rest)) = first_step(path) else {
            return Some(self);
        };
        let child = match &mut self.value {
            Value::Map(entries) => entries
                .iter_mut()
                .find(|entry| entry.key == step)
                .map(|entry| &mut entry.node),
            Value::List(items) => items.get_mut(step.parse::<usize>().ok()?),
            _ => None,
        };
        child?.find_mut(rest)
    }

    /// The member of that name, or the item with that index.
    pub(super) fn child(&self, step: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(_) => self.entry(step).map(|entry| &entry.node),
            Value::List(items) => items.get(step.parse::<usize>().ok()?),
            _ => None,
        }
    }

    /// The member of that name with its key.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|entry| entry.key == key),
            _ => None,
        }
    }
}

/// The first key or index of a path, and the rest of the path; none for the empty path.
fn first_step(path: &str) -> Option<(&str, &str)> {
    let (step, rest) = match path.strip_prefix('[') {
        Some(path) => path.split_once(']').unwrap_or((path, "")),
        None if path.is_empty() => return None,
        None => path.split_at(path.find(['.', '[']).unwrap_or(path.len())),
    };
    Some((step, rest.strip_prefix('.').unwrap_or(rest)))
}

/// Reads a whole JSON text.
pub(super) fn parse(text: &str) -> Result<Node, Fault> {
    let raw: &RawValue = serde_json::from_str(text).map_err(|error| {
        // Skipping a value tells less about its mistakes than reading it.
        let json = &mut serde_json::Deserializer::from_str(text);
        let read = serde_path_to_error::deserialize::<_, serde_json::Value>(json);
        let (path, error) = match read {
            Ok(_) => (String::new(), error),
            Err(error) => (error.path().to_string(), error.into_inner()),
        };
        let what = syntax_message(&error);
        let what = match path.trim_end_matches(['.', '?']) {
            "" => what,
            path => format!("`{path}`: {what}"),
        };
        (offset(text, error.line(), error.column()), what)
    })?;
    node(text, raw, 0)
}

/// Line and column of byte offset `at` in `text`.
pub(super) fn position(text: &str, at: usize) -> Position {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    Position {
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
    }
}

/// Byte offset of serde_json's line and column, which count from 1 and in bytes.
fn offset(text: &str, line: usize, column: usize) -> usize {
    let start: usize = text
        .split_inclusive('\n')
        .take(line.saturating_sub(1))
        .map(str::len)
        .sum();
    (start + column.saturating_sub(1)).min(text.len())
}

fn syntax_message(error: &serde_json::Error) -> String {
    format!("not valid JSON: {}", without_position(error))
}

/// The message of serde_json, without the line and column at its end.
pub(crate) fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let tail = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&tail).unwrap_or(&text).to_owned()
}

fn node(text: &str, raw: &RawValue, depth: usize) -> Result<Node, Fault> {
    let json = raw.get();
    // Both slices are of the same allocation: `raw` borrows from `text`.
    let at = json.as_ptr().addr() - text.as_ptr().addr();
    if depth > MAX_DEPTH {
        return Err((at, format!("nested deeper than {MAX_DEPTH} levels")));
    }
    let fault = |error: serde_json::Error| (at, syntax_message(&error));
    let value = match json.as_bytes().first() {
        Some(b'n') => Value::Null,
        Some(b't') => Value::Bool(true),
        Some(b'f') => Value::Bool(false),
        Some(b'"') => Value::Text(serde_json::from_str(json).map_err(fault)?),
        Some(b'[') => {
            let items: Vec<&RawValue> = serde_json::from_str(json).map_err(fault)?;
            let items = items.into_iter().map(|item| node(text, item, depth + 1));
            Value::List(items.collect::<Result<_, _>>()?)
        }
        Some(b'{') => {
            let Members(members) = serde_json::from_str(json).map_err(fault)?;
            let entries = members
                .into_iter()
                .map(|member| entry(text, member, depth + 1));
            let entries = entries.collect::<Result<Vec<_>, _>>()?;
            no_key_twice(&entries)?;
            Value::Map(entries)
        }
        _ => Value::Number(serde_json::from_str(json).map_err(fault)?),
    };
    Ok(Node { at, value })
}

fn entry(text: &str, (key, value): (&RawValue, &RawValue), depth: usize) -> Result<Entry, Fault> {
    let Node {
        at,
        value: Value::Text(key),
    } = node(text, key, depth)?
    else {
        return Err((0, "not valid JSON: a key is not a string".to_owned()));
    };
    Ok(Entry {
        key,
        at,
        node: node(text, value, depth)?,
    })
}

fn no_key_twice(entries: &[Entry]) -> Result<(), Fault> {
    let mut seen = std::collections::HashSet::new();
    match entries.iter().find(|entry| !seen.insert(&entry.key)) {
        Some(twice) => {
            let key = twice.key.escape_debug();
            let what = format!("key `{key}` stands twice in one object: remove one of them");
            Err((twice.at, what))
        }
        None => Ok(()),
    }
}

/// An object's members, unparsed: serde_json's own maps lose the places.
struct Members<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// The value as compact JSON; a long one is cut short.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Number(value) => write!(f, "{value}"),
            Self::Text(value) if value.chars().count() > 60 => {
                let head: String = value.chars().take(57).collect();
                write!(f, "\"{}...\"", head.escape_debug())
            }
            Self::Text(value) => write!(f, "\"{}\"", value.escape_debug()),
            Self::List(items) if items.is_empty() => f.write_str("[]"),
            Self::List(_) => f.write_str("[...]"),
            Self::Map(entries) if entries.is_empty() => f.write_str("{}"),
            Self::Map(_) | Self::Skipped => f.write_str("{...}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_and_value_knows_its_place() {
        let text = "{\n  \"é\": [1, true],\n  \"b\" : null }";
        let root = parse(text).unwrap();
        let Value::Map(entries) = root.value else {
            panic!("{:?}", root.value)
        };
        let Value::List(items) = &entries[0].node.value else {
            panic!()
        };
        let places = [
            entries[0].at,
            items[1].at,
            entries[1].at,
            entries[1].node.at,
        ]
        .map(|at| position(text, at))
        .map(|Position { line, column }| (line, column));
        assert_eq!(places, [(2, 3), (2, 12), (3, 3), (3, 9)]);
    }

    #[test]
    fn a_syntax_error_is_placed_where_it_stands() {
        for (text, line, column, what) in [
            ("{\n  \"a\": 1,\n}", 3, 1, "trailing comma"),
            ("{\"a\": 1} x", 1, 10, "trailing characters"),
            ("", 1, 1, "EOF while parsing a value"),
            ("{\"a\": }", 1, 7, "expected value"),
            ("{\n\"a\" 1}", 2, 5, "expected `:`"),
        ] {
            let (at, said) = parse(text).unwrap_err();
            let place = position(text, at);
            assert_eq!((place.line, place.column), (line, column), "{text}: {said}");
            assert!(said.contains(what), "{text}: {said}");
        }
    }

    #[test]
    fn deep_nesting_ends_in_an_error() {
        let text = "[".repeat(5000) + &"]".repeat(5000);
        assert!(parse(&text).unwrap_err().1.contains("nested deeper"));
    }
}
