//! Where in a JSON file a key is: mistakes that are seen only when all files are read are told with their
//! lines too.

use std::fmt;
use std::path::Path;

use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::Value;

/// A place in a file. Shown as file, line and column, as far as they are known: what is only about to be
/// written has no line yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: Box<Path>,
    /// Line and column of the value, from 1.
    pub position: Option<(u32, u32)>,
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
    /// A key of a file, such as `groups[0].rules[1].slot`.
    pub(crate) fn of(file: &Path, key: &str) -> Self {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        Self::in_text(file, &text, key)
    }

    /// A key of a text that is known under this name.
    pub fn in_text(name: &Path, text: &str, key: &str) -> Self {
        Self {
            file: name.into(),
            position: find(text, key),
        }
    }

    /// A key of the first entry of that name.
    pub(crate) fn first(file: &Path, item: ListItem<'_>, key: &str) -> Self {
        Self::in_list(file, item, key, |found| found.first().copied())
    }

    /// A key of the last entry of that name: of two, the one that is too many.
    pub(crate) fn last(file: &Path, item: ListItem<'_>, key: &str) -> Self {
        Self::in_list(file, item, key, |found| found.last().copied())
    }

    fn in_list(
        file: &Path,
        ListItem { list, name }: ListItem<'_>,
        key: &str,
        choose: impl Fn(&[usize]) -> Option<usize>,
    ) -> Self {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        let entries = value[list].as_array().map_or(&[][..], Vec::as_slice);
        let named = (0..entries.len()).filter(|index| entries[*index]["name"] == name);
        let index = choose(&named.collect::<Vec<_>>());
        let position = index.and_then(|index| {
            // A key that is left out is wrong at its entry.
            let entry = format!("{list}[{index}]");
            find(&text, &format!("{entry}.{key}")).or_else(|| find(&text, &entry))
        });
        Self {
            file: file.into(),
            position,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        match self.position {
            Some((line, column)) => write!(f, ":{line}:{column}"),
            None => Ok(()),
        }
    }
}

/// What [`Seek`] fails with when it is there.
const FOUND: &str = "found";

/// Line and column of a key's value.
fn find(text: &str, key: &str) -> Option<(u32, u32)> {
    let steps: Vec<&str> = key
        .split(['.', '['])
        .map(|step| step.trim_end_matches(']'))
        .collect();
    let mut json = serde_json::Deserializer::from_str(text);
    let error = Seek(&steps).deserialize(&mut json).err()?;
    let number = |number| u32::try_from(number).ok();
    match error.to_string().starts_with(FOUND) {
        true => number(error.line()).zip(number(error.column())),
        false => None,
    }
}

/// Goes down to a value by keys and indexes, and fails there: errors know where they are.
struct Seek<'s>(&'s [&'s str]);

impl<'de> DeserializeSeed<'de> for Seek<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        match self.0 {
            [] => Err(D::Error::custom(FOUND)),
            _ => deserializer.deserialize_any(self),
        }
    }
}

impl<'de> Visitor<'de> for Seek<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list or an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let [step, rest @ ..] = self.0 else {
            return Ok(());
        };
        while let Some(key) = map.next_key::<String>()? {
            match key == *step {
                true => map.next_value_seed(Seek(rest))?,
                false => map.next_value::<IgnoredAny>().map(drop)?,
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let [step, rest @ ..] = self.0 else {
            return Ok(());
        };
        let wanted = step.parse().unwrap_or(usize::MAX);
        for _ in 0..wanted {
            if list.next_element::<IgnoredAny>()?.is_none() {
                return Ok(());
            }
        }
        list.next_element_seed(Seek(rest)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "{\n  \"groups\": [\n    {\"name\": \"a\",\n     \"rules\": [{\"class\": \"01\"},\n       \
        {\"slot\": \"x\"}]},\n    {\"name\": \"a\"}\n  ]\n}\n";

    #[test]
    fn a_key_has_a_line() {
        let line = |key: &str| find(TEXT, key).map(|(line, _)| line);
        assert_eq!(line("groups[0].name"), Some(3));
        assert_eq!(line("groups[0].rules[1].slot"), Some(5));
        assert_eq!(line("groups[1].name"), Some(6));
        assert_eq!(line("groups[2]"), None);
        assert_eq!(line("groups[0].rules[1].class"), None);
        assert_eq!(line("groups[0].name.x"), None);
        assert_eq!(find("{", "a"), None);
    }

    #[test]
    fn an_entry_is_found_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("groups.json");
        std::fs::write(&file, TEXT).unwrap();
        let item = |name| ListItem {
            list: "groups",
            name,
        };
        let line = |place: Place| place.position.map(|(line, _)| line);
        assert_eq!(line(Place::first(&file, item("a"), "name")), Some(3));
        assert_eq!(line(Place::last(&file, item("a"), "name")), Some(6));
        assert_eq!(line(Place::last(&file, item("a"), "rules")), Some(6));
        let new = Place::last(&file, item("b"), "name");
        assert_eq!(new.to_string(), file.display().to_string());
        let shown = Place::first(&file, item("a"), "name").to_string();
        assert!(shown.ends_with("groups.json:3:13"), "{shown}");
    }
}
