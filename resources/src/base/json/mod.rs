//! The one reader of JSON: files of VMs, groups, plans and tenants, and bodies of API calls. Each mistake is
//! reported as `FILE:LINE:COLUMN: KEY: REASON: REMEDY`.

mod decode;
mod place;
mod tree;

use std::fmt;
use std::path::Path;

use serde::de::DeserializeOwned;

pub use decode::join;
use decode::{DecodeError, Misfit};
pub(crate) use place::ListItem;
pub use place::Place;
pub(crate) use tree::without_position;
pub use tree::{Entry, Node, Position, Value};

/// The most mistakes of one text that are reported.
const MOST_MISTAKES: usize = 16;
/// The similarity, from 0 to 1, from which a known word is suggested for an unknown one.
const ALIKE: f64 = 0.79;

/// A JSON text, and the mistakes that were found in it so far.
#[derive(Debug)]
pub struct Document<'a> {
    /// The file; none for a text that is in no file.
    file: Option<&'a Path>,
    text: &'a str,
    /// The whole value.
    pub root: Node,
    mistakes: Vec<Mistake>,
    /// Keys for which an unknown key was probably a misspelling: they are not reported as missing.
    meant: Vec<String>,
}

impl<'a> Document<'a> {
    /// Reads a text. `file` is the name that it has in errors.
    ///
    /// # Errors
    /// It is not JSON, is nested too deeply, or has a key twice in one object.
    pub fn parse(file: &'a Path, text: &'a str) -> Result<Self, JsonError> {
        Self::new(Some(file), text)
    }

    fn new(file: Option<&'a Path>, text: &'a str) -> Result<Self, JsonError> {
        let root = tree::parse(text).map_err(|(at, what)| {
            let place = file.map(|file| Place::at(file, text, at));
            JsonError(vec![Mistake { place, what }])
        })?;
        Ok(Self {
            file,
            text,
            root,
            mistakes: Vec::new(),
            meant: Vec::new(),
        })
    }

    /// Reads a value out of the whole text.
    pub fn decode<T: DeserializeOwned>(&mut self) -> Option<T> {
        self.decode_beside(&|_| Vec::new())
    }

    /// The same for objects with more known keys than the type has: `others` returns those of the object at a
    /// path.
    pub fn decode_beside<T: DeserializeOwned>(
        &mut self,
        others: &dyn Fn(&str) -> Vec<&'static str>,
    ) -> Option<T> {
        loop {
            let error = match decode::decode(&self.root) {
                Ok(value) => return Some(value),
                Err(error) => error,
            };
            let part = part(&error.path).to_owned();
            if self.is_skipped(&part) {
                return None;
            }
            self.add(error, others);
            // Mistakes in other parts of the text are kept.
            match self.root.find_mut(&part) {
                Some(node) if !part.is_empty() => node.value = Value::Skipped,
                _ => return None,
            }
            if self.mistakes.len() >= MOST_MISTAKES {
                return None;
            }
        }
    }

    /// Whether a part was left out because of a mistake in it, so that it is not missing.
    fn is_skipped(&self, part: &str) -> bool {
        matches!(self.root.nearest(part).value, Value::Skipped)
    }

    /// Adds a mistake at the value of a key such as `devices[0].count`; the empty path is the whole text. A
    /// part that could not be read because of a mistake gets no second one.
    pub fn mistake(&mut self, key: &str, what: impl fmt::Display) {
        if self.is_skipped(part(key)) {
            return;
        }
        let at = self.root.nearest(key).at;
        let what = match self.shown(key) {
            "" => what.to_string(),
            key => format!("`{key}`: {what}"),
        };
        self.mistake_at(at, what);
    }

    /// Adds a mistake at a byte offset of the text.
    pub fn mistake_at(&mut self, at: usize, what: String) {
        let place = self.file.map(|file| Place::at(file, self.text, at));
        self.mistakes.push(Mistake { place, what });
    }

    /// The value, or the mistakes in the order of their places.
    ///
    /// # Errors
    /// There is a mistake.
    pub fn finish<T>(mut self, value: Option<T>) -> Result<T, JsonError> {
        let position = |mistake: &Mistake| mistake.place.as_ref().and_then(|place| place.position);
        self.mistakes.sort_by_key(position);
        self.mistakes.truncate(MOST_MISTAKES);
        match value {
            Some(value) if self.mistakes.is_empty() => Ok(value),
            _ => Err(JsonError(self.mistakes)),
        }
    }

    /// The path of a key in a message. A text that is in no file has no lists whose items a user could count.
    fn shown<'k>(&self, key: &'k str) -> &'k str {
        match self.file {
            Some(_) => key,
            None => split(key).1,
        }
    }

    fn add(&mut self, error: DecodeError, others: &dyn Fn(&str) -> Vec<&'static str>) {
        let DecodeError { path, misfit } = error;
        let (parent, key) = split(&path);
        let shown = self.shown(&path);
        match misfit {
            Misfit::Unknown { known } => {
                let object = self.root.nearest(parent);
                let at = object.entry(key).map_or(object.at, |entry| entry.at);
                let others = others(parent);
                let what = unknown_key(shown, known, &others);
                let near = near(key, known, &others);
                self.meant.extend(near.map(|near| join(parent, near)));
                self.mistake_at(at, what);
            }
            Misfit::Missing if self.meant.contains(&path) => {}
            Misfit::Missing => {
                let what = format!("this key is missing: add \"{key}\": ...");
                self.mistake(&path, what);
            }
            Misfit::Type { expected, found } => {
                self.mistake(&path, format_args!("expected {expected}, found {found}"));
            }
            Misfit::Word { found, known } => {
                let help = match nearest(&found, known.iter().copied()) {
                    Some(word) => format!("did you mean \"{word}\"?"),
                    None => format!("use one of {}", known.join(", ")),
                };
                let found = found.escape_debug();
                self.mistake(&path, format_args!("\"{found}\" is unknown: {help}"));
            }
            Misfit::Other(what) => self.mistake(&path, what),
        }
    }
}

/// Reads a file's text. `file` is only for errors.
///
/// # Errors
/// All mistakes in it.
pub fn from_file<T: DeserializeOwned>(file: &Path, text: &str) -> Result<T, JsonError> {
    whole(Document::parse(file, text)?)
}

/// Reads a text that is in no file: one that is about to be written, or a part of a command line. Its mistakes have
/// no line.
///
/// # Errors
/// All mistakes in it.
pub fn from_text<T: DeserializeOwned>(text: &str) -> Result<T, JsonError> {
    whole(Document::new(None, text)?)
}

fn whole<T: DeserializeOwned>(mut document: Document<'_>) -> Result<T, JsonError> {
    let value = document.decode();
    document.finish(value)
}

/// The message for an unknown key: with the nearest known key, or else all of them.
pub fn unknown_key(path: &str, known: &[&'static str], others: &[&'static str]) -> String {
    let (_, key) = split(path);
    let help = match near(key, known, others) {
        Some(near) => format!("did you mean `{near}`?"),
        None if known.is_empty() => "remove it".to_owned(),
        None => format!("the keys here are {}", known.join(", ")),
    };
    format!("unknown key `{}`: {help}", path.escape_debug())
}

/// The key that an unknown one was meant to be. Keys that gantry supports come first.
fn near(key: &str, known: &[&'static str], others: &[&'static str]) -> Option<&'static str> {
    let near = nearest(key, known.iter().copied());
    near.or_else(|| nearest(key, others.iter().copied()))
}

/// A key path's parent and last key.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('.').unwrap_or(("", path))
}

/// The part of a text that is left out if it has a mistake: a member of the root, or an item of it.
fn part(path: &str) -> &str {
    let name = path.find(['.', '[']).unwrap_or(path.len());
    match path.get(name..).and_then(|rest| rest.find(']')) {
        Some(end) if path[name..].starts_with('[') => &path[..=name + end],
        _ => &path[..name],
    }
}

/// The most similar of some words, if any is similar.
pub(crate) fn nearest<'w>(word: &str, known: impl Iterator<Item = &'w str>) -> Option<&'w str> {
    let word = word.to_lowercase();
    let rated = known.map(|known| {
        let likeness = strsim::jaro_winkler(&word, &known.to_lowercase());
        (likeness, known)
    });
    rated
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, known)| known)
}

/// The rest of a message about an unknown name: the most similar name, or the command that lists all.
pub(crate) fn near_or_list(near: &Option<String>, list: &str) -> String {
    match near {
        Some(near) => format!(": did you mean \"{near}\"?"),
        None => format!(": `{list}` shows them"),
    }
}

/// Something wrong in a text.
#[derive(Debug, PartialEq, Eq)]
struct Mistake {
    place: Option<Place>,
    /// The key, the reason and the remedy.
    what: String,
}

/// The mistakes in a JSON text, one line each.
#[derive(Debug, PartialEq, Eq)]
pub struct JsonError(Vec<Mistake>);

impl JsonError {
    /// A mistake at a known place.
    pub(crate) fn new(place: Option<Place>, what: String) -> Self {
        Self(vec![Mistake { place, what }])
    }
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Mistake { place, what }) in self.0.iter().enumerate() {
            let end = if index == 0 { "" } else { "\n" };
            match place {
                Some(place) => write!(f, "{end}{place}: {what}")?,
                None => write!(f, "{end}{what}")?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for JsonError {}

#[cfg(test)]
mod tests;
