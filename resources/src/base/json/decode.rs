//! Deserialises a [`Node`] tree, with errors that know the key path.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, Expected, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, Visitor,
};

use super::tree::{Entry, Node, Value};

/// Reads a `T` out of a tree.
pub(super) fn decode<'de, T: serde::Deserialize<'de>>(node: &'de Node) -> Result<T, DecodeError> {
    T::deserialize(Decoder(node))
}

/// A value that does not fit its type, with its key path.
#[derive(Debug)]
pub(super) struct DecodeError {
    /// Key path from the root, such as `devices[0].count`; empty for the root itself.
    pub(super) path: String,
    /// The mistake.
    pub(super) misfit: Misfit,
}

/// The ways in which a value does not fit a type.
#[derive(Debug)]
pub(super) enum Misfit {
    /// There is no key of that name.
    Unknown {
        /// The known keys.
        known: &'static [&'static str],
    },
    /// A required key is missing.
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
            misfit,
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
    /// A message that begins with a key, as in "`count`: 0 is too few", is about that key of the value.
    fn custom<T: fmt::Display>(message: T) -> Self {
        let message = message.to_string();
        let own = message
            .strip_prefix('`')
            .and_then(|rest| rest.split_once("`: "));
        match own {
            Some((key, what)) => Self::new(key, Misfit::Other(what.to_owned())),
            None => Self::new("", Misfit::Other(message)),
        }
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

/// The expectation of serde, in a user's words.
fn plain(expected: &str) -> String {
    let most = match expected {
        "u8" => u8::MAX.into(),
        "u16" => u16::MAX.into(),
        "u32" => u32::MAX,
        "u64" | "usize" => return "a whole number, 0 or more".to_owned(),
        "path string" => return "a string".to_owned(),
        "a sequence" => return "a list".to_owned(),
        "a boolean" => return "true or false".to_owned(),
        other => return other.to_owned(),
    };
    format!("a whole number, 0 to {most}")
}

impl Value {
    /// The value found, in a user's words.
    pub fn describe(&self) -> String {
        describe(self.unexpected())
    }

    fn unexpected(&self) -> Unexpected<'_> {
        match self {
            Self::Null => Unexpected::Unit,
            Self::Bool(value) => Unexpected::Bool(*value),
            Self::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(value), _) => Unexpected::Unsigned(value),
                (_, Some(value)) => Unexpected::Signed(value),
                _ => Unexpected::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Self::Text(text) => Unexpected::Str(text),
            Self::List(_) => Unexpected::Seq,
            Self::Map(_) | Self::Skipped => Unexpected::Map,
        }
    }
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
            Value::Skipped => Err(DecodeError::custom("it is not read")),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self.0.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    /// Accepts an object only: serde would also take a list, with its items for the fields in their order.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        struct Object;
        impl Expected for Object {
            fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }
        }
        match &self.0.value {
            Value::Map(_) => self.deserialize_any(visitor),
            value => Err(DecodeError::invalid_type(value.unexpected(), &Object)),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        visitor.visit_newtype_struct(self)
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
            other => Err(DecodeError::invalid_type(other.unexpected(), &"a string")),
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map identifier ignored_any
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
        let rest = self.items.iter().enumerate().skip(self.next);
        let mut unread = rest.filter(|(_, item)| !matches!(item.value, Value::Skipped));
        let Some((index, item)) = unread.next() else {
            return Ok(None);
        };
        self.next = index + 1;
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
        while let Some((entry, rest)) = self.rest.split_first() {
            self.rest = rest;
            if !matches!(entry.node.value, Value::Skipped) {
                self.value = Some(entry);
                return seed
                    .deserialize(entry.key.as_str().into_deserializer())
                    .map(Some);
            }
        }
        Ok(None)
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
