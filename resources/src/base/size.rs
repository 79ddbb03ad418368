//! Numbers of bytes in the form that people write.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes, written as a number or with a binary unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u32); 4] = [("K", 10), ("M", 20), ("G", 30), ("T", 40)];

impl ByteSize {
    /// Reads `4096`, `512M` or `512MiB`; units are powers of 1024.
    pub fn parse(text: &str) -> Option<Self> {
        text.parse()
            .map(Self)
            .ok()
            .or_else(|| Self::with_unit(text))
    }

    fn with_unit(text: &str) -> Option<Self> {
        let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
        let number: u64 = number.parse().ok()?;
        let unit = unit.trim_start();
        let unit = unit.strip_suffix("iB").unwrap_or(unit);
        let (_, shift) = UNITS.iter().find(|(name, _)| *name == unit)?;
        number.checked_mul(1 << shift).map(Self)
    }

    /// The size that a wrong text probably means: `2G` for `2GB` or `2g`.
    fn meant(text: &str) -> Option<String> {
        let text = text.to_uppercase();
        let text = text.strip_suffix('B').unwrap_or(&text);
        let text = text.strip_suffix('I').unwrap_or(text);
        Self::with_unit(text).map(|_| text.replace(' ', ""))
    }
}

/// The size in the largest unit that gives a whole number.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let fits = |shift: &u32| self.0 != 0 && self.0.is_multiple_of(1 << shift);
        match UNITS.iter().rev().find(|(_, shift)| fits(shift)) {
            Some((unit, shift)) => write!(f, "{} {unit}iB", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text).ok_or_else(|| match Self::meant(text) {
            Some(meant) => format!("did you mean {meant}?"),
            None => "write a size such as 512M or 4GiB".to_owned(),
        })
    }
}

/// A text with a unit, or the number of bytes if no unit divides it.
impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.to_string() {
            text if Self::with_unit(&text).is_some() => serializer.serialize_str(&text),
            _ => serializer.serialize_u64(self.0),
        }
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Size;
        impl Visitor<'_> for Size {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number of bytes or a string such as \"512M\" or \"4GiB\"")
            }

            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteSize, E> {
                ByteSize::parse(text).ok_or_else(|| match ByteSize::meant(text) {
                    Some(meant) => E::custom(format_args!(
                        "\"{text}\" is no size: did you mean \"{meant}\"?"
                    )),
                    None => E::invalid_value(serde::de::Unexpected::Str(text), &self),
                })
            }
        }
        deserializer.deserialize_any(Size)
    }
}

impl JsonSchema for ByteSize {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ByteSize".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": "^[0-9]+( ?[KMGT](iB)?)?$"},
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_binary_units() {
        for (text, bytes) in [
            ("512M", Some(512 << 20)),
            ("512MiB", Some(512 << 20)),
            ("512 MiB", Some(512 << 20)),
            ("4G", Some(4 << 30)),
            ("1T", Some(1 << 40)),
            ("64K", Some(64 << 10)),
            ("4096", Some(4096)),
            ("", None),
            ("M", None),
            ("4 GB", None),
            ("-4G", None),
            ("4.5G", None),
            ("99999999T", None),
        ] {
            assert_eq!(ByteSize::parse(text), bytes.map(ByteSize), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_whole_unit() {
        for (bytes, shown) in [(0, "0 bytes"), (3, "3 bytes"), (512 << 20, "512 MiB")] {
            assert_eq!(ByteSize(bytes).to_string(), shown);
            let json = serde_json::to_string(&ByteSize(bytes)).unwrap();
            assert_eq!(
                serde_json::from_str::<ByteSize>(&json).unwrap(),
                ByteSize(bytes)
            );
        }
    }
}
