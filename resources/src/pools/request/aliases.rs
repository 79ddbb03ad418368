//! Nova's list of aliases with counts.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::DeviceRequest;
use crate::base::text::written_as_text;

/// Nova's `pci_passthrough:alias`: aliases with counts, such as `gpu:1, qat-c62x-vf:2`. An alias without a count
/// asks for one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Aliases(pub Vec<DeviceRequest>);

impl FromStr for Aliases {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let one = |part: &str| {
            let part = part.trim();
            let (name, count) = part.split_once(':').unwrap_or((part, "1"));
            let (name, count) = (name.trim(), count.trim());
            let digits = !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit());
            match count.parse::<u32>() {
                _ if name.is_empty() || !digits => Err(format!(
                    "\"{part}\" is not an alias with a count: write \"gpu:1\", several with commas between"
                )),
                Ok(count) if count > 0 => Ok(DeviceRequest::alias(name, count)),
                _ => Err(format!(
                    "\"{part}\" asks for no devices: ask for 1 or more, or leave it out"
                )),
            }
        };
        text.split(',').map(one).collect::<Result<_, _>>().map(Self)
    }
}

written_as_text!(Aliases);

impl fmt::Display for Aliases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, request) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            let name = request.from.pool().unwrap_or_default();
            write!(f, "{comma}{name}:{}", request.count)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_are_read_verbatim() {
        let aliases = |text: &str| text.parse().map(|Aliases(requests)| requests);
        assert_eq!(
            aliases("gpu:1, qat-c62x-vf:2"),
            Ok(vec![
                DeviceRequest::alias("gpu", 1),
                DeviceRequest::alias("qat-c62x-vf", 2)
            ])
        );
        assert_eq!(
            aliases("qat-dh895xcc-vf:2"),
            Ok(vec![DeviceRequest::alias("qat-dh895xcc-vf", 2)])
        );
        assert_eq!(aliases("p2000"), Ok(vec![DeviceRequest::alias("p2000", 1)]));
        for (text, said) in [
            ("", "is not an alias"),
            (",", "is not an alias"),
            ("gpu:", "is not an alias"),
            ("gpu:x", "is not an alias"),
            (":1", "is not an alias"),
            ("gpu:1:2", "is not an alias"),
            ("gpu:+1", "is not an alias"),
            ("gpu:0", "asks for no devices"),
            ("gpu:99999999999", "asks for no devices"),
        ] {
            let error = aliases(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
        let text = Aliases(aliases("gpu, x:2").unwrap()).to_string();
        assert_eq!(text, "gpu:1, x:2");
    }
}
