//! Deserialises a [`Node`] tree, with errors that know key and place instead of a text to be parsed.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, Expected, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, Visitor,
};

use super::document::{Entry, Node, Value};

/// Reads a `T` out of a tree.
pub fn decode<'de, T: serde::Deserialize<'de>>(node: &'de Node) -> Result<T, DecodeError> {
    T::deserialize(Decoder(node))
}

/// What does not fit, where.
#[derive(Debug)]
pub struct DecodeError {
    /// Key path from the root, such as `devices[0].count`; empty for the root itself.
    pub path: String,
    /// Byte offset of the key or value; none until it has passed a value of the tree.
    pub at: Option<usize>,
    /// What is wrong with it.
    pub misfit: Misfit,
}

/// The ways in which a tree does not fit a type.
#[derive(Debug)]
pub enum Misfit {
    /// There is no key of that name.
    Unknown {
        /// The keys there are.
        known: &'static [&'static str],
    },
    /// A key that is needed is not there.
    Missing,
    /// Another kind of value was expected.
    Type {
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// One of a few words was expected.
    Word {
        /// What was found.
        found: String,
        /// The words.
        known: &'static [&'static str],
    },
    /// Anything else.
    Other(String),
}

impl DecodeError {
    fn new(path: &str, misfit: Misfit) -> Self {
        Self {
            path: path.to_owned(),
            at: None,
            misfit,
        }
    }

    /// Fills in the place, unless a deeper one is known already.
    fn or_at(self, at: usize) -> Self {
        Self {
            at: self.at.or(Some(at)),
            ..self
        }
    }

    /// Puts a key, or an index such as `[0]`, in front of the path.
    fn within(self, parent: &str) -> Self {
        Self {
            path: join(parent, &self.path),
            ..self
        }
    }
}

/// Joins two key paths: `devices` and `[0].count` to `devices[0].count`.
pub fn join(parent: &str, child: &str) -> String {
    let dot = if parent.is_empty() || child.is_empty() || child.starts_with('[') {
        ""
    } else {
        "."
    };
    format!("{parent}{dot}{child}")
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {:?}", self.path, self.misfit)
    }
}

impl std::error::Error for DecodeError {}

impl serde::de::Error for DecodeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new("", Misfit::Other(message.to_string()))
    }

    fn invalid_type(found: Unexpected, expected: &dyn Expected) -> Self {
        let (expected, found) = (plain(&expected.to_string()), describe(found));
        Self::new("", Misfit::Type { expected, found })
    }

    fn invalid_value(found: Unexpected, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn unknown_variant(found: &str, known: &'static [&'static str]) -> Self {
        Self::new(
            "",
            Misfit::Word {
                found: found.to_owned(),
                known,
            },
        )
    }

    fn unknown_field(key: &str, known: &'static [&'static str]) -> Self {
        Self::new(key, Misfit::Unknown { known })
    }

    fn missing_field(key: &'static str) -> Self {
        Self::new(key, Misfit::Missing)
    }
}

/// serde's words for what it expects, in a user's words.
fn plain(expected: &str) -> String {
    match expected {
        "u64" => "a whole number, 0 or more",
        "path string" => "a string",
        "a sequence" => "a list",
        "a boolean" => "true or false",
        other => other,
    }
    .to_owned()
}

fn describe(found: Unexpected) -> String {
    match found {
        Unexpected::Bool(value) => value.to_string(),
        Unexpected::Unsigned(value) => format!("the number {value}"),
        Unexpected::Signed(value) => format!("the number {value}"),
        Unexpected::Float(value) => format!("the number {value}"),
        Unexpected::Str(value) => format!("the string {}", Value::Text(value.to_owned())),
        Unexpected::Unit | Unexpected::Option => "null".to_owned(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "an object".to_owned(),
        other => other.to_string(),
    }
}

#[derive(Clone, Copy)]
struct Decoder<'de>(&'de Node);

impl<'de> Deserializer<'de> for Decoder<'de> {
    type Error = DecodeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match &self.0.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(value), _, _) => visitor.visit_u64(value),
                (_, Some(value), _) => visitor.visit_i64(value),
                (_, _, Some(value)) => visitor.visit_f64(value),
                _ => Err(DecodeError::custom(format!(
                    "{number} is not a number gantry can hold"
                ))),
            },
            Value::Text(text) => visitor.visit_borrowed_str(text),
            Value::List(items) => visitor.visit_seq(Items { items, next: 0 }),
            Value::Map(entries) => visitor.visit_map(Members {
                rest: entries,
                value: None,
            }),
        }
        .map_err(|error| error.or_at(self.0.at))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self.0.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    /// A list is no object, though serde would take its items for the fields in their order.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        match self.0.value {
            Value::List(_) => {
                Err(DecodeError::invalid_type(Unexpected::Seq, &visitor).or_at(self.0.at))
            }
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        match &self.0.value {
            Value::Text(word) => {
                let word: StrDeserializer<'_, DecodeError> = word.as_str().into_deserializer();
                visitor.visit_enum(word)
            }
            other => Err(DecodeError::new(
                "",
                Misfit::Type {
                    expected: "a string".to_owned(),
                    found: other.to_string(),
                },
            )),
        }
        .map_err(|error| error.or_at(self.0.at))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct newtype_struct seq tuple tuple_struct map identifier ignored_any
    }
}

struct Items<'de> {
    items: &'de [Node],
    next: usize,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = DecodeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, DecodeError> {
        let Some(item) = self.items.get(self.next) else {
            return Ok(None);
        };
        let index = self.next;
        self.next += 1;
        let value = seed.deserialize(Decoder(item));
        value
            .map(Some)
            .map_err(|error| error.within(&format!("[{index}]")))
    }
}

struct Members<'de> {
    rest: &'de [Entry],
    value: Option<&'de Entry>,
}

impl<'de> MapAccess<'de> for Members<'de> {
    type Error = DecodeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, DecodeError> {
        let Some((entry, rest)) = self.rest.split_first() else {
            return Ok(None);
        };
        (self.rest, self.value) = (rest, Some(entry));
        let key = seed.deserialize(entry.key.as_str().into_deserializer());
        key.map(Some)
            .map_err(|error: DecodeError| error.or_at(entry.at))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, DecodeError> {
        let Some(entry) = self.value.take() else {
            return Err(DecodeError::custom("a value was asked for before its key"));
        };
        let value = seed.deserialize(Decoder(&entry.node));
        value.map_err(|error| error.within(&entry.key))
    }
}
