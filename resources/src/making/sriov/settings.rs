//! What a group wants of virtual functions, and what one of them has: addresses, VLAN, rates and guards.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::token::VfToken;
use crate::base::bdf::HostBdf;
use crate::pools::rule::IdPair;

/// Most VFs that PCI has room for (`TotalVFs` has 16 bits, function numbers end before).
const MOST_VFS: u16 = 4096;

/// The virtual functions of one physical function, as a group's file asks for them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SriovSpec {
    /// Address of the physical function.
    pub pf: HostBdf,
    /// What must be at that address: "8086:10c9". Anything else there is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<IdPair>,
    /// How many virtual functions there shall be.
    #[schemars(range(min = 1))]
    pub count: u16,
    /// Of network cards: the address of the first function, from which the others count up, or a list
    /// with one address for each. Left to the card if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacPlan>,
    /// VLAN of all traffic, 1 to 4094; 0 for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 4094))]
    pub vlan: Option<u16>,
    /// 802.1p priority in the VLAN, 0 to 7.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 7))]
    pub qos: Option<u8>,
    /// Whether the card drops what a guest sends with another address than its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spoof_check: Option<bool>,
    /// Whether a guest may change its address and listen to all traffic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<bool>,
    /// Guaranteed sending rate in Mbit/s; 0 for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_rate: Option<u32>,
    /// Greatest sending rate in Mbit/s; 0 for any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rate: Option<u32>,
    /// The link that a guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_state: Option<LinkState>,
    /// Lets VMs have the physical function and its virtual ones apart, all with vfio-pci: true for a
    /// token that gantry makes, or one that other programs know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf_token: Option<VfToken>,
}

/// The link of a virtual function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// As that of the physical function.
    Auto,
    /// Always up: functions of one card reach each other without a cable.
    Enable,
    /// Always down.
    Disable,
}

/// Addresses of all functions of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(
    untagged,
    expecting = "expected a MAC address like 52:54:00:12:34:56, or a list of them"
)]
pub enum MacPlan {
    /// The first one's; each following one has the next.
    Base(Mac),
    /// One for each.
    Each(Vec<Mac>),
}

/// A network card's address, written `52:54:00:12:34:56`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$"))]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address `index` further on; none beyond the last one with the same maker's half.
    fn plus(self, index: u16) -> Option<Self> {
        let [a, b, c, d, e, f] = self.0;
        let next = u32::from_be_bytes([0, d, e, f]).checked_add(u32::from(index))?;
        let [0, d, e, f] = next.to_be_bytes() else {
            return None;
        };
        Some(Self([a, b, c, d, e, f]))
    }

    /// A card may have it: it names one station, and not none.
    fn names_a_station(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        f.pad(&parts.join(":"))
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
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

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// What one function has, or is to have; what is none is not known, or is left as it is.
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
    /// Whether foreign sender addresses are dropped.
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
    /// The link that it sees.
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
    /// Whether foreign sender addresses are dropped.
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
    /// The link that it sees.
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
    /// This, with what `wanted` says in its place.
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

    /// Whether it says something of what a setting is about.
    pub(super) fn asks_for(&self, setting: &VfSetting) -> bool {
        self.clone().without(setting) != *self
    }

    /// This without what a setting is about.
    pub(super) fn without(self, setting: &VfSetting) -> Self {
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

    /// The changes that make `wanted` of this.
    pub(crate) fn changes_to(&self, wanted: &Self) -> Vec<VfSetting> {
        let same = Self::default();
        let differs = Self {
            mac: wanted.mac.filter(|_| wanted.mac != self.mac),
            vlan: wanted.vlan.filter(|_| wanted.vlan != self.vlan),
            qos: wanted.qos.filter(|_| wanted.qos != self.qos),
            spoof_check: wanted
                .spoof_check
                .filter(|_| wanted.spoof_check != self.spoof_check),
            trust: wanted.trust.filter(|_| wanted.trust != self.trust),
            min_rate: wanted.min_rate.filter(|_| wanted.min_rate != self.min_rate),
            max_rate: wanted.max_rate.filter(|_| wanted.max_rate != self.max_rate),
            link_state: wanted
                .link_state
                .filter(|_| wanted.link_state != self.link_state),
        };
        if differs == same {
            return Vec::new();
        }
        // What goes in pairs takes the half that is not asked for from what there is.
        let all = self.with(wanted);
        differs.settings(&all)
    }

    /// Everything that is asked for, as changes; `all` fills pairs up.
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

impl SriovSpec {
    /// What the function of this number, from 0, is to have.
    pub fn wanted(&self, index: u16) -> VfState {
        let mac = match &self.mac {
            None => None,
            Some(MacPlan::Base(first)) => first.plus(index),
            Some(MacPlan::Each(all)) => all.get(usize::from(index)).copied(),
        };
        VfState {
            mac,
            vlan: self.vlan,
            qos: self.qos,
            spoof_check: self.spoof_check,
            trust: self.trust,
            min_rate: self.min_rate,
            max_rate: self.max_rate,
            link_state: self.link_state,
        }
    }

    /// Whether it asks for what only a network card has.
    pub fn is_for_network(&self) -> bool {
        self.wanted(0) != VfState::default()
    }

    /// What is wrong with it: the key, and words.
    pub(crate) fn problem(&self) -> Option<(&'static str, String)> {
        if self.count == 0 || self.count > MOST_VFS {
            return Some(("count", format!("is 1 to {MOST_VFS}")));
        }
        if let Some(problem) = self.mac_problem() {
            return Some(("mac", problem));
        }
        if self.vlan.is_some_and(|vlan| vlan > 4094) {
            return Some(("vlan", "is 1 to 4094, or 0 for none".to_owned()));
        }
        if self.qos.is_some_and(|qos| qos > 7) {
            return Some(("qos", "is 0 to 7".to_owned()));
        }
        if self.qos.is_some_and(|qos| qos > 0) && self.vlan.unwrap_or(0) == 0 {
            return Some(("qos", "is a priority in a VLAN: give a vlan too".to_owned()));
        }
        let (min, max) = (self.min_rate.unwrap_or(0), self.max_rate.unwrap_or(0));
        if max != 0 && min > max {
            return Some(("min_rate", format!("is above max_rate, {max}")));
        }
        None
    }

    fn mac_problem(&self) -> Option<String> {
        let count = self.count;
        if let Some(MacPlan::Each(all)) = &self.mac
            && all.len() != usize::from(count)
        {
            return Some(format!(
                "lists {} addresses for {count} functions",
                all.len()
            ));
        }
        let mut seen = std::collections::BTreeSet::new();
        for index in 0..count {
            let Some(mac) = self.wanted(index).mac else {
                return (self.mac.is_some())
                    .then(|| format!("leaves too few addresses: {index} of {count} fit"));
            };
            if !mac.names_a_station() {
                return Some(format!("{mac} is not a unicast address"));
            }
            if !seen.insert(mac) {
                return Some(format!("{mac} is given twice"));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(more: serde_json::Value) -> SriovSpec {
        let mut all = json!({"pf": "03:00.0", "count": 3});
        for (key, value) in more.as_object().unwrap() {
            all[key] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn addresses_count_up_or_are_listed() {
        let base = spec(json!({"mac": "52:54:00:00:00:fe"}));
        assert_eq!(base.wanted(2).mac.unwrap().to_string(), "52:54:00:00:01:00");
        let each =
            spec(json!({"mac": ["02:00:00:00:00:01", "02:00:00:00:00:07", "02:00:00:00:00:05"]}));
        assert_eq!(each.wanted(1).mac.unwrap().to_string(), "02:00:00:00:00:07");
        assert_eq!(spec(json!({})).wanted(0), VfState::default());
        assert!(!spec(json!({})).is_for_network() && base.is_for_network());
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (more, key, words) in [
            (json!({"count": 0}), "count", "1 to"),
            (json!({"mac": "03:00:00:00:00:00"}), "mac", "unicast"),
            (json!({"mac": "00:00:00:00:00:00"}), "mac", "unicast"),
            (json!({"mac": "52:54:00:ff:ff:fe"}), "mac", "2 of 3 fit"),
            (
                json!({"mac": ["02:00:00:00:00:01"]}),
                "mac",
                "1 addresses for 3",
            ),
            (
                json!({"count": 2, "mac": ["02:00:00:00:00:01", "02:00:00:00:00:01"]}),
                "mac",
                "twice",
            ),
            (json!({"vlan": 4095}), "vlan", "4094"),
            (json!({"vlan": 1, "qos": 8}), "qos", "0 to 7"),
            (json!({"qos": 1}), "qos", "vlan"),
            (
                json!({"min_rate": 9, "max_rate": 8}),
                "min_rate",
                "max_rate",
            ),
        ] {
            let (found, problem) = spec(more.clone()).problem().unwrap();
            assert!(found == key && problem.contains(words), "{more}: {problem}");
        }
        let good =
            json!({"mac": "02:00:00:00:00:01", "vlan": 5, "qos": 7, "min_rate": 9, "max_rate": 0});
        assert_eq!(spec(good).problem(), None);
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:0g",
            "2:0:0:0:0:1",
            "02:00:00:00:00:01:02",
        ] {
            assert!(Mac::try_from(text.to_owned()).is_err(), "{text}");
        }
    }

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
