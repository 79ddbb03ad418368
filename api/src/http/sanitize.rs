//! Sanitizes the answers of a socket, since another user may listen there: no text has control characters or
//! changes the direction of writing, and no answer is larger than a limit.

use gantry_resources::base::harmless;
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
pub async fn read_body(body: Incoming) -> Result<Bytes, Problem> {
    Ok(Limited::new(body, LONGEST).collect().await?.to_bytes())
}

/// A value whose texts are harmless.
pub fn json<T: DeserializeOwned>(json: &[u8]) -> Result<T, Problem> {
    let mut value: Value = serde_json::from_slice(json)?;
    clean(&mut value);
    Ok(serde_json::from_value(value)?)
}

fn clean(value: &mut Value) {
    match value {
        Value::String(string) => *string = harmless(string),
        Value::Array(items) => items.iter_mut().for_each(clean),
        Value::Object(members) => {
            let taken = std::mem::take(members).into_iter();
            members.extend(taken.map(|(key, mut value)| {
                clean(&mut value);
                (harmless(&key), value)
            }));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_keys_of_values_are_clean_at_every_depth() {
        let json = br#"{"a\u001b[": ["\u202e", {"b": "c\u0007"}], "n": 1.5}"#;
        let value: Value = super::json(json).unwrap();
        let wanted = serde_json::json!({
            "a\\u{1b}[": ["\\u{202e}", {"b": "c\\u{7}"}], "n": 1.5
        });
        assert_eq!(value, wanted);
        assert!(super::json::<Value>(b"{").is_err());
    }
}
