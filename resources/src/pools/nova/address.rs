//! Addresses as Nova's `device_spec` writes them: a pattern, or a regular expression for each part.

use regex_lite::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::words::hex;
use crate::base::bdf::HostBdf;

/// Addresses of PCI functions.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Written", into = "Written")]
#[schemars(with = "Written")]
pub struct Address {
    written: Written,
    test: Test,
}

#[derive(Clone, Debug)]
enum Test {
    /// Domain, bus, slot, function; none for any.
    Pattern([Option<u32>; 4]),
    /// The same, each found at the beginning of its part.
    Expressions(Box<[Regex; 4]>),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
enum Written {
    Pattern(String),
    Parts(Parts),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Parts {
    #[serde(default = "anything")]
    domain: String,
    #[serde(default = "anything")]
    bus: String,
    #[serde(default = "anything")]
    slot: String,
    #[serde(default = "anything")]
    function: String,
}

fn anything() -> String {
    ".*".to_owned()
}

impl Address {
    /// Whether it matches an address.
    pub(crate) fn covers(&self, bdf: HostBdf) -> bool {
        match &self.test {
            Test::Pattern(parts) => {
                let wanted = parts.iter().zip(numbers(bdf));
                wanted
                    .into_iter()
                    .all(|(part, is)| part.is_none_or(|part| part == is))
            }
            Test::Expressions(parts) => {
                let mut wanted = parts.iter().zip(texts(bdf));
                wanted.all(|(part, is)| part.is_match(&is))
            }
        }
    }

    /// Whether it is exactly this address, in full, and no pattern.
    pub(crate) fn is_exactly(&self, bdf: HostBdf) -> bool {
        match (&self.test, &self.written) {
            (Test::Pattern(parts), _) => *parts == numbers(bdf).map(Some),
            (Test::Expressions(_), Written::Parts(parts)) => {
                let Parts {
                    domain,
                    bus,
                    slot,
                    function,
                } = parts;
                texts(bdf).iter().eq([domain, bus, slot, function])
            }
            (Test::Expressions(_), Written::Pattern(_)) => false,
        }
    }
}

fn numbers(bdf: HostBdf) -> [u32; 4] {
    let [bus, slot, function] = [bdf.bus(), bdf.device(), bdf.function()].map(u32::from);
    [bdf.domain(), bus, slot, function]
}

fn texts(bdf: HostBdf) -> [String; 4] {
    [
        format!("{:04x}", bdf.domain()),
        format!("{:02x}", bdf.bus()),
        format!("{:02x}", bdf.device()),
        format!("{:x}", bdf.function()),
    ]
}

impl PartialEq for Address {
    fn eq(&self, other: &Self) -> bool {
        self.written == other.written
    }
}

impl Eq for Address {}

impl TryFrom<Written> for Address {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let test = match &written {
            Written::Pattern(text) => Test::Pattern(pattern(text)?),
            Written::Parts(parts) => {
                let regex = |text: &str| {
                    Regex::new(&format!("^(?:{text})"))
                        .map_err(|error| format!("\"{text}\" is not a regular expression: {error}"))
                };
                Test::Expressions(Box::new([
                    regex(&parts.domain)?,
                    regex(&parts.bus)?,
                    regex(&parts.slot)?,
                    regex(&parts.function)?,
                ]))
            }
        };
        Ok(Self { written, test })
    }
}

/// Reads `[[[[domain]:]bus]:][slot][.[function]]`: parts are left out on the left, and a part that is
/// empty or `*` is any.
fn pattern(text: &str) -> Result<[Option<u32>; 4], String> {
    let (before, function) = text.split_once('.').unwrap_or((text, ""));
    let mut parts: Vec<&str> = before.split(':').collect();
    if parts.len() > 3 {
        return Err(format!(
            "\"{text}\" is not a PCI address: write it like \"0000:0a:00.1\", \"*:0a:00.*\" or \":0a:00.\""
        ));
    }
    while parts.len() < 3 {
        parts.insert(0, "*");
    }
    let part = |name: &str, part: Option<&&str>, max: u32| {
        match part.map_or("", |part| part.trim()) {
        "" | "*" => Ok(None),
        part => hex(part, max).map(Some).ok_or_else(|| {
            format!(
                "\"{text}\" is not a PCI address: its {name} \"{part}\" is not a hex number up to {max:X}, nor \"*\""
            )
        }),
    }
    };
    Ok([
        part("domain", parts.first(), 0xffff)?,
        part("bus", parts.get(1), 0xff)?,
        part("slot", parts.get(2), 0x1f)?,
        part("function", Some(&function), 7)?,
    ])
}

impl From<Address> for Written {
    fn from(address: Address) -> Self {
        address.written
    }
}
