//! The settings of one virtual function of a network card: address, VLAN, rates and guards.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::text::written_as_text;

/// The link of a virtual function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// The state of the physical function's link.
    Auto,
    /// Always up: functions of one card reach each other without a cable.
    Enable,
    /// Always down.
    Disable,
}

/// A network card's address, written `52:54:00:12:34:56`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$"))]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address `index` further on; none beyond the last one with the same vendor part.
    pub(super) fn plus(self, index: u16) -> Option<Self> {
        let [a, b, c, d, e, f] = self.0;
        let next = u32::from_be_bytes([0, d, e, f]).checked_add(u32::from(index))?;
        let [0, d, e, f] = next.to_be_bytes() else {
            return None;
        };
        Some(Self([a, b, c, d, e, f]))
    }

    /// Whether a card can have it: it is a unicast address, and not zero.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        f.pad(&parts.join(":"))
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is not a MAC address: write it like 52:54:00:12:34:56");
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|part| u8::try_from(crate::base::bdf::hex(part, 2..=2)?).ok())
            .collect();
        let bytes: [u8; 6] = bytes
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(wrong)?;
        Ok(Self(bytes))
    }
}

written_as_text!(Mac);

/// The settings of one function. A setting that is none is unknown, or is not changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfState {
    /// Its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// VLAN; 0 for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Priority in the VLAN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qos: Option<u8>,
    /// Whether packets with another sender address are dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spoof_check: Option<bool>,
    /// Whether the guest is trusted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<bool>,
    /// Mbit/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_rate: Option<u32>,
    /// Mbit/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rate: Option<u32>,
    /// The link state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_state: Option<LinkState>,
}

/// One change of one function. Shown as `ip link set DEV vf N` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum VfSetting {
    /// Its address.
    Mac(Mac),
    /// VLAN and priority.
    Vlan {
        /// 0 for none.
        vlan: u16,
        /// 0 to 7.
        qos: u8,
    },
    /// Whether packets with another sender address are dropped.
    SpoofCheck(bool),
    /// Whether the guest is trusted.
    Trust(bool),
    /// Mbit/s.
    Rate {
        /// Guaranteed.
        min: u32,
        /// Greatest; 0 for any.
        max: u32,
    },
    /// The link state.
    LinkState(LinkState),
}

impl VfSetting {
    /// The key of a group's file that asks for it.
    pub fn key(&self) -> &'static str {
        match self {
            Self::Mac(_) => "mac",
            Self::Vlan { .. } => "vlan",
            Self::SpoofCheck(_) => "spoof_check",
            Self::Trust(_) => "trust",
            Self::Rate { .. } => "max_rate",
            Self::LinkState(_) => "link_state",
        }
    }
}

impl fmt::Display for VfSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |on: bool| if on { "on" } else { "off" };
        match *self {
            Self::Mac(mac) => write!(f, "mac {mac}"),
            Self::Vlan { vlan, qos } => write!(f, "vlan {vlan} qos {qos}"),
            Self::SpoofCheck(check) => write!(f, "spoofchk {}", on(check)),
            Self::Trust(trust) => write!(f, "trust {}", on(trust)),
            Self::Rate { min, max } => write!(f, "min_tx_rate {min} max_tx_rate {max}"),
            Self::LinkState(LinkState::Auto) => f.write_str("state auto"),
            Self::LinkState(LinkState::Enable) => f.write_str("state enable"),
            Self::LinkState(LinkState::Disable) => f.write_str("state disable"),
        }
    }
}

impl VfState {
    /// These settings, replaced by those that `wanted` has.
    pub(crate) fn with(&self, wanted: &Self) -> Self {
        Self {
            mac: wanted.mac.or(self.mac),
            vlan: wanted.vlan.or(self.vlan),
            qos: wanted.qos.or(self.qos),
            spoof_check: wanted.spoof_check.or(self.spoof_check),
            trust: wanted.trust.or(self.trust),
            min_rate: wanted.min_rate.or(self.min_rate),
            max_rate: wanted.max_rate.or(self.max_rate),
            link_state: wanted.link_state.or(self.link_state),
        }
    }

    /// Whether it has a value for a setting.
    pub(crate) fn asks_for(&self, setting: &VfSetting) -> bool {
        self.clone().without(setting) != *self
    }

    /// These settings without one.
    pub(crate) fn without(self, setting: &VfSetting) -> Self {
        match setting {
            VfSetting::Mac(_) => Self { mac: None, ..self },
            VfSetting::Vlan { .. } => Self {
                vlan: None,
                qos: None,
                ..self
            },
            VfSetting::SpoofCheck(_) => Self {
                spoof_check: None,
                ..self
            },
            VfSetting::Trust(_) => Self {
                trust: None,
                ..self
            },
            VfSetting::Rate { .. } => Self {
                min_rate: None,
                max_rate: None,
                ..self
            },
            VfSetting::LinkState(_) => Self {
                link_state: None,
                ..self
            },
        }
    }

    /// The changes from these settings to `wanted`. If `wanted` has only half of a pair, the other half comes
    /// from these.
    pub(crate) fn changes_to(&self, wanted: &Self) -> Vec<VfSetting> {
        let now = self.settings(self);
        let mut changes = wanted.settings(&self.with(wanted));
        changes.retain(|change| !now.contains(change));
        changes
    }

    /// The settings as changes; `all` completes pairs.
    pub fn settings(&self, all: &Self) -> Vec<VfSetting> {
        let vlan = (self.vlan.is_some() || self.qos.is_some()).then(|| VfSetting::Vlan {
            vlan: all.vlan.unwrap_or(0),
            qos: all.qos.unwrap_or(0),
        });
        let rate = (self.min_rate.is_some() || self.max_rate.is_some()).then(|| VfSetting::Rate {
            min: all.min_rate.unwrap_or(0),
            max: all.max_rate.unwrap_or(0),
        });
        [
            self.mac.map(VfSetting::Mac),
            vlan,
            self.spoof_check.map(VfSetting::SpoofCheck),
            self.trust.map(VfSetting::Trust),
            rate,
            self.link_state.map(VfSetting::LinkState),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_what_differs_with_the_other_half_of_a_pair() {
        let now = VfState {
            vlan: Some(0),
            qos: Some(0),
            min_rate: Some(0),
            max_rate: Some(100),
            spoof_check: Some(true),
            ..VfState::default()
        };
        let wanted = VfState {
            vlan: Some(7),
            min_rate: Some(5),
            spoof_check: Some(true),
            link_state: Some(LinkState::Enable),
            ..VfState::default()
        };
        let words: Vec<String> = now
            .changes_to(&wanted)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            words,
            [
                "vlan 7 qos 0",
                "min_tx_rate 5 max_tx_rate 100",
                "state enable"
            ]
        );
        assert_eq!(now.with(&wanted).changes_to(&wanted), []);
        assert_eq!(now.changes_to(&VfState::default()), []);
    }
}
