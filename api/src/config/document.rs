//! A JSON text as a tree in which every key and value knows where it was written.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::error::Fault;

/// Nesting at which reading gives up; gantry's own files need five levels.
const MAX_DEPTH: usize = 32;

/// Place in a text, both counted from 1, columns in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// What stands there.
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

/// Reads a whole JSON text.
pub fn parse(text: &str) -> Result<Node, Fault> {
    let raw: &RawValue = serde_json::from_str(text).map_err(|error| {
        // Skipping a value says less about what is wrong with it than reading it does.
        let error = serde_json::from_str::<serde_json::Value>(text)
            .err()
            .unwrap_or(error);
        let at = offset(text, error.line(), error.column());
        Fault::new(at, syntax_message(&error))
    })?;
    node(text, raw, 0)
}

/// Line and column of byte offset `at` in `text`.
pub fn position(text: &str, at: usize) -> Position {
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
    let text = error.to_string();
    let tail = format!(" at line {} column {}", error.line(), error.column());
    format!(
        "not valid JSON: {}",
        text.strip_suffix(&tail).unwrap_or(&text)
    )
}

fn node(text: &str, raw: &RawValue, depth: usize) -> Result<Node, Fault> {
    let json = raw.get();
    // Both slices are of the same allocation: `raw` borrows from `text`.
    let at = json.as_ptr().addr() - text.as_ptr().addr();
    if depth > MAX_DEPTH {
        return Err(Fault::new(
            at,
            format!("nested deeper than {MAX_DEPTH} levels"),
        ));
    }
    let fault = |error: serde_json::Error| Fault::new(at, syntax_message(&error));
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
        return Err(Fault::new(
            0,
            "not valid JSON: a key is not a string".to_owned(),
        ));
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
            let what = format!(
                "key `{}` stands twice in one object",
                twice.key.escape_debug()
            );
            Err(Fault::new(twice.at, what).help("remove one of them"))
        }
        None => Ok(()),
    }
}

/// An object's members, unread: serde_json's own maps forget where they were.
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
            Self::Map(_) => f.write_str("{...}"),
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
            let fault = parse(text).unwrap_err();
            let place = position(text, fault.at);
            assert_eq!(
                (place.line, place.column),
                (line, column),
                "{text}: {}",
                fault.what
            );
            assert!(fault.what.contains(what), "{text}: {}", fault.what);
        }
    }

    #[test]
    fn deep_nesting_ends_in_an_error() {
        let text = "[".repeat(5000) + &"]".repeat(5000);
        assert!(parse(&text).unwrap_err().what.contains("nested deeper"));
    }
}
