//! Errors with their causes.

use std::error::Error;
use std::iter::successors;

/// An error and its causes, from the outside in.
pub fn causes<'e>(
    error: &'e (dyn Error + 'static),
) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    successors(Some(error), |&error| error.source())
}

/// The messages of an error and its causes. An error that only passes its source on has no message of its own.
pub fn messages(error: &(dyn Error + 'static)) -> Vec<String> {
    let mut texts: Vec<String> = causes(error).map(ToString::to_string).collect();
    texts.dedup();
    texts
}

/// An error and its causes in one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    messages(error).join(": ")
}
