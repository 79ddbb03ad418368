//! Addresses as Nova's `device_spec` writes them: a pattern, or a regular expression for each part.

use regex_lite::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::host::HostBdf;
use crate::rule::Slot;

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
    Slot(Slot),
    /// Domain, bus, slot, function.
    Parts(Box<[Regex; 4]>),
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
    /// Whether an address is meant.
    pub(crate) fn covers(&self, bdf: HostBdf) -> bool {
        match &self.test {
            Test::Slot(slot) => slot.covers(bdf),
            Test::Parts(parts) => {
                let numbers = [
                    format!("{:04x}", bdf.domain()),
                    format!("{:02x}", bdf.bus()),
                    format!("{:02x}", bdf.device()),
                    format!("{:x}", bdf.function()),
                ];
                parts
                    .iter()
                    .zip(&numbers)
                    .all(|(part, number)| part.is_match(number))
            }
        }
    }
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
            Written::Pattern(text) => Test::Slot(short(text).parse().map_err(|_| {
                format!(
                    "\"{text}\" is no PCI address: write it like \"0000:0a:00.1\" or \"*:0a:00.*\""
                )
            })?),
            Written::Parts(parts) => {
                let regex = |text: &str| {
                    Regex::new(&format!("(?i)^(?:{text})"))
                        .map_err(|error| format!("\"{text}\" is no regular expression: {error}"))
                };
                Test::Parts(Box::new([
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

/// Nova leaves parts out on the right: "*:0a" is "*:0a:*".
fn short(text: &str) -> String {
    let parts = text
        .bytes()
        .all(|byte| byte.is_ascii_hexdigit() || b"*:".contains(&byte));
    match parts && text.contains(':') && !text.ends_with('*') {
        true => format!("{text}*"),
        false => text.to_owned(),
    }
}

impl From<Address> for Written {
    fn from(address: Address) -> Self {
        address.written
    }
}
