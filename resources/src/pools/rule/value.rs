//! The values that a device's fields are compared with, as rules write them.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use regex_lite::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RuleError;
use super::filter::FilterValue;
use crate::base::bdf::{BdfError, HostBdf, hex};
use crate::base::text::written_as_text;
use crate::facts::ids::{PciClass, PciId};

/// A vendor or device id of a rule.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^(0x)?[0-9a-fA-F]{4}$"))]
pub struct HexId(pub u16);

/// A vendor id and a device id of a rule.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^(0x)?[0-9a-fA-F]{4}:(0x)?[0-9a-fA-F]{4}$"))]
pub struct IdPair {
    /// Vendor id.
    pub vendor: HexId,
    /// Device id.
    pub device: HexId,
}

/// The first one, two or three bytes of a class code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^(0x)?([0-9a-fA-F]{2}){1,3}$"))]
pub struct ClassPrefix {
    bits: u32,
    digits: u8,
}

impl From<PciId> for IdPair {
    fn from(id: PciId) -> Self {
        Self {
            vendor: HexId(id.vendor),
            device: HexId(id.device),
        }
    }
}

impl From<PciClass> for ClassPrefix {
    fn from(class: PciClass) -> Self {
        Self {
            bits: class.code(),
            digits: 6,
        }
    }
}

impl ClassPrefix {
    /// Whether a class begins with these digits.
    pub fn covers(self, class: PciClass) -> bool {
        self.begins(&class.into())
    }

    fn begins(self, longer: &Self) -> bool {
        longer.digits >= self.digits
            && longer.bits >> (4 * u32::from(longer.digits - self.digits)) == self.bits
    }
}

/// Text, compared literally, or a pattern if it holds `*` (anything) or `?` (one character). Patterns ignore case.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("minLength" = 1))]
pub struct Word {
    text: String,
    glob: Option<Regex>,
    /// Of a device's text: case does not count.
    fold: bool,
}

impl Word {
    /// A device's text, in which case counts.
    pub(crate) fn exact(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            glob: None,
            fold: false,
        }
    }

    /// A device's text, in which case does not count.
    pub(crate) fn folded(text: &str) -> Self {
        Self {
            fold: true,
            ..Self::exact(text)
        }
    }
}

impl PartialEq for Word {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Word {}

impl FromStr for Word {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        if text.trim().is_empty() {
            return Err(RuleError::EmptyText);
        }
        let glob = text
            .contains(['*', '?'])
            .then(|| glob(text, false))
            .transpose()?;
        Ok(Self {
            glob,
            ..Self::exact(text)
        })
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A PCI address, or a pattern for addresses: `*`, `?` and `[0-3]`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("minLength" = 1))]
pub enum Slot {
    /// This address.
    Exact(HostBdf),
    /// All addresses that look like this.
    Glob(String, Regex),
}

impl Slot {
    /// Whether an address is meant.
    pub(crate) fn covers(&self, bdf: HostBdf) -> bool {
        match self {
            Self::Exact(exact) => *exact == bdf,
            Self::Glob(_, glob) => addresses(bdf).iter().any(|text| glob.is_match(text)),
        }
    }
}

/// How an address is written: in full, and in domain 0 also without the domain.
pub(crate) fn addresses(bdf: HostBdf) -> Vec<String> {
    let full = bdf.to_string();
    let short = full.strip_prefix("0000:").map(str::to_owned);
    [Some(full), short].into_iter().flatten().collect()
}

impl PartialEq for Slot {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Exact(one), Self::Exact(other)) => one == other,
            (Self::Glob(one, _), Self::Glob(other, _)) => one == other,
            _ => false,
        }
    }
}

impl Eq for Slot {}

impl FromStr for Slot {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        match text.parse() {
            Ok(bdf) => Ok(Self::Exact(bdf)),
            Err(_) if text.contains(['*', '?', '[']) => {
                Ok(Self::Glob(text.to_owned(), glob(text, true)?))
            }
            Err(BdfError(text)) => Err(RuleError::Slot(text)),
        }
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(bdf) => bdf.fmt(f),
            Self::Glob(text, _) => f.write_str(text),
        }
    }
}

/// A number, such as that of a NUMA node or an IOMMU group.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct Number(pub u32);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A shell pattern as a regular expression. Brackets count only where asked: names in pci.ids have some.
fn glob(text: &str, brackets: bool) -> Result<Regex, RuleError> {
    let mut pattern = "(?i)^".to_owned();
    let mut rest = text.chars();
    while let Some(one) = rest.next() {
        match one {
            '*' => pattern.push_str(".*"),
            '?' => pattern.push('.'),
            '[' if brackets => {
                let (set, after) = rest
                    .as_str()
                    .split_once(']')
                    .ok_or_else(|| RuleError::Slot(text.to_owned()))?;
                pattern.push('[');
                pattern.push_str(&set.replacen('!', "^", usize::from(set.starts_with('!'))));
                pattern.push(']');
                rest = after.chars();
            }
            other => pattern.push_str(&regex_lite::escape(other.encode_utf8(&mut [0; 4]))),
        }
    }
    pattern.push('$');
    Regex::new(&pattern).map_err(|source| RuleError::Pattern {
        text: text.to_owned(),
        problem: source.to_string(),
    })
}

impl FilterValue for HexId {
    const TEXT: bool = true;
    const ORDERED: bool = true;

    fn order(&self, found: &Self) -> Option<Ordering> {
        Some(found.cmp(self))
    }
}

impl FilterValue for IdPair {
    const TEXT: bool = true;
    const ORDERED: bool = true;

    fn order(&self, found: &Self) -> Option<Ordering> {
        Some(found.cmp(self))
    }
}

impl FilterValue for ClassPrefix {
    const TEXT: bool = true;
    const ORDERED: bool = false;

    fn is(&self, found: &Self) -> bool {
        self.begins(found)
    }
}

impl FilterValue for Word {
    const TEXT: bool = true;
    const ORDERED: bool = false;

    fn is(&self, found: &Self) -> bool {
        let equal = if found.fold {
            self.text.eq_ignore_ascii_case(&found.text)
        } else {
            self.text == found.text
        };
        equal
            || self
                .glob
                .as_ref()
                .is_some_and(|glob| glob.is_match(&found.text))
    }
}

impl FilterValue for Slot {
    const TEXT: bool = true;
    const ORDERED: bool = true;

    fn is(&self, found: &Self) -> bool {
        match found {
            Self::Exact(bdf) => self.covers(*bdf),
            Self::Glob(..) => false,
        }
    }

    fn order(&self, found: &Self) -> Option<Ordering> {
        match (self, found) {
            (Self::Exact(bound), Self::Exact(bdf)) => Some(bdf.cmp(bound)),
            _ => None,
        }
    }
}

impl FilterValue for Number {
    const TEXT: bool = false;
    const ORDERED: bool = true;

    fn order(&self, found: &Self) -> Option<Ordering> {
        Some(found.cmp(self))
    }
}

fn digits(text: &str) -> &str {
    text.strip_prefix("0x").unwrap_or(text)
}

impl FromStr for HexId {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let id = hex(digits(text), 4..=4).and_then(|id| u16::try_from(id).ok());
        id.map(Self).ok_or_else(|| RuleError::Id(text.to_owned()))
    }
}

impl FromStr for IdPair {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let pair = text.split_once(':').and_then(|(vendor, device)| {
            Some(Self {
                vendor: vendor.parse().ok()?,
                device: device.parse().ok()?,
            })
        });
        pair.ok_or_else(|| RuleError::IdPair(text.to_owned()))
    }
}

impl FromStr for ClassPrefix {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let digits = digits(text);
        match hex(digits, 2..=6) {
            Some(bits) if digits.len().is_multiple_of(2) => Ok(Self {
                bits,
                digits: digits.len() as u8,
            }),
            _ => Err(RuleError::Class(text.to_owned())),
        }
    }
}

impl fmt::Display for HexId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}", self.0)
    }
}

impl fmt::Display for IdPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.vendor, self.device)
    }
}

impl fmt::Display for ClassPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:0width$x}",
            self.bits,
            width = usize::from(self.digits)
        )
    }
}

written_as_text!(HexId, IdPair, ClassPrefix, Word, Slot);
