//! The sentences in which a file's faults are told.

use super::decode::{DecodeError, Misfit};
use super::error::Fault;
use super::inert;

/// Likeness, from 0 to 1, from which a known word is offered for an unknown one.
const ALIKE: f64 = 0.8;

/// A misfit as a fault; `at` falls back to the start of the text.
pub fn misfit(error: DecodeError) -> Fault {
    let DecodeError { path, at, misfit } = error;
    let at = at.unwrap_or(0);
    match misfit {
        Misfit::Unknown { known } => unknown_key(at, &path, known),
        Misfit::Missing => {
            let (_, key) = split(&path);
            Fault::new(at, format!("key `{path}` is missing")).help(format!("add \"{key}\": ..."))
        }
        Misfit::Type { expected, found } => wrong_type(at, &path, &expected, &found),
        Misfit::Word { found, known } => {
            let fault = Fault::new(at, format!("`{path}` cannot be \"{found}\""));
            fault.help(match nearest(&found, known.iter().copied()) {
                Some(word) => format!("did you mean \"{word}\"?"),
                None => format!("it is one of: {}", known.join(", ")),
            })
        }
        Misfit::Other(what) => Fault::new(at, format!("`{path}`: {what}")),
    }
}

/// A key that nobody knows, with the nearest one that somebody does.
pub fn unknown_key(at: usize, path: &str, known: &[&'static str]) -> Fault {
    let (parent, key) = split(path);
    let fault = Fault::new(at, format!("unknown key `{path}`"));
    // A key that gantry acts on is the likelier meaning.
    let near = nearest(key, known.iter().copied());
    match near.or_else(|| nearest(key, inert::keys_of(parent))) {
        Some(near) => fault.help(format!("did you mean `{near}`?")),
        None if known.is_empty() => fault.help("remove it"),
        None => fault.help(format!("the keys here are: {}", known.join(", "))),
    }
}

/// A value of another kind than the one needed.
pub fn wrong_type(at: usize, path: &str, expected: &str, found: &str) -> Fault {
    let what = match path {
        "" => format!("expected {expected}, found {found}"),
        path => format!("`{path}`: expected {expected}, found {found}"),
    };
    Fault::new(at, what)
}

/// A key path's parent and last key.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('.').unwrap_or(("", path))
}

fn nearest(word: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let word = word.to_lowercase();
    let likeness = |known: &str| strsim::jaro_winkler(&word, &known.to_lowercase());
    known
        .map(|known| (likeness(known), known))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}
