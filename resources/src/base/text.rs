//! Texts that others wrote, made fit to be shown.

/// Characters of what others say that are kept.
const MOST: usize = 200;

/// As much of what others say as a line has room for: it is kept for people to read, at a terminal. What
/// changes how a terminal shows the rest is left out.
pub(crate) fn short(reason: &str) -> String {
    let shown = |one: &char| {
        one.is_alphanumeric() || one.is_ascii_punctuation() || matches!(one, ' ' | '\u{2019}')
    };
    reason.chars().filter(shown).take(MOST).collect()
}
