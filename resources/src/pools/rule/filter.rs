//! One filter of a rule: how a field of a device is compared, and with what.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt;
use std::marker::PhantomData;

use regex_lite::Regex;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::{MapAccessDeserializer, StrDeserializer, U64Deserializer};
use serde::de::{DeserializeOwned, Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::RuleError;

/// A value that a filter compares with.
pub trait FilterValue:
    Clone + PartialEq + fmt::Debug + fmt::Display + Serialize + DeserializeOwned + JsonSchema
{
    /// Whether the field is text too, so that `begins`, `ends`, `contains` and `regex` apply.
    const TEXT: bool;
    /// Whether `less` and `more` apply.
    const ORDERED: bool;

    /// Whether a device's value is this one.
    fn is(&self, found: &Self) -> bool {
        self == found
    }

    /// How a device's value compares to this one; none where less and more mean nothing.
    fn order(&self, _found: &Self) -> Option<Ordering> {
        None
    }
}

/// Comparisons that must all hold for one field. There is at least one.
///
/// Written as a value, which the field must equal, or as an object such as
/// `{"begins": "GP1", "not": "GP106"}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter<T>(Comparisons<T>);

/// The comparisons as an object of a rule has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Comparisons<T> {
    #[serde(skip_serializing_if = "Option::is_none")]
    equal: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    less: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    more: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    begins: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ends: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    contains: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    regex: Option<Pattern>,
}

/// A regular expression, found anywhere in a text.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
struct Pattern {
    text: String,
    regex: Regex,
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl TryFrom<String> for Pattern {
    type Error = RuleError;

    fn try_from(text: String) -> Result<Self, RuleError> {
        match Regex::new(&text) {
            Ok(regex) => Ok(Self { text, regex }),
            Err(source) => Err(RuleError::Pattern {
                problem: source.to_string(),
                text,
            }),
        }
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.text
    }
}

/// One field of a device: its values, and how they read.
#[derive(Debug)]
pub(crate) struct Subject<'a, T> {
    /// Mostly one; none where the device lacks the field.
    pub(crate) values: Vec<T>,
    /// Texts as the hardware has them.
    pub(crate) texts: Vec<Cow<'a, str>>,
    /// Texts for people, in which case does not count.
    pub(crate) names: Vec<Cow<'a, str>>,
}

impl<T> Filter<T> {
    /// The filter that holds for this value.
    pub fn equal(value: T) -> Self {
        Self(Comparisons {
            equal: Some(value),
            not: None,
            less: None,
            more: None,
            begins: None,
            ends: None,
            contains: None,
            regex: None,
        })
    }
}

impl<T> Filter<T> {
    /// The value that the field must equal, if there is one.
    pub fn only(&self) -> Option<&T> {
        self.0.equal.as_ref()
    }
}

impl<T: FilterValue> Filter<T> {
    /// Whether all comparisons hold. An absent field differs from every value.
    pub(crate) fn holds(&self, subject: &Subject<'_, T>) -> bool {
        let c = &self.0;
        let is = |wanted: &T| subject.values.iter().any(|found| wanted.is(found));
        let ordered = |bound: &T, wanted: Ordering| {
            let mut found = subject.values.iter();
            found.any(|found| bound.order(found) == Some(wanted))
        };
        let text = |part: &str, test: fn(&str, &str) -> bool| {
            let folded = part.to_lowercase();
            subject.texts.iter().any(|text| test(text, part))
                || subject
                    .names
                    .iter()
                    .any(|name| test(&name.to_lowercase(), &folded))
        };
        let matched = |pattern: &Pattern| {
            let mut all = subject.texts.iter().chain(&subject.names);
            all.any(|text| pattern.regex.is_match(text))
        };
        c.equal.as_ref().is_none_or(is)
            && c.not.as_ref().is_none_or(|value| !is(value))
            && c.less
                .as_ref()
                .is_none_or(|bound| ordered(bound, Ordering::Less))
            && c.more
                .as_ref()
                .is_none_or(|bound| ordered(bound, Ordering::Greater))
            && c.begins
                .as_ref()
                .is_none_or(|part| text(part, |text, part| text.starts_with(part)))
            && c.ends
                .as_ref()
                .is_none_or(|part| text(part, |text, part| text.ends_with(part)))
            && c.contains
                .as_ref()
                .is_none_or(|part| text(part, |text, part| text.contains(part)))
            && c.regex.as_ref().is_none_or(matched)
    }

    /// The comparisons of an object, if they mean something for this field.
    fn new(c: Comparisons<T>) -> Result<Self, RuleError> {
        let parts = [
            ("begins", &c.begins),
            ("ends", &c.ends),
            ("contains", &c.contains),
        ];
        for (operator, part) in parts {
            match part {
                Some(_) if !T::TEXT => return Err(RuleError::NotText { operator }),
                Some(part) if part.is_empty() => return Err(RuleError::EmptyText),
                _ => {}
            }
        }
        if c.regex.is_some() && !T::TEXT {
            return Err(RuleError::NotText { operator: "regex" });
        }
        for (operator, bound) in [("less", &c.less), ("more", &c.more)] {
            if bound
                .as_ref()
                .is_some_and(|bound| bound.order(bound).is_none())
            {
                return Err(RuleError::NotOrdered { operator });
            }
        }
        let values = [&c.equal, &c.not, &c.less, &c.more];
        let texts = parts.iter().any(|(_, part)| part.is_some()) || c.regex.is_some();
        if !texts && values.iter().all(|value| value.is_none()) {
            return Err(RuleError::NoOperator);
        }
        Ok(Self(c))
    }
}

impl<T: FilterValue> Serialize for Filter<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0.equal {
            Some(value) if *self == Self::equal(value.clone()) => value.serialize(serializer),
            _ => self.0.serialize(serializer),
        }
    }
}

impl<'de, T: FilterValue> Deserialize<'de> for Filter<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FilterVisitor(PhantomData))
    }
}

struct FilterVisitor<T>(PhantomData<T>);

impl<'de, T: FilterValue> Visitor<'de> for FilterVisitor<T> {
    type Value = Filter<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = if T::TEXT { "a string" } else { "a number" };
        write!(f, "{value} or an object such as {{\"not\": ...}}")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Filter<T>, E> {
        if !T::TEXT {
            return Err(E::invalid_type(serde::de::Unexpected::Str(text), &self));
        }
        T::deserialize(StrDeserializer::new(text)).map(Filter::equal)
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Filter<T>, E> {
        if T::TEXT {
            return Err(E::invalid_type(
                serde::de::Unexpected::Unsigned(number),
                &self,
            ));
        }
        T::deserialize(U64Deserializer::new(number)).map(Filter::equal)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Filter<T>, A::Error> {
        let comparisons = Comparisons::deserialize(MapAccessDeserializer::new(map))?;
        Filter::new(comparisons).map_err(A::Error::custom)
    }
}

impl<T: FilterValue> JsonSchema for Filter<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("FilterBy{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let value = generator.subschema_for::<T>();
        let mut operators = vec!["equal", "not"];
        if T::ORDERED {
            operators.extend(["less", "more"]);
        }
        let of_value = operators
            .into_iter()
            .map(|name| (name.to_owned(), value.clone().to_value()));
        let text = json_schema!({"type": "string", "minLength": 1}).to_value();
        let of_text = ["begins", "ends", "contains", "regex"]
            .into_iter()
            .filter(|_| T::TEXT)
            .map(|name| (name.to_owned(), text.clone()));
        let properties: serde_json::Map<_, _> = of_value.chain(of_text).collect();
        json_schema!({
            "anyOf": [value, {
                "type": "object",
                "properties": properties,
                "additionalProperties": false,
                "minProperties": 1,
            }]
        })
    }
}
