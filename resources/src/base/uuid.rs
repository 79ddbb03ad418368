//! Universally unique identifiers (RFC 9562), as the kernel writes and reads them.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::base::bdf::hex;
use crate::base::text::written_as_text;

/// An identifier, written `83b8f4f2-509f-382f-3c1e-e6bfe0fa1001`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"))]
pub struct Uuid([u8; 16]);

/// Text that is no identifier.
#[derive(Debug, Error)]
#[error("\"{0}\" is no UUID: write it like 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001, or leave it out")]
pub struct UuidError(String);

impl FromStr for Uuid {
    type Err = UuidError;

    fn from_str(text: &str) -> Result<Self, UuidError> {
        let parts: Vec<&str> = text.split('-').collect();
        let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
        let value = parts
            .iter()
            .flat_map(|part| part.as_bytes().chunks(4))
            .try_fold(0_u128, |value, digits| {
                let digits = std::str::from_utf8(digits).ok()?;
                Some(value << 16 | u128::from(hex(digits, 4..=4)?))
            });
        match value {
            Some(value) if lengths == [8, 4, 4, 4, 12] => Ok(Self(value.to_be_bytes())),
            _ => Err(UuidError(text.to_owned())),
        }
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = format!("{:032x}", u128::from_be_bytes(self.0));
        let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| digits.get(part));
        f.pad(&parts.map(Option::unwrap_or_default).join("-"))
    }
}

written_as_text!(Uuid);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_read_as_they_are_written() {
        let text = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
        assert_eq!(text.parse::<Uuid>().unwrap().to_string(), text);
        assert_eq!(
            text.to_uppercase().parse::<Uuid>().unwrap().to_string(),
            text
        );
        for wrong in [
            "",
            "83b8f4f2509f382f3c1ee6bfe0fa1001",
            "83b8f4f2-509f-382f-3c1e-e6bfe0fa100",
            "83b8f4f2-509f-382f-3c1e-e6bfe0fa100g",
            "83b8f4f2-509f-382f-3c1ee6bf-e0fa1001",
            "é3b8f4f-509f-382f-3c1e-e6bfe0fa1001",
        ] {
            assert!(wrong.parse::<Uuid>().is_err(), "{wrong}");
        }
    }
}
