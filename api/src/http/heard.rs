//! What a socket answers, made harmless: whoever listens there may be another user. Texts hold nothing that
//! a terminal obeys or that turns the direction of writing, and no answer is larger than a limit.

use std::fmt::Write;

use http_body_util::{BodyExt, Limited};
use hyper::body::{Bytes, Incoming};
use serde::de::DeserializeOwned;
use serde_json::Value;

type Problem = Box<dyn std::error::Error + Send + Sync>;

/// The longest answer. A VM with a hundred devices answers with a hundredth of it.
const LONGEST: usize = 16 << 20;
/// The longest line of a stream of events.
pub const LONGEST_LINE: usize = 1 << 20;

/// A whole body.
pub async fn whole(body: Incoming) -> Result<Bytes, Problem> {
    Ok(Limited::new(body, LONGEST).collect().await?.to_bytes())
}

/// A value whose texts are harmless.
pub fn value<T: DeserializeOwned>(json: &[u8]) -> Result<T, Problem> {
    let mut value: Value = serde_json::from_slice(json)?;
    clean(&mut value);
    Ok(serde_json::from_value(value)?)
}

fn clean(value: &mut Value) {
    match value {
        Value::String(string) => *string = text(string),
        Value::Array(items) => items.iter_mut().for_each(clean),
        Value::Object(members) => {
            let taken = std::mem::take(members).into_iter();
            members.extend(taken.map(|(key, mut value)| {
                clean(&mut value);
                (text(&key), value)
            }));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// A text with the characters escaped that are not to reach a terminal. Lines stay lines.
pub fn text(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '\n' | '\t' => clean.push(char),
            char if char.is_control() || is_invisible(char) => {
                // Nothing fails that writes into a string.
                let _ = write!(clean, "\\u{{{:x}}}", u32::from(char));
            }
            char => clean.push(char),
        }
    }
    clean
}

/// Characters that show nothing themselves and change how others show: marks and overrides of direction,
/// joiners, separators of lines, tags.
fn is_invisible(char: char) -> bool {
    matches!(char,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_gets_through() {
        for (hostile, harmless) in [
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
            assert_eq!(text(hostile), harmless);
        }
    }

    #[test]
    fn texts_and_keys_of_values_are_clean_at_every_depth() {
        let json = br#"{"a\u001b[": ["\u202e", {"b": "c\u0007"}], "n": 1.5}"#;
        let value: Value = super::value(json).unwrap();
        let wanted = serde_json::json!({
            "a\\u{1b}[": ["\\u{202e}", {"b": "c\\u{7}"}], "n": 1.5
        });
        assert_eq!(value, wanted);
        assert!(super::value::<Value>(b"{").is_err());
    }
}
