//! Virtual functions of network interfaces through rtnetlink(7).

use std::collections::BTreeMap;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    LinkAttribute, LinkExtentMask, LinkMessage, LinkVfInfo, VfInfo, VfInfoLinkState, VfInfoMac,
    VfInfoRate, VfInfoSpoofCheck, VfInfoTrust, VfInfoVlan, VfLinkState,
};

use super::links::{Interface, LinkError, LinkWrite, VfLinks, when_ready};
use crate::base::host::HostPaths;
use crate::base::rtnetlink::ask;
use crate::pools::vf_settings::{LinkState, Mac, VfSetting, VfState};

/// The running host's interfaces.
#[derive(Debug)]
pub struct Netlink<'a> {
    paths: &'a HostPaths,
}

impl<'a> Netlink<'a> {
    /// The interfaces that go with these paths: the running host's, or none.
    pub fn new(paths: &'a HostPaths) -> Self {
        Self { paths }
    }

    fn on_this_host(&self) -> Result<(), LinkError> {
        // A host made of files would have this one's cards changed.
        if self.paths.sysfs == HostPaths::default().sysfs {
            return Ok(());
        }
        Err(LinkError::Elsewhere {
            sysfs: self.paths.sysfs.clone(),
        })
    }
}

impl VfLinks for Netlink<'_> {
    fn read(&self, interface: &Interface) -> Result<BTreeMap<u16, VfState>, LinkError> {
        self.on_this_host()?;
        let answer = when_ready(|| {
            let mut message = message_of(interface);
            let parts = vec![LinkExtentMask::Vf, LinkExtentMask::SkipStats];
            message.attributes.push(LinkAttribute::ExtMask(parts));
            let answer = ask(RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST);
            answer.map_err(|source| LinkError::Ask {
                interface: interface.name.clone(),
                source,
            })
        })?;
        let mut found = BTreeMap::new();
        let attributes = answer.into_iter().flat_map(|link| link.attributes);
        for attribute in attributes {
            if let LinkAttribute::VfInfoList(functions) = attribute {
                found.extend(functions.iter().filter_map(state));
            }
        }
        Ok(found)
    }

    fn set(&self, write: &LinkWrite) -> Result<(), LinkError> {
        self.on_this_host()?;
        let mut message = message_of(&write.interface);
        let info = LinkVfInfo(vec![attribute(write.vf, write.setting)]);
        message
            .attributes
            .push(LinkAttribute::VfInfoList(vec![info]));
        ask(
            RouteNetlinkMessage::SetLink(message),
            NLM_F_REQUEST | NLM_F_ACK,
        )
        .map(drop)
        .map_err(|source| LinkError::Refused {
            write: write.clone(),
            source,
        })
    }
}

fn message_of(interface: &Interface) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = interface.index;
    message
}

fn attribute(vf: u16, setting: VfSetting) -> VfInfo {
    let vf = u32::from(vf);
    match setting {
        VfSetting::Mac(Mac(bytes)) => VfInfo::Mac(VfInfoMac::new(vf, &bytes)),
        VfSetting::Vlan { vlan, qos } => VfInfo::Vlan(VfInfoVlan::new(vf, vlan.into(), qos.into())),
        VfSetting::SpoofCheck(on) => VfInfo::SpoofCheck(VfInfoSpoofCheck::new(vf, on)),
        VfSetting::Trust(on) => VfInfo::Trust(VfInfoTrust::new(vf, on)),
        VfSetting::Rate { min, max } => VfInfo::Rate(VfInfoRate::new(vf, min, max)),
        VfSetting::LinkState(state) => {
            let state = match state {
                LinkState::Auto => VfLinkState::Auto,
                LinkState::Enable => VfLinkState::Enable,
                LinkState::Disable => VfLinkState::Disable,
            };
            VfInfo::LinkState(VfInfoLinkState::new(vf, state))
        }
    }
}

/// What the kernel says of one function: each attribute has its number.
fn state(function: &LinkVfInfo) -> Option<(u16, VfState)> {
    let mut state = VfState::default();
    let mut number = None;
    for info in &function.0 {
        match info {
            VfInfo::Mac(mac) => {
                number = Some(mac.vf_id);
                let [a, b, c, d, e, f, ..] = mac.mac;
                state.mac = Some(Mac([a, b, c, d, e, f]));
            }
            VfInfo::Vlan(vlan) => {
                state.vlan = u16::try_from(vlan.vlan_id).ok();
                state.qos = u8::try_from(vlan.qos).ok();
            }
            VfInfo::SpoofCheck(check) => state.spoof_check = Some(check.enabled),
            VfInfo::Trust(trust) => state.trust = Some(trust.enabled),
            VfInfo::Rate(rate) => {
                state.min_rate = Some(rate.min_tx_rate);
                state.max_rate = Some(rate.max_tx_rate);
            }
            VfInfo::LinkState(link) => {
                state.link_state = match link.state {
                    VfLinkState::Auto => Some(LinkState::Auto),
                    VfLinkState::Enable => Some(LinkState::Enable),
                    VfLinkState::Disable => Some(LinkState::Disable),
                    _ => None,
                };
            }
            _ => {}
        }
    }
    Some((u16::try_from(number?).ok()?, state))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_reads_back() {
        let mac = Mac([2, 0, 0, 0, 1, 2]);
        let settings = [
            VfSetting::Mac(mac),
            VfSetting::Vlan { vlan: 100, qos: 3 },
            VfSetting::SpoofCheck(false),
            VfSetting::Trust(true),
            VfSetting::Rate { min: 1, max: 2 },
            VfSetting::LinkState(LinkState::Disable),
        ];
        let info = LinkVfInfo(settings.map(|setting| attribute(5, setting)).to_vec());
        let (number, state) = state(&info).unwrap();
        assert_eq!(number, 5);
        let all: Vec<VfSetting> = state.settings(&state);
        assert_eq!(all, settings);
    }

    #[test]
    fn the_loopback_has_no_functions_and_a_foreign_host_is_left_alone() {
        let lo = Interface {
            name: "lo".to_owned(),
            index: 1,
        };
        let here = HostPaths::default();
        match Netlink::new(&here).read(&lo) {
            Ok(found) => assert!(found.is_empty(), "{found:?}"),
            // Where the tests may open no socket, the error says which interface.
            Err(error) => assert!(error.to_string().contains("of lo"), "{error}"),
        }
        let files = HostPaths::under("/nonexistent".as_ref());
        let error = Netlink::new(&files).read(&lo).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/sys"), "{error}");
        let write = LinkWrite {
            interface: lo,
            vf: 0,
            setting: VfSetting::Trust(true),
        };
        assert!(Netlink::new(&files).set(&write).is_err());
        assert_eq!(write.to_string(), "ip link set lo vf 0 trust on");
    }
}
