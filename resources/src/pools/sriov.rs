//! A group's definition of the virtual functions of one physical function.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::base::uuid::Uuid;
use crate::inventory::device::HostDevice;
use crate::pools::rule::IdPair;
use crate::pools::vf_settings::{LinkState, Mac, VfState};

/// The most VFs that PCI can address (`TotalVFs` has 16 bits, function numbers end before).
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

/// The token that a group asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(
    untagged,
    expecting = "expected true for a secret token, or a UUID that others know too"
)]
pub enum VfToken {
    /// One that gantry makes and keeps to itself, or none.
    Secret(bool),
    /// This one.
    Known(Uuid),
}

/// A physical function that cannot have the virtual functions that a group asks for.
#[derive(Debug, Error)]
pub enum PfError {
    /// Other hardware than the group was made for.
    #[error("{pf} is {is} now, not {wanted}: change the group's sriov.id if that is right")]
    OtherPf {
        /// The address.
        pf: HostBdf,
        /// What is there.
        is: IdPair,
        /// What should be.
        wanted: IdPair,
    },
    /// The device has no SR-IOV.
    #[error(
        "{pf} cannot have virtual functions: it has no SR-IOV, or the firmware or kernel does not show it (sriov_totalvfs)"
    )]
    NotCapable {
        /// The device.
        pf: HostBdf,
    },
    /// It cannot have as many.
    #[error("{pf} can have {total} virtual functions at most, and the group asks for {wanted}")]
    TooMany {
        /// The device.
        pf: HostBdf,
        /// How many it can have.
        total: u16,
        /// How many are asked for.
        wanted: u16,
    },
}

impl SriovSpec {
    /// Refuses other hardware than the group names.
    pub(crate) fn check_hardware(&self, pf: &HostDevice) -> Result<(), PfError> {
        let is = IdPair::from(pf.id);
        match self.id.filter(|wanted| *wanted != is) {
            Some(wanted) => Err(PfError::OtherPf {
                pf: self.pf,
                is,
                wanted,
            }),
            None => Ok(()),
        }
    }

    /// Refuses other hardware than the group names, and a card that cannot have as many functions.
    pub(crate) fn check_capacity(&self, pf: &HostDevice) -> Result<(), PfError> {
        self.check_hardware(pf)?;
        let bdf = self.pf;
        let total = match pf.sriov {
            Some(sriov) if sriov.total > 0 => sriov.total,
            _ => return Err(PfError::NotCapable { pf: bdf }),
        };
        if self.count > total {
            return Err(PfError::TooMany {
                pf: bdf,
                total,
                wanted: self.count,
            });
        }
        Ok(())
    }

    /// The settings of the function with this index, from 0.
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

    /// Whether it has settings that only a network card has.
    pub(crate) fn is_for_network(&self) -> bool {
        self.wanted(0) != VfState::default()
    }

    /// What is wrong with it: the key, and the mistake with its remedy.
    pub(crate) fn problem(&self) -> Option<(&'static str, String)> {
        if self.count == 0 || self.count > MOST_VFS {
            let problem = format!(
                "a card cannot have {} functions: use 1 to {MOST_VFS}",
                self.count
            );
            return Some(("count", problem));
        }
        if let Some(problem) = self.mac_problem() {
            return Some(("mac", problem));
        }
        let (vlan, qos) = (self.vlan.unwrap_or(0), self.qos.unwrap_or(0));
        if vlan > 4094 {
            let problem = format!("{vlan} is no VLAN: use 1 to 4094, or 0 for none");
            return Some(("vlan", problem));
        }
        if qos > 7 {
            return Some(("qos", format!("{qos} is no priority: use 0 to 7")));
        }
        if qos > 0 && vlan == 0 {
            let problem = "a priority needs a VLAN: add vlan, or remove qos";
            return Some(("qos", problem.to_owned()));
        }
        let (min, max) = (self.min_rate.unwrap_or(0), self.max_rate.unwrap_or(0));
        if max != 0 && min > max {
            let problem = format!("{min} is above max_rate, {max}: lower it, or raise max_rate");
            return Some(("min_rate", problem));
        }
        None
    }

    fn mac_problem(&self) -> Option<String> {
        let count = self.count;
        if let Some(MacPlan::Each(all)) = &self.mac
            && all.len() != usize::from(count)
        {
            let listed = all.len();
            return Some(format!(
                "it lists {listed} addresses for {count} functions: list one for each"
            ));
        }
        let mut seen = std::collections::BTreeSet::new();
        for index in 0..count {
            let Some(mac) = self.wanted(index).mac else {
                return self.mac.is_some().then(|| {
                    format!("it leaves too few addresses, {index} of {count} fit: start lower")
                });
            };
            if !mac.is_unicast() {
                return Some(format!(
                    "{mac} is not a unicast address: use one whose first byte is even"
                ));
            }
            if !seen.insert(mac) {
                return Some(format!("{mac} is given twice: give each function its own"));
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
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }
}
