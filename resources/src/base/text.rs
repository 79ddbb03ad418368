//! Texts: those of other users made safe for a terminal, and types that JSON holds as text.

use std::fmt::Write;

/// Lets serde read a type by its `FromStr` and write it by its `Display`.
macro_rules! written_as_text {
    ($($kind:ty),*) => {$(
        impl TryFrom<String> for $kind {
            type Error = <Self as std::str::FromStr>::Err;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$kind> for String {
            fn from(value: $kind) -> Self {
                value.to_string()
            }
        }
    )*};
}
pub(crate) use written_as_text;

/// Characters of a [`short`] text.
const MOST: usize = 200;

/// A text with control characters escaped, except line breaks and tabs.
pub fn harmless(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '\n' | '\t' => clean.push(char),
            char if is_unseen(char) => {
                // Writing to a string does not fail.
                let _ = write!(clean, "\\u{{{:x}}}", u32::from(char));
            }
            char => clean.push(char),
        }
    }
    clean
}

/// The beginning of a text, without characters that change how a terminal shows the rest.
pub(crate) fn short(text: &str) -> String {
    let shown = text.chars().filter(|char| !is_unseen(*char));
    shown.take(MOST).collect()
}

/// Control characters, and characters that are invisible but change how others are shown: marks and overrides of
/// direction, joiners, line separators, tags.
fn is_unseen(char: char) -> bool {
    char.is_control()
        || matches!(char,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_gets_through() {
        for (hostile, shown) in [
            ("plain é 日本 🙂\n\tend", "plain é 日本 🙂\n\tend"),
            (
                "\u{1b}[2J\u{1b}]0;title\u{7}",
                "\\u{1b}[2J\\u{1b}]0;title\\u{7}",
            ),
            ("a\rb\u{8}c\u{7f}", "a\\u{d}b\\u{8}c\\u{7f}"),
            ("\u{9b}31m\u{85}", "\\u{9b}31m\\u{85}"),
            ("\u{202e}txt.exe\u{2066}", "\\u{202e}txt.exe\\u{2066}"),
            ("zero\u{200b}width\u{feff}", "zero\\u{200b}width\\u{feff}"),
        ] {
            assert_eq!(harmless(hostile), shown);
        }
        assert_eq!(short("a\u{1b}[2J\u{202e}b\n"), "a[2Jb");
        assert_eq!(short(&"é".repeat(MOST + 1)), "é".repeat(MOST));
    }
}
